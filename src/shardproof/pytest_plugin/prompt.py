"""A debugger's prompt on one rank (`--ranks-pdb RANK`), and none on the others."""

from __future__ import annotations

import os
import pdb
import signal
import sys
from typing import Any

import pytest


class Terminal:
    """The terminal that pytest was started in, kept from before pytest began to capture."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._in, self._out = os.dup(0), os.dup(1)
        self._owner = os.getpgrp()

    def take(self, config: pytest.Config) -> None:
        """Run by the rank: its stdin and stdout are the terminal's from now on, and failures open a prompt."""
        from _pytest.debugging import PdbInvoke  # noqa: PLC0415  (only where somebody debugs)

        # Back into the terminal's foreground, or reading would stop the process.
        os.setpgid(0, self._owner)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, number in ((self._in, 0), (self._out, 1), (self._out, 2)):
            os.dup2(descriptor, number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (open as long as the rank lives)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        _show_on(config, sys.stdout)
        if not config.pluginmanager.hasplugin("pdbinvoke"):
            config.pluginmanager.register(PdbInvoke(), "pdbinvoke")


def forbid(config: pytest.Config, rank: int, *, elsewhere: bool) -> None:
    """Run by a rank without a terminal: `breakpoint()` says so, or does nothing where another rank has the prompt."""
    config.pluginmanager.set_blocked("pdbinvoke")
    config.option.usepdb = False

    def refuse(*args: Any, **options: Any) -> None:
        if not elsewhere:
            raise RuntimeError(f"rank {rank} has no terminal for a debugger: run pytest with --ranks-pdb {rank}")

    sys.breakpointhook = refuse
    pdb.set_trace = refuse


def _show_on(config: pytest.Config, stream: Any) -> None:
    """pytest's own lines about the debugger go where its prompt is."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter._tw._file = stream
