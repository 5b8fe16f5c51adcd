"""Ranks forked from the test's own process: calls, worlds, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardproof.errors import RankFailed, UsageError
from shardproof.ranks import Place, start
from shardproof.ranks.blame import how_it_ended


class Arithmetic:
    def __init__(self) -> None:
        self.calls = 0

    def rank_plus(self, place: Place, number: int) -> int:
        self.calls += 1
        return place.rank + number

    def count(self, place: Place) -> int:
        return self.calls

    def sum_of_ranks(self, place: Place, name: str, size: int) -> tuple[float, int, int]:
        with place.world(name, size):
            total = torch.tensor([float(place.rank)], device=place.device())
            dist.all_reduce(total)
            found = total.item(), dist.get_rank(), dist.get_world_size()
        assert not dist.is_initialized()
        return found


def test_every_rank_answers_and_stays_warm_for_the_next_call() -> None:
    with start(3, Arithmetic()) as ranks:
        assert ranks.leader
        assert ranks.size == 3
        assert ranks.call("rank_plus", 10) == {0: 10, 1: 11, 2: 12}
        assert ranks.call("rank_plus", 10, ranks=[2]) == {2: 12}
        assert ranks.call("count") == {0: 1, 1: 1, 2: 2}


def test_lambdas_and_closures_of_the_target_work() -> None:
    offset = 40

    class Local:
        twice = staticmethod(lambda x: 2 * x)

        def step(self, place: Place) -> int:
            return self.twice(place.rank) + offset

    with start(2, Local()) as ranks:
        assert ranks.call("step") == {0: 40, 1: 42}


def test_many_worlds_follow_each_other_in_one_pool() -> None:
    with start(3, Arithmetic()) as ranks:
        for _ in range(3):
            assert ranks.call("sum_of_ranks", "all", 3) == {r: (3.0, r, 3) for r in range(3)}
            assert ranks.call("sum_of_ranks", "all", 2, ranks=range(2)) == {r: (1.0, r, 2) for r in range(2)}


def test_a_world_of_one_works_on_each_rank_alone() -> None:
    with start(2, Arithmetic()) as ranks:
        assert ranks.call("sum_of_ranks", "reference", 1, ranks=[1]) == {1: (1.0, 0, 1)}
        assert ranks.call("sum_of_ranks", "reference", 1) == {0: (0.0, 0, 1), 1: (1.0, 0, 1)}


def test_a_world_of_one_works_in_a_process_that_is_no_rank() -> None:
    place = Place(rank=0, size=1, local_rank=0, device_type="cpu")
    assert Arithmetic().sum_of_ranks(place, "alone", 1) == (0.0, 0, 1)


def test_a_rank_outside_the_world_cannot_join_it() -> None:
    with start(2, Arithmetic()) as ranks, pytest.raises(UsageError, match="rank 1 of 2 cannot join the world 'small'"):
        ranks.call("sum_of_ranks", "small", 3, ranks=[1])


def test_code_that_reads_torchruns_variables_finds_its_world_in_them() -> None:
    class Reads:
        def step(self, place: Place) -> list[list[str | None]]:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            found = []
            for size in (2, 1):
                with place.world("reads", size):
                    found.append([os.environ[name] for name in names])
            return [*found, [os.environ.get(name) for name in names]]

    with start(2, Reads()) as ranks:
        assert ranks.call("step")[1] == [["1", "2", "1", "2"], ["0", "1", "0", "1"], [None] * 4]


def test_a_rank_that_leaves_at_once_waits_for_those_that_still_join() -> None:
    class Leaves:
        def step(self, place: Place) -> None:
            for _ in range(60):
                with place.world("short", place.size):
                    pass

    # Others on the machine make it likely: by itself it went wrong once in some hundred runs.
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        with start(4, Leaves()) as ranks:
            assert ranks.call("step") == dict.fromkeys(range(4))
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_meshes_of_an_earlier_world_do_not_leak_into_the_next() -> None:
    class TrainsInTurn:
        def step(self, place: Place, tp: int, groups: int) -> list[float]:
            with place.world("turn", place.size):
                torch.manual_seed(0)
                for _ in range(groups):  # so that the groups of the mesh have other names each time
                    dist.new_group()
                mesh = init_device_mesh("cpu", (place.size // tp, tp), mesh_dim_names=("dp", "tp"))
                model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
                parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
                losses = []
                for _ in range(2):
                    loss = model(torch.ones(2, 4)).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(round(loss.item(), 5))
                return losses

    with start(4, TrainsInTurn()) as ranks:
        results = [loss for turn, tp in enumerate((2, 4, 2, 1)) for loss in ranks.call("step", tp, 4 - turn).values()]
    assert all(result == results[0] for result in results)


def test_a_rank_computes_on_one_thread_whatever_the_parent_did_before() -> None:
    class Computes:
        def step(self, place: Place) -> tuple[int, float]:
            return torch.get_num_threads(), (torch.ones(256, 256) @ torch.ones(256, 256)).sum().item()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (torch.ones(512, 512) @ torch.ones(512, 512)).exp().sum()
        with start(2, Computes()) as ranks:
            assert set(ranks.call("step").values()) == {(1, 256.0**3)}
    finally:
        torch.set_num_threads(before)


def test_a_rank_that_asks_for_input_gets_an_end_of_file() -> None:
    class Asks:
        def step(self, place: Place) -> str:
            return input("continue? ")

    with start(1, Asks()) as ranks, pytest.raises(RankFailed, match="EOFError"):
        ranks.call("step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "ranks=0"),
        ({"size": 1, "device": "tpu"}, "device='tpu'"),
        ({"size": 1, "timeout_s": 0}, "timeout=0"),
    ],
)
def test_wrong_use_is_refused_with_the_value(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        start(target=None, **arguments)


def test_a_call_on_ranks_that_do_not_exist_is_refused() -> None:
    with start(2, Arithmetic()) as ranks, pytest.raises(UsageError, match=r"ranks \[1, 2\]: there are ranks 0 to 1"):
        ranks.call("count", ranks=[1, 2])


def test_a_parent_with_cuda_or_autograd_threads_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        with pytest.raises(UsageError, match=r"CUDA is in use .* use the command line"):
            start(1, Arithmetic(), device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr("shardproof.ranks.safety._threads", lambda: ["python", "pt_autograd_0"])
        with pytest.raises(UsageError, match=r"backward pass, .* use the command line"):
            start(1, Arithmetic())
    with monkeypatch.context() as patch:
        patch.delattr(os, "fork")
        with pytest.raises(UsageError, match="no fork"):
            start(1, Arithmetic())


def test_ranks_that_cannot_be_started_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    forks = iter([os.fork])
    made = []

    def fork() -> int:
        try:
            made.append(next(forks)())
        except StopIteration:
            raise BlockingIOError(11, "Resource temporarily unavailable") from None
        return made[-1]

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(UsageError, match="cannot start rank 1 of 2"):
        start(2, Arithmetic())
    with pytest.raises(ProcessLookupError):
        os.kill(made[0], 0)


def test_the_room_is_importable_without_torch() -> None:
    code = "import sys, shardproof.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_words_for_ends_of_processes_name_signals_and_codes() -> None:

    assert "SIGSEGV" in how_it_ended(-11)
    assert "code 3" in how_it_ended(3)
    assert "signal 63" in how_it_ended(-63)
    assert "gone" in how_it_ended(None)
