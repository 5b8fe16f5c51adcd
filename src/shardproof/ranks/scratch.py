"""A temporary folder that goes however its process ends: also by a SIGKILL, or by a launcher that ends everybody."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SWEEP = """
read -r _
rm -rf -- "$0" 2>/dev/null || { sleep 1; rm -rf -- "$0"; }
"""
"""`read` ends when the last process that holds the pipe has ended. A rank that is being killed may still write: then
the folder is removed once more."""


_LONGEST_HOME = 103 - len("/listener-12345678")
"""Bytes: the path of a socket has 103 at most on macOS, 107 on Linux."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for this process and those that it forks, removed in the end with all that is in it.

    A shell waits to do so where this process cannot: it takes 1 MB and no time.
    """
    with tempfile.TemporaryDirectory(prefix="shardproof-") as name, _swept(name):
        yield Path(name)


@contextmanager
def home_of_sockets(folder: Path) -> Iterator[None]:
    """Processes forked inside keep the sockets of Python's multiprocessing in `folder`, not in a folder of their own.

    So do their data loaders. A rank that is ended has no time to remove them. Where `folder` lies too deep for sockets,
    Python's own shorter name is left to try.
    """
    if len(os.fsencode(folder)) > _LONGEST_HOME:
        yield
        return
    # Processes take it over from who starts them. Python has no public way to say so (`multiprocessing.util`).
    config = vars(multiprocessing.current_process()).get("_config", {})
    before = config.get("tempdir")
    config["tempdir"] = str(folder)
    try:
        yield
    finally:
        config["tempdir"] = before


@contextmanager
def _swept(folder: str) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    waiting, held = os.pipe()
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", _SWEEP, folder],
            stdin=waiting,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
    except OSError:
        shell = None  # no shell, or no process to be had: then nobody sweeps after a SIGKILL
    finally:
        os.close(waiting)
    try:
        yield
    finally:
        if shell is not None:
            shell.kill()
            shell.wait()
        os.close(held)
