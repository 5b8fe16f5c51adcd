"""What a rank's copy of pytest has to do differently: nobody must write where pytest's own process writes."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from shardproof.pytest_plugin.prompt import Terminal, forbid

if TYPE_CHECKING:
    from _pytest.capture import CaptureManager

_INHERITED = pytest.StashKey[list[Any]]()
"""Files that are out of use. Python warns of those that are collected without having been closed."""


class Files:
    """Where the rank's stdout and stderr go during a test: made by the host, which can read them after a death."""

    def __init__(self) -> None:
        self._files = {name: tempfile.TemporaryFile(prefix="shardproof-") for name in ("out", "err")}  # noqa: SIM115

    def use(self, capturing: Any) -> None:
        """Run by the rank: pytest's captures (of file descriptors) write into these files."""
        for number, name in ((1, "out"), (2, "err")):
            capture = getattr(capturing, name, None)
            if capture is None or not hasattr(capture, "targetfd_save"):
                continue  # captured in memory (--capture=sys), or not at all (-s)
            os.dup2(self._files[name].fileno(), capture.tmpfile.fileno())
            os.dup2(self._files[name].fileno(), number)

    def text(self) -> dict[str, str]:
        """Run by the host: what pytest has not taken out yet."""
        said = {}
        for name, file in self._files.items():
            size = os.fstat(file.fileno()).st_size
            said[name] = os.pread(file.fileno(), size, 0).decode(errors="replace").replace("\0", "")
        return said

    def close(self) -> None:
        """Gives the files back."""
        for file in self._files.values():
            file.close()


def settle(config: pytest.Config, rank: int, files: Files, terminal: Terminal | None) -> None:
    """Run by a rank before its first test."""
    # A crash in native code writes its stack where the host finds it: not where pytest captures a test.
    faulthandler.enable(file=os.dup(2), all_threads=False)
    capman: CaptureManager = config.pluginmanager.getplugin("capturemanager")
    # The parent's captures: their files are the parent's, at the position that both would share.
    config.stash[_INHERITED] = [capman._global_capturing, sys.stdin, sys.stdout, sys.stderr]
    capman._global_capturing = None
    if terminal is not None and terminal.rank == rank:
        terminal.take(config)
        capman._method = "no"  # type: ignore[misc]  # as with -s, for this rank alone
    else:
        forbid(config, rank, elsewhere=terminal is not None)
    capman.start_global_capturing()
    if capman.is_globally_capturing():
        files.use(capman._global_capturing)
    capman.suspend_global_capture()
    sys.stdout.flush()
