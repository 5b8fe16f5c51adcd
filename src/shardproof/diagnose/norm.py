"""Right gradients before clipping, wrong ones after it: how was the norm counted?"""

from __future__ import annotations

import math
from itertools import product

from shardproof.compare.measure import largest, wide
from shardproof.compare.verdict import Verdict
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axis_name
from shardproof.parallel.names import ROOT
from shardproof.spec.parallelism import AXES

FIX = (
    "take the norm over all shards once: sum squares over the axes along which a gradient is cut, count what "
    "is replicated once, and clip every rank by that one norm"
)

SAME_NORM = 1e-3
"""By how much norms may differ to which ranks have clipped: what they add before they divide leaves as much."""


def clipped(case: Case) -> Diagnosis | None:
    """The norm, or the coefficient made from it."""
    per_rank = _coefficients(case)
    said = []
    if not per_rank:
        said.append("what became of them is no multiple of the right ones")
    elif len(set(per_rank.values())) > 1:
        listed = ", ".join(f"{value:.6g} on rank {rank}" for rank, value in sorted(per_rank.items())[:4])
        said.append(
            f"ranks clipped by different coefficients ({listed} times the right one): each by a norm of its own"
        )
    else:
        said.append(f"all ranks clipped by {next(iter(per_rank.values())):.6g} times the right coefficient")
    seen = any(
        (c.step, c.stage) == (case.first.step, "gradient") and c.verdict in (Verdict.EQUAL, Verdict.ROUNDING)
        for c in case.comparisons
    )
    if not seen and not per_rank:
        # What was clipped may have been wrong before, and nobody saw it.
        return None
    before = "gradients before clipping are right" if seen else "gradients before clipping were not seen in this step"
    rule = _counted(case, per_rank)
    if rule:
        said.append(rule)
    return Diagnosis(
        cause="grad-norm",
        axis=_axis(per_rank, case),
        factor=case.first.ratio,
        evidence="; ".join([before, *said]),
        fix=FIX,
    )


def _axis(per_rank: dict[int, float], case: Case) -> str | None:
    """The axes along which ranks clipped by different coefficients."""
    parallelism = case.facts.parallelism
    at = {rank: parallelism.coordinates(rank) for rank in per_rank}
    axes = {
        axis
        for axis in AXES
        for one in at
        for two in at
        if per_rank[one] != per_rank[two] and all((at[one][a] != at[two][a]) == (a == axis) for a in AXES)
    }
    return axis_name(axes, parallelism) or None


def clipped_by_hand(case: Case) -> Diagnosis | None:
    """Every rank's gradients are one multiple of the right ones, and ranks differ in it: a loop that clips by itself
    shows its gradients clipped already."""
    per_rank = _coefficients(case, "gradient", "")
    factors = sorted(set(per_rank.values()))
    norms = _norms(case) if len(factors) > 1 else {}
    # Each has clipped its own gradients to the one norm that is allowed.
    alike = bool(norms) and max(norms.values()) <= (1 + SAME_NORM) * min(norms.values())
    if not alike or not case.fits("a factor of its own on all gradients of each rank, to one norm", 0.0):
        return None
    listed = ", ".join(f"{value:.6g} on rank {rank}" for rank, value in sorted(per_rank.items())[:4])
    return Diagnosis(
        cause="grad-norm",
        axis=_axis(per_rank, case),
        evidence=f"all gradients of a rank are one multiple of the right ones, and ranks differ in it ({listed}): "
        "each clipped by a norm of its own",
        fix=FIX,
    )


def _norms(case: Case) -> dict[int, float]:
    """Rank -> the norm of all gradients that it holds."""
    squares: dict[int, float] = {}
    for comparison in case.stage:
        for share in case.shares(comparison):
            squares[share.rank] = squares.get(share.rank, 0.0) + float(share.got.square().sum())
    return {rank: math.sqrt(square) for rank, square in squares.items()}


def _coefficients(case: Case, stage: str = "grad-norm", part: str = "clipped") -> dict[int, float]:
    """Rank -> how much more it was clipped than the reference; empty where no one number says it for all gradients."""
    found: dict[int, list[tuple[float, float]]] = {}
    for comparison in case.comparisons:
        if (comparison.step, comparison.stage, comparison.part) != (case.first.step, stage, part):
            continue
        want = case.reference.tensors(comparison.key)
        for share in case.shares(comparison) if want else ():
            right = share.take(wide(want[0]))
            square = float(right @ right)
            far = 1e3 * comparison.floor
            if not square > far**2:
                continue
            ratio = float(share.got @ right) / square
            if not largest((share.got - ratio * right).abs()) <= far * max(1.0, abs(ratio)):
                return {}
            found.setdefault(share.rank, []).append((ratio, far / square**0.5))
    if any(abs(one - own[0][0]) > 1e-9 + slack for own in found.values() for one, slack in own):
        return {}
    # Rounded, so that equal ones are equal.
    return {rank: float(f"{own[0][0]:.9g}") for rank, own in found.items()}


def _counted(case: Case, per_rank: dict[int, float]) -> str:
    """How often each kind of gradient was counted, where that explains the norm."""
    step = case.first.step
    right = case.reference.tensors((step, "grad-norm", ROOT, "norm"))
    ratio = case.first.ratio if case.first.part == "norm" else None
    if ratio is None and len(set(per_rank.values())) == 1:
        ratio = 1 / next(iter(per_rank.values()))
    if not right or ratio is None or not math.isfinite(ratio):
        return ""
    whole = float(right[0]) ** 2
    seen = whole * ratio**2
    kinds: dict[tuple[str, ...], float] = {}
    for c in case.comparisons:
        if (c.step, c.stage) != (step, "gradient") or c.verdict is Verdict.NOT_CHECKED:
            continue
        axes = tuple(axis for axis in AXES if f"{axis}: " in c.layout)
        square = float(wide(case.reference.tensors(c.key)[0]).square().sum())
        kinds[axes] = kinds.get(axes, 0.0) + square
    parallelism = case.facts.parallelism
    times = sorted(
        {1.0, *(float(getattr(parallelism, a)) for a in AXES), *(1 / getattr(parallelism, a) for a in AXES), 0.0}
    )
    names = list(kinds)
    for counts in product(times, repeat=len(names)) if len(names) <= 3 else ():
        total = sum(count * kinds[name] for count, name in zip(counts, names, strict=True))
        if any(count != 1 for count in counts) and math.isclose(total, seen, rel_tol=1e-4):
            odd = [
                f"what is {f'cut over {axis_name(name, parallelism)}' if name else 'whole'} counted {count:.3g} times"
                for count, name in zip(counts, names, strict=True)
                if count != 1
            ]
            return f"the norm is that of {' and '.join(odd)}"
    return f"the norm is {ratio:.6g} times the right one"
