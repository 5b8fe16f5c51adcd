"""Is the right gradient the sum, or the mean, of what the ranks along an axis hold?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import inf

import torch
from torch import Tensor

from shardproof.compare.measure import largest, scale, wide, within
from shardproof.compare.shares import Share
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axis_name
from shardproof.diagnose.origin import senders
from shardproof.spec.parallelism import AXES, Parallelism

COMBINATION = "a combination of"
"""How the name of the hypothesis begins that gradients are made from contributions."""

DATA = ("dp_replicate", "dp_shard")


def over_tp(case: Case) -> Diagnosis | None:
    """Copies along `tp` that differ, and only add up to the right gradient: of the first wrong tensor or, where that
    one is mixed from a path that is right and one that is not, of another of the step."""
    if case.facts.parallelism.tp == 1:
        return None
    found = _over(case, [("tp",)])
    if found is not None or case.probe is not None:
        return found
    # A copy of the model on one device tells which module sends back a part only; recordings alone do not.
    for other in case.wrong:
        groups = groups_over(("tp",), case.shares(other), case.facts.parallelism)
        if any(_differ(group, other.floor) for group in groups) and other is not case.first:
            found = _over(replace(case, first=other), [("tp",)])
            if found is not None and found.cause == "grad-not-summed":
                return replace(found, at=other)
    return None


def over_data(case: Case) -> Diagnosis | None:
    """The same along the data axes, and along data axes and `tp` together."""
    if any(hypothesis.name.startswith(COMBINATION) for hypothesis in case.tried):
        # The contributions could be told apart, and are not what the ranks hold: a mean that is right says no more.
        return None
    axes = [axis for axis in AXES if getattr(case.facts.parallelism, axis) > 1]
    sets = [found for size in (1, 2, 3) for found in combinations(axes, size) if found != ("tp",)]
    return _over(case, sets)


def _over(case: Case, sets: Sequence[tuple[str, ...]]) -> Diagnosis | None:
    held = case.shares(case.first)
    for axes in sets:
        groups = groups_over(axes, held, case.facts.parallelism)
        if not groups or not any(_differ(group, case.first.floor) for group in groups):
            continue
        name = axis_name(axes, case.facts.parallelism)
        size = len(groups[0])
        if case.fits(f"the sum over {name} is right", _residual(groups, case, mean=False)):
            return _not_summed(case, name, axes, size)
        other = _reduced_elsewhere(groups, case, axes)
        # Two ranks along each axis: a sum of twice the right one is a right mean as well, and that says less.
        if other is not None and (other.factor != size or "tp" in axes or case.probe is not None):
            return other
        if "tp" not in axes and case.fits(f"the mean over {name} is right", _residual(groups, case, mean=True)):
            return _not_reduced(case, name, size)
    return None


def _reduced_elsewhere(groups: Sequence[Sequence[Share]], case: Case, axes: Sequence[str]) -> Diagnosis | None:
    """Whether the sum is as many times too large as another axis has ranks: over that one it was summed instead."""
    parallelism = case.facts.parallelism
    want = case.reference.tensors(case.first.key)[0]
    for other in AXES:
        times = getattr(parallelism, other)
        if other in axes or times == 1 or (times == len(groups[0]) and _cut_ones_too(case, axes, other)):
            continue
        far = 0.0
        for group in groups:
            total, right = torch.stack([share.got for share in group]).sum(0), group[0].take(want)
            far = max(far, largest((total - times * right).abs()) / (case.first.floor * len(group) * times))
        name = axis_name(axes, parallelism)
        if case.fits(f"the sum over {name} is {other}={times} times the right one", far):
            return Diagnosis(
                cause="wrong-group",
                axis=name,
                factor=float(times),
                evidence=f"the ranks along {name} hold different gradients of {case.first.name}, whose sum is {times} "
                f"times the reference's: it was summed over {other} instead of {name}",
                fix=f"reduce this gradient over the process group of mesh['{name}'], not that of {other}",
            )
    return None


def _cut_ones_too(case: Case, axes: Sequence[str], other: str) -> bool:
    """Whether gradients that are cut over `other` have the right mean over `axes`: summed over it, they would be mixed.

    Where both axes have as many ranks, this tells what was not reduced from what was summed over the other one.
    """
    alike = _like_it(case, axes, mean=True)
    return any(not groups_over((other,), case.shares(one), case.facts.parallelism) for one in alike)


def by_module(case: Case) -> Diagnosis | None:
    """A module sends back a part of its input's gradient on each tp rank; nobody sums them on this path."""
    for name, got, want in senders(case):
        exact = case.reference.tensors(case.first.key)[0].dtype == torch.float64
        far = largest((got - wide(want)).abs()) if got.shape == want.shape else inf
        if not far <= (1e-9 if exact else 1e-3) * scale(want):
            continue
        case.fits(f"the sum over tp of what {name} sends back is right", 0.0)
        return Diagnosis(
            cause="grad-not-summed",
            axis="tp",
            evidence=f"each rank of a tp group gets another gradient of {name}'s input, and their sum is what one "
            "device makes of the run's own input and output gradient: nobody sums them on this path",
            fix=f"sum the gradient of {name}'s input over tp (Megatron's f, or input_layouts of its parallel style)",
        )
    return None


