"""The loss is the first that is wrong: its own arithmetic over ranks, or means that do not add up."""

from __future__ import annotations

import math
from dataclasses import replace

from shardproof.compare.measure import wide
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose import scale
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.diagnose.coefficients import splits
from shardproof.diagnose.factors import axes_of, axis_name, simple
from shardproof.diagnose.sums import DATA
from shardproof.parallel.names import ROOT


def wrong_loss(case: Case) -> Diagnosis | None:
    """Why the loss differs though every output is right."""
    factor = _same_factor(case)
    if factor is not None and case.fits("one factor on the loss and on all gradients", 0.0):
        return Diagnosis(
            cause="grad-scale",
            axis=axes_of(factor, case.facts.parallelism, case.facts.microbatches),
            factor=factor,
            evidence=f"the loss and all gradients are {factor:.6g} times the reference's: the loss is scaled",
            fix="divide the loss once, by the ranks that hold different samples: data ranks do, tp peers do not",
        )
    own = _own_losses(case)
    if own is None:
        return None
    parts, peers_differ = own
    far = [abs(got - want) for got, want in parts]
    right = max(far) <= 6 * case.first.floor * max(len(parts), 1)
    if right and len(parts) > 1 and not peers_differ:
        if case.first.part == "logged" and not _local_wrong(case):
            return _logged(case)
        case.fits("each part's own loss is right", 0.0)
        if not case.fits(
            "the gradients of the batch are a weighted sum of those of its parts", 0.0 if splits(case) else math.inf
        ):
            return Diagnosis(
                cause="unexplained",
                evidence=f"the loss of each of the {len(parts)} parts of the batch is what one device gets for it, but "
                "the loss of a batch is not made up of those of its parts, as where samples are compared",
                fix="gather what the loss compares over the data ranks (with gradients), or take as the reference a "
                "loss that looks at each part alone",
            )
        data = axis_name(DATA, case.facts.parallelism)
        return Diagnosis(
            cause="mean-of-means",
            axis=data or "micro-batch",
            evidence=f"the loss of each of the {len(parts)} parts of the batch is what one device gets for it, and the "
            "mean over parts is not the loss of the batch: the parts do not count equally many",
            fix="return sp.LossSum(total, count), or divide every sum by the count of the whole batch",
        )
    if right and case.first.part == "logged":
        return _logged(case)
    if not _outputs_right(case):
        return None
    weighted = _addend(case)
    if weighted is not None or case.facts.parallelism.tp == 1:
        # Without tensor parallelism every rank has whole logits: nothing of the loss is sharded.
        return weighted
    case.fits("the outputs are right and the loss made from them is not", 0.0)
    far_by = [got - want for got, want in parts]
    said = "ranks of a tp group get different losses from the same output" if peers_differ else _offset(far_by, case)
    return Diagnosis(
        cause="sharded-loss",
        axis="tp" if case.facts.parallelism.tp > 1 else None,
        evidence=f"the model's output is right and the loss made from it is not: {said}",
        fix="compute the loss from whole logits, or sum exponentials and target logits over tp exactly once "
        "(loss_parallel, a vocabulary-parallel cross entropy on logits that are still split)",
    )


def _addend(case: Case) -> Diagnosis | None:
    """One addend of the loss that counts otherwise, as the gradients tell."""
    gradients = [
        c for c in case.comparisons if (c.step, c.stage, c.verdict) == (case.first.step, "gradient", Verdict.DIFFERENT)
    ]
    return next((d for c in gradients[:3] if (d := scale.term(replace(case, first=c))) is not None), None)


def _offset(far: list[float], case: Case) -> str:
    mean = sum(far) / len(far)
    facts = case.facts
    for name, size in (("tp", facts.parallelism.tp), ("dp", facts.parallelism.dp)):
        if size > 1 and all(math.isclose(one, math.log(size), rel_tol=1e-6) for one in far):
            return (
                f"it is larger by {mean:.6g} = log({name}={size}) on every rank, as if each logit counted {size} times"
            )
    return f"it is off by {mean:.6g} on average over the parts"


def _same_factor(case: Case) -> float | None:
    """The loss over the reference's, where every gradient of the step has the same ratio."""
    if case.first.ratio is None:
        return None
    gradients = [c for c in case.comparisons if c.step == case.first.step and c.stage == "gradient"]
    counted = [c for c in gradients if c.verdict is not Verdict.NOT_CHECKED]
    factor = simple(case.first.ratio, 1e-6)
    same = [c for c in counted if c.ratio is not None and math.isclose(c.ratio, factor, rel_tol=1e-5)]
    return factor if counted and len(same) == len(counted) else None


def _own_losses(case: Case) -> tuple[list[tuple[float, float]], bool] | None:
    """(this run's, one device's) loss of every part of the batch; and whether tp peers differ."""
    observed, step = case.observed, case.first.step
    known = {(part.reader, part.microbatch): part for part in case.contributions}
    if not known:
        return None
    sums = case.first.part in ("total", "count") or (step, "loss", ROOT, "total") in case.observed.ranks[0].by_key
    shown = _shown(case, "total" if sums else "local")
    found, differ = [], False
    for (rank, call), got in shown.items():
        reader = rank - observed.parallelism.coordinates(rank)["tp"]
        part = known.get((rank, call)) or known.get((reader, call))
        if part is None:
            continue
        first = shown.get((reader, call), got)
        differ |= not observed.batch_split_over_tp and abs(got - first) > 6 * case.first.floor
        found.append((got, part.loss * (part.count if sums else 1.0)))
    return (found, differ) if found else None


def _shown(case: Case, part: str) -> dict[tuple[int, int], float]:
    return {
        (rank, record.call): float(wide(tensor).reshape(()))
        for rank, record, tensor in case.observed.held((case.first.step, "loss", ROOT, part))
        if tensor is not None
    }


def _local_wrong(case: Case) -> bool:
    return any(
        c.verdict is Verdict.DIFFERENT and c.part != "logged"
        for c in case.comparisons
        if c.step == case.first.step and c.stage == "loss"
    )


def _outputs_right(case: Case) -> bool:
    root = [c for c in case.comparisons if (c.step, c.stage, c.name) == (case.first.step, "forward", ROOT)]
    return bool(root) and all(_agrees(c) or "partial sums" in c.layout for c in root)


def _agrees(comparison: Comparison) -> bool:
    return comparison.verdict in (Verdict.EQUAL, Verdict.ROUNDING)


def _logged(case: Case) -> Diagnosis:
    gradients = [c for c in case.comparisons if c.step == case.first.step and c.stage == "gradient"]
    right = sum(_agrees(c) for c in gradients)
    ratio = case.first.ratio
    said = "" if ratio is None else f": it is {ratio:.6g} times the reference's"
    axis = None if ratio is None else axes_of(ratio, case.facts.parallelism, case.facts.microbatches)
    return Diagnosis(
        cause="unexplained",
        axis=axis,
        evidence=f"the losses of all parts are right, and {right} of {len(gradients)} gradients; what the step returns "
        f"is not{said}",
        fix="return the mean over this rank's micro-batches, or the mean over all data ranks, the same on all tp peers",
    )
