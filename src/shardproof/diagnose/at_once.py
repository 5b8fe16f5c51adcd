"""Findings that need no numbers: what was read, what was laid out, what the optimizer holds, what is tied."""

from __future__ import annotations

from collections.abc import Sequence

from shardproof.compare.reads import Misread
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.case import Facts
from shardproof.diagnose.finding import Finding
from shardproof.spec.stages import STAGES


def at_once(comparisons: Sequence[Comparison], facts: Facts) -> Finding | None:
    """The earliest finding that facts alone give, in causal order; None where there is none."""
    found = [
        finding
        for finding in (facts.not_applied, _ties(facts), _misread(facts.misread, comparisons), _strangers(facts))
        if finding is not None
    ]
    return min(found, key=lambda finding: (finding.step, STAGES.index(finding.stage)), default=None)


def _misread(misread: Misread | None, comparisons: Sequence[Comparison]) -> Finding | None:
    if misread is None:
        return None
    batches = (c for c in comparisons if c.stage == "batch" and c.step == misread.step)
    shown = next((c for c in batches if c.verdict is Verdict.DIFFERENT), None)
    return Finding(
        cause=misread.cause,
        stage="batch",
        where=f"batch{shown.part}" if shown is not None else "batch",
        axis=misread.axis,
        factor=None,
        ranks=misread.ranks,
        step=misread.step,
        evidence=misread.evidence,
        fix=misread.fix,
        comparison=shown,
    )


def _ties(facts: Facts) -> Finding | None:
    for rank, ties in facts.ties.items():
        lost = [group for group in facts.reference_ties if group not in ties]
        new = [group for group in ties if group not in facts.reference_ties]
        if not lost and not new:
            continue
        group = (lost or new)[0]
        said = "share one storage on one device and no longer do" if lost else "share one storage only"
        return Finding(
            cause="tied-weights-split" if lost else "initial-state",
            stage="initial-state",
            where=group[0],
            axis=None,
            factor=None,
            ranks=tuple(r for r, other in facts.ties.items() if other == ties),
            step=-1,
            evidence=f"{' and '.join(group)} {said} under {facts.parallelism.strategy} (seen on rank {rank})",
            fix="tie the weights again after the model is laid out, and lay both out alike",
        )
    return None


def _strangers(facts: Facts) -> Finding | None:
    ranks = tuple(rank for rank, strangers in facts.strangers.items() if strangers)
    if not ranks:
        return None
    return Finding(
        cause="optimizer",
        stage="optimizer-state",
        where=next(iter(facts.left_behind.get(ranks[0], ())), "(root)"),
        axis=None,
        factor=None,
        ranks=ranks,
        step=-1,
        evidence=f"the optimizer holds {len(facts.strangers[ranks[0]])} parameters that are not the laid-out model's: "
        f"{'; '.join(facts.strangers[ranks[0]][:3])}",
        fix="build the optimizer after the model is laid out, from the parameters of what parallelize returned",
    )
