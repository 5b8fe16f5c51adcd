"""From comparisons to findings: the first divergence of a run, and the family of causes that explains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isclose

from shardproof.compare.losses import BACKWARD
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose import (
    attention,
    checkpoint,
    forward,
    layout,
    loss,
    norm,
    optimizer,
    origin,
    precision,
    reduction,
    repeat,
    rng,
    scale,
    sums,
)
from shardproof.diagnose.at_once import at_once
from shardproof.diagnose.case import Case, Diagnosis, Facts
from shardproof.diagnose.finding import Finding, Hypothesis
from shardproof.diagnose.sums import replicas_differ
from shardproof.parallel.names import ROOT
from shardproof.spec.stages import STAGES

Family = Callable[[Case], Diagnosis | None]

FAMILIES: Mapping[str, tuple[Family, ...]] = {
    "initial-state": (layout.of_parameter, precision.lost),
    "checkpoint": (checkpoint.reloaded,),
    "forward": (
        rng.misdrawn,
        rng.undue,
        rng.not_drawn,
        repeat.differs_from_itself,
        forward.not_reduced,
        forward.bias,
        forward.averaged,
        forward.branch,
        layout.of_output,
        attention.positions,
        layout.fused,
        forward.wrong_group,
        precision.lost,
        attention.forward,
        forward.normalises,
    ),
    "loss": (repeat.differs_from_itself, forward.not_reduced, loss.wrong_loss, precision.lost),
    "gradient": (
        repeat.differs_from_itself,
        optimizer.skipped_infinite,
        scale.everywhere,
        scale.subset,
        norm.clipped_by_hand,
        sums.over_tp,
        reduction.combined,
        scale.term,
        reduction.mixed,
        sums.over_data,
        precision.lost,
        precision.added_up,
        attention.backward,
        sums.by_module,
    ),
    "grad-norm": (repeat.differs_from_itself, optimizer.skipped, norm.clipped),
    "optimizer-state": (repeat.differs_from_itself, optimizer.skipped, precision.lost, optimizer.updated),
    "update": (repeat.differs_from_itself, optimizer.skipped, precision.lost, optimizer.updated),
    "buffer": (repeat.differs_from_itself, precision.lost),
}
"""Stage -> the families that are asked, the simplest hypothesis first."""

STAGE_CAUSES = {"initial-state": "initial-state", "buffer": "buffers", "checkpoint": "checkpoint"}
"""Stages whose name is the cause where no family says more, as everything that comes before them is right."""

FIXES = {
    "initial-state": "build the model under one seed on every rank, or broadcast rank 0's weights, before sharding",
    "checkpoint": "restore weights and optimizer state shard by shard to where they were saved from: "
    "torch.distributed.checkpoint does it for every layout",
    "forward": "look at what this module computes under this layout: its inputs are the last to be trusted, its "
    "output the first that is not",
    "loss": "compute the loss from the model's whole output, and mean it over the samples once",
    "gradient": "check how this gradient is reduced: averaged over data ranks, summed over tp where partial, once",
    "buffer": "reduce or broadcast buffers the way the layout needs",
}
"""What to look at, by stage, where the cause says no more."""


def first_divergence(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The first tensor that differs, in causal order; a parameter's gradient rather than an activation's."""
    wrong = [c for c in comparisons if c.verdict is Verdict.DIFFERENT]
    if not wrong:
        return None
    first = wrong[0]
    if first.stage == "backward":
        # A wrong gradient of an activation only says where: what counts is the parameter's.
        first = next((c for c in wrong if c.step == first.step and c.stage == "gradient"), first)
    losses = [c for c in wrong if (c.step, c.stage) == (first.step, "loss")]
    if first.stage == "loss" and all(c.part == BACKWARD for c in losses):
        # A loop may call backward on any multiple of its loss: the gradient says what became of it.
        first = next((c for c in wrong if c.step == first.step and c.stage == "gradient"), first)
    elif first.stage == "loss" and all(c.part == "logged" for c in losses):
        # What a step logs is no part of training: a wrong gradient says more, unless it is wrong by the same factor.
        gradient = next((c for c in wrong if c.step == first.step and c.stage == "gradient"), first)
        alike = (
            first.ratio is not None
            and gradient.ratio is not None
            and isclose(first.ratio, gradient.ratio, rel_tol=1e-5)
        )
        first = first if alike else gradient
    return first


def needs_numbers(comparisons: Sequence[Comparison], facts: Facts) -> bool:
    """Whether the first divergence is one that `explain` is to be asked about."""
    first = first_divergence(comparisons)
    if first is None or first.stage == "batch":
        return False
    known = at_once(comparisons, facts)
    return known is None or _order(known.step, known.stage) > _order(first.step, first.stage)


