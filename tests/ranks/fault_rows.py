"""The table of faults: what breaks, how it was started, and what is to be said."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

FAULTY = Path(__file__).with_name("faulty.py")
LOOP = Path(__file__).with_name("recorded_loop.py")
HANG_S = 5
LONG_S = 60
"""The time limit of commands that hang; more than any call takes that does not."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One line of the table."""

    name: str
    way: str = "check"
    """`check` or `train`, where `torchrun` says who starts the ranks; `record` is a loop of the user's own under
    torchrun, `pytest` a test on ranks."""
    torchrun: bool = False
    does: str = ""
    """The fault of the experiment, where it is not `name`."""
    exit_code: int = 3
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    line: bool = True
    """Whether the message names the line of the file that is marked with the fault's name."""
    noise: bool = False
    """Whether torchrun, or a loop of the user's own, adds words that are not ours."""
    sent: tuple[signal.Signals, ...] = ()
    """Sent to the command itself, once its ranks work, two seconds apart."""
    extra: tuple[str, ...] = ()
    """More options; SMALL in them is a folder with `room`."""
    keeps: int = 0
    """Checkpoints, or steps of a recording, that have to be there afterwards, whole."""
    room: int | None = None
    """Bytes that fit into SMALL, a file system of its own."""
    room_of_a_file: int | None = None
    """Bytes that fit into one file, where no file system can be mounted; without it the row needs one."""
    largest: int | None = None
    """Bytes that fit into any file, as where the temporary directory is full."""
    port_taken: bool = False
    """Whether somebody listens on MASTER_PORT."""
    env: tuple[tuple[str, str], ...] = ()
    early: bool = False
    """Whether it is told long before the time limit, which is `LONG_S` then."""
    rare: bool = False
    """Tried only if asked for: it takes long, or another row shows as much."""

    @property
    def file(self) -> Path:
        """What breaks."""
        return LOOP if self.way == "record" else FAULTY

    @property
    def lineno(self) -> int:
        """Of the line that breaks."""
        mark = f"# <- {self.does or self.name}"
        return next(n for n, text in enumerate(self.file.read_text().splitlines(), 1) if text.endswith(mark))

    def __str__(self) -> str:
        return f"{'torchrun-' * self.torchrun}{self.way}-{self.name}".replace(" ", "-")


_DIED = "rank 1 died in ddp"
_FAILED = "rank 1 failed in ddp at "
_HUNG = (f"no answer in ddp within {HANG_S} s: rank 1 is at ", "ranks 0, 2 wait for rank 1 in call ")
_STUCK = (f"no answer in ddp within {HANG_S} s: rank 1 is at ",)
_NO_ROOM = ("/dev/full: cannot be written: No space left",)
_OTHER = "rank 1 called another collective in ddp than ranks 0, 2"

