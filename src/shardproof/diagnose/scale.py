"""One factor: on all gradients, or on some of them."""

from __future__ import annotations

import math

import torch

from shardproof.compare.measure import largest, wide, within
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.factors import axes_of, simple


def everywhere(case: Case) -> Diagnosis | None:
    """Every gradient that can be compared is the same multiple of the reference's."""
    factor = _factor(case)
    same = [] if factor is None else [c for c in case.wrong if _has(c, factor)]
    telling = [] if factor is None else [c for c in case.stage if _tells(c, factor, case)]
    if factor is None or not case.fits("one factor on all gradients", 0.0 if len(same) == len(telling) else math.inf):
        return None
    facts = case.facts
    axis = axes_of(factor, facts.parallelism, facts.microbatches)
    said = f"all {len(same)} gradients are {factor:.6g} times the reference's"
    if facts.batch_split_over_tp and math.isclose(factor, facts.parallelism.tp, rel_tol=1e-6):
        return Diagnosis(
            cause="grad-scale",
            axis="tp",
            factor=factor,
            evidence=f"all {len(same)} gradients are exactly {factor:.6g} times too large along tp, because the plan "
            f"splits the batch over tp={facts.parallelism.tp} (tp peers hold different samples, their gradients are "
            "summed over tp) while gradients are averaged over dp only",
            fix="divide the loss by the size of tp, or give tp peers the same samples",
        )
    return Diagnosis(
        cause="grad-scale",
        axis=axis,
        factor=factor,
        evidence=f"{said}{_named(factor, case)}{_loss_too(case, factor)}",
        fix="scale once: divide by the number of data ranks and of micro-batches (or by the tokens of the whole "
        "batch), and by nothing else",
    )


def subset(case: Case) -> Diagnosis | None:
    """Some gradients are one multiple of the reference's, and others are not."""
    factor = _factor(case)
    if not case.fits("one factor on some gradients", math.inf if factor is None else 0.0) or factor is None:
        return None
    same = [c for c in case.wrong if _has(c, factor)]
    other = len(case.wrong) - len(same)
    right = sum(_tells(c, factor, case) for c in case.stage) - len(case.wrong)
    names = ", ".join(c.name for c in same[:4]) + (", ..." if len(same) > 4 else "")
    mixed = (
        f"; {other} more differ by no one factor, as what is made from these and from right ones would" if other else ""
    )
    return Diagnosis(
        cause="grad-scale-subset",
        axis=axes_of(factor, case.facts.parallelism, case.facts.microbatches),
        factor=factor,
        evidence=f"{len(same)} gradients ({names}) are {factor:.6g} times the reference's, {right} are right{mixed}",
        fix=_subset_fix(factor, case),
    )


def term(case: Case) -> Diagnosis | None:
    """One addend of the loss (an auxiliary loss) counts k times in the gradients, and the others once."""
    parts, key = case.contributions, case.first.key
    count = min((len(part.terms) for part in parts), default=0)
    want, held = case.reference.tensors(key), case.shares(case.first)
    total = sum(part.count for part in parts)
    if count < 2 or not want or not held or not total > 0:
        return None
    zero = torch.zeros_like(wide(want[0]))
    terms = [
        torch.stack([p.terms[n].get(case.first.name, zero) * (p.count / total) for p in parts]).sum(0)
        for n in range(count)
    ]
    if largest((torch.stack(terms).sum(0) - wide(want[0])).abs()) > 6 * case.first.floor:
        return None
    known = [n for n in range(count) if bool(terms[n].any())]
    basis = torch.cat([torch.stack([share.take(terms[n]) for n in known], 1) for share in held])
    got = torch.cat([share.got for share in held])
    if len(got) < 2 * len(known) or len(known) < 2 or not bool(got.isfinite().all()):
        return None
    solved = torch.linalg.lstsq(basis, got.unsqueeze(1), driver="gelsd").solution[:, 0]
    size = max(1.0, float(solved.abs().max()))
    if not case.fits(
        "addends of the loss counted otherwise",
        largest((got - basis @ solved).abs()) / case.first.floor / size,
        limit=24,
    ):
        return None
    counted = {n: simple(float(k), 1e-6) for n, k in zip(known, solved, strict=True)}
    odd = {n: k for n, k in counted.items() if abs(k - 1) > 1e-6}
    if not odd or len(odd) == len(counted):
        return None
    said = ", ".join(f"addend {n + 1} of {count} counts {k:.6g} times" for n, k in odd.items())
    factor = next(iter(odd.values())) if len(odd) == 1 else None
    return Diagnosis(
        cause="grad-scale-subset",
        axis=None if factor is None else axes_of(factor, case.facts.parallelism, case.facts.microbatches),
        factor=factor,
        evidence=f"the loss is a sum, and in the gradient of {case.first.name} {said}, the others once",
        fix="scale every part of the loss alike, auxiliary losses too: by the micro-batches, and by the ranks over "
        "which gradients are averaged",
    )