def replicas_differ(case: Case) -> str | None:
    """The axis along which copies of the first wrong tensor differ; None where they agree, or nothing is a copy."""
    held = case.shares(case.first)
    axes = [axis for axis in AXES if getattr(case.facts.parallelism, axis) > 1]
    for axis in axes:
        groups = groups_over((axis,), held, case.facts.parallelism)
        if any(_differ(group, case.first.floor) for group in groups):
            return axis
    return None


def groups_over(axes: Sequence[str], held: Sequence[Share], parallelism: Parallelism) -> list[list[Share]]:
    """The ranks that differ in `axes` alone and should hold the same elements; empty unless each group is complete."""
    size = 1
    for axis in axes:
        size *= getattr(parallelism, axis)
    groups: dict[object, list[Share]] = {}
    for share in held:
        at = parallelism.coordinates(share.rank)
        groups.setdefault((share.place, *(at[a] for a in AXES if a not in axes)), []).append(share)
    return list(groups.values()) if groups and all(len(group) == size for group in groups.values()) else []


def _differ(group: Sequence[Share], floor: float) -> bool:
    return any(largest((share.got - group[0].got).abs()) > floor for share in group)


def _residual(groups: Sequence[Sequence[Share]], case: Case, *, mean: bool) -> float:
    """How far the sums (or means) are from the reference, in noise floors of a sum of so many."""
    want = case.reference.tensors(case.first.key)[0]
    return max(_far(group, group[0].take(want), mean=mean) / (case.first.floor * len(group)) for group in groups)


def _far(group: Sequence[Share], want: Tensor, *, mean: bool) -> float:
    held = torch.stack([share.got for share in group])
    together = held.mean(0) if mean else held.sum(0)
    # A part of the tensor may be right on every rank (rows that no split path reaches).
    apart = (held - want).abs().amax(0)
    return largest(torch.minimum((together - want).abs(), apart))


def _like_it(case: Case, axes: Sequence[str], *, mean: bool = False) -> list[Comparison]:
    """Other wrong gradients of which the same is true."""
    found = []
    for other in case.wrong:
        groups = groups_over(axes, case.shares(other), case.facts.parallelism)
        want = case.reference.tensors(other.key)
        if groups and want:
            far = max(_far(group, group[0].take(want[0]), mean=mean) for group in groups)
            if within(far, other.floor * len(groups[0])):
                found.append(other)
    return found


def _not_summed(case: Case, name: str, axes: Sequence[str], size: int) -> Diagnosis:
    alike = _like_it(case, axes)
    rest = len(case.wrong) - len(alike)
    upstream = f"; {rest} other gradients differ as well, being made from them or mixed with a path that is right"
    return Diagnosis(
        cause="grad-not-summed",
        axis=name,
        evidence=f"the {size} ranks along {name} hold different gradients of {case.first.name}, and their sum is the "
        f"reference's; the same holds for {len(alike)} of {len(case.wrong)} wrong gradients"
        f"{upstream if rest else ''}",
        fix=f"sum this gradient over {name} (all_reduce with SUM after backward, or make the operation that splits the "
        "work sum the gradient of its input)",
    )


def _not_reduced(case: Case, name: str, size: int) -> Diagnosis:
    alike = _like_it(case, name.split(" and ") if name != "dp" else DATA, mean=True)
    return Diagnosis(
        cause="grad-not-reduced",
        axis=name,
        evidence=f"the {size} ranks along {name} hold different gradients of {case.first.name}, each that of its own "
        f"samples, and their mean is the reference's; the same holds for {len(alike)} of {len(case.wrong)} wrong "
        "gradients",
        fix=not_reduced_fix(name),
    )


def not_reduced_fix(axis: str) -> str:
    """What to change where a gradient stays that of the rank's own samples."""
    return (
        f"average this gradient over {axis} in every rank's step: under DDP and FSDP call the wrapped model (not its "
        ".module), let the last micro-batch's backward synchronise, and keep every trainable parameter inside"
    )
