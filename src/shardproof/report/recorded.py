"""A recording as text: what `shardproof show` prints."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from rich.text import Text

from shardproof.errors import UsageError
from shardproof.report import spelling
from shardproof.report.lines import INDENT, columns, heading
from shardproof.report.shown import place
from shardproof.report.spelling import printable
from shardproof.spec.stages import STAGES
from shardproof.trace.folder.line import DEPTHS
from shardproof.trace.folder.reader import RankTrace, Recording
from shardproof.trace.record import Record
from shardproof.trace.stats import Stats, stats_of

FIRST = 4
"""Values of a tensor that are printed."""

NEAR = 6
"""Names that an error lists where a pattern matches none."""

_ORDER = {stage: position for position, stage in enumerate(STAGES)}

LONGEST_FACT = 200
"""Characters of a header's field that is printed."""

_OWN = frozenset(("shardproof", "version", "rank", "world_size", "steps"))
"""Fields of a header that are told in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Which records are asked for; None is any."""

    rank: int | None = None
    name: str | None = None
    """A pattern as of file names, held against the whole canonical name."""

    step: int | None = None
    stage: str | None = None

    def has(self, record: Record) -> bool:
        """Whether a record is asked for, of whatever rank."""
        return (
            (self.step is None or record.step == self.step)
            and (self.stage is None or record.stage == self.stage)
            and (self.name is None or fnmatchcase(record.name, self.name))
        )


def summary(recording: Recording) -> Iterator[Text]:
    """Ranks, steps, what was kept of each stage, and what is wrong with the recording."""
    traces = recording.ranks.values()
    yield Text(f"recording {printable(str(recording.path))}", "bold")
    state = "complete" if recording.complete else "not complete"
    yield Text(f"{spelling.count(recording.world_size, 'rank')}: {spelling.ranks(recording.ranks)}, {state}")
    yield Text(f"steps: {_steps_held(recording)}")
    for key, value in _facts(recording):
        yield Text(f"{printable(key)}: {printable(value)}")
    yield Text()
    yield from _table(
        ["stage", "records", *DEPTHS, "nothing", "bytes"], _by_stage(traces), right=frozenset(range(1, 7))
    )
    problems = (*recording.problems, *_left_by_an_exception(recording))
    if problems:
        yield from heading("problems", style="bold yellow")
        yield from (Text(f"{INDENT}- {printable(problem)}") for problem in problems)


def _left_by_an_exception(recording: Recording) -> Iterator[str]:
    for rank, trace in recording.ranks.items():
        for event in trace.events:
            if event.get("event") == "aborted":
                why = f"{event.get('exception')}: {event.get('message')}"[:LONGEST_FACT]
                yield f"rank {rank}: an exception left the loop in step {event.get('step')}: {why}"


def records(recording: Recording, chosen: Chosen, *, stats: bool) -> Iterator[Text]:
    """One row a record, rank by rank in the order in which they were made; `stats` sums up each tensor.

    Raises `UsageError` where there is none such.
    """
    if chosen.rank is not None and chosen.rank not in recording.ranks:
        raise UsageError(f"--rank {chosen.rank}: {recording.path} has {spelling.of_ranks(recording.ranks)}")
    heads = ["rank", "step", "stage", "name", "call", "shape", "dtype"]
    numbers = [0, 1, 4]
    if stats:
        heads += ["min", "max", "mean", "rms", "zeros", "NaN", "inf"]
        numbers += range(7, 14)
    else:
        heads += ["where", "values"]
    rows = []
    for rank, trace in recording.ranks.items():
        if chosen.rank not in (None, rank):
            continue
        for number, record in enumerate(trace.records):
            if chosen.has(record):
                rows.append([str(rank), *_what(trace, number), *_values(trace, number, stats=stats)])
    if not rows:
        raise _nothing(recording, chosen)
    yield from _table(heads, rows, right=frozenset(numbers))
    problems = (*recording.problems, *_left_by_an_exception(recording))
    if problems:
        yield from heading("problems", style="bold yellow")
        yield from (Text(f"{INDENT}- {printable(problem)}") for problem in problems)


def _table(heads: list[str], rows: Iterable[list[str]], right: frozenset[int]) -> Iterator[Text]:
    head, *lines = columns([heads, *rows], right=right)
    yield Text(head, "dim")
    yield from map(Text, lines)


def _by_stage(traces: Iterable[RankTrace]) -> Iterator[list[str]]:
    counts: dict[str, Counter[str]] = {}
    for trace in traces:
        for number, record in enumerate(trace.records):
            found = counts.setdefault(record.stage, Counter())
            found[trace.depth(number) or "nothing"] += 1
            found["bytes"] += trace.size_bytes(number)
    for stage in sorted(counts, key=lambda stage: _ORDER.get(stage, len(_ORDER))):
        yield _counted(stage, counts[stage])
    if len(counts) > 1:
        yield _counted("all", sum(counts.values(), Counter()))


def _counted(stage: str, found: Counter[str]) -> list[str]:
    kinds = [found[kind] for kind in (*DEPTHS, "nothing")]
    return [stage, str(sum(kinds)), *(str(number or "-") for number in kinds), size(found["bytes"])]


