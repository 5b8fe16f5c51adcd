"""Right values in wrong places: swapped shards, permuted rows, fused blocks cut as if they were one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardproof.compare.activations import aligned, best_fit
from shardproof.compare.layouts import slices
from shardproof.compare.measure import largest, wide
from shardproof.compare.shares import Share
from shardproof.compare.verdict import Verdict
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axis_name
from shardproof.diagnose.origin import around, fed
from shardproof.spec.parallelism import AXES

BLOCKS = (3, 2, 1, 4, 6)
"""Numbers of fused blocks that are tried: query, key and value; gate and up."""


def of_parameter(case: Case) -> Diagnosis | None:
    """A weight whose pieces are all in the reference's, but elsewhere."""
    held = case.shares(case.first)
    want = case.reference.tensors(case.first.key)
    if not held or not want or want[0].numel() < 2:
        return _torn(case)
    whole = wide(want[0])
    # Initial values owe the same bits; later ones carry the rounding of the steps before.
    floor = 0.0 if case.first.stage == "initial-state" else case.first.floor
    wrong = [share for share in held if largest((share.got - share.take(whole)).abs()) > 6 * floor]
    swapped = _swapped(wrong, held, whole, floor)
    if swapped and case.fits("each wrong piece is another rank's", 0.0):
        said = "; ".join(f"rank {rank} holds the piece of rank {other}" for rank, other in list(swapped.items())[:4])
        return _permuted(case, f"{said}: right values on the wrong ranks", axis=_axis(swapped, case))
    order = _rows(wrong, whole, floor)
    if order is not None and case.fits("the slices are right, in another order", 0.0):
        dim, index = order
        moved = [i for i, at in enumerate(index) if at != i][:6]
        said = ", ".join(f"{i} holds {index[i]}" for i in moved)
        return _permuted(
            case, f"its slices along dim {dim} are the reference's in another order: {said} ...", axis=None
        )
    if _same_values(wrong, held, whole) and case.fits("the values are right, in other places", 0.0):
        return _permuted(case, "it holds the reference's values, each once, in other places", axis=None)
    return None


def _torn(case: Case) -> Diagnosis | None:
    """Plain pieces that tile no whole: a slice that two ranks hold, and one that nobody does."""
    observed, want = case.observed, case.reference.tensors(case.first.key)
    if not want or case.facts.parallelism.tp == 1:
        return None
    tensors = {rank: tensor for rank, _, tensor in observed.held(case.first.key) if tensor is not None}
    peers = [rank for rank in observed.tp_peers(0) if rank in tensors]
    found: dict[int, tuple[int, ...]] = {}
    for rank in peers:
        at = _found_at(wide(tensors[rank]), wide(want[0]))
        if at is None:
            return None
        found[rank] = at
    twice = [rank for rank in peers if list(found.values()).count(found[rank]) > 1]
    if not twice or not case.fits("two ranks hold the same slice", 0.0):
        return None
    return _permuted(
        case,
        f"ranks {', '.join(map(str, twice))} hold the same slice of the reference's, and nobody holds another",
        axis="tp",
    )


def _found_at(piece: Tensor, whole: Tensor) -> tuple[int, ...] | None:
    """(dim, start) of a contiguous slice of `whole` that `piece` is, bit for bit."""
    for dim in range(whole.dim()):
        size = piece.shape[dim] if piece.dim() == whole.dim() else 0
        if not size or piece.numel() * whole.shape[dim] != whole.numel() * size:
            continue
        for start in range(whole.shape[dim] - size + 1):
            if torch.equal(whole.narrow(dim, start, size), piece):
                return (dim, start)
    return None


def _swapped(wrong: Sequence[Share], held: Sequence[Share], whole: Tensor, floor: float) -> dict[int, int]:
    """Rank -> the rank whose right piece it holds, for all wrong ranks; empty where one holds nobody's."""
    found: dict[int, int] = {}
    for share in wrong:
        for other in held:
            theirs = other.take(whole)
            alike = other.place != share.place and theirs.shape == share.got.shape
            if alike and largest((theirs - share.got).abs()) <= 6 * floor:
                found[share.rank] = other.rank
                break
        else:
            return {}
    return found


def _rows(wrong: Sequence[Share], whole: Tensor, floor: float) -> tuple[int, list[int]] | None:
    """(dim, which slice of the whole stands where) for a rank that holds all of a tensor, its slices permuted."""
    for share in wrong:
        if share.got.numel() != whole.numel():
            continue
        got = share.got.reshape(whole.shape)
        for dim in range(whole.dim()):
            order = slices([got], whole, dim, floor)
            if order is not None and bool((order[0] != torch.arange(len(order[0]))).any()):
                return dim, [int(i) for i in order[0]]
    return None


def _same_values(wrong: Sequence[Share], held: Sequence[Share], whole: Tensor) -> bool:
    """Whether all ranks together hold each of the reference's values as often as it does."""
    places: dict[object, Share] = {}
    for share in held:
        known = places.setdefault(share.place, share)
        if not torch.equal(known.got, share.got):
            return False
    got = torch.cat([share.got for share in places.values()])
    if got.numel() != whole.numel() or not wrong or bool((got == got[0]).all()):
        return False
    return torch.equal(got.sort().values, whole.reshape(-1).sort().values)


