"""The first wrong output: partial sums that nobody summed, a bias added too often, a mean where the sum was due."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardproof.compare.activations import PARTIAL, PARTIAL_AND_BIAS, Aligned, aligned
from shardproof.compare.measure import largest, wide
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axes_of, simple
from shardproof.diagnose.origin import fed, follows
from shardproof.parallel.names import ROOT

SUM_IT = "sum the output over tp before it is used (all_reduce, or output_layouts=Replicate())"


def not_reduced(case: Case) -> Diagnosis | None:
    """The outputs of tp peers only add up to the right one, and somebody used them as they were."""
    first = case.first
    biased = first.stage == "forward" and first.layout == PARTIAL_AND_BIAS
    if biased:
        shown = shown_of(case)
        if all(torch.equal(a.got, b.got) for a in shown for b in shown if a.cell is b.cell):
            biased = False  # Peers that hold the same hold no parts: something else made them so.
        for later in case.wrong if biased else ():
            summed = None if later.layout == PARTIAL_AND_BIAS else bias(replace(case, first=later))
            if summed is not None:
                return replace(summed, where=first.name)
    partial = first if biased else _unsummed(case.comparisons, first)
    if not case.fits("the sum over tp of the outputs is right", math.inf if partial is None else 0.0):
        return None
    if partial is None:
        return None
    if partial is first:
        said = (
            f"the outputs of {first.name} on the ranks of a tp group add up to the reference's, but for one vector "
            "(a bias) that each of them has added, and nobody summed them"
        )
    else:
        said = (
            f"the outputs of {partial.name} on the ranks of a tp group only add up to the reference's, and the next "
            f"tensor ({first.stage} {first.name}) was made from one part"
        )
    return Diagnosis(
        cause="forward-not-reduced",
        axis="tp",
        stage="forward",
        where=partial.name,
        evidence=said,
        fix=SUM_IT,
    )


def _unsummed(comparisons: Sequence[Comparison], first: Comparison) -> Comparison | None:
    """The output that nobody summed, where the first wrong tensor was made from partial sums over tp.

    The module around a partial output may well sum it, so that only a later module or the loss gives it away.
    """
    if first.stage not in ("forward", "loss"):
        return None
    before = [c for c in comparisons if c.step == first.step and c.stage == "forward"]
    if first in before:
        before = before[: before.index(first)]
    partial = None
    for candidate in reversed(before):
        if candidate.layout != PARTIAL:
            break
        partial = candidate
    inside = partial is not None and (first.name == ROOT or partial.name.startswith(f"{first.name}."))
    return None if inside and first.stage == "forward" else partial


def bias(case: Case) -> Diagnosis | None:
    """The output is off by a multiple of one vector that the module adds, the same for every token."""
    shown = shown_of(case)
    for name, vector in vectors(case, shown):
        added = _multiple([(a.got - a.want, a.take(spread(vector, a))) for a in shown], case)
        if added is None:
            continue
        return _counted(
            case,
            added,
            name,
            evidence=f"the output of {case.first.name} is off by {added:.6g} x {name}, the same for every token: it",
            fix="add the bias once, after the outputs are summed over tp (or on one rank of the group alone)",
        )
    return None


def branch(case: Case) -> Diagnosis | None:
    """The output is off by a multiple of what one module inside it gives: a whole added on every rank."""
    shown = shown_of(case)
    prefix = "" if case.first.name == ROOT else f"{case.first.name}."
    inside = [
        key
        for key in case.reference.trace.by_key
        if key[:2] == (case.first.step, "forward") and key[2].startswith(prefix) and key[2] != case.first.name
    ]
    for key in inside if shown else ():
        wholes = case.reference.tensors(key)
        pairs = []
        for one in shown:
            part = one.same_part(wholes[one.cell.call]) if one.cell.call < len(wholes) else None
            if part is None:
                break
            pairs.append((one.got - one.want, one.take(part)))
        added = _multiple(pairs, case) if len(pairs) == len(shown) else None
        if added is None:
            continue
        return _counted(
            case,
            added,
            f"what {key[2]} gives",
            evidence=f"the output of {case.first.name} is off by {added:.6g} times what {key[2]} gives: that is whole "
            "on every rank, and",
            fix="add what is whole on every rank after partial outputs are summed over tp, or divide it by tp before",
        )
    return None


def _counted(case: Case, added: float, what: str, *, evidence: str, fix: str) -> Diagnosis:
    """The diagnosis where `added` times too much of something whole is in the output."""
    times, tp = simple(added + 1, 1e-6), case.facts.parallelism.tp
    case.fits(f"{what} added {times:.6g} times", 0.0)
    return Diagnosis(
        cause="bias-counted-k-times",
        axis="tp" if tp > 1 and times in (0.0, tp, 1 / tp) else None,
        factor=times,
        evidence=f"{evidence} was added {times:.6g} times instead of once",
        fix=fix,
    )


def wrong_group(case: Case) -> Diagnosis | None:
    """The output is the sum of partial outputs, but of other ranks' than those of the tp group."""
    parallelism = case.facts.parallelism
    shown = shown_of(case)
    given = {(cell.data_rank, cell.microbatch, call): value for cell, value, call in fed(case.first.name, case)}
    if parallelism.tp == 1 or not shown or not given or any(one.dim is not None for one in shown):
        return None
    held: dict[int, set[int]] = {}
    for one in shown:
        if one.rank in held or largest((one.got - one.want).abs()) <= 6 * case.first.floor:
            continue
        at = (one.cell.microbatch, one.cell.call)
        found = _partials(case, {d: value for (d, *place), value in given.items() if tuple(place) == at})
        ranks = None if found is None else _summed_ranks(one, *found, case)
        if ranks is None:
            return None
        held[one.rank] = ranks
    right = {r: set(case.observed.tp_peers(parallelism.coordinates(r)["dp"])) for r in held}
    wrong = {r: ranks for r, ranks in held.items() if ranks != right[r]}
    if not wrong or not case.fits("the sum of other ranks' partial outputs", 0.0):
        return None
    said = "; ".join(f"rank {r} holds the sum of those of {_listed(ranks)}" for r, ranks in list(wrong.items())[:4])
    return Diagnosis(
        cause="wrong-group",
        axis="tp",
        evidence=f"the partial outputs of {case.first.name} were summed over other ranks than a tp group: {said}",
        fix="reduce over the process group of the tp axis, mesh['tp'].get_group()",
    )


