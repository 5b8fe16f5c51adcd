"""Ranks that torchrun has started, with the real torchrun."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardproof.errors import StrategyError, UsageError
from shardproof.ranks import start
from shardproof.ranks.launch import Launch

_PROGRAM = """
import sys, time
from shardproof.errors import ShardproofError, StrategyError
from shardproof.ranks import start

class Target:
    offset = staticmethod(lambda place: place.rank + 10 * place.local_rank)
    def where(self, place, number):
        return self.offset(place) + number
    def total(self, place):
        import torch, torch.distributed as dist
        with place.world("total", 2):
            value = torch.tensor([1.0 + place.rank])
            dist.all_reduce(value)
            return value.item()
    def alone(self, place):
        import torch.distributed as dist
        with place.world("alone", 1):
            return dist.get_world_size()
    def raises(self, place):
        import torch, torch.distributed as dist
        with place.world("raises", 2):
            if place.rank == 1:
                raise ValueError("no")
            dist.all_reduce(torch.ones(2))
    def usage(self, place):
        if place.rank == 1:
            raise StrategyError("3 heads over 2 ranks")
    def hangs(self, place):
        import torch, torch.distributed as dist
        with place.world("hangs", 2):
            if place.rank == 1:
                time.sleep(60)
            dist.all_reduce(torch.ones(2))

def main():
    for size in (2, 1):
        with start(size, Target(), timeout_s=2.0) as ranks:
            if not ranks.leader:
                continue
            print("where", ranks.call("where", 100), flush=True)
            if size == 2:
                print("only", ranks.call("where", 100, ranks=[1]), flush=True)
                print("total", ranks.call("total"), ranks.call("total"), ranks.call("alone"), flush=True)
    for what in sys.argv[1:]:
        with start(2, Target(), timeout_s=2.0) as ranks:
            if ranks.leader:
                try:
                    ranks.call(what, during="ddp")
                except ShardproofError as error:
                    print(type(error).__name__, error, flush=True)
                    sys.exit(error.exit_code)
main()
"""

_GOOD = ["where {0: 100, 1: 111}", "only {1: 111}", "total {0: 3.0, 1: 3.0} {0: 3.0, 1: 3.0} {0: 1, 1: 1}"]


def _torchrun(program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(_PROGRAM)
    return file


def test_torchruns_ranks_are_joined_and_the_leader_calls(program: Path) -> None:
    done = _torchrun(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*_GOOD, "where {0: 100}"]


@pytest.mark.parametrize(
    ("what", "error", "exit_code"),
    [
        ("raises", "RankFailed rank 1 failed in ddp at {program}:24: ValueError: no", 3),
        ("usage", "StrategyError 3 heads over 2 ranks", 2),
        ("hangs", "RankHung no answer in ddp within 2 s", 3),
    ],
)
def test_a_follower_that_breaks_is_reported_by_the_leader(program: Path, what: str, error: str, exit_code: int) -> None:
    done = _torchrun(program, what)
    line = next(line for line in done.stdout.splitlines() if what and line.startswith(error.split()[0]))
    assert line.startswith(error.format(program=program))
    assert f"exitcode: {exit_code}) local_rank: 0" in done.stderr
    assert "[rank" not in done.stderr
    if what == "hangs":
        assert "in hangs" in done.stdout.partition("rank 1:")[2]


def test_a_launch_without_an_agent_works_and_ends_with_its_leader(program: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began = time.monotonic()
    both = [
        subprocess.Popen(
            [sys.executable, str(program), "raises"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [3, 3]
    assert outputs[0][0].splitlines()[:3] == _GOOD
    assert outputs[1] == ("", "")
    assert time.monotonic() - began < 9, "the follower sees that the leader is gone"


def _environment(**changed: str) -> dict[str, str]:
    base = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    return base | changed


def test_more_ranks_than_the_launcher_has_started_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StrategyError, match="8 ranks are asked for, but the launcher has started 4"):
        start(8, None)


def test_the_environment_decides_whether_there_is_a_launch() -> None:
    assert Launch.of({}) is None
    assert Launch.of({"RANK": "0"}) is None
    launch = Launch.of(_environment(TORCHELASTIC_USE_AGENT_STORE="True"))
    assert launch == Launch(
        rank=1,
        world_size=4,
        local_rank=1,
        local_world_size=4,
        host="localhost",
        port=29500,
        agent_store=True,
        attempt="0",
    )
    with pytest.raises(UsageError, match="RANK=one"):
        Launch.of(_environment(RANK="one"))
    with pytest.raises(UsageError, match="LOCAL_RANK, MASTER_ADDR"):
        Launch.of({"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"})
