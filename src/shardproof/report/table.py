"""One row a strategy: its verdict, its tensors by verdict, its layout, and the tensor worst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from shardproof.compare.verdict import Verdict
from shardproof.report import spelling
from shardproof.report.data import Report, Run
from shardproof.report.lines import GAP, INDENT, columns, wrapped

HEADS = ("verdict", *map(str, Verdict), "time")
NUMBERS = frozenset(range(2, len(HEADS) + 1))
"""The columns that are read as numbers."""

NAME_WIDTH = 20
"""A longer name (`dp_replicate=2,dp_shard=2,tp=2`) gets a line of its own where room is short."""

LEGEND = (
    "equal: the same bits. rounding: within what rounding alone does to that tensor, its measured "
    "noise floor. different: further away."
)

LEGEND_ESTIMATED = (
    "equal: the same bits. rounding: within what rounding may do to that tensor, its estimated noise floor (a "
    "recording made with disturb= measures it; docs/noise-floor.md). different: further away."
)

LEGEND_OF_REPLICAS = (
    "equal: the same bits on all ranks that hold the same part. different: other bits on some of them. "
    "No reference was trained: what all replicas have wrong is not seen."
)


def word(run: Run) -> tuple[str, str]:
    """The verdict on a run in one word, and its style."""
    if run.findings or run.verdicts[Verdict.DIFFERENT]:
        return "DIVERGES", "bold red"
    if run.invariants:
        # No parity without a reference; and no replicas where everything is sharded.
        return ("consistent", "green") if run.verdicts[Verdict.EQUAL] else ("no replicas", "bold yellow")
    if not run.proven:
        # Never a pass for what was not looked at.
        return "UNPROVEN", "bold yellow"
    return "parity", "green"


def table(report: Report, width: int) -> Iterator[Text]:
    """A row for each run; layout and worst tensor stand at its end where `width` allows, else below it."""
    runs, heads = report.runs, ("recording" if report.recorded else "strategy", *HEADS)
    layout_width = max((len(spelling.degrees(run.degrees)) for run in runs), default=0)
    tails = [f"{'layout':<{layout_width}}{GAP}worst"]
    tails += [f"{spelling.degrees(run.degrees):<{layout_width}}{GAP}{worst(run)}" for run in runs]
    rows = columns([heads, *map(_cells, runs)], right=NUMBERS)
    if len(rows[0]) + len(GAP) + max(map(len, tails)) <= width:
        yield Text(f"{rows[0]}{GAP}{tails[0]}", "dim")
        for row, tail, run in zip(rows[1:], tails[1:], runs, strict=True):
            yield _coloured(f"{row}{GAP}{tail}", run)
    else:
        yield from _stacked(runs, heads, width)
    yield Text()
    yield from (Text(line, "dim") for line in wrapped(legend(report), width))


def _cells(run: Run) -> tuple[str, ...]:
    # A dash, so that the eye stops at what is there.
    return (
        run.strategy,
        word(run)[0],
        *(str(n) if n else "-" for n in run.verdicts.values()),
        spelling.duration(run.time_s),
    )


def legend(report: Report) -> str:
    """What the verdicts mean."""
    return LEGEND_ESTIMATED if report.estimated else LEGEND_OF_REPLICAS if report.invariants else LEGEND


def worst(run: Run, room: int = 1000) -> str:
    """`1.8 floors, backward of blocks.0`."""
    furthest = run.worst
    if furthest is None:
        return "bitwise equal" if run.verdicts[Verdict.EQUAL] else "nothing was compared"
    distance = spelling.floors(furthest.floors)
    return f"{distance}, {spelling.tensor(furthest.stage, furthest.name, furthest.part, room - len(distance) - 2)}"


def _coloured(line: str, run: Run) -> Text:
    verdict, style = word(run)
    text = Text(line)
    text.highlight_regex(rf"(?<=  ){verdict}(?=  )", style)
    return text


def _stacked(runs: Sequence[Run], heads: Sequence[str], width: int) -> Iterator[Text]:
    """For narrow terminals: layout and worst tensor on a line of their own."""
    short = [("" if len(run.strategy) > NAME_WIDTH else run.strategy, *_cells(run)[1:]) for run in runs]
    rows = columns([heads, *short], right=NUMBERS)
    yield Text(rows[0], "dim")
    for row, run in zip(rows[1:], runs, strict=True):
        if len(run.strategy) > NAME_WIDTH:
            yield Text(run.strategy)
        yield _coloured(row, run)
        yield from (Text(f"{INDENT}{line}", "dim") for line in _tail(run, width - len(INDENT)))


def _tail(run: Run, width: int) -> list[str]:
    lead = f"{spelling.degrees(run.degrees)}; worst: "
    beside = f"{lead}{worst(run, width - len(lead))}"
    return [beside] if len(beside) <= width else [lead.rstrip(), f"{INDENT}{worst(run, width - len(INDENT))}"]
