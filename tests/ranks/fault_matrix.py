"""One fault of the table is tried: what is said, when the command ends, and what is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fault_rows import FAULTY, HANG_S, LONG_S, LOOP, Fault
from warm_commands import Commands

_GONE_WITHIN_S = 5.0
"""A hang guard for what ends together with the command."""
_TESTS = """
import os, pathlib, time
import pytest

@pytest.mark.ranks(2)
def test_endless():
    pathlib.Path(os.environ["FAULT_BEGAN"]).write_text(repr(time.time()))
    time.sleep(1000)
"""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came of it."""

    exit_code: int
    said: str
    seconds: float
    """From the fault to the end of the command."""
    left: list[str]
    """Processes, shared memory and temporary files that are still there."""
    kept: int
    """Whole checkpoints."""
    recording: Path
    """What was recorded, where anything was."""


def run(fault: Fault, commands: Commands, folder: Path) -> Seen:
    """Tries one fault in an empty `folder`."""
    said, began = (folder / name for name in ("said", "began"))
    env = {"FAULT": "sleeps" if fault.sent else fault.does or fault.name, "FAULT_BEGAN": str(began), **dict(fault.env)}
    shared = set(os.listdir("/dev/shm"))
    with ExitStack() as stack:
        # Not in `folder`: the path of a socket of Python's multiprocessing has a hundred characters at most.
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="f-", ignore_cleanup_errors=True)))
        small = folder / "small"
        if fault.room is not None:
            env |= stack.enter_context(_little_room(small, fault))
        if fault.largest is not None:
            env["LARGEST_FILE"] = str(fault.largest)
        if fault.port_taken:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stack.enter_context(_taken_port()))}
        saved = (small if fault.room else folder) / "saved"
        program, arguments = _command(fault, folder, saved, small, env)
        started = time.time()
        pid = commands.start(program, *arguments, scratch=scratch, said=said, env=env)
        if fault.sent:
            _send(fault.sent, pid, began)
        ended = commands.wait()
        until(lambda: not _left(pid, scratch, shared), _GONE_WITHIN_S)
        unfinished = [str(path) for path in small.glob(".*")] if fault.room else []
        kept = len(list(saved.glob("step-*")))
        if fault.room and fault.way == "record":
            subprocess.run(["cp", "-r", saved, folder / "recording"], check=True)
        left = _left(pid, scratch, shared) + unfinished
    return Seen(
        exit_code=ended.exit_code,
        said=said.read_text(errors="replace"),
        seconds=ended.at - (float(began.read_text()) if began.exists() else started),
        left=left,
        kept=kept,
        recording=folder / "recording" if fault.room else saved,
    )


def _command(fault: Fault, folder: Path, saved: Path, small: Path, env: dict[str, str]) -> tuple[str, list[str]]:
    """A program of `warm_commands`, and its arguments."""
    if fault.way == "record":
        return "torchrun", ["2", str(LOOP), str(saved)]
    if fault.way == "pytest":
        tests = folder / "test_endless.py"
        tests.write_text(_TESTS)
        return "pytest", ["-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", f"--rootdir={folder}", str(tests)]
    if fault.way == "torchrun":
        return "run", ["--nproc-per-node", "2", "--master-port", env.pop("MASTER_PORT"), str(LOOP), str(saved)]
    hangs = str(LONG_S if fault.sent or fault.exit_code == 0 or fault.early else HANG_S)
    options = ["--strategies", "ddp"] if fault.way == "check" else ["--strategy", "ddp", "--save-folder", str(saved)]
    extra = [option.replace("SMALL", str(small)) for option in fault.extra]
    arguments = [fault.way, str(FAULTY), "--ranks", "3", *options, "--timeout", hangs, *extra]
    return ("torchrun", ["3", "shardproof", *arguments]) if fault.torchrun else ("shardproof", arguments)


def _send(signals: Sequence[signal.Signals], pid: int, began: Path) -> None:
    until(began.exists, 60)
    for number, signal_number in enumerate(signals):
        time.sleep(2.1 if number else 0.5)
        os.kill(pid, signal_number)
        if not number:
            began.write_text(repr(time.time()))


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for it, and no longer."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@cache
def mounts() -> bool:
    """Whether a file system can be mounted here, tried where nobody else sees it: root may, mostly."""
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return sys.platform == "linux" and subprocess.run(tried, capture_output=True, check=False).returncode == 0


@contextmanager
def _little_room(folder: Path, fault: Fault) -> Iterator[dict[str, str]]:
    folder.mkdir()
    if not mounts():
        yield {"LARGEST_FILE": str(fault.room_of_a_file)}
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={fault.room}", "tmpfs", folder], check=True)
    try:
        yield {}
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def _taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _left(session: int, scratch: Path, shared: set[str]) -> list[str]:
    # Torchrun's logs, and a cache of torch.
    theirs = ("torchelastic_", "torchinductor_")
    files = [str(path) for path in scratch.iterdir() if not path.name.startswith(theirs)]
    return _processes(session, scratch) + files + [name for name in _shared_memory() if name not in shared]


def _processes(session: int, scratch: Path) -> list[str]:
    """Of the command's session, and whoever else has its folder on the command line. Zombies have left."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (process / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z" and (int(of) == session or str(scratch) in command):
            found.append(f"process {process.name}: {command}")
    return found


def _shared_memory() -> list[str]:
    """Torch's files there whose maker has ended."""
    names = [name for name in os.listdir("/dev/shm") if name.startswith("torch_")]
    return [name for name in names if not Path("/proc", name.split("_")[1]).exists()]
