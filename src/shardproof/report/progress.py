"""What a user sees while a check runs: one live line on a terminal, plain lines in a log, or nothing.

All of it goes to stderr: stdout is for the report.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from shardproof.report import spelling
from shardproof.report.data import Run
from shardproof.report.table import word


class Progress(Protocol):
    """Told what happens during a check. Under torchrun only the leader is to call it: other ranks stay silent."""

    def starting(self, text: str) -> None:
        """Something that takes time begins, as `tp_fsdp on 4 ranks`."""

    def finished(self, run: Run) -> None:
        """A strategy was compared with the reference."""

    def message(self, text: str) -> None:
        """A line that a rank printed."""

    def close(self) -> None:
        """Nothing more will come; also called when the check failed, and more than once."""


class Silent:
    """Says nothing."""

    def starting(self, text: str) -> None:
        """Says nothing."""

    def finished(self, run: Run) -> None:
        """Says nothing."""

    def message(self, text: str) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Says nothing."""


class Lines:
    """A line for everything that happens, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def starting(self, text: str) -> None:
        """`tp_fsdp on 4 ranks ...`."""
        self._print(Text(f"{text} ..."))

    def finished(self, run: Run) -> None:
        """`tp_fsdp: parity, 1.3 s`."""
        self._print(_outcome(run))

    def message(self, text: str) -> None:
        """The text as it came."""
        self._print(Text(text))

    def close(self) -> None:
        """Nothing to tidy up."""

    def _print(self, text: Text) -> None:
        # No wrapping: a log is searched line by line.
        self._console.print(text, soft_wrap=True, highlight=False)


class OneLine:
    """One line that always says what is going on now, below what the ranks print; gone at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done: list[Run] = []
        # No refresh from a thread: ranks are forked from this process, and a thread that holds the lock of
        # stderr at that moment would leave it locked in the rank for ever.
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def starting(self, text: str) -> None:
        """Replace the line."""
        self._live.start()
        self._live.update(Text.assemble(*self._so_far(), (f"{text} ...", "bold"), no_wrap=True), refresh=True)

    def finished(self, run: Run) -> None:
        """Count the run in the line."""
        self._done.append(run)
        self._live.update(Text.assemble(*self._so_far(), no_wrap=True), refresh=True)

    def message(self, text: str) -> None:
        """Print the text above the line."""
        self._console.print(Text(text), soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Wipe the line away."""
        self._live.update(Text())
        self._live.stop()

    def _so_far(self) -> list[tuple[str, str]]:
        return [(f"{run.strategy} ", word(run)[1]) for run in self._done]


def progress_on(console: Console, *, quiet: bool) -> Progress:
    """What suits `console`: one live line on a terminal, lines in a log, nothing when `quiet`."""
    if quiet:
        return Silent()
    # isatty, not rich's is_terminal: FORCE_COLOR turns that on in CI logs, which cannot erase a line.
    return OneLine(console) if console.file.isatty() and not console.is_dumb_terminal else Lines(console)


def _outcome(run: Run) -> Text:
    verdict, style = word(run)
    return Text.assemble(f"{run.strategy}: ", (verdict, style), f", {spelling.duration(run.time_s)}")
