"""What GitHub Actions shows of a report: annotations at lines of files, and a summary of the job.

Annotations are workflow commands, lines of output that the runner acts on. Whatever comes from a model, a recording or
an exception is escaped in them, and `silenced` keeps the report itself from being taken for commands.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shardproof.diagnose.finding import Finding
from shardproof.errors import UsageError
from shardproof.report import finding, spelling
from shardproof.report.blame import BLAMED
from shardproof.report.data import Report, Run
from shardproof.report.places import WHOLE, Place
from shardproof.report.stopped import Stopped
from shardproof.report.table import word

MOST = 10
"""Annotations: GitHub shows ten errors of a step and leaves out the others without a word."""

LONGEST = 4000
"""Characters of a message."""

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable with the path of the file to which a step appends its summary."""

WORKSPACE = "GITHUB_WORKSPACE"
"""Environment variable with the path of the checkout, to which the files of annotations are relative."""


def commands(report: Report, places: Mapping[str, Place], root: Path) -> Iterator[str]:
    """A command for each divergence, runs with the same one together; for what is not proven; for an error.

    `places` says where the parts of the experiment stand, `root` is the folder of the checkout.
    """
    if report.stopped is not None:
        yield _of_error(report.stopped, places, root)
    same: dict[tuple[str, str, str, int], tuple[list[str], Finding]] = {}
    for run in report.runs:
        found = finding.first(run)
        if found is not None:
            key = (found.cause, found.stage, found.where, found.step)
            same.setdefault(key, ([], found))[0].append(run.strategy)
    for strategies, found in list(same.values())[:MOST]:
        title = f"shardproof: {', '.join(strategies)}: {finding.why(found)}"
        ranks = spelling.of_ranks(found.ranks)
        lines = [finding.place(found) + (f", {ranks}" if ranks else ""), found.evidence]
        lines += [f"fix: {found.fix}"] if found.fix else []
        yield _command("error", title, "\n".join(lines), _blamed(found.cause, places), root)
    if unproven := [run.strategy for run in report.runs if finding.first(run) is None and _unproven(run)]:
        said = f"no gradient or updated weight of {', '.join(unproven)} could be compared"
        yield _command("warning", "shardproof: UNPROVEN", said, places.get(WHOLE), root)


def _unproven(run: Run) -> bool:
    return not run.ok or word(run)[0] == "UNPROVEN"


def _blamed(cause: str, places: Mapping[str, Place]) -> Place | None:
    """The first part that a cause concerns and whose place is known."""
    return next((places[part] for part in (*BLAMED.get(cause, ()), WHOLE) if part in places), None)


def _of_error(stopped: Stopped, places: Mapping[str, Place], root: Path) -> str:
    place = places.get(WHOLE)
    if stopped.file is not None and stopped.line:
        place = Place(stopped.file, stopped.line)
    where = f" in {stopped.during}" if stopped.during else ""
    who = f"rank {stopped.rank}: " if stopped.rank is not None else ""
    return _command("error", f"shardproof: {who}{stopped.kind}{where}", stopped.message, place, root)


def _command(kind: str, title: str, message: str, place: Place | None, root: Path) -> str:
    properties = {"title": title}
    if place is not None:
        properties = {"file": _relative(place.file, root), "line": str(place.line), **properties}
    said = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{kind} {said}::{_data(message)}"


def _relative(file: str, root: Path) -> str:
    path = Path(file)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else file


def _data(text: str) -> str:
    said = spelling.printable(text.strip(), keep="\n")
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
    return said.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(" ".join(text.split())).replace(":", "%3A").replace(",", "%2C")


@contextmanager
def silenced(stream: IO[str]) -> Iterator[None]:
    """Inside, the runner takes nothing that is printed for a command, whatever names a recording or a model brings."""
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}", file=stream, flush=True)
    try:
        yield
    finally:
        print(f"::{token}::", file=stream, flush=True)


def append_summary(text: str) -> None:
    """Add `text` to the summary of the job, where there is one. Raises `UsageError` where it cannot be written."""
    path = os.environ.get(SUMMARY)
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the summary of ${SUMMARY} cannot be written: {error}") from error


def root(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder to which annotations are relative."""
    return Path(environment.get(WORKSPACE) or Path.cwd()).resolve()
