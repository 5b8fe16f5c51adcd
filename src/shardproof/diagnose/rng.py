"""Random numbers that should be alike and are not, or should differ and do not."""

from __future__ import annotations

from shardproof.compare.draws import DP_ALIKE, TP_DIFFER
from shardproof.diagnose.case import Case, Diagnosis


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
