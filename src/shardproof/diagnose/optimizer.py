"""Right gradients, wrong weights: what the optimizer did with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.compare.measure import MULTIPLE, largest, wide
from shardproof.compare.shares import Share, shares
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import simple

FIX = "build the optimizer after the model is laid out, over the parameters that it returns"


@dataclass(frozen=True, kw_only=True)
class _Moves:
    """How far each rank's part of a weight went in the step, and should have gone."""

    got: dict[int, Tensor]
    want: dict[int, Tensor]
    floor: float

    def stood(self, rank: int) -> bool:
        return not bool(self.got[rank].any())

    def right(self, rank: int) -> bool:
        return largest((self.got[rank] - self.want[rank]).abs()) <= 2 * MULTIPLE * self.floor


def skipped(case: Case) -> Diagnosis | None:
    """Some ranks took the step and others did not."""
    moves = [m for c in _weights(case) if (m := _moves(c, case)) is not None]
    if not moves:
        return None
    ranks = sorted({rank for m in moves for rank in m.got})
    stood = [r for r in ranks if all(m.stood(r) for m in moves if r in m.got)]
    went = [r for r in ranks if r not in stood]
    infinite = [r for r in ranks if _has_infinite(r, case)]
    if not stood and infinite and all(not bool(m.want[r].any()) for m in moves for r in m.want):
        case.fits("the ranks took a step that the reference skipped", 0.0)
        return Diagnosis(
            cause="overflow-not-shared",
            evidence=f"gradients of rank {', '.join(map(str, infinite))} are not finite, the reference skipped the "
            "step, and every rank took it: nobody, or not everybody, was told",
            fix="look for inf and NaN in every gradient, share found_inf (MAX) over all ranks, and then skip the step",
        )
    due = {rank for m in moves for rank, want in m.want.items() if bool(want.any())}
    # Either those that stood still should have moved, or those that moved should not have.
    apart = bool(stood and went) and (due.issuperset(stood) or not due.intersection(went))
    if not apart or not case.fits("some ranks skipped the step", 0.0):
        return None
    said = f"; gradients of rank {', '.join(map(str, infinite))} are not finite" if infinite else ""
    return Diagnosis(
        cause="overflow-not-shared",
        evidence=f"in this step no weight of rank {', '.join(map(str, stood))} moved, while those of rank "
        f"{', '.join(map(str, went))} did{said}",
        fix="share the decision to skip: all_reduce found_inf (MAX) over every rank that holds a part of the model "
        "before the optimizer steps",
        ranks=tuple(stood),
    )


def skipped_infinite(case: Case) -> Diagnosis | None:
    """The same where the gradients that made them skip are what differs first."""
    ranks = range(case.facts.parallelism.world_size)
    return skipped(case) if any(_has_infinite(rank, case) for rank in ranks) else None


def _has_infinite(rank: int, case: Case) -> bool:
    trace, step = case.observed.ranks[rank], case.first.step
    return any(
        not bool(trace.tensor(number).isfinite().all())
        for key, numbers in trace.by_key.items()
        if key[0] == step and key[1] in ("gradient", "grad-norm")
        for number in numbers
        if not trace.records[number].missing
    )


def updated(case: Case) -> Diagnosis | None:
    """The weights moved otherwise than the right gradients say."""
    moves = _moves(case.first, case) if case.first.stage == "update" else None
    said, factor = "its state differs, and the gradients are right", None
    if moves is not None:
        said, factor = _said(moves)
    elif case.first.stage == "update":
        said = "the weights differ, and gradients and optimizer state are right"
    wrong = len(case.wrong)
    return Diagnosis(
        cause="optimizer",
        factor=factor if factor is not None else case.first.ratio,
        evidence=f"{case.first.name}: {said}; {wrong} of {len(case.stage)} tensors of this stage and step differ",
        fix=FIX
        if moves is None or factor == 0
        else "give the optimizer and its scheduler the same param groups, "
        "learning rates and number of steps under every layout",
    )


def _said(moves: _Moves) -> tuple[str, float | None]:
    got, want = torch.cat(list(moves.got.values())), torch.cat(list(moves.want.values()))
    if not bool(got.any()):
        return "it did not move at all: the optimizer does not hold this parameter, or not its gradient", 0.0
    if not bool(want.any()):
        return "it moved, and should not have: it is in no param group of the reference, or frozen there", None
    square = float(want @ want)
    ratio = float(got @ want) / square
    if largest((got - ratio * want).abs()) <= 2 * MULTIPLE * moves.floor * max(1.0, abs(ratio)) and got.numel() > 1:
        ratio = simple(ratio, 1e-6)
        return f"it moved {ratio:.6g} times as far as it should have: another learning rate, or number of steps", ratio
    return "it moved, and elsewhere than it should have: weight decay, momentum or state differ", None


def _weights(case: Case) -> list[Comparison]:
    return [c for c in case.comparisons if c.step == case.first.step and c.stage == "update"]


def _moves(comparison: Comparison, case: Case) -> _Moves | None:
    step = comparison.step
    before = (-1, "initial-state", comparison.name, "") if step == 0 else (step - 1, "update", comparison.name, "")
    old, new = (shares(key, case.observed, case.reference) for key in (before, comparison.key))
    was, now = case.reference.tensors(before), case.reference.tensors(comparison.key)
    if not old or len(old) != len(new) or not was or not now:
        return None
    pairs: list[tuple[Share, Share]] = [(o, n) for o, n in zip(old, new, strict=True) if n.got.numel()]
    return _Moves(
        got={n.rank: n.got - o.got for o, n in pairs},
        want={n.rank: n.take(wide(now[0])) - n.take(wide(was[0])) for _, n in pairs},
        floor=max(comparison.floor, case.reference.floor(before)),
    )
