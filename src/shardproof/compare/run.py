"""Every tensor of a run against the reference, in causal order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shardproof.compare import activations, batches, losses, parameters
from shardproof.compare.draws import misdrawn
from shardproof.compare.measure import Look
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed, Reference, causal_order
from shardproof.spec.stages import STAGES

RANDOM = "depends on random numbers, which each data rank draws for its own part (set dropout to 0 to compare)"


def compare_run(
    observed: Observed,
    reference: Reference,
    *,
    exact: bool = False,
    share: tuple[int, int] = (0, 1),
    repeats: bool = False,
    told: Callable[[Comparison], None] = lambda _comparison: None,
) -> list[Comparison]:
    """One Comparison per tensor, in causal order: nothing that was recorded is left out.

    `exact` says that rounding is far below any bug (float64), so that what follows from an output tells of it.
    `share` is (number, of how many): the steps are dealt out in turn, and what comes before the first is the first's.
    `repeats` says that data ranks may draw the same random numbers as each other.
    `told` hears of each tensor before the floor of the next is asked for (`estimated.Estimate.saw`).
    """
    number, count = share
    # Initial values tell where parameters lie, so that all shares look at them.
    keys = [key for key in causal_order(reference.trace, observed.ranks) if key[0] < 0 or key[0] % count == number]
    backward = [key for key in keys if key[1] == "backward"]
    factors: dict[tuple[int, int], float] = {}
    understood = -1
    known: dict[Key, list[Look]] = {}
    looked_at: set[tuple[int, str]] = set()
    found: list[Comparison] = []
    for key in keys:
        stage = key[1]
        if stage == "batch":
            found.append(batches.compare(key, observed))
        elif stage == "loss":
            found.append(losses.compare(key, observed, reference))
        elif stage == "forward":
            found.append(activations.compare(key, observed, reference))
        elif stage == "backward":
            if key[0] != understood:
                understood = key[0]
                own = [other for other in backward if other[0] == understood]
                factors |= activations.backward_factors(own, observed, reference)
            found.append(activations.compare(key, observed, reference, factors))
        else:
            if key[:2] not in looked_at:
                looked_at.add(key[:2])
                known |= parameters.looks([other for other in keys if other[:2] == key[:2]], observed, reference)
            found.append(parameters.compare(key, observed, reference, known.pop(key, ())))
        told(found[-1])
    found = [c for c in found if c.step >= 0 or number == 0]
    found = _only_where_gradients_differ(_with_draws(_without_random(found, observed, reference), observed, repeats))
    return _only_where_something_follows(_only_of_owners(found, observed)) if exact else found


def _only_where_gradients_differ(found: list[Comparison]) -> list[Comparison]:
    """Activation gradients locate a fault; alone they are none, as a user may scale a backward pass as he likes."""
    wrong = {c.step for c in found if c.stage == "gradient" and c.verdict is Verdict.DIFFERENT}
    reason = "differs by more than one factor, yet every parameter gradient of the step is right"
    return [
        replace(c, verdict=Verdict.NOT_CHECKED, reason=reason)
        if c.stage == "backward" and c.verdict is Verdict.DIFFERENT and c.step not in wrong
        else c
        for c in found
    ]


def _only_of_owners(found: list[Comparison], observed: Observed) -> list[Comparison]:
    """A gradient that only the ranks lack who get the new weight from another: ZeRO's owners reduce, step and send.

    Told by the new weight, which is right everywhere, and by a rank of each group of replicas whose gradient is right.
    """
    parallelism = observed.parallelism
    if parallelism.dp_replicate == 1 or parallelism.dp_shard > 1:
        return found
    updated = {
        (c.step, c.name) for c in found if c.stage == "update" and c.verdict in (Verdict.EQUAL, Verdict.ROUNDING)
    }
    reason = "right on the rank that owns it, and the new weight is right on every rank"

    def owned(c: Comparison) -> bool:
        right = set(range(parallelism.world_size)) - set(c.ranks)
        return {parallelism.coordinates(rank)["tp"] for rank in right} == set(range(parallelism.tp))

    return [
        replace(c, verdict=Verdict.NOT_CHECKED, reason=reason)
        if c.stage == "gradient" and c.verdict is Verdict.DIFFERENT and (c.step, c.name) in updated and owned(c)
        else c
        for c in found
    ]


def _only_where_something_follows(found: list[Comparison]) -> list[Comparison]:
    """An output that differs, where loss, gradients and weights of the step do not, is in another order or unused.

    A model may sort its tokens or pack its sequences, and count what it sees: that is no wrong training.
    """
    after = [c for c in found if STAGES.index(c.stage) > STAGES.index("forward") and c.stage != "backward"]
    wrong = {c.step for c in after if c.verdict is Verdict.DIFFERENT}
    right = {c.step for c in after if c.stage == "gradient" and c.verdict in (Verdict.EQUAL, Verdict.ROUNDING)}
    right -= {c.step for c in after if c.stage == "loss" and c.verdict is Verdict.NOT_CHECKED}
    reason = "differs, yet the loss and every gradient and weight of the step are right: another order, or never used"
    return [
        replace(c, verdict=Verdict.NOT_CHECKED, reason=reason)
        if c.stage == "forward" and c.verdict is Verdict.DIFFERENT and c.step in right - wrong
        else c
        for c in found
    ]


def _with_draws(found: list[Comparison], observed: Observed, repeats: bool) -> list[Comparison]:
    """What was drawn wrongly is different, whatever values it has."""
    wrong = misdrawn(observed, repeats=repeats)
    if wrong is None:
        return found
    key, reason, ranks = wrong
    return [replace(c, verdict=Verdict.DIFFERENT, reason=reason, ranks=ranks) if c.key == key else c for c in found]


def _without_random(found: list[Comparison], observed: Observed, reference: Reference) -> list[Comparison]:
    """From the first draw that is not the reference's own, nothing can be compared."""
    start = _first_foreign_draw(observed, reference)
    if start is None:
        return found
    step, order = start
    forward = {key: place for place, key in enumerate(reference.trace.by_key) if key[1] == "forward"}

    def depends(c: Comparison) -> bool:
        if c.stage == "batch" or c.step < step:
            return False
        if c.step == step and c.stage == "forward":
            return forward.get((c.step, c.stage, c.name, c.part), order) >= order
        return c.step > step or STAGES.index(c.stage) > STAGES.index("forward")

    return [replace(c, verdict=Verdict.NOT_CHECKED, reason=RANDOM) if depends(c) else c for c in found]


def _first_foreign_draw(observed: Observed, reference: Reference) -> tuple[int, int] | None:
    """(step, place among the reference's keys) of the first output made after draws that the reference did not make."""
    own: dict[tuple[Key, int], int] = {
        (record.key, record.call): record.draws for record in reference.trace.records if record.draws
    }
    if not own:
        # One device draws nothing at all: whatever a layout draws must not matter.
        return None
    place = {key: number for number, key in enumerate(reference.trace.by_key)}
    found = [
        (record.step, place.get(record.key, 0))
        for trace in observed.ranks
        for record in trace.records
        if record.draws and own.get((record.key, record.call)) != record.draws
    ]
    return min(found, default=None)
