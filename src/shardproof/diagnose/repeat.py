"""The same run twice: what differs from itself has no layout to blame."""

from __future__ import annotations

import math

from shardproof.compare.measure import largest, wide
from shardproof.compare.view import Key
from shardproof.diagnose.case import Case, Diagnosis
from shardproof.trace.trace import Trace


def differs_from_itself(case: Case) -> Diagnosis | None:
    """The first wrong tensor has other values when the run is repeated."""
    again, first = case.again, case.first
    if again is None:
        return None
    if _read_other(case):
        # A loader with state of its own (a generator that lives on): the second run is another run.
        return None
    far, ranks = 0.0, []
    for rank, (one, two) in enumerate(zip(case.observed.ranks, again.ranks, strict=True)):
        moved = _moved(one, two, first.key)
        if moved > 6 * first.floor:
            ranks.append(rank)
        far = max(far, moved)
    if not ranks or not case.fits("the same run twice differs", 0.0):
        return None
    drawn = _draws_differ(case)
    return Diagnosis(
        cause="rng" if drawn else "nondeterminism",
        evidence=f"the same run a second time gives another value: {far:.3g} apart; rounding moves {first.floor:.2g}"
        + (f"; {drawn}" if drawn else ""),
        fix="seed the generator that is drawn from here from the run's own seed"
        if drawn
        else "wait for every collective and copy before its buffer is read or written again (work.wait(), "
        "stream.synchronize()), seed whatever draws, and keep no state (a counter, a file) that outlives a run",
        ranks=tuple(sorted(set(ranks))),
    )


def _read_other(case: Case) -> bool:
    """Whether the second run was fed other samples, or began with other weights, than the first."""
    ranks = () if case.again is None else zip(case.observed.ranks, case.again.ranks, strict=True)
    return any(
        _moved(one, two, key) > 0
        for one, two in ranks
        for key in one.by_key
        if key[1] in ("batch", "initial-state") and key[0] <= case.first.step
    )


def _moved(one: Trace, two: Trace, key: Key) -> float:
    """How far apart two runs of one rank show a tensor; NaN is no distance."""
    far = 0.0
    for number, other in zip(one.by_key.get(key, ()), two.by_key.get(key, ()), strict=False):
        if one.records[number].missing or two.records[other].missing:
            continue
        left, right = wide(one.tensor(number)), wide(two.tensor(other))
        same = left.shape == right.shape
        far = max(far, largest((left - right).abs().nan_to_num(0.0)) if same else math.inf)
    return far


def _draws_differ(case: Case) -> str:
    """Whether the generators stood elsewhere in the second run by then."""
    if case.again is None:
        return ""
    for rank, (one, two) in enumerate(zip(case.observed.ranks, case.again.ranks, strict=True)):
        states = [
            {(r.key, r.call): r.draws for r in trace.records if r.step == case.first.step and r.draws}
            for trace in (one, two)
        ]
        if any(states[1].get(key, state) != state for key, state in states[0].items()):
            return f"rank {rank} drew other random numbers"
    return ""
