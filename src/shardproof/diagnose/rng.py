"""Random numbers that should be alike and are not, or should differ and do not."""

from __future__ import annotations

from collections.abc import Iterable

from shardproof.compare.draws import DP_ALIKE, TP_DIFFER
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.trace.record import Record


def undue(case: Case) -> Diagnosis | None:
    """The first wrong output draws random numbers, of which one device draws none in the whole run."""
    drawing = {
        (record.key, rank)
        for rank, trace in enumerate(case.observed.ranks)
        for record in trace.records
        if record.draws and record.key == case.first.key
    }
    if not drawing or any(record.draws for record in case.reference.trace.records):
        return None
    if not case.fits("this layout draws random numbers, and one device none", 0.0):
        return None
    return Diagnosis(
        cause="rng",
        evidence=f"random numbers are drawn in or before {case.first.name} under this layout, and none on one device",
        fix="draw the same under every layout: seeded by the step and the data rank, or not at all",
    )


def not_drawn(case: Case) -> Diagnosis | None:
    """The other way round: the reference drew for the first wrong output, and this run drew nothing."""
    key = case.first.key

    def draws(records: Iterable[Record]) -> bool:
        return any(record.draws for record in records if record.key == key)

    traces = case.observed.ranks
    if not draws(case.reference.trace.records) or any(draws(trace.records) for trace in traces):
        return None
    if not case.fits("the reference draws random numbers, and this run none", 0.0):
        return None
    return Diagnosis(
        cause="rng",
        evidence=f"the reference drew random numbers in or before {case.first.name}, and this run drew none: a "
        "dropout of 0, or a module left in evaluation mode",
        fix="call model.train() after every evaluation, and give both runs the same dropout",
    )


def misdrawn(case: Case) -> Diagnosis | None:
    """Masks of dropout over the ranks of a group."""
    reason = case.first.reason
    if reason == TP_DIFFER:
        return Diagnosis(
            cause="rng",
            axis="tp",
            evidence=f"seen in what {case.first.name} set to zero",
            fix="seed what draws for a replicated tensor by the data rank alone, so that all ranks of a tp group draw "
            "alike",
        )
    if reason == DP_ALIKE:
        return Diagnosis(
            cause="rng",
            axis="dp",
            evidence=f"seen in what {case.first.name} set to zero",
            fix="seed every data rank differently: add its rank in mesh['dp'] to the seed",
        )
    return None