def _subset_fix(factor: float, case: Case) -> str:
    if not axes_of(factor, case.facts.parallelism, case.facts.microbatches):
        return "look for what multiplies these gradients alone: a hook, a loss weight, a division on their path"
    if factor > 1:
        return (
            "look for a gradient that is reduced twice on its way here, as by an all_reduce whose backward sums again "
            "over ranks that hold the same loss"
        )
    return "look for a mean where the sum is due, or a division on one path of the forward pass (a bias divided by tp)"


def _factor(case: Case) -> float | None:
    """The factor of the first wrong gradient, if its values can tell one: a single number always has one."""
    first = case.first
    if first.ratio is None:
        return None
    factor = simple(first.ratio, tolerance(first))
    if math.prod(first.shape) > 1:
        return factor
    return factor if any(_has(c, factor) for c in case.wrong if math.prod(c.shape) > 1) else None


def _tells(comparison: Comparison, factor: float, case: Case) -> bool:
    """Whether a gradient would differ if it had the factor: not one that is zero but for rounding, as that of the bias
    of attention keys."""
    if comparison.verdict is Verdict.DIFFERENT:
        return True
    size = case.size(comparison.key)
    return size is None or not within(abs(factor - 1) * size, comparison.floor)


def _has(comparison: Comparison, factor: float) -> bool:
    return comparison.ratio is not None and math.isclose(comparison.ratio, factor, rel_tol=tolerance(comparison))


def tolerance(comparison: Comparison) -> float:
    """Relative error of a measured factor: what rounding does to the tensor's largest element."""
    if comparison.ratio is None or comparison.error == 0:
        return 0.0
    size = comparison.error / abs(comparison.ratio - 1)
    return 1e-6 + 6 * comparison.floor / size


def _named(factor: float, case: Case) -> str:
    """The factor as a count of tokens, where no axis explains it."""
    if axes_of(factor, case.facts.parallelism, case.facts.microbatches):
        return ""
    total = sum(part.count for part in case.contributions)
    mean = total / max(len(case.contributions), 1)
    for what, count in (("tokens or samples of the whole batch", total), ("of one micro-batch", mean)):
        if count > 1 and any(math.isclose(factor, k, rel_tol=1e-6) for k in (count, 1 / count)):
            return f"; {count:g} is the number {what}" if "of one" in what else f"; {count:g} is the number of {what}"
    return ""


def _loss_too(case: Case, factor: float) -> str:
    """Whether the loss carries the factor as well: scaled before the backward pass, or after it."""
    losses = [c for c in case.comparisons if c.step == case.first.step and c.stage == "loss" and c.part != "count"]
    if any(_has(c, factor) for c in losses):
        return "; the loss carries the same factor, so it was scaled before the backward pass"
    return "; the loss does not carry it" if losses else ""
