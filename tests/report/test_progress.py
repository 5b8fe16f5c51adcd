from __future__ import annotations

import io
import threading

from rich.console import Console

from shardproof.report.data import Report
from shardproof.report.progress import Lines, OneLine, Progress, Silent, progress_on


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal() -> tuple[Console, Terminal]:
    screen = Terminal()
    return Console(file=screen, force_terminal=True, width=80, color_system=None), screen


def tell(progress: Progress, report: Report) -> None:
    progress.starting("ddp on 8 ranks")
    progress.message("[rank 1] [bold]hello[/bold]")
    progress.finished(report.runs[0])
    progress.close()
    progress.close()


def test_a_log_gets_a_line_for_everything(parity: Report):
    log = io.StringIO()
    console = Console(file=log, width=20)
    tell(progress_on(console, quiet=False), parity)
    assert log.getvalue() == "ddp on 8 ranks ...\n[rank 1] [bold]hello[/bold]\nddp: parity, 1.3 s\n"


def test_a_terminal_gets_one_line_that_is_wiped_away_and_keeps_what_ranks_print(parity: Report):
    console, screen = on_terminal()
    progress = progress_on(console, quiet=False)
    assert isinstance(progress, OneLine)
    tell(progress, parity)
    written = screen.getvalue()
    assert "ddp on 8 ranks ..." in written
    assert "[rank 1] [bold]hello[/bold]\n" in written
    # Erase the line: the last thing that happens to it.
    assert "\x1b[2K" in written[written.rindex("ddp") :]


def test_no_thread_is_running_when_ranks_are_forked():
    console, _ = on_terminal()
    before = threading.active_count()
    progress = progress_on(console, quiet=False)
    progress.starting("ddp on 8 ranks")
    assert threading.active_count() == before
    progress.close()


def test_quiet_says_nothing_at_all(parity: Report):
    log = io.StringIO()
    progress = progress_on(Console(file=log), quiet=True)
    assert isinstance(progress, Silent)
    tell(progress, parity)
    assert log.getvalue() == ""


def test_forced_colour_in_a_log_is_still_a_log():
    assert isinstance(progress_on(Console(file=io.StringIO(), force_terminal=True), quiet=False), Lines)


def test_a_check_that_fails_before_it_starts_leaves_the_terminal_alone():
    console, screen = on_terminal()
    progress_on(console, quiet=False).close()
    assert screen.getvalue() == ""
