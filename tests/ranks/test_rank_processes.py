"""Ranks leave nothing behind: no process, no zombie, no file, no noise."""

import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shardproof.errors import RankFailed, UsageError
from shardproof.ranks import Place, start


class Tells:
    def pid(self, place: Place) -> int:
        return os.getpid()

    def starts_a_child(self, place: Place) -> int:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        return child

    def fails(self, place: Place) -> None:
        raise ValueError("no")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # an orphan stays a zombie until the init process has reaped it
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def _all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(_alive, pids))


def _open_files() -> set[str]:
    return set(os.listdir("/dev/fd"))


def test_no_process_and_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(1, Tells()) as ranks:
        ranks.call("pid")  # whatever the first use opens for good
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = _open_files()
    with start(3, Tells()) as ranks:
        pids = list(ranks.call("pid").values())
        assert all(map(_alive, pids))
        assert list(tmp_path.iterdir()) == [], "not even while they run"
    assert not any(map(_alive, pids))
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    gc.collect()
    assert len(_open_files()) <= len(before)
    ranks.close()
    ranks.close()
    with pytest.raises(UsageError, match="are closed"):
        ranks.call("pid")


def test_no_process_is_left_after_an_error_or_an_exception_of_the_caller() -> None:
    pids: list[int] = []
    with start(2, Tells()) as ranks:
        pids += ranks.call("pid").values()
        with pytest.raises(RankFailed):
            ranks.call("fails")
        assert not any(map(_alive, pids))

    def interrupted() -> None:
        with start(2, Tells()) as ranks:
            pids.extend(ranks.call("pid").values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(map(_alive, pids))


def test_ranks_that_nobody_refers_to_any_more_end() -> None:
    pids = list(start(2, Tells()).call("pid").values())
    gc.collect()
    assert not any(map(_alive, pids))


def test_what_user_code_started_on_a_rank_ends_with_it() -> None:
    with start(2, Tells()) as ranks:
        children = list(ranks.call("starts_a_child").values())
    assert _all_end(children)


_PROGRAM = """
import atexit, os, sys, time
from shardproof.errors import RankError
from shardproof.ranks import start
import torch, torch.distributed as dist

atexit.register(lambda: print("at exit", flush=True))
print("begin")

class Target:
    def pid(self, place):
        return os.getpid()
    def step(self, place, how):
        with place.world("step", place.size):
            dist.all_reduce(torch.ones(2))
            if place.rank == 1:
                if how == "exit": sys.exit(3)
                if how == "kill": os.kill(os.getpid(), 9)
                if how == "raise": raise ValueError("no")
                time.sleep(60)
            dist.all_reduce(torch.ones(2))

ranks = start(3, Target(), timeout_s=1.0 if sys.argv[1] == "hang" else 60.0)
print(*ranks.call("pid").values(), flush=True)
if sys.argv[1] == "end": sys.exit(0)
try:
    ranks.call("step", sys.argv[1])
except RankError as error:
    print(type(error).__name__)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("how", "error"), [("raise", "RankFailed"), ("exit", "RankFailed"), ("kill", "RankDied"), ("hang", "RankHung")]
)
def test_a_failure_is_quiet_on_stderr_and_runs_the_parents_exit_hooks_once(how: str, error: str) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 3
    begin, pids, *rest = done.stdout.splitlines()
    assert (begin, rest) == ("begin", [error, "at exit"])
    assert not any(_alive(int(pid)) for pid in pids.split())


def test_ranks_that_are_never_closed_end_with_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, "end"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(_alive(int(pid)) for pid in done.stdout.splitlines()[1].split())
