"""Ranks that called different collectives, and ranks that others wait for: told from what each has called."""

from __future__ import annotations

import linecache
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardproof.ranks.journal import Call, Spot, Tally
from shardproof.ranks.output import numbers

_BACKWARD = "in no line of yours, as in a backward pass"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first call on a group that its ranks did not call alike: rank -> call."""

    calls: Mapping[int, Call]

    @property
    def guilty(self) -> tuple[int, ...]:
        """The ranks that differ from most others; all of them where there is no majority."""
        alike = _alike(self.calls)
        largest = max(map(len, alike))
        if sum(len(ranks) == largest for ranks in alike) > 1:
            return tuple(sorted(self.calls))
        return tuple(sorted(rank for ranks in alike if len(ranks) < largest for rank in ranks))


@dataclass(frozen=True, slots=True)
class Waiting:
    """Ranks that wait in a collective for others, which have not called it."""

    call: Call
    """As the lowest of them called it."""
    waiting: tuple[int, ...]
    missing: tuple[int, ...]


def first_mismatch(journals: Mapping[int, Sequence[Call]], *, sizes: bool) -> Mismatch | None:
    """The earliest difference; `sizes` counts those that only some backends forgive."""
    together: dict[tuple[str, int], dict[int, Call]] = {}
    order: dict[tuple[str, int], int] = {}
    for rank, calls in sorted(journals.items()):
        for index, call in enumerate(calls):
            key = call.group, call.number
            together.setdefault(key, {})[rank] = call
            order[key] = min(index, order.get(key, index))
    for key in sorted(together, key=lambda key: (order[key], key)):
        calls_of = together[key]
        differ = len({call.same for call in calls_of.values()}) > 1
        uneven = sizes and len({call.sizes for call in calls_of.values()}) > 1
        free = any(call.name.startswith("all_to_all") for call in calls_of.values())
        if differ or (uneven and not free):
            return Mismatch(calls_of)
    return None


def uneven_groups(tallies: Mapping[int, Mapping[str, Tally]]) -> list[str]:
    """Groups whose ranks, all of them heard, did not all call the same collectives in the same order."""
    found = []
    for group in sorted({group for of_rank in tallies.values() for group in of_rank}):
        of_group = {rank: of_rank[group] for rank, of_rank in tallies.items() if group in of_rank}
        members = next(iter(of_group.values())).ranks
        if all(rank in tallies for rank in members) and (
            len(of_group) < len(members) or len({(tally.count, tally.digest) for tally in of_group.values()}) > 1
        ):
            found.append(group)
    return found


def who_waits(journals: Mapping[int, Sequence[Call]]) -> Waiting | None:
    """Whom ranks wait for whose last call not all of its group have come to; None where nobody waits."""
    reached: dict[str, dict[int, int]] = {}
    for rank, calls in journals.items():
        for call in calls:
            reached.setdefault(call.group, {})[rank] = call.number
    last = {rank: calls[-1] for rank, calls in journals.items() if calls}
    found = []
    for rank, call in sorted(last.items()):
        missing = tuple(r for r in call.ranks if r in journals and reached[call.group].get(r, -1) < call.number)
        if missing:
            found.append((rank, call, missing))
    waits = {rank for rank, _, _ in found}
    # A rank that waits itself, on another group, is held up by somebody else.
    for _, call, missing in found:
        if not waits.intersection(missing):
            waiting = tuple(r for r, other, m in found if (other.group, other.number) == (call.group, call.number))
            return Waiting(call, waiting, missing)
    return None


def told_mismatch(mismatch: Mismatch, during: str) -> str:
    """The text of the error."""
    some = next(iter(mismatch.calls.values()))
    guilty, others = mismatch.guilty, tuple(sorted(set(mismatch.calls) - set(mismatch.guilty)))
    where = f" in {during}" if during else ""
    spot = mismatch.calls[guilty[0]].spot
    at = f" at {spot}" if spot is not None else ""
    if others:
        first = f"{_named(guilty)} called another collective{where} than {_named(others)}{at}"
    else:
        first = f"{_named(guilty)} called different collectives{where}{at}"
    lines = [f"{first}. Call {some.number + 1} {_group(some)} was"]
    for ranks in _alike(mismatch.calls):
        lines += ["", f"{_named(ranks)}: {told(mismatch.calls[ranks[0]])}"]
    lines += ["", "All ranks of a group must call the same collectives, in the same order, with the same sizes."]
    return "\n".join(lines)


def told_waiting(waiting: Waiting) -> str:
    """`ranks 0, 2 wait for rank 1 in call 3 of ranks 0-2: ...`."""
    few = f"{_named(waiting.waiting)} wait{'s' if len(waiting.waiting) == 1 else ''} for {_named(waiting.missing)}"
    return f"{few} in call {waiting.call.number + 1} {_group(waiting.call)}: {told(waiting.call)}"


def told(call: Call) -> str:
    """`all_reduce SUM of float32 [4], train.py:44 in loss: dist.all_reduce(t)`."""
    what = f"{call.name} {call.details}".rstrip()
    return f"{what}, {told_spot(call.spot)}"


def told_spot(spot: Spot | None) -> str:
    """A line with its source, as far as it can be read."""
    if spot is None:
        return _BACKWARD
    source = linecache.getline(spot.file, spot.line).strip()
    return f"{spot} in {spot.function}" + (f": {source}" if source else "")


def _alike(calls: Mapping[int, Call]) -> list[tuple[int, ...]]:
    """Ranks that called the same, together; the lowest first."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, call in sorted(calls.items()):
        groups.setdefault((call.same, call.sizes), []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def _group(call: Call) -> str:
    return f"of ranks {numbers(call.ranks)}" + (f" ({call.axis})" if call.axis else "")


def _named(ranks: Iterable[int]) -> str:
    listed = list(ranks)
    return f"rank{'' if len(listed) == 1 else 's'} {numbers(listed)}"