FAULTS = (
    Fault(name="killed", says=(f"{_DIED}: killed by signal 9 (SIGKILL)",), line=False),
    Fault(name="out of memory", says=(_FAILED, "MemoryError")),
    Fault(name="torch out of memory", says=(_FAILED, "can't allocate memory"), rare=True),
    Fault(name="raises", says=(_FAILED, "ValueError: 3 is not 4")),
    Fault(name="raises what does not pickle", says=(_FAILED, "NotPortable: 3 is not 4")),
    Fault(name="raises at length", says=(_FAILED, "ValueError: 3 is not 4", "characters left out"), rare=True),
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
        says=("rank 1 is stopped (by SIGSTOP", "ranks 0, 2 wait for rank 1"),
        line=False,
        rare=True,
    ),
    Fault(name="floods", exit_code=0, says=("lines left out", "parity"), line=False),
    Fault(name="floods one line", exit_code=0, says=("left out", "parity"), line=False, rare=True),
    Fault(name="calls once more", early=True, says=(_OTHER, "rank 1: all_reduce SUM of float64 [3]")),
    Fault(
        name="another collective",
        early=True,
        says=(_OTHER, "ranks 0, 2: all_reduce SUM", "rank 1: broadcast from rank 0"),
    ),
    Fault(name="another collective late", early=True, says=(_OTHER,), rare=True),
    Fault(name="another shape", early=True, says=(_OTHER, "float64 [4]", "rank 1: all_reduce SUM of float64 [8]")),
    Fault(
        name="another dtype",
        early=True,
        says=(_OTHER, "float64 [4]", "rank 1: all_reduce SUM of float32 [4]"),
        rare=True,
    ),
    Fault(name="another order", early=True, says=(_OTHER, "float64 [4]", "rank 1: all_reduce SUM of float64 [2, 2]")),
    Fault(name="another reduction", early=True, says=(_OTHER, "all_reduce SUM", "rank 1: all_reduce MAX")),
    Fault(name="another source", early=True, says=(_OTHER, "rank 1: broadcast from rank 1"), rare=True),
    Fault(name="another group", early=True, says=("called different collectives in ddp",)),
    Fault(
        name="waits while it fails",
        rare=True,
        early=True,
        says=(_OTHER, "rank 1: barrier", "while it handles ValueError: 3 is not 4"),
    ),
    Fault(name="killed", way="train", says=("rank 1 died in fit: killed by signal 9",), line=False, keeps=1, rare=True),
    Fault(
        name="killed beside its data loaders",
        way="train",
        does="killed",
        says=("rank 1 died in fit: killed by signal 9",),
        line=False,
        extra=("--workers", "2"),
        keeps=1,
    ),
    Fault(name="raises", way="train", says=("rank 1 failed in fit at ",), keeps=1),
    Fault(name="sleeps", way="train", says=("no answer in fit", "rank 1 is at "), keeps=1, rare=True),
    Fault(
        name="another collective", way="train", says=("rank 1 called another collective in fit",), keeps=1, rare=True
    ),
    Fault(name="Ctrl-C", exit_code=130, line=False, sent=(signal.SIGINT,)),
    Fault(name="SIGTERM", exit_code=-15, line=False, sent=(signal.SIGTERM,), rare=True),
    Fault(name="SIGHUP", exit_code=-1, line=False, sent=(signal.SIGHUP,), rare=True),
    Fault(name="SIGKILL", exit_code=-9, line=False, sent=(signal.SIGKILL,)),
    Fault(name="Ctrl-C", way="train", exit_code=130, line=False, sent=(signal.SIGINT,), keeps=1),
    Fault(name="SIGTERM twice", way="train", exit_code=-15, line=False, sent=(signal.SIGTERM,) * 2, keeps=1, rare=True),
    Fault(name="SIGKILL", way="train", exit_code=-9, line=False, sent=(signal.SIGKILL,), keeps=1, rare=True),
    Fault(name="Ctrl-C", way="pytest", exit_code=2, line=False, sent=(signal.SIGINT,)),
    Fault(name="never joins: batches", says=_STUCK),
    Fault(name="never joins: parallelize", says=_STUCK, rare=True),
    Fault(name="never joins: model", says=_STUCK, rare=True),
    Fault(
        name="never joins", torchrun=True, exit_code=1, noise=True, says=("rank 1 has not come",), line=False, rare=True
    ),
    Fault(name="port taken", does="none", exit_code=0, says=("parity",), line=False, port_taken=True),
    Fault(
        name="port taken, no torchrun",
        does="none",
        exit_code=2,
        says=("MASTER_PORT", "in use"),
        line=False,
        port_taken=True,
        env=(("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")),
    ),
    Fault(
        name="port taken",
        way="torchrun",
        exit_code=1,
        noise=True,
        says=("EADDRINUSE",),
        line=False,
        port_taken=True,
        rare=True,
    ),
    Fault(
        name="killed",
        torchrun=True,
        exit_code=1,
        noise=True,
        says=(f"error: {_DIED}: its process does not answer any more", "ranks 0, 2 wait for rank 1 in call "),
        line=False,
    ),
    Fault(
        name="killed",
        way="train",
        torchrun=True,
        exit_code=1,
        noise=True,
        says=("error: rank 0 lost a peer in fit, after step ", "the last complete checkpoint is "),
        line=False,
        keeps=1,
    ),
    Fault(name="raises", torchrun=True, exit_code=1, noise=True, says=(_FAILED, "ValueError: 3 is not 4")),
    Fault(name="sleeps", torchrun=True, exit_code=1, noise=True, says=_HUNG, rare=True),
    Fault(name="another collective", torchrun=True, exit_code=1, noise=True, early=True, says=(_OTHER,), rare=True),
    Fault(
        name="another collective late", torchrun=True, exit_code=1, noise=True, early=True, says=(_OTHER,), rare=True
    ),
    Fault(
        name="killed", way="record", exit_code=1, noise=True, says=("by peer", "ChildFailedError"), line=False, keeps=2
    ),
    Fault(name="raises", way="record", exit_code=1, noise=True, says=("ValueError: 3 is not 4",), keeps=2),
    Fault(
        name="no room",
        way="record",
        exit_code=1,
        noise=True,
        says=("could not write", "What was written stays readable"),
        line=False,
        keeps=1,
        room=400_000,
        room_of_a_file=195_000,
    ),
    Fault(
        name="no room for a checkpoint",
        way="train",
        does="none",
        exit_code=2,
        says=("No space left",),
        line=False,
        keeps=1,
        room=20_000,
    ),
    Fault(
        name="no room for reports",
        does="none",
        exit_code=2,
        says=("cannot be written", "r.html", "r.json", "/dev/full"),
        line=False,
        room=4096,
        extra=("--html", "SMALL/r.html", "--json", "SMALL/r.json", "--junit", "/dev/full"),
    ),
    Fault(name="no room for the report", exit_code=2, says=_NO_ROOM, line=False, extra=("--json", "/dev/full")),
    Fault(name="no room for traces", exit_code=2, says=("cannot be written", "TMPDIR"), line=False, largest=3000),
)
