"""What each part of a batch contributes to the gradients, from recordings alone: there is no model to ask.

The gradient of a bias is the sum of its module's output gradients over all tokens, and that of a matrix the product of
these with the module's input. Which recorded output was its input nobody wrote down: it is the one whose product is the
gradient that was recorded, so that a wrong guess contributes nothing. Embeddings and norms are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.compare.activations import parts_of
from shardproof.compare.measure import largest, scale, wide
from shardproof.compare.view import Observed, Reference
from shardproof.parallel.names import ROOT
from shardproof.train.contributions import Contribution

SLACK = 256.0
"""Units in the last place by which the sum over all parts may miss the recorded gradient."""

MATRICES = 4
"""Matrices whose input is looked for; their gradients are large, and a few of them say what there is to say."""

Place = tuple[int, int, int]
"""As `Observed.part`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    reader: int
    microbatch: int
    place: Place


def contributions(observed: Observed, reference: Reference, step: int) -> list[Contribution]:
    """One per part of the batch that `observed` read in this step; empty where that was not counted."""
    parts = [
        _Part(reader=data_rank * observed.parallelism.tp, microbatch=m, place=observed.part(step, data_rank, m))
        for data_rank, row in enumerate(observed.samples.get(step, ()))
        for m, count in enumerate(row)
        if count
    ]
    if len(parts) < 2:
        return []
    counts = _counts(parts, reference, step)
    found: list[dict[str, Tensor]] = [{} for _ in parts]
    matrices = 0
    for at, stage, name, part in reference.trace.by_key:
        wholes = reference.tensors((at, stage, name, part)) if (at, stage, part) == (step, "gradient", "") else []
        if not wholes or wholes[0].dim() not in (1, 2) or (wholes[0].dim() == 2 and matrices == MATRICES):
            continue
        made = _contributed(parts, wholes[0], name, reference, step)
        matrices += made is not None and wholes[0].dim() == 2
        for own, gradient, count in zip(found, made or (), counts, strict=False):
            own[name] = gradient * (sum(counts) / count)
    return [
        Contribution(reader=part.reader, microbatch=part.microbatch, count=count, loss=0.0, gradients=own)
        for part, count, own in zip(parts, counts, found, strict=True)
    ]


def _counts(parts: Sequence[_Part], reference: Reference, step: int) -> list[float]:
    """What the loss counts in each part: tokens whose output gradient is not zero, of the last module that shows one;
    else samples."""
    modules = [name for at, stage, name, part in reference.trace.by_key if (at, stage, part) == (step, "backward", "")]
    for name in (ROOT, *modules):
        for sent in reference.tensors((step, "backward", name, "")):
            rows = [_part(sent, part.place) for part in parts]
            if sent.dim() < 2 or any(row is None for row in rows):
                continue
            counts = [float((row != 0).any(-1).sum()) for row in rows if row is not None]
            if all(counts):
                return counts
    return [float(part.place[1]) for part in parts]


def _contributed(
    parts: Sequence[_Part], want: Tensor, name: str, reference: Reference, step: int
) -> list[Tensor] | None:
    """The addends of one gradient, by part; None where nothing that was recorded adds up to it."""
    sent = reference.tensors((step, "backward", name.rpartition(".")[0] or ROOT, ""))
    if not sent or not scale(want) > 0 or any(one.shape[-1:] != want.shape[:1] for one in sent):
        return None
    for given in [None] if want.dim() == 1 else _inputs(sent, want, name, reference, step):
        made = [_of_part(part.place, sent, given) for part in parts]
        if any(one is None for one in made):
            continue
        addends = [one for one in made if one is not None]
        total = torch.stack(addends).sum(0)
        square = float((total * total).sum())
        # Ranks that average afterwards record output gradients that are a multiple of what they become.
        factor = float((total * wide(want)).sum()) / square if square > 0 else 0.0
        limit = SLACK * torch.finfo(want.dtype).eps * scale(want)
        if factor and largest((factor * total - wide(want)).abs()) <= limit:
            return [factor * one for one in addends]
    return None


def _inputs(
    sent: Sequence[Tensor], want: Tensor, name: str, reference: Reference, step: int
) -> Iterator[Sequence[Tensor]]:
    """Recorded outputs, call by call, that may have been the module's input by their shape: the nearest before it."""
    module = name.rpartition(".")[0]
    order = [n for at, stage, n, part in reference.trace.by_key if (at, stage, part) == (step, "forward", "")]
    before = order[: order.index(module)] if module in order else order
    for other in reversed(before):
        wholes = reference.tensors((step, "forward", other, ""))
        shapes = [(*one.shape[:-1], want.shape[1]) for one in sent]
        if [tuple(whole.shape) for whole in wholes] == shapes:
            yield wholes


def _of_part(place: Place, sent: Sequence[Tensor], given: Sequence[Tensor] | None) -> Tensor | None:
    """Output gradients (times inputs) of some samples, added up over tokens and calls."""
    total: Tensor | None = None
    for call, one in enumerate(sent):
        own = _part(one, place)
        if own is None:
            return None
        rows = wide(own).reshape(-1, own.shape[-1])
        if given is None:
            made = rows.sum(0)
        else:
            taken = _part(given[call], place)
            if taken is None:
                return None
            made = rows.T @ wide(taken).reshape(-1, taken.shape[-1])
        total = made if total is None else total + made
    return total


def _part(whole: Tensor, place: Place) -> Tensor | None:
    """These samples of a whole batch; None where no dim holds samples."""
    found = next(parts_of(whole, place))
    return None if found.shape == whole.shape and place[1] < place[2] else found