def explain(case: Case, families: Mapping[str, tuple[Family, ...]] | None = None) -> Finding:
    """The finding for the first divergence of a case; `families`, all of them if None, are asked by its stage."""
    first = case.first
    asked = (FAMILIES if families is None else families).get(first.stage, ())
    made = next((d for family in asked if (d := _asked(family, case)) is not None), None)
    diagnosis = made or Diagnosis(
        cause=STAGE_CAUSES.get(first.stage, "unexplained"),
        axis=replicas_differ(case) if first.stage in STAGE_CAUSES else None,
        factor=first.ratio,
        evidence=_apart(case) if first.stage in STAGE_CAUSES else _ruled_out(case),
        fix=FIXES.get(first.stage, FIXES["forward"]),
    )
    at = diagnosis.at or first
    later = [c for c in case.comparisons if c.verdict is Verdict.DIFFERENT and c is not at]
    said, polluted = _inherited(case, later)
    evidence = [diagnosis.evidence, _sizes(at), _spread(case), said]
    return Finding(
        cause=diagnosis.cause,
        stage=diagnosis.stage or at.stage,
        where=diagnosis.where or _where(at),
        axis=diagnosis.axis,
        factor=diagnosis.factor,
        ranks=diagnosis.ranks or at.ranks,
        step=at.step,
        evidence="; ".join(part for part in evidence if part),
        fix=diagnosis.fix,
        comparison=at,
        polluted=polluted,
        tried=tuple(case.tried),
    )


def _ruled_out(case: Case) -> str:
    tried = [hypothesis.name for hypothesis in case.tried if not hypothesis.holds]
    return f"ruled out: {'; '.join(dict.fromkeys(tried))}" if tried else "nothing that is known fits it"


def _later(count: int) -> str:
    return f"{count} later tensor{'s differ' if count > 1 else ' differs'} as well"


def _apart(case: Case) -> str:
    axis = replicas_differ(case)
    what = (
        "the ranks hold other values than one device"
        if axis is None
        else f"the ranks along {axis} hold different copies"
    )
    return f"{what}, in this and {len(case.wrong) - 1} more tensors" if len(case.wrong) > 1 else what


def _asked(family: Family, case: Case) -> Diagnosis | None:
    """What a family makes of a case. A cause that cannot be sought must not cost the finding itself."""
    try:
        return family(case)
    except Exception as error:  # noqa: BLE001 (user models run here, and whatever they raise says nothing of the run)
        case.tried.append(
            Hypothesis(name=f"{family.__module__}.{family.__name__} ended in {error!r}", residual=inf, holds=False)
        )
        return None


def _order(step: int, stage: str) -> tuple[int, int]:
    return (step, STAGES.index(stage))


def _where(comparison: Comparison) -> str:
    return f"batch{comparison.part}" if comparison.stage == "batch" else comparison.name


def _inherited(case: Case, later: Sequence[Comparison]) -> tuple[str, int]:
    """What else differs, and whether that follows from the first."""
    if not later:
        return "", 0
    if case.first.stage != "forward":
        return _later(len(later)), len(later)
    found = origin.of_outputs(case)
    # What holds the faulty module is as wrong as it is.
    others = [n for n in found.own if n not in (case.first.name, ROOT) and not case.first.name.startswith(f"{n}.")]
    said = _later(len(later))
    if found.inherited:
        said += (
            f"; of {len(found.inherited) + len(found.own)} modules that could be asked, {len(found.inherited)} give "
        )
        said += "the same on one device when fed this run's own input, so that their error is not their own"
    if case.first.name in found.inherited:
        said += f"; {case.first.name} is one of them: what it was fed is wrong already, by what is computed between it "
        said += "and the modules before it, or it mixes the samples of a batch, of which each rank has a part"
    if others:
        said += f"; {', '.join(others[:3])} {'are' if len(others) > 1 else 'is'} wrong of its own as well"
    return said, len(later) - len(others)


def _sizes(comparison: Comparison) -> str:
    if comparison.reason:
        return comparison.reason
    said = f"max|got - want| = {comparison.error:.3g}, {comparison.floors:.3g} noise floors of {comparison.floor:.2g}"
    return said if comparison.ratio is None else f"{said}; got / want = {comparison.ratio:.6g} everywhere"


def _spread(case: Case) -> str:
    counted = len(case.stage)
    return f"{len(case.wrong)} of {counted} tensors of this stage and step differ" if counted > 1 else ""
