"""What came of a run of the zoo, for a person: a row an entry, what was missed, and the sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from shardproof.diagnose.finding import CAUSES
from shardproof.report import spelling, text
from shardproof.report.finding import place, why
from shardproof.report.lines import GAP, INDENT, columns, heading, item, labelled, wrapped
from shardproof.zoo.entry import Bug, Control
from shardproof.zoo.run import BugResult, ControlResult, ZooReport
from shardproof.zoo.setting import Setting

BUG_HEADS = ("bug", "detected", "located", "named", "time")
CONTROL_HEADS = ("control", "passed", "time")

LEGEND = (
    "detected: there is a finding. located: it names a right stage and place. named: the first finding has the true "
    "cause. passed: right code, proven and without a finding."
)

LINES_OF_ERRORS = 3
"""Of what a check raised: the rest is a traceback."""


def view(report: ZooReport, width: int, *, verbose: bool = False) -> Iterator[Text]:
    """The lines of the report; `verbose` adds the finding of every bug in full."""
    width = max(width, text.NARROWEST)
    yield from header(report.setting, len(report.bugs), len(report.controls), report.time_s)
    if report.bugs:
        yield Text()
        yield from _bugs(report.bugs, width)
    if report.controls:
        yield Text()
        yield from _controls(report.controls)
    yield Text()
    yield from (Text(line, "dim") for line in wrapped(LEGEND, width))
    if verbose and report.bugs:
        yield from heading("every finding")
        for bug in report.bugs:
            yield from _finding(bug, width)
    missed = [bug for bug in report.bugs if not bug.ok]
    if missed:
        yield from heading("what was missed, and what was found instead", style="bold red")
        for bug in missed:
            yield from _miss(bug, width)
    alarms = [control for control in report.controls if not control.ok]
    if alarms:
        yield from heading("false alarms", style="bold red")
        for control in alarms:
            yield from _alarm(control, width)
    yield Text()
    yield conclusion(report)


def header(setting: Setting, bugs: int, controls: int, time_s: float = 0.0) -> Iterator[Text]:
    """What is run, and how."""
    time = f", {spelling.duration(time_s)}" if time_s else ""
    first, second = setting.grid
    yield Text(
        f"shardproof: {spelling.count(bugs, 'known bug')} and {spelling.count(controls, 'control')}{time}", "bold"
    )
    yield Text(
        f"seed {setting.seed}, width {setting.width}, dp {setting.dp}, tp {setting.tp}, grid {first}x{second}, "
        f"micro-batches {setting.microbatches}"
    )


def conclusion(report: ZooReport) -> Text:
    """The last line: how many bugs were detected, located and named, and how many controls raised a false alarm."""
    bugs, parts = report.bugs, []
    if bugs:
        sums = (
            ("detected", sum(bug.detected for bug in bugs)),
            ("located", sum(bug.located for bug in bugs)),
            ("named", sum(bug.cause_first for bug in bugs)),
        )
        counted = ", ".join(f"{word} {n} ({percentage(n, len(bugs))})" for word, n in sums)
        parts.append(f"{spelling.count(len(bugs), 'bug')}: {counted}")
    if report.controls:
        alarms = spelling.count(report.false_alarms, "false alarm")
        parts.append(f"{spelling.count(len(report.controls), 'control')}: {alarms}")
    complete = report.ok and all(bug.ok for bug in bugs)
    return Text("; ".join(parts), "bold green" if complete else "bold yellow" if report.ok else "bold red")


def percentage(part: int, whole: int) -> str:
    """`98.4%`, `100%`: never rounded up to all."""
    return "100%" if part == whole else f"{int(1000 * part / whole) / 10:g}%"


def outcome(result: BugResult | ControlResult) -> str:
    """One entry on one line, for progress."""
    if isinstance(result, ControlResult):
        said = "passed" if result.ok else "FALSE ALARM"
    else:
        said = _found(result) if result.ok else f"{_lacks(result)}: {_found(result)}"
    return f"{result.name}: {said}, {spelling.duration(result.time_s)}"


def listing(bugs: Iterable[Bug], controls: Iterable[Control]) -> Iterator[Text]:
    """A line an entry: its name, its cause, and its source or, as controls have none, what it is."""
    rows = [("entry", "cause", "source"), *((bug.name, bug.cause, bug.source) for bug in bugs)]
    rows += [(control.name, "(control)", control.summary) for control in controls]
    yield from map(Text, columns(rows))


def _bugs(bugs: Sequence[BugResult], width: int) -> Iterator[Text]:
    """A row an entry, by cause; where it was found stands at the end of a row where `width` allows, else below it."""
    bugs = sorted(bugs, key=lambda bug: CAUSES.index(bug.cause))
    rows = columns([BUG_HEADS, *map(_cells, bugs)], right=frozenset({4}))
    wide = max(len(row) for row in rows)
    places = [_found(bug) for bug in bugs]
    beside = wide + len(GAP) + max(map(len, places)) <= width
    yield Text(f"{rows[0]:<{wide}}{GAP}found" if beside else rows[0], "dim")
    cause = ""
    for bug, row, found in zip(bugs, rows[1:], places, strict=True):
        if bug.cause != cause:
            cause = bug.cause
            yield Text(cause, "bold")
        line = Text(f"{row:<{wide}}{GAP}{found}" if beside else row)
        line.highlight_regex(r"\bNO\b", "bold red")
        yield line
        if not beside:
            yield from item(found, width, style="dim", mark="", indent=INDENT * 2)


def _cells(bug: BugResult) -> tuple[str, ...]:
    marks = ("yes" if mark else "NO" for mark in (bug.detected, bug.located, bug.cause_first))
    return (f"{INDENT}{bug.name}", *marks, spelling.duration(bug.time_s))


def _controls(controls: Sequence[ControlResult]) -> Iterator[Text]:
    cells = [(f"{INDENT}{c.name}", "yes" if c.ok else "NO", spelling.duration(c.time_s)) for c in controls]
    head, *rows = columns([CONTROL_HEADS, *cells], right=frozenset({2}))
    yield Text(head, "dim")
    for row in rows:
        line = Text(row)
        line.highlight_regex(r"\bNO\b", "bold red")
        yield line


def _found(bug: BugResult) -> str:
    if bug.finding is not None:
        named = "" if bug.cause_first else f"{bug.found_cause}: "
        return f"{named}{place(bug.finding)}"
    return "an error, and no report" if bug.error else "nothing"


def _lacks(bug: BugResult) -> str:
    lacking = (("detected", bug.detected), ("located", bug.located), ("named", bug.cause_first))
    return "not " + next(word for word, there in lacking if not there)


def _finding(bug: BugResult, width: int) -> Iterator[Text]:
    yield from item(f"{bug.name}: {bug.cause}", width, mark="", style="bold")
    found = bug.finding
    if found is None:
        yield from labelled("found", _found(bug), width, indent=INDENT * 2)
        yield from labelled("error", _short(bug.error), width, indent=INDENT * 2)
        return
    said = (
        ("found", f"{why(found)}, {place(found)}, {spelling.of_ranks(found.ranks)}"),
        ("evidence", found.evidence),
        ("fix", found.fix),
        ("source", bug.source),
    )
    for label, value in said:
        yield from labelled(label, value, width, indent=INDENT * 2)


def _miss(bug: BugResult, width: int) -> Iterator[Text]:
    yield from item(f"{bug.name}: {_lacks(bug)}", width, mark="", style="bold")
    yield from labelled("true", f"{bug.cause}, {' or '.join(bug.stages)} of {', '.join(bug.where)}", width)
    found = bug.finding
    yield from labelled("found", _found(bug) if found is None else f"{why(found)}, {place(found)}", width)
    yield from labelled("evidence", _short(bug.error) if found is None else found.evidence, width)


def _alarm(control: ControlResult, width: int) -> Iterator[Text]:
    yield from item(control.name, width, mark="", style="bold")
    report = control.report
    if report is None:
        yield from labelled("error", _short(control.error), width)
    elif report.first is not None:
        yield from labelled("found", f"{why(report.first)}, {place(report.first)}", width)
        yield from labelled("evidence", report.first.evidence, width)
    else:
        yield from labelled("found", text.conclusion(report, width).plain, width)


def _short(error: str) -> str:
    return "\n".join(error.splitlines()[:LINES_OF_ERRORS]) or "none"
