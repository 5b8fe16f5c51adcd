"""Causes of a divergence of which no values were kept: what sketches tell of how gradients were reduced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from shardproof.align.kept import kept
from shardproof.align.side import Side
from shardproof.compare.view import Key
from shardproof.compare.wholes import Shown, read
from shardproof.diagnose import scale
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axis_name
from shardproof.diagnose.sums import not_reduced_fix
from shardproof.spec.parallelism import AXES, Parallelism
from shardproof.trace.sketch import norm

Family = Callable[[Case], Diagnosis | None]


def families(want: Side, got: Side) -> Mapping[str, tuple[Family, ...]]:
    """Stage -> the families that are asked where only sketches or statistics were kept."""
    return {"gradient": (scale.everywhere, partial(sums, want, got), scale.subset)}


def sums(want: Side, got: Side, case: Case) -> Diagnosis | None:
    """Replicas along an axis whose sketches differ, and whose sum or mean is the right gradient."""
    parallelism = got.layout.parallelism
    trusted = next((way.sketch for way in read(kept(want, case.first.key)).wholes if way.sketch is not None), None)
    shown = [one for one in kept(got, case.first.key).shown if one.sketch is not None and one.record.piece is not None]
    if trusted is None or not shown:
        return None
    used = [axis for axis in AXES if getattr(parallelism, axis) > 1]
    for axes in (chosen for size in (1, 2, 3) for chosen in combinations(used, size)):
        groups = _groups(shown, axes, parallelism)
        if not groups:
            continue
        ranks, name = len(groups[0]), axis_name(axes, parallelism)
        total = torch.stack([_total(group) for group in _distinct(groups)]).sum(0)
        limit = case.first.floor * ranks
        if case.fits(f"the sum over {name} is right, by sketch", norm(total - trusted) / limit):
            return Diagnosis(
                cause="grad-not-summed",
                axis=name,
                evidence=f"the sketches that the {ranks} ranks along {name} kept of the gradient of {case.first.name} "
                "differ, and their sum is the reference's",
                fix=f"sum this gradient over {name} (all_reduce with SUM after backward, or make the operation that "
                "splits the work sum the gradient of its input)",
            )
        if "tp" not in axes and case.fits(
            f"the mean over {name} is right, by sketch", norm(total / ranks - trusted) / limit
        ):
            return Diagnosis(
                cause="grad-not-reduced",
                axis=name,
                evidence=f"the sketches that the {ranks} ranks along {name} kept of the gradient of {case.first.name} "
                "differ, and their mean is the reference's",
                fix=not_reduced_fix(name),
            )
    return None


def size(want: Side, key: Key) -> float | None:
    """How large the trusted tensor is, by its sketch; None where it has none."""
    trusted = next((way.sketch for way in read(kept(want, key)).wholes if way.sketch is not None), None)
    return None if trusted is None else norm(trusted)


def _groups(shown: Sequence[Shown], axes: Sequence[str], parallelism: Parallelism) -> list[list[Shown]]:
    """Ranks that differ in `axes` alone and hold the same piece; empty unless each group is whole and some differ."""
    size = 1
    for axis in axes:
        size *= getattr(parallelism, axis)
    found: dict[object, list[Shown]] = {}
    for one in shown:
        at = parallelism.coordinates(one.rank)
        found.setdefault((one.record.piece, *(at[axis] for axis in AXES if axis not in axes)), []).append(one)
    whole = all(len(group) == size for group in found.values())
    differ = any(not torch.equal(_sketch(one), _sketch(group[0])) for group in found.values() for one in group)
    return list(found.values()) if whole and differ else []


def _distinct(groups: Sequence[list[Shown]]) -> list[list[Shown]]:
    """One group for each piece: others are replicas of it along another axis."""
    return list({group[0].record.piece: group for group in groups}.values())


def _total(group: Sequence[Shown]) -> Tensor:
    return torch.stack([_sketch(one) for one in group]).sum(0)


def _sketch(one: Shown) -> Tensor:
    return torch.zeros(16, 16, dtype=torch.float64) if one.sketch is None else one.sketch.to(torch.float64)