def _axis(swapped: dict[int, int], case: Case) -> str | None:
    parallelism = case.facts.parallelism
    axes = {
        axis
        for rank, other in swapped.items()
        for axis in AXES
        if parallelism.coordinates(rank)[axis] != parallelism.coordinates(other)[axis]
    }
    return axis_name(axes, parallelism) or None


def _permuted(case: Case, evidence: str, *, axis: str | None) -> Diagnosis:
    return Diagnosis(
        cause="layout-permuted",
        axis=axis,
        evidence=evidence,
        fix="cut and load this tensor in the order in which the layout puts it together: axis by axis, fused blocks "
        "one by one",
    )


def of_output(case: Case) -> Diagnosis | None:
    """An output whose slices are the reference's in another order (never along the samples)."""
    shown = aligned(case.first.key, case.observed, case.reference)
    floor = case.first.floor
    for one in shown:
        if one.dim is not None or largest((one.got - one.want).abs()) <= 6 * floor:
            continue
        for dim in range(1, one.part.dim()):
            order = slices([one.got], one.part, dim, floor)
            if order is not None and case.fits(f"the output's slices along dim {dim} are permuted", 0.0):
                moved = [f"{i} holds {int(at)}" for i, at in enumerate(order[0]) if int(at) != i][:6]
                said = f"its slices along dim {dim} are the reference's in another order: {', '.join(moved)} ..."
                return _permuted(case, said, axis="tp" if case.facts.parallelism.tp > 1 else None)
    return None


def fused(case: Case) -> Diagnosis | None:
    """A weight whose rows each rank takes for others than they are: one device, its rows so permuted, does the same.

    A fused weight that is cut as if it were one matrix, or one whose rows were permuted on their way to the ranks.
    """
    probe, tp = case.probe, case.facts.parallelism.tp
    if probe is None or tp == 1:
        return None
    for parent in around(case.first.name):
        shown = fed(parent, case)
        own = probe.parameters(parent)
        orders = {name: order for name in own if name.endswith("weight") and (order := _rows_held(name, case))}
        for name, order in orders.items() if shown else ():
            for blocks, value in _regrouped(own, name, order):
                answers = [(cell, probe.ask(parent, given, parameters=value)) for cell, given, _ in shown]
                if all(
                    answer is not None
                    and (fit := best_fit(cell, answer.output, 4 * case.first.floor, (0, 1, 1))) is not None
                    and fit.outcome.verdict is not Verdict.DIFFERENT
                    for cell, answer in answers
                ) and case.fits(f"the rows of {name} taken for others, as {blocks} fused blocks", 0.0):
                    said = f"{blocks} fused blocks" if blocks > 1 else "one matrix"
                    return Diagnosis(
                        cause="layout-permuted",
                        axis="tp",
                        evidence=f"with the rows of {name} permuted as its {tp} slices are taken to be (slices of "
                        f"{said}), one device gives what this run gives in {parent}",
                        fix=f"cut {name} over tp block by block, heads and fused blocks whole, and give every rank its "
                        "slice of each",
                    )
    return None


def _rows_held(name: str, case: Case) -> list[Tensor]:
    """The rows of a weight that each tp rank holds, in its order; empty where it is not cut by rows."""
    key, parallelism = (-1, "initial-state", name, ""), case.facts.parallelism
    held, want = case.shares(key), case.reference.tensors(key)
    if not want or want[0].dim() < 2:
        return []
    rows = torch.arange(want[0].shape[0], dtype=torch.float64)
    numbers = rows.reshape(-1, *[1] * (want[0].dim() - 1)).expand(want[0].shape)
    width = want[0].numel() // max(len(rows), 1)
    found: dict[int, list[Tensor]] = {}
    for share in held:
        at = parallelism.coordinates(share.rank)
        if at["dp_replicate"] == 0 and (at["dp_shard"] == 0 or share.place != held[at["tp"]].place):
            # Below tp, FSDP cuts a tp rank's rows once more.
            found.setdefault(at["tp"], []).append(share.take(numbers))
    taken = [torch.cat(found[tp]) for tp in sorted(found)]
    if len(taken) != parallelism.tp or sum(len(t) for t in taken) != want[0].numel():
        return []
    lines = [t.reshape(-1, width) for t in taken if t.numel() % width == 0]
    whole = len(lines) == len(taken) and all(bool((line == line[:, :1]).all()) for line in lines)
    return [line[:, 0].to(torch.int64) for line in lines] if whole else []


def _regrouped(own: dict[str, Tensor], name: str, order: Sequence[Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(fused blocks, parameters) with the rows of a weight, and of its bias, where the ranks take them to be."""
    each = {len(rows) for rows in order}
    for blocks in BLOCKS:
        if len(each) != 1 or next(iter(each)) % blocks:
            continue
        # Rank r takes its rows for its parts of block 0, 1, ...
        index = torch.stack(list(order)).reshape(len(order), blocks, -1).transpose(0, 1).reshape(-1)
        if bool((index == torch.arange(len(index))).all()):
            continue
        changed = {name: own[name][index]}
        bias = f"{name.removesuffix('weight')}bias"
        if bias in own and own[bias].shape[0] == len(index):
            changed[bias] = own[bias][index]
        yield blocks, changed
