"""From comparisons to findings: the first divergence of a run, in words that say where, by how much and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardproof.compare.activations import PARTIAL, PARTIAL_AND_BIAS
from shardproof.compare.reads import Misread
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.factors import axes_of
from shardproof.diagnose.finding import Finding
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.stages import STAGES

STAGE_CAUSES = {
    "initial-state": "initial-state",
    "grad-norm": "grad-norm",
    "optimizer-state": "optimizer",
    "update": "optimizer",
    "buffer": "buffers",
}
"""Stages whose name is already the cause, as everything that comes before them is right."""

FIXES = {
    "initial-state": "build the model under one seed on every rank, or broadcast rank 0's weights, before sharding",
    "batch": "give all ranks of a tensor-parallel group the same samples",
    "forward": "look at what this module computes under this layout: its inputs are the first to be trusted, its "
    "output the first that is not",
    "loss": "compute the loss from the model's whole output, and mean it over the samples once",
    "gradient": "check how this gradient is reduced: averaged over data ranks, summed over tp where partial, once",
    "grad-norm": "take the norm over all shards once (each shard counted once, each replica not at all), then clip",
    "optimizer-state": "build the optimizer over the laid-out model's own parameters",
    "update": "build the optimizer after the model is laid out, over the parameters that it returns",
    "buffer": "reduce or broadcast buffers the way the layout needs",
}
"""What to look at, by stage, where the cause says no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a run beside its comparisons."""

    parallelism: Parallelism
    microbatches: int
    batch_split_over_tp: bool
    ties: Mapping[int, tuple[tuple[str, ...], ...]]
    """Rank -> groups of names that share one storage."""
    reference_ties: tuple[tuple[str, ...], ...]
    strangers: Mapping[int, tuple[str, ...]]
    """Rank -> what the optimizer holds that is not the model's."""
    left_behind: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Rank -> trainable parameters that the optimizer does not hold."""
    misread: Misread | None = None
    not_applied: Finding | None = None


def explain(comparisons: Sequence[Comparison], facts: Facts) -> list[Finding]:
    """The findings of a run, the first divergence first; empty where there is none."""
    found = [
        finding
        for finding in (
            facts.not_applied,
            _ties(facts),
            _misread(facts.misread, comparisons),
            _strangers(facts),
            _first_divergence(comparisons, facts),
        )
        if finding is not None
    ]
    # Causal order: what comes first in training comes first here, whatever else it brought about.
    return sorted(found, key=lambda finding: (finding.step, STAGES.index(finding.stage)))[:1]


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


def _first_divergence(comparisons: Sequence[Comparison], facts: Facts) -> Finding | None:
    wrong = [c for c in comparisons if c.verdict is Verdict.DIFFERENT]
    if not wrong:
        return None
    # A wrong gradient of an activation only says where: what counts is the parameter's.
    first = wrong[0]
    if first.stage == "backward":
        first = next((c for c in wrong if c.step == first.step and c.stage == "gradient"), first)
    biased = first.stage == "forward" and first.layout == PARTIAL_AND_BIAS
    partial = first if biased else _unsummed(comparisons, first)
    if partial is not None:
        return _not_reduced(partial, first)
    siblings = [c for c in comparisons if (c.step, c.stage) == (first.step, first.stage)]
    counted = [c for c in siblings if c.verdict is not Verdict.NOT_CHECKED]
    evidence = [_sizes(first), _spread(siblings)]
    cause, axis, factor = STAGE_CAUSES.get(first.stage, "unexplained"), None, first.ratio
    fix = FIXES.get(first.stage, FIXES["forward"])
    if first.stage == "gradient" and factor is not None:
        same = [c for c in counted if c.ratio is not None and math.isclose(c.ratio, factor, rel_tol=1e-6)]
        axis = axes_of(factor, facts.parallelism, facts.microbatches)
        if len(same) == len(counted):
            cause = "grad-scale"
            fix = "scale once: divide by the number of data ranks and of micro-batches, and by nothing else"
            if facts.batch_split_over_tp and math.isclose(factor, facts.parallelism.tp, rel_tol=1e-6):
                axis = "tp"
                evidence.append(
                    f"the plan splits the batch over tp={facts.parallelism.tp}, so that the ranks of a tp group hold "
                    "different samples and their gradients are summed, while gradients are averaged over dp only"
                )
                fix = "divide the loss by the size of tp, or give tp peers the same samples"
    return Finding(
        cause=cause,
        stage=first.stage,
        where=_where(first),
        axis=axis,
        factor=factor,
        ranks=first.ranks,
        step=first.step,
        evidence="; ".join(part for part in evidence if part),
        fix=fix,
        comparison=first,
    )


def _where(comparison: Comparison) -> str:
    return f"batch{comparison.part}" if comparison.stage == "batch" else comparison.name


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
    inside = partial is not None and (first.name == "(root)" or partial.name.startswith(f"{first.name}."))
    return None if inside and first.stage == "forward" else partial


def _not_reduced(partial: Comparison, first: Comparison) -> Finding:
    return Finding(
        cause="forward-not-reduced",
        stage="forward",
        where=partial.name,
        axis="tp",
        factor=None,
        ranks=first.ranks,
        step=partial.step,
        evidence=_said_of_parts(partial, first),
        fix="sum the output over tp before it is used (all_reduce, or output_layouts=Replicate())",
        comparison=first,
    )


def _said_of_parts(partial: Comparison, first: Comparison) -> str:
    if partial is first:
        return (
            f"the outputs of {first.name} on the ranks of a tp group add up to the reference's, but for one vector "
            f"that each of them has added (a bias), and nobody summed them: {_sizes(first)}"
        )
    return (
        f"the outputs of {partial.name} on the ranks of a tp group only add up to the reference's, and the next tensor "
        f"({first.stage} {first.name}) was made from one part: {_sizes(first)}"
    )


def _sizes(comparison: Comparison) -> str:
    if comparison.reason:
        return comparison.reason
    said = f"max|got - want| = {comparison.error:.3g}, {comparison.floors:.3g} noise floors of {comparison.floor:.2g}"
    return said if comparison.ratio is None else f"{said}; got / want = {comparison.ratio:.6g} everywhere"


def _spread(siblings: Sequence[Comparison]) -> str:
    counted = [c for c in siblings if c.verdict is not Verdict.NOT_CHECKED]
    wrong = sum(c.verdict is Verdict.DIFFERENT for c in counted)
    return f"{wrong} of {len(counted)} tensors of this stage and step differ" if len(counted) > 1 else ""