def size(of_bytes: int) -> str:
    """`640 B`, `1.5 KiB`, `3.2 GiB`."""
    if of_bytes < 1024:
        return f"{of_bytes} B"
    power = min((of_bytes.bit_length() - 1) // 10, 5)
    return f"{of_bytes / 1024**power:.1f} {'KMGTP'[power - 1]}iB"


def _steps(found: set[int]) -> str:
    said = ["before the first"] if -1 in found else []
    numbers = found - {-1}
    return ", ".join([*said, *([spelling.ranks(numbers)] if numbers else [])]) or "none"


def _steps_held(recording: Recording) -> str:
    held = {record.step for trace in recording.ranks.values() for record in trace.records}
    asked = _header(recording).get("steps")
    if not isinstance(asked, str) or asked in ("all", spelling.ranks(held - {-1})):
        return _steps(held)
    return printable(f"{_steps(held)}; asked for: {asked}")


def _facts(recording: Recording) -> Iterator[tuple[str, str]]:
    """What the header of the first rank says beside its own fields, as far as that fits a line."""
    for key, value in _header(recording).items():
        said = _fact(key, value)
        if key not in _OWN and said is not None and len(said) <= LONGEST_FACT:
            yield key, said


def _header(recording: Recording) -> Mapping[str, object]:
    return next(iter(recording.ranks.values())).header


def _fact(key: str, value: object) -> str | None:
    """A field of a header in words; None for one that says nothing, or that is no matter of one line."""
    if value is None or (key == "names" and value == ["*"]):
        return None
    if key == "what" and isinstance(value, dict):
        return _depths(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return None if isinstance(value, dict) else str(value)


def _depths(what: Mapping[object, object]) -> str:
    """`full`, or `full of batch, gradient; stats of forward`."""
    by_depth: dict[str, list[str]] = {}
    for stage, depth in what.items():
        by_depth.setdefault(str(depth), []).append(str(stage))
    if len(by_depth) == 1 and len(what) >= len(STAGES) - 1:
        return next(iter(by_depth))
    return "; ".join(f"{depth} of {', '.join(stages)}" for depth, stages in by_depth.items())


def _what(trace: RankTrace, number: int) -> list[str]:
    record, dtype = trace.records[number], trace.dtype(number)
    return [
        str(record.step),
        record.stage,
        printable(spelling.with_part(record.name, record.part)),
        str(record.call),
        "" if dtype is None else f"[{', '.join(map(str, trace.shape(number)))}]",
        "" if dtype is None else str(dtype).removeprefix("torch."),
    ]


def _values(trace: RankTrace, number: int, *, stats: bool) -> list[str]:
    depth = trace.depth(number)
    if depth is None:
        said = "unknown" if trace.records[number].unknown else "none"
        return [said, *[""] * 6] if stats else ["", f"({said})"]
    if stats:
        found = stats_of(trace.tensor(number)) if depth == "full" else trace.stats(number)
        return [*_summed(found), *(str(count or "-") for count in (found.zeros, found.nans, found.infs))]
    where = printable(place(trace.records[number].piece)) or "whole" * (trace.records[number].piece is not None)
    if depth == "full":
        return [where, _first(trace.tensor(number))]
    low, high, mean, _ = _summed(trace.stats(number))
    return [where, f"({depth}) from {low} to {high}, mean {mean}"]


def _summed(stats: Stats) -> list[str]:
    """Smallest, largest, mean and root mean square of the finite values."""
    finite = stats.count - stats.nans - stats.infs
    if finite <= 0:
        return ["-"] * 4
    rms = math.sqrt(stats.square_sum / finite) if stats.square_sum >= 0 else math.nan
    return [spelling.number(value) for value in (stats.min, stats.max, stats.sum / finite, rms)]


def _first(tensor: torch.Tensor) -> str:
    if not tensor.numel():
        return "(no part of it)"
    flat = tensor.reshape(-1)[:FIRST]
    # By way of a dtype that prints: some of float8 have no conversion to Python of their own.
    shown = (flat.to(torch.float64) if flat.is_floating_point() else flat).tolist()
    said = " ".join(spelling.number(value) if isinstance(value, float) else str(value) for value in shown)
    return f"{said} ..." if tensor.numel() > FIRST else said


def _nothing(recording: Recording, chosen: Chosen) -> UsageError:
    names = {record.name for trace in recording.ranks.values() for record in trace.records}
    if chosen.name is not None and not any(fnmatchcase(name, chosen.name) for name in names):
        near = difflib.get_close_matches(chosen.name, sorted(names), n=NEAR, cutoff=0.3) or sorted(names)[:NEAR]
        listed = ", ".join(map(printable, near)) or "there is no record"
        return UsageError(f"--name {chosen.name!r}: no record has such a name; near names: {listed}")
    steps = _steps({record.step for trace in recording.ranks.values() for record in trace.records})
    return UsageError(f"{recording.path}: no record is of such a rank, step, stage and name; steps: {steps}")
