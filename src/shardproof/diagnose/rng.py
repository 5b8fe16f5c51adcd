"""Random numbers that should be alike and are not, or should differ and do not."""

from __future__ import annotations

from shardproof.compare.draws import DP_ALIKE, TP_DIFFER
from shardproof.diagnose.case import Case, Diagnosis


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
