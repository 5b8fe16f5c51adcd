"""Whatever goes wrong on a rank, the one who did it is named, and nobody else."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from shardproof.errors import PatternError, RankDied, RankFailed, RankHung, StrategyError, UsageError
from shardproof.ranks import Place, start


def _all_reduce() -> None:
    dist.all_reduce(torch.ones(2))


class OneBreaks:
    """All ranks meet in a collective, but `guilty` does something else before."""

    def __init__(self, guilty: int, breaks: object) -> None:
        self.guilty, self.breaks = guilty, breaks

    def step(self, place: Place) -> None:
        with place.world("step", place.size):
            _all_reduce()
            if place.rank == self.guilty:
                self.breaks()
            _all_reduce()

    def fine(self, place: Place) -> int:
        return place.rank


def _raise_deep() -> None:
    torch.ones(2) @ torch.ones(3)


def test_the_cause_is_reported_not_the_rank_that_waits_for_it() -> None:
    with start(3, OneBreaks(2, _raise_deep)) as ranks, pytest.raises(RankFailed) as caught:
        ranks.call("step", during="fsdp")
    failure = caught.value.failure
    assert failure.rank == 2
    assert failure.type_name == "RuntimeError"
    assert "size" in failure.message
    assert failure.file == __file__
    assert failure.line == _raise_deep.__code__.co_firstlineno + 1
    assert str(caught.value).startswith(f"rank 2 failed in fsdp at {__file__}:{failure.line}: RuntimeError: ")


def test_the_traceback_starts_in_the_users_code() -> None:
    with start(1, OneBreaks(0, _raise_deep)) as ranks, pytest.raises(RankFailed) as caught:
        ranks.call("step")
    files = [line for line in caught.value.failure.traceback.splitlines() if line.startswith("  File")]
    assert [__file__ in line for line in files] == [True, True]
    assert "answer.py" not in caught.value.failure.traceback


def test_the_lowest_rank_is_named_where_all_fail_alike() -> None:
    class LateIsLow:
        def step(self, place: Place) -> None:
            time.sleep(0.05 * (2 - place.rank))
            raise ValueError(f"rank {place.rank}")

    with start(3, LateIsLow()) as ranks, pytest.raises(RankFailed, match="ValueError: rank 0"):
        ranks.call("step")


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with start(3, OneBreaks(1, killed)) as ranks, pytest.raises(RankDied) as caught:
        ranks.call("step", during="tp")
    assert caught.value.rank == 1
    assert str(caught.value).startswith("rank 1 died in tp: killed by signal 9 (SIGKILL): ")


def test_a_rank_that_exits_behind_pythons_back_is_named_with_its_exit_code() -> None:
    with start(2, OneBreaks(1, lambda: os._exit(7))) as ranks, pytest.raises(RankDied, match="exited with code 7"):
        ranks.call("step")


def test_a_death_shows_where_a_process_of_the_user_holds_the_pipe_open() -> None:
    class LeavesAChild:
        def step(self, place: Place) -> None:
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    with start(1, LeavesAChild()) as ranks, pytest.raises(RankDied):
        ranks.call("step")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("breaks", "kind"), [(lambda: sys.exit(0), "SystemExit"), (signal.raise_signal, "TypeError")])
def test_an_exit_in_user_code_is_a_failure_of_that_rank(breaks: object, kind: str) -> None:
    with start(2, OneBreaks(1, breaks)) as ranks, pytest.raises(RankFailed) as caught:
        ranks.call("step")
    assert (caught.value.failure.rank, caught.value.failure.type_name) == (1, kind)


def test_a_hang_shows_where_each_rank_stands_and_only_those_that_have_not_answered() -> None:
    class OneSleeps:
        def step(self, place: Place) -> None:
            if place.rank == 2:
                return
            with place.world("step", 2):
                if place.rank == 1:
                    self.oversleeps()
                _all_reduce()

        def oversleeps(self) -> None:
            time.sleep(60)

    with start(3, OneSleeps(), timeout_s=1.0) as ranks, pytest.raises(RankHung) as caught:
        ranks.call("step", during="ddp")
    stacks = caught.value.stacks
    assert sorted(stacks) == [0, 1]
    assert "in _all_reduce" in stacks[0]
    assert "in oversleeps" in stacks[1].splitlines()[0]
    assert "shardproof/ranks" not in stacks[1]
    assert "no answer in ddp within 1 s" in str(caught.value)


@pytest.mark.parametrize("error", [UsageError, StrategyError, PatternError])
def test_a_usage_error_keeps_its_type_and_message(error: type[UsageError]) -> None:
    def breaks() -> None:
        raise error("no module matches 'blocks.*'")

    with start(2, OneBreaks(1, breaks)) as ranks, pytest.raises(error) as caught:
        ranks.call("step")
    assert type(caught.value) is error
    assert str(caught.value) == "no module matches 'blocks.*'"


def test_a_usage_error_that_does_not_pickle_arrives_as_its_nearest_base() -> None:
    class LocalError(StrategyError):
        pass

    def breaks() -> None:
        raise LocalError("3 heads over 2 ranks")

    with start(1, OneBreaks(0, breaks)) as ranks, pytest.raises(StrategyError, match="3 heads over 2 ranks"):
        ranks.call("step")


def test_an_exception_that_cannot_be_shown_is_a_failure_all_the_same() -> None:
    class Shy(Exception):
        def __str__(self) -> str:
            raise ValueError

    def breaks() -> None:
        raise Shy

    with start(1, OneBreaks(0, breaks)) as ranks, pytest.raises(RankFailed, match="cannot be shown") as caught:
        ranks.call("step")
    assert caught.value.failure.type_name == "Shy"


def test_a_result_that_does_not_pickle_is_a_failure() -> None:
    class ReturnsALambda:
        def step(self, place: Place) -> object:
            return lambda: None

    with start(1, ReturnsALambda()) as ranks, pytest.raises(RankFailed, match="pickle"):
        ranks.call("step")


def test_ranks_that_lost_a_peer_are_named_where_nobody_says_more() -> None:
    def loses() -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")

    began = time.monotonic()
    with start(1, OneBreaks(0, loses)) as ranks, pytest.raises(RankFailed, match="Connection closed"):
        ranks.call("step")
    assert time.monotonic() - began < 3, "all ranks have spoken: there is nobody to wait for"


def test_after_an_error_a_call_says_that_the_ranks_are_gone() -> None:
    with start(2, OneBreaks(1, _raise_deep)) as ranks:
        assert ranks.call("fine") == {0: 0, 1: 1}
        with pytest.raises(RankFailed):
            ranks.call("step")
        with pytest.raises(UsageError, match="ended by an earlier RankFailed"):
            ranks.call("fine")
