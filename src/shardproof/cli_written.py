"""What `check` and `diff` write beside what they print: files, annotations, and a report of what stopped them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console

from shardproof.errors import ShardproofError, UsageError
from shardproof.ranks.launch import Launch
from shardproof.report import file
from shardproof.report.data import Report
from shardproof.report.stopped import stopped

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from shardproof.report.places import Place

STDOUT = Path("-")
"""In place of a path: standard output."""

Json: TypeAlias = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the report as JSON; - is stdout.")
]
Html: TypeAlias = Annotated[Path | None, typer.Option("--html", metavar="PATH", help="Write the report as a web page.")]
Junit: TypeAlias = Annotated[
    Path | None, typer.Option("--junit", metavar="PATH", help="Write the report as JUnit XML, for CI.")
]
Annotate: TypeAlias = Annotated[
    bool, typer.Option("--annotate", help="Print GitHub annotations; add to the job's summary.")
]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a report goes beside the terminal."""

    json: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    annotate: bool = False

    def refuse(self) -> None:
        """Raise `UsageError` for what cannot be written, before anybody waits for it."""
        for option, path in (("--json", self.json), ("--html", self.html), ("--junit", self.junit)):
            if path is None:
                continue
            if path != STDOUT:
                file.check(path)
            elif option != "--json":
                raise UsageError(f"{option} -: only --json can go to standard output; give a path")

    @property
    def console(self) -> Console:
        """What the report is printed on: stderr where stdout belongs to the JSON."""
        return Console(stderr=self.json == STDOUT)

    def printing(self) -> AbstractContextManager[None]:
        """Around printing the report: where GitHub reads along, it takes nothing of it for a command."""
        if not self.annotate:
            return nullcontext()
        from shardproof.report.github import silenced  # noqa: PLC0415  (only where asked for)

        return silenced(self.console.file)

    def write(self, report: Report, places: Mapping[str, Place]) -> None:
        """Write everything that can be written, then raise one `UsageError` that says what could not be."""
        failed: list[str] = []
        for write in (self._json, self._html, self._junit, lambda report: self._annotations(report, places)):
            try:
                write(report)
            except UsageError as error:
                failed.append(str(error))
        if failed:
            raise UsageError("; ".join(failed))

    @contextmanager
    def reporting(self, about: Report, places: Mapping[str, Place]) -> Iterator[None]:
        """Around the work: an error of it is written too, so that CI shows it and not the lack of a file.

        `about` says what was asked for. Raises the error itself.
        """
        try:
            yield
        except ShardproofError as error:
            launch = Launch.of(os.environ)
            if launch is not None and launch.rank:
                # Every rank of torchrun may raise it, and one writes.
                raise
            try:
                self.write(replace(about, stopped=stopped(error)), places)
            except UsageError as unwritten:
                typer.echo(f"error: {unwritten}", err=True)
            raise

    def _json(self, report: Report) -> None:
        if self.json == STDOUT:
            from shardproof.report.json import text  # noqa: PLC0415  (views are loaded when asked for)

            sys.stdout.write(text(report))
            sys.stdout.flush()
        elif self.json is not None:
            report.to_json(self.json)

    def _html(self, report: Report) -> None:
        # A page about runs, of which there are none where something stopped them.
        if self.html is not None and report.stopped is None:
            report.to_html(self.html)

    def _junit(self, report: Report) -> None:
        if self.junit is not None:
            report.to_junit(self.junit)

    def _annotations(self, report: Report, places: Mapping[str, Place]) -> None:
        if not self.annotate:
            return
        from shardproof.report import github, markdown  # noqa: PLC0415  (only where asked for)

        for line in github.commands(report, places, github.root()):
            print(line, file=self.console.file, flush=True)
        github.append_summary(markdown.summary(report))
