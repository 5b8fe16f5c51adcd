"""The table of faults: what breaks, how it was started, what is to be said; and how one of them is tried."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from warm_commands import Commands

FAULTY = Path(__file__).with_name("faulty.py")
_LINES = FAULTY.read_text().splitlines()
_GONE_WITHIN_S = 5.0
"""A hang guard for what ends together with the command."""
HANG_S = 5
"""The time limit of commands that hang; more than any call takes that does not."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One line of the table."""

    name: str
    way: str = "check"
    """The command."""
    exit_code: int = 3
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    line: bool = True
    """Whether the message names the line of faulty.py that is marked with the fault's name."""
    sent: tuple[signal.Signals, ...] = ()
    """Sent to the command itself, once its ranks work, two seconds apart."""
    extra: tuple[str, ...] = ()
    """More options."""
    keeps: int = 0
    """Checkpoints that have to be there afterwards, whole."""
    room: int | None = None
    """Bytes that fit into one file."""
    rare: bool = False
    """Tried only if asked for."""

    @property
    def lineno(self) -> int:
        """Of the line that breaks."""
        return next(number for number, text in enumerate(_LINES, 1) if text.endswith(f"# <- {self.name}"))


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


_DIED = "rank 1 died in ddp"
_FAILED = "rank 1 failed in ddp at "
_HUNG = (f"no answer in ddp within {HANG_S} s: rank 1 is at ", "ranks 0, 2 wait for rank 1 in call ")
_NO_ROOM = ("/dev/full: cannot be written: No space left",)
_OTHER = "rank 1 called another collective in ddp than ranks 0, 2"

FAULTS = (
    Fault(name="killed", says=(f"{_DIED}: killed by signal 9 (SIGKILL)", "it was last seen at ")),
    Fault(name="out of memory", says=(_FAILED, "MemoryError")),
    Fault(name="torch out of memory", says=(_FAILED, "can't allocate memory"), rare=True),
    Fault(name="raises", says=(_FAILED, "ValueError: 3 is not 4")),
    Fault(name="raises what does not pickle", says=(_FAILED, "NotPortable: 3 is not 4")),
    Fault(name="raises at length", says=(_FAILED, "ValueError: 3 is not 4", "characters left out")),
    Fault(name="raises in a hook", says=(_FAILED, "ValueError: 3 is not 4")),
    Fault(name="raises everywhere", says=("rank 0 failed in ddp at ", "ValueError: 3 is not 4"), rare=True),
    Fault(name="exits 0", says=(_FAILED, "SystemExit: 0")),
    Fault(name="exits 1", says=(_FAILED, "SystemExit: 1"), rare=True),
    Fault(name="exits at once", says=(f"{_DIED} at ", "its process exited with code 0 in the middle of the call")),
    Fault(name="crashes", says=(f"{_DIED} at ", "(SIGSEGV)")),
    Fault(name="worker killed", says=("failed in ddp at ", "DataLoader worker")),
    Fault(name="sleeps", says=_HUNG),
    Fault(name="spins", says=(_HUNG[0],), line=False, rare=True),
    Fault(name="waits for a lock", says=_HUNG, rare=True),
    Fault(name="waits in native code", says=_HUNG, rare=True),
    Fault(
        name="stopped",
        says=("rank 1 is stopped (by SIGSTOP", "it was last seen at ", "ranks 0, 2 wait for rank 1"),
        line=False,
    ),
    Fault(name="floods", exit_code=0, says=("lines left out", "parity"), line=False),
    Fault(name="floods one line", exit_code=0, says=("left out", "parity"), line=False, rare=True),
    Fault(name="calls once more", says=(_OTHER, "rank 1: all_reduce SUM of float64 [3]")),
    Fault(name="another collective", says=(_OTHER, "ranks 0, 2: all_reduce SUM", "rank 1: broadcast from rank 0")),
    Fault(name="another shape", says=(_OTHER, "float64 [4]", "rank 1: all_reduce SUM of float64 [8]")),
    Fault(name="another dtype", says=(_OTHER, "float64 [4]", "rank 1: all_reduce SUM of float32 [4]"), rare=True),
    Fault(name="another order", says=(_OTHER, "float64 [4]", "rank 1: all_reduce SUM of float64 [2, 2]")),
    Fault(name="another reduction", says=(_OTHER, "all_reduce SUM", "rank 1: all_reduce MAX")),
    Fault(name="another source", says=(_OTHER, "rank 1: broadcast from rank 1"), rare=True),
    Fault(name="another group", says=("called different collectives in ddp",)),
    Fault(name="waits while it fails", says=(_OTHER, "rank 1: barrier", "while it handles ValueError: 3 is not 4")),
    Fault(name="killed", way="train", says=("rank 1 died in fit: killed by signal 9",), keeps=1),
    Fault(name="raises", way="train", says=("rank 1 failed in fit at ",), keeps=1),
    Fault(name="sleeps", way="train", says=("no answer in fit", "rank 1 is at "), keeps=1),
    Fault(
        name="another collective", way="train", says=("rank 1 called another collective in fit",), keeps=1, rare=True
    ),
    Fault(name="Ctrl-C", exit_code=130, line=False, sent=(signal.SIGINT,)),
    Fault(name="SIGTERM", exit_code=-15, line=False, sent=(signal.SIGTERM,)),
    Fault(name="SIGHUP", exit_code=-1, line=False, sent=(signal.SIGHUP,), rare=True),
    Fault(name="SIGKILL", exit_code=-9, line=False, sent=(signal.SIGKILL,)),
    Fault(name="Ctrl-C", way="train", exit_code=130, line=False, sent=(signal.SIGINT,), keeps=1),
    Fault(name="SIGTERM twice", way="train", exit_code=-15, line=False, sent=(signal.SIGTERM,) * 2, keeps=1, rare=True),
    Fault(name="SIGKILL", way="train", exit_code=-9, line=False, sent=(signal.SIGKILL,), keeps=1, rare=True),
    Fault(name="no room for the report", exit_code=2, says=_NO_ROOM, line=False, extra=("--json", "/dev/full")),
    Fault(name="no room for traces", exit_code=2, says=("cannot be written", "TMPDIR"), line=False, room=3000),
)


