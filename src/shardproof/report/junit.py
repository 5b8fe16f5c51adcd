"""The report as JUnit XML, which CI systems show: a suite for each strategy, a case for each stage of its steps.

A case for each tensor would be tens of thousands, and one for each step would have other names whenever the number of
steps changes; a CI system knows a case by its name. So a strategy has at most one case per stage and one more,
`verdict`, which says what the strategy's row in the table says and carries its time: stages are compared together, and
have no time of their own.

What the readers agree on is the schema of Jenkins' xUnit plugin; nothing is written that it lacks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from shardproof.compare.verdict import Comparison, Verdict
from shardproof.diagnose.finding import Finding
from shardproof.report import file, finding, spelling
from shardproof.report.data import Report, Run
from shardproof.report.stopped import Stopped
from shardproof.report.table import word
from shardproof.spec.stages import STAGES

WIDTH = 100
"""Characters of a line in a body."""

LISTED = 20
"""Tensors, or warnings, that a case lists."""

LONGEST_MESSAGE = 300
"""Characters of an attribute: what systems show in one line."""

LONGEST_BODY = 20_000
"""Characters. A traceback may have more."""


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    outcome: str = ""
    """`failure`, `error` or `skipped`; empty for a case that passed."""
    kind: str = ""
    message: str = ""
    body: str = ""
    out: str = ""
    time_s: float = 0.0


def write(report: Report, path: Path) -> None:
    """Write `report` to `path`, in one move. Raises `UsageError` where it cannot be written."""
    file.write(path, document(report))


def document(report: Report) -> str:
    """The whole document. Characters that XML does not know, and those that steer a terminal, are escaped."""
    root = ET.Element("testsuites", name="shardproof", time=_seconds(report.time_s))
    suites = [_suite(report, run.strategy, run.time_s, list(_cases(report, run))) for run in report.runs]
    if report.stopped is not None or not suites:
        suites.append(_suite(report, "stopped", 0.0, [_stop(report.stopped)]))
    root.extend(suites)
    for total in ("tests", "failures", "errors"):
        root.set(total, str(sum(int(suite.get(total, "0")) for suite in suites)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(report: Report, strategy: str, time_s: float, cases: Sequence[_Case]) -> ET.Element:
    counts = {name: sum(case.outcome == name for case in cases) for name in ("failure", "error", "skipped")}
    element = ET.Element(
        "testsuite",
        name=_text(f"{report.experiment} {strategy}"),
        tests=str(len(cases)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
        time=_seconds(time_s),
    )
    about = {
        "experiment": report.experiment,
        "reference": report.reference,
        "ranks": str(report.ranks),
        "steps": str(report.steps),
        "dtype": report.dtype,
        "device": report.device,
    }
    properties = ET.SubElement(element, "properties")
    for name, value in about.items():
        ET.SubElement(properties, "property", name=name, value=_text(value))
    for case in cases:
        element.append(_element(case, f"{_dotted(report.experiment)}.{_dotted(strategy)}"))
    return element


def _element(case: _Case, of_class: str) -> ET.Element:
    element = ET.Element("testcase", classname=of_class, name=_text(case.name), time=_seconds(case.time_s))
    if case.outcome:
        said = ET.SubElement(element, case.outcome, type=_text(case.kind), message=_shortened(case.message))
        said.text = _body(case.body) or None
    if case.out:
        ET.SubElement(element, "system-out").text = _body(case.out)
    return element


def _cases(report: Report, run: Run) -> Iterator[_Case]:
    yield _verdict(report, run)
    known = {stage: position for position, stage in enumerate(STAGES)}
    stages = {c.stage for c in run.comparisons} | {found.stage for found in run.findings}
    for stage in sorted(stages, key=lambda stage: (known.get(stage, len(known)), stage)):
        yield _stage(report, run, stage)


def _verdict(report: Report, run: Run) -> _Case:
    said, _ = word(run)
    first = finding.first(run)
    out = "\n".join(_notes(report, run))
    if first is not None:
        message = f"{finding.why(first)}: {finding.place(first)}"
        return _Case("verdict", "failure", first.cause, message, _in_full(report, run, first), out, run.time_s)
    if not run.ok:
        nothing = "nothing that the run computed could be compared"
        return _Case("verdict", "failure", "nothing-compared", nothing, _reasons(run.comparisons), out, run.time_s)
    if said == "UNPROVEN":
        unproven = "UNPROVEN: no gradient or updated weight could be compared"
        return _Case("verdict", "skipped", "unproven", unproven, _reasons(run.comparisons), out, run.time_s)
    if said == "no replicas":
        alone = "NO REPLICAS: every rank holds a part of its own"
        return _Case("verdict", "skipped", "no-replicas", alone, "", out, run.time_s)
    return _Case("verdict", out=out, time_s=run.time_s)


def _stage(report: Report, run: Run, stage: str) -> _Case:
    compared = [c for c in run.comparisons if c.stage == stage]
    different = [c for c in compared if c.verdict is Verdict.DIFFERENT]
    found = next((found for found in run.findings if found.stage == stage), None)
    out = "\n".join(line for line in (_counted(compared), _reasons(compared)) if line)
    if found is not None or different:
        first = finding.first(run)
        body = [] if found is None else [_in_full(report, run, found)]
        if first is not None and first.stage != stage:
            body.insert(0, f"the run first diverges elsewhere: {finding.place(first)}: {finding.why(first)}")
        body += [_distance(c) for c in different[:LISTED]]
        body += [f"and {len(different) - LISTED} more"] if len(different) > LISTED else []
        message = f"{len(different)} of {spelling.count(len(compared), 'tensor')} different"
        if found is not None:
            message = f"{finding.why(found)}: {finding.place(found)}; {message}"
        return _Case(stage, "failure", "different" if found is None else found.cause, message, "\n".join(body), out)
    unchecked = [c for c in compared if c.verdict is Verdict.NOT_CHECKED]
    if len(unchecked) == len(compared):
        why = "; ".join(dict.fromkeys(c.reason or "no reason was given" for c in unchecked))
        return _Case(stage, "skipped", "not-checked", why, _reasons(unchecked))
    return _Case(stage, out=out)


def _stop(stopped: Stopped | None) -> _Case:
    if stopped is None:
        return _Case("check", "error", "nothing-compared", "nothing was compared")
    first, *_ = stopped.message.strip().splitlines() or [stopped.kind]
    return _Case(stopped.during or "check", "error", stopped.kind, first, stopped.message)


def _in_full(report: Report, run: Run, found: Finding) -> str:
    return "\n".join(line.plain for line in finding.full(run, found, report.trusted, WIDTH)).strip("\n")


def _counted(compared: Sequence[Comparison]) -> str:
    counts = [(verdict, sum(c.verdict is verdict for c in compared)) for verdict in Verdict]
    return ", ".join(f"{number} {verdict}" for verdict, number in counts if number)


def _reasons(compared: Sequence[Comparison]) -> str:
    reasons: dict[str, int] = {}
    for c in compared:
        if c.verdict is Verdict.NOT_CHECKED:
            reasons[c.reason] = reasons.get(c.reason, 0) + 1
    lines = [
        f"not checked, {spelling.count(n, 'tensor')}: {why or 'no reason was given'}" for why, n in reasons.items()
    ]
    return "\n".join(lines[:LISTED])


def _distance(compared: Comparison) -> str:
    named = spelling.with_part(compared.name, compared.part)
    return f"{spelling.step(compared.step)}, {named}: {spelling.floors(compared.floors)}"


def _notes(report: Report, run: Run) -> Iterator[str]:
    yield _counted(run.comparisons)
    yield from (f"note: {note}" for note in run.notes[:LISTED])
    yield from (f"warning: {warning}" for warning in report.warnings[:LISTED])
    for proof in report.proofs:
        if proof.strategy == run.strategy:
            yield f"caught {proof.caught} of {spelling.count(len(proof.planted), 'planted fault')}"
            yield from (f"missed: {miss.fault} ({miss.place}): {miss.reason}" for miss in proof.missed)


def _dotted(name: str) -> str:
    """`examples.digits.mlp` of `examples/digits.py:mlp`: systems take the last dot for the end of a package."""
    return re.sub(r"[^\w=,-]+", ".", re.sub(r"\.py(?=:|$)", "", spelling.printable(name))).strip(".") or "shardproof"


def _text(text: str, keep: str = "") -> str:
    # What is printable is a part of what XML 1.0 allows. An escape can be read; a character that is left out cannot.
    return spelling.printable(text, keep=keep)


def _shortened(text: str) -> str:
    line = _text(" ".join(text.split()))
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 3]}..."


def _body(text: str) -> str:
    said = _text(text, keep="\n\t")
    return (
        said if len(said) <= LONGEST_BODY else f"{said[:LONGEST_BODY]}\n... and {len(said) - LONGEST_BODY} characters"
    )


def _seconds(time_s: float) -> str:
    return f"{time_s if math.isfinite(time_s) and time_s > 0 else 0:.3f}"