def _summed_ranks(one: Aligned, bias: Tensor, partials: dict[int, Tensor], case: Case) -> set[int] | None:
    """The ranks whose partial outputs add up to what a rank holds; None where no such sum does."""
    basis = torch.stack([partial.reshape(-1) for partial in partials.values()], 1)
    values = (one.got - bias).reshape(-1)
    if len(values) < 2 * basis.shape[1] or not bool(basis.isfinite().all() and values.isfinite().all()):
        return None
    solved = torch.linalg.lstsq(basis, values.unsqueeze(1), driver="gelsd").solution[:, 0]
    size = max(1.0, float(solved.abs().sum()))
    if not largest((values - basis @ solved).abs()) <= 24 * case.first.floor * size:
        return None
    if bool(((solved - solved.round()).abs() > 1e-6).any()):
        return None
    return {rank for rank, c in zip(partials, solved, strict=True) if abs(float(c)) > 0.5}


def _listed(ranks: set[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}" if ranks else "nobody"


def _partials(case: Case, given: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]] | None:
    """The module's bias, and what it makes of each rank's slice of the input features alone, on one device."""
    probe, tp = case.probe, case.facts.parallelism.tp
    if probe is None or len({value.shape for value in given.values()}) != 1:
        return None
    zero = probe.ask(case.first.name, torch.zeros_like(next(iter(given.values()))))
    if zero is None:
        return None
    found = {}
    for data_rank, value in sorted(given.items()):
        features = value.shape[-1]
        if features % tp:
            return None
        for number in range(tp):
            alone = torch.zeros_like(value)
            start = number * features // tp
            alone[..., start : start + features // tp] = value[..., start : start + features // tp]
            answer = probe.ask(case.first.name, alone)
            if answer is None:
                return None
            found[data_rank * tp + number] = wide(answer.output) - wide(zero.output)
    return wide(zero.output), found


def normalises(case: Case) -> Diagnosis | None:
    """A module that takes means over the samples it sees, of which each rank has a part."""
    if case.probe is None or case.facts.parallelism.dp * case.facts.microbatches == 1:
        return None
    if not case.probe.normalises_batches(case.first.name) or follows(case.first, case) is not True:
        return None
    return Diagnosis(
        cause="unexplained",
        evidence=f"{case.first.name} normalises over the samples of a batch, and each rank and micro-batch has a part "
        "of it: one device gives the same for such a part",
        fix="nn.SyncBatchNorm takes means over all ranks; or normalise over something else than samples, as LayerNorm "
        "and GroupNorm do",
    )


def averaged(case: Case) -> Diagnosis | None:
    """The part of the output that does not stem from a bias is one multiple of the right one."""
    shown = shown_of(case)
    nothing: list[tuple[str, Tensor | None]] = [("", None), *vectors(case, shown)]
    for name, vector in nothing:
        pairs = []
        for a in shown:
            bias = 0.0 if vector is None else a.take(spread(vector, a))
            pairs.append((a.got - bias, a.want - bias))
        factor = _multiple(pairs, case)
        if factor is None or abs(factor - 1) < 1e-6:
            continue
        factor = simple(factor, 1e-6)
        case.fits(f"the output is {factor:.6g} times the right one{f', but for {name}' if name else ''}", 0.0)
        tp = case.facts.parallelism.tp
        mean = tp > 1 and math.isclose(factor, 1 / tp, rel_tol=1e-6)
        return Diagnosis(
            cause="forward-not-reduced" if mean else "unexplained",
            axis="tp" if mean else axes_of(factor, case.facts.parallelism, case.facts.microbatches),
            factor=factor,
            evidence=f"the output of {case.first.name} is {factor:.6g} times the reference's"
            + (f", but for {name}" if name else "")
            + (": partial sums were averaged over tp, not summed" if mean else ""),
            fix=SUM_IT if mean else "look for a reduction that is made twice, or divided by the wrong size",
        )
    return None


def shown_of(case: Case) -> list[Aligned]:
    """The first wrong output beside the reference's, rank by rank."""
    return aligned(case.first.key, case.observed, case.reference) if case.first.stage == "forward" else []


def vectors(case: Case, shown: Sequence[Aligned]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the module that are one vector over its output's features."""
    if not shown or shown[0].part.dim() < 1:
        return
    shape = shown[0].part.shape
    known = _recorded(case) if case.probe is None else case.probe.parameters(case.first.name)
    for name, value in known.items():
        if value.dim() != 1 or not bool((value != 0).any()):
            continue
        # Features are the last dim, and channels of a convolution the second.
        for dim in {len(shape) - 1, min(1, len(shape) - 1)}:
            if len(value) == shape[dim]:
                yield name, wide(value.cpu()).reshape([-1 if d == dim else 1 for d in range(len(shape))])


def _recorded(case: Case) -> dict[str, Tensor]:
    """The parameters of the module as the reference had them when the step began, where there is no copy to ask."""
    inside = "" if case.first.name == ROOT else f"{case.first.name}."
    found = {}
    for _, stage, name, part in case.reference.trace.by_key:
        if stage != "initial-state" or part or not name.startswith(inside) or "." in name.removeprefix(inside):
            continue
        before = (case.first.step - 1, "update", name, "")
        wholes = case.reference.tensors(before) or case.reference.tensors((case.first.step - 1, stage, name, ""))
        if wholes and wholes[0].is_floating_point():
            found[name] = wholes[0]
    return found


def spread(vector: Tensor, one: Aligned) -> Tensor:
    """A vector over the features for every token."""
    return vector.expand_as(one.part)


def _multiple(pairs: Sequence[tuple[Tensor, Tensor]], case: Case) -> float | None:
    """k, where left = k x right everywhere and k is not zero, simple where rounding leaves that open; else None."""
    if not pairs:
        return None
    left = torch.cat([one.reshape(-1) for one, _ in pairs])
    right = torch.cat([other.reshape(-1) for _, other in pairs])
    square = float(right @ right)
    if not square > 0 or right.numel() < 2 or not bool(left.isfinite().all()):
        return None
    factor = float(left @ right) / square
    floor = case.first.floor
    size = largest(right.abs())
    fits = largest((left - factor * right).abs()) <= 6 * floor * max(1.0, abs(factor))
    return simple(factor, 1e-6 + 6 * floor / size) if fits and abs(factor) * size > 6 * floor else None