def run(fault: Fault, commands: Commands, folder: Path) -> Seen:
    """Tries one fault in an empty `folder`."""
    scratch, said, began, saved = (folder / name for name in ("scratch", "said", "began", "saved"))
    scratch.mkdir()
    options = {
        "check": ("--strategies", "ddp"),
        "train": ("--strategy", "ddp", "--save-folder", str(saved)),
    }[fault.way]
    hangs = "--timeout", "60" if fault.sent or fault.exit_code == 0 else str(HANG_S)
    env = {"FAULT": "sleeps" if fault.sent else fault.name, "FAULT_BEGAN": str(began)}
    if fault.room is not None:
        env["LARGEST_FILE"] = str(fault.room)
    shared = set(os.listdir("/dev/shm"))
    started = time.time()
    pid = commands.start(
        fault.way, str(FAULTY), "--ranks", "3", *options, *hangs, *fault.extra, scratch=scratch, said=said, env=env
    )
    if fault.sent:
        until(began.exists, 60)
        for number, signal_number in enumerate(fault.sent):
            time.sleep(2.1 if number else 0.5)
            os.kill(pid, signal_number)
            if not number:
                began.write_text(repr(time.time()))
    ended = commands.wait()
    until(lambda: not _left(pid, scratch, shared), _GONE_WITHIN_S)
    return Seen(
        exit_code=ended.exit_code,
        said=said.read_text(errors="replace"),
        seconds=ended.at - (float(began.read_text()) if began.exists() else started),
        left=_left(pid, scratch, shared),
        kept=len(list(saved.glob("step-*"))),
    )


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for it, and no longer."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _left(session: int, scratch: Path, shared: set[str]) -> list[str]:
    files = [str(path) for path in scratch.iterdir()]
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
