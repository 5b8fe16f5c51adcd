"""The first wrong output: partial sums that nobody summed, a bias added too often, a mean where the sum was due."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardproof.compare.activations import PARTIAL, PARTIAL_AND_BIAS, Aligned, aligned
from shardproof.compare.measure import largest, wide
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axes_of, simple
from shardproof.parallel.names import ROOT

SUM_IT = "sum the output over tp before it is used (all_reduce, or output_layouts=Replicate())"


def not_reduced(case: Case) -> Diagnosis | None:
    """The outputs of tp peers only add up to the right one, and somebody used them as they were."""
    first = case.first
    biased = first.stage == "forward" and first.layout == PARTIAL_AND_BIAS
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
    shown = _shown(case)
    for name, vector in _vectors(case, shown):
        added = _multiple([(a.got - a.want, a.take(_spread(vector, a))) for a in shown], case)
        if added is None:
            continue
        times = simple(added + 1, 1e-6)
        tp = case.facts.parallelism.tp
        case.fits(f"{name} added {times:.6g} times", 0.0)
        return Diagnosis(
            cause="bias-counted-k-times",
            axis="tp" if tp > 1 and times in (0.0, tp, 1 / tp) else None,
            factor=times,
            evidence=f"the output of {case.first.name} is off by {added:.6g} x {name}, the same for every token: it "
            f"was added {times:.6g} times instead of once",
            fix="add the bias once, after the outputs are summed over tp (or on one rank of the group alone)",
        )
    return None


def averaged(case: Case) -> Diagnosis | None:
    """The part of the output that does not stem from a bias is one multiple of the right one."""
    shown = _shown(case)
    nothing: list[tuple[str, Tensor | None]] = [("", None), *_vectors(case, shown)]
    for name, vector in nothing:
        pairs = []
        for a in shown:
            bias = 0.0 if vector is None else a.take(_spread(vector, a))
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


def _shown(case: Case) -> list[Aligned]:
    return aligned(case.first.key, case.observed, case.reference) if case.first.stage == "forward" else []


def _vectors(case: Case, shown: Sequence[Aligned]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the module that are one vector over its output's features."""
    if case.probe is None or not shown or shown[0].part.dim() < 1:
        return
    features = shown[0].part.shape[-1]
    for name, value in case.probe.parameters(case.first.name).items():
        if tuple(value.shape) == (features,) and bool((value != 0).any()):
            yield name, wide(value.cpu())


def _spread(vector: Tensor, one: Aligned) -> Tensor:
    return vector.expand_as(one.part)


def _multiple(pairs: Sequence[tuple[Tensor, Tensor]], case: Case) -> float | None:
    """k, where left = k x right everywhere and k is not zero; else None."""
    if not pairs:
        return None
    left = torch.cat([one.reshape(-1) for one, _ in pairs])
    right = torch.cat([other.reshape(-1) for _, other in pairs])
    square = float(right @ right)
    if not square > 0 or right.numel() < 2 or not bool(left.isfinite().all()):
        return None
    factor = float(left @ right) / square
    floor = case.first.floor
    fits = largest((left - factor * right).abs()) <= 6 * floor * max(1.0, abs(factor))
    return factor if fits and abs(factor) * largest(right.abs()) > 6 * floor else None
