"""What is drawn while a training runs."""

from __future__ import annotations

import io
import pickle
import re
import threading
from dataclasses import replace

from rich.console import Console

from shardproof.trainer.screen import Bar, NoBar, Shown, screen_on

SHOWN = Shown(step=3, total_steps=12, epoch=1, fraction=0.25, loss=0.512345, samples_per_s=1234.5, lr=0.001)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def on_terminal() -> tuple[Console, Terminal]:
    file = Terminal()
    return Console(file=file, force_terminal=True, width=120, color_system=None), file


def last_line(file: Terminal) -> str:
    """The bar as it was drawn last, without what moves the cursor."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").rstrip().splitlines()[-1]


def test_the_bar_says_how_far_how_well_how_fast_and_how_long():
    console, file = on_terminal()
    clock = Clock()
    bar = Bar(console, clock=clock)
    bar.update(replace(SHOWN, step=0, fraction=0.0))
    clock.now += 30
    bar.update(SHOWN)
    line = last_line(file)
    assert line.startswith("epoch 1 step 3/12 ")
    assert line.rstrip().endswith("loss 0.5123  lr 0.001  1234 samples/s  1:30 left")
    bar.close()


def test_a_resumed_run_estimates_from_what_it_has_seen_itself():
    console, file = on_terminal()
    clock = Clock()
    bar = Bar(console, clock=clock)
    bar.update(replace(SHOWN, fraction=0.5))
    clock.now += 3600
    bar.update(replace(SHOWN, fraction=0.75))
    assert last_line(file).rstrip().endswith("1:00:00 left")
    bar.close()


def test_what_is_not_known_is_not_shown():
    console, file = on_terminal()
    bar = Bar(console)
    bar.update(Shown(step=7, total_steps=None, epoch=0, fraction=0.5))
    line = last_line(file)
    assert line.startswith("epoch 0 step 7 ")
    assert not re.search(r"loss|lr|samples|left|None", line)
    bar.close()


def test_drawing_does_not_slow_training_down_and_the_last_state_is_drawn():
    console, file = on_terminal()
    bar = Bar(console, clock=Clock())
    for step in range(1000):
        bar.update(replace(SHOWN, step=step))
    assert file.getvalue().count("epoch") == 1
    bar.close()
    assert last_line(file).startswith("epoch 1 step 999/12")
    bar.close()


def test_what_ranks_print_stands_above_the_bar_as_it_came():
    console, file = on_terminal()
    bar = Bar(console)
    bar.update(SHOWN)
    bar.message("[rank 1] [bold]hello[/bold]")
    bar.close()
    assert "[rank 1] [bold]hello[/bold]\n" in file.getvalue()
    assert last_line(file).startswith("epoch 1 step 3/12")


def test_a_bar_that_was_never_drawn_closes_in_silence():
    console, file = on_terminal()
    Bar(console).close()
    assert "epoch" not in file.getvalue()


def test_no_thread_is_running_when_ranks_are_forked():
    console, _ = on_terminal()
    before = threading.active_count()
    bar = Bar(console)
    bar.update(SHOWN)
    assert threading.active_count() == before
    bar.close()


def test_a_log_gets_what_ranks_print_and_no_bar():
    log = io.StringIO()
    screen = screen_on(Console(file=log, width=20))
    screen.update(SHOWN)
    screen.message("[rank 1] a line that is longer than the log is wide")
    screen.close()
    assert log.getvalue() == "[rank 1] a line that is longer than the log is wide\n"


def test_a_terminal_gets_a_bar_unless_none_is_wanted():
    console, _ = on_terminal()
    assert isinstance(screen_on(console), Bar)
    assert isinstance(screen_on(console, progress_bar=False), NoBar)


def test_what_is_shown_travels_between_processes():
    assert pickle.loads(pickle.dumps(SHOWN)) == SHOWN
