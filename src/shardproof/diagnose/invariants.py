"""From replicas that differ to findings: what is known without a reference, and no more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardproof.compare.invariants import DATA_AXES, Seen
from shardproof.compare.reads import Misread
from shardproof.compare.verdict import Verdict
from shardproof.diagnose.finding import Finding
from shardproof.spec.stages import STAGES

CAUSES = {
    "initial-state": "initial-state",
    "batch": "batch-differs-in-group",
    "grad-norm": "grad-norm",
    "optimizer-state": "optimizer",
    "update": "optimizer",
    "buffer": "buffers",
}
"""Stages at which replicas that differ for the first time leave one cause only."""

FIXES = {
    "initial-state": "build the model under one seed on every rank, or broadcast one rank's weights, before the "
    "first step",
    "batch": "give all ranks of a tensor-parallel group the same samples",
    "grad-norm": "take one norm over all ranks, and scale every replica by it",
    "optimizer-state": "start and step the optimizer alike on all ranks that hold the same parameter",
    "update": "step the same parameters with the same settings on all ranks that hold them",
    "buffer": "reduce or broadcast the buffer over this axis",
}

REDUCE_FIX = "average gradients over the data axes (DDP, FSDP, or an all_reduce of your own) before optimizer.step()"
TP_FIX = (
    "look at what each rank of the tp group computes before this parameter: an input gradient of a column-parallel "
    "layer that is not summed over tp, or an output that is not"
)


def explain_invariants(
    seen: Sequence[Seen],
    *,
    collectives: Mapping[str, Mapping[str, int]] | None,
    misread: Misread | None,
    not_applied: Finding | None,
) -> list[Finding]:
    """The first violation, in the order in which one causes the next; empty where there is none.

    `collectives` are those of the first step by axis, None where they were not counted.
    """
    wrong = [one for one in seen if one.comparison.verdict is Verdict.DIFFERENT]
    found = [
        finding
        for finding in (
            not_applied,
            None if misread is None else _misread(misread, wrong),
            _violation(wrong[0], wrong, collectives) if wrong else None,
        )
        if finding is not None
    ]
    return sorted(found, key=lambda finding: (finding.step, STAGES.index(finding.stage)))[:1]


def _misread(misread: Misread, wrong: Sequence[Seen]) -> Finding:
    own = (one.comparison for one in wrong if one.comparison.stage == "batch")
    shown = next((comparison for comparison in own if comparison.step == misread.step), None)
    return Finding(
        cause=misread.cause,
        stage="batch",
        where="batch" if shown is None else f"batch{shown.part}",
        axis=misread.axis,
        factor=None,
        ranks=misread.ranks,
        step=misread.step,
        evidence=misread.evidence,
        fix=misread.fix,
        comparison=shown,
    )


def _violation(first: Seen, wrong: Sequence[Seen], collectives: Mapping[str, Mapping[str, int]] | None) -> Finding:
    shown = first.comparison
    siblings = [one for one in wrong if (one.comparison.step, one.comparison.stage) == (shown.step, shown.stage)]
    evidence = [
        f"{shown.reason}: max|got - want| = {shown.error:.3g} between them",
        f"{len(siblings)} tensors of this stage and step differ so" if len(siblings) > 1 else "",
    ]
    cause, fix = CAUSES.get(shown.stage, "unexplained"), FIXES.get(shown.stage, "")
    if shown.stage == "gradient":
        cause, said, fix = _gradient(first.axes, collectives)
        evidence.append(said)
    return Finding(
        cause=cause,
        stage=shown.stage,
        where=f"batch{shown.part}" if shown.stage == "batch" else shown.name,
        axis=" and ".join(first.axes) or None,
        factor=None,
        ranks=shown.ranks,
        step=shown.step,
        evidence="; ".join(part for part in evidence if part),
        fix=fix,
        comparison=shown,
    )


def _gradient(axes: Sequence[str], collectives: Mapping[str, Mapping[str, int]] | None) -> tuple[str, str, str]:
    """Cause, evidence and fix of gradients that differ between replicas."""
    if not set(axes) <= set(DATA_AXES):
        return "unexplained", "weights and batches of these ranks are the same", TP_FIX
    if collectives is None:
        return "unexplained", "", REDUCE_FIX
    reduced = [axis for axis in axes if _reduces(axis, collectives)]
    if reduced:
        # Something was summed over the axis: other gradients, another micro-batch, or no gradients at all.
        return "unexplained", f"some reduction ran over {' and '.join(reduced)} in the first step", REDUCE_FIX
    return "grad-not-reduced", f"no reduction ran over {' and '.join(axes)} in the first step", REDUCE_FIX


def _reduces(axis: str, collectives: Mapping[str, Mapping[str, int]]) -> bool:
    return any(
        "reduce" in name
        for axes, names in collectives.items()
        # A group that follows no axis may hold this one's ranks.
        if axis in axes.split("+") or axes == "other"
        for name in names
    )
