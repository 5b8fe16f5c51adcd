"""The loader of a training run: the same samples under every layout, with workers, and after a resumption."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate

from parallel.loaded import LAYOUTS, LENGTH, SIZE, Augmented, Numbers, experiment, flat, loader, read, rows, same, whole
from shardproof.errors import ExperimentError, RankDied, StrategyError, UsageError
from shardproof.parallel.data import GlobalBatches, dataset_of
from shardproof.parallel.loading import eval_batches
from shardproof.parallel.samples import Samples, may_draw
from shardproof.ranks import Place, Ranks, start


class Broken(Augmented):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 13:
            raise LookupError("no picture of a cat")
        return super().__getitem__(index)


class Unlucky(Exception):
    """It does not pickle: it takes two arguments and remembers one."""

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(reason)


class BrokenInItsOwnWay(Augmented):
    def __getitem__(self, index: int) -> dict[str, Any]:
        raise Unlucky(index, "the moon is wrong")


# Map-style data sets


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_read_the_same_samples_with_the_same_augmentation(layout: tuple[int, int]) -> None:
    want = whole(experiment(), (1, 1), 7)
    assert [len(batch) for batch in want] == [8, 8, 6, 8, 8, 6, 8]
    assert same(whole(experiment(), layout, 7), want)


def test_every_epoch_draws_an_order_and_an_augmentation_of_its_own() -> None:
    first, second = (torch.cat(whole(experiment(), (1, 1), 6)[at : at + 3]) for at in (0, 3))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(LENGTH))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert len(torch.cat([first, second])[:, 1:].unique()) == 2 * LENGTH * 3


def test_the_order_is_that_of_the_global_batches_of_a_check() -> None:
    batches = GlobalBatches(experiment(seed=3), data_ranks=1, microbatches=1, shuffle=True)
    got = [batch[:, 0].tolist() for batch in whole(experiment(), (2, 2), 7)]
    assert got == [batches.indices(step) for step in range(7)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    want = [read(loader(experiment(), rank, (2, 2)), 7) for rank in range(2)]
    got = [read(loader(experiment(), rank, (2, 2), workers=workers), 7) for rank in range(2)]
    assert same(rows(got), rows(want))
    assert [step.state for step in got[0]] == [step.state for step in want[0]]


def test_a_step_tells_its_epoch_its_samples_and_whether_the_epoch_ends() -> None:
    given = loader(experiment(), 1, (4, 1))
    assert given.steps_per_epoch == 3
    told = [(step.epoch, step.samples, step.last) for step in read(given, 4)]
    assert told == [(0, 8, False), (0, 8, False), (0, 6, True), (1, 8, False)]


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
@pytest.mark.parametrize("after", range(6))
def test_a_resumed_run_reads_what_the_unbroken_one_reads(layout: tuple[int, int], after: int) -> None:
    unbroken = [read(loader(experiment(), rank, (2, 1)), 8) for rank in range(2)]
    state = unbroken[0][after].state
    assert same(whole(experiment(), layout, 7 - after, state), rows(unbroken)[after + 1 :])


def test_a_run_is_resumed_with_workers_as_without() -> None:
    unbroken = read(loader(experiment()), 8)
    resumed = read(loader(experiment(), workers=2), 3, unbroken[4].state)
    assert same(rows([resumed]), rows([unbroken])[5:])
    assert [step.state for step in resumed] == [step.state for step in unbroken[5:]]


def test_the_state_says_where_the_run_is() -> None:
    states = [step.state for step in read(loader(experiment()), 3)]
    assert [(state["epoch"], state["step"], state["samples"]) for state in states] == [(0, 1, 8), (0, 2, 16), (1, 0, 0)]


def test_a_run_cannot_be_resumed_with_another_batch_size() -> None:
    state = read(loader(experiment()), 1)[0].state
    with pytest.raises(UsageError, match=r"had batch_size 8, this one has 4; .*give the same batch_size"):
        loader(experiment(), batch_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "inside epoch 0 with seed = 3, and this one has 4"),
        ({"shuffle": False}, "shuffle = True, and this one has False"),
        ({"data": Subset(Augmented(), range(20))}, r"len\(data\) = 22, and this one has 20"),
        ({"data": Numbers(9)}, "data = 'a data set', and this one has 'a stream'"),
    ],
)
def test_another_order_is_refused_inside_an_epoch_and_welcome_at_its_end(changes: dict[str, Any], says: str) -> None:
    states = [step.state for step in read(loader(experiment()), 3)]
    changes = dict(changes)
    other = experiment(changes.pop("data", None))
    with pytest.raises(UsageError, match=says):
        loader(other, **changes).load_state_dict(states[1])
    loader(other, **changes).load_state_dict(states[2])


def test_a_state_that_lacks_something_says_what() -> None:
    with pytest.raises(UsageError, match="lacks step, snapshot"):
        loader(experiment()).load_state_dict({"epoch": 0, "samples": 0, "batch_size": 8, "about": {}})


def test_a_batch_that_does_not_divide_is_refused() -> None:
    for data in (Augmented(), Numbers(9)):
        with pytest.raises(StrategyError, match="use 6 or 9"):
            loader(experiment(data), 0, (3, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_a_tensor_dataset_leaves_the_generators_alone(workers: int) -> None:
    data = TensorDataset(torch.arange(LENGTH))
    before = random.getstate(), torch.get_rng_state().tolist()
    next(iter(loader(experiment(data), workers=workers)))
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_a_row_of_tensors_is_what_torch_collates() -> None:
    tensors = torch.randn(9, 2, 3), torch.arange(9), torch.ones(9, 0), torch.rand(9).bfloat16(), torch.ones(9) > 0
    plain = TensorDataset(*tensors)
    for data in (plain, Subset(plain, [8, 7, 6, 5, 4, 3, 2, 1]), Subset(Subset(plain, range(1, 9)), torch.arange(7))):
        got = Samples(data, 0).batch(0, [5, 0, 3])
        want = default_collate([data[i] for i in [5, 0, 3]])
        assert type(got) is type(want)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        got[0].zero_()
    assert tensors[0].count_nonzero() == tensors[0].numel(), "a batch must be a copy"


def test_a_subclass_of_a_tensor_dataset_is_asked_for_its_samples() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return tuple(2 * tensor for tensor in super().__getitem__(index))

    assert Samples(Doubled(torch.arange(4)), 0).batch(0, [1, 2])[0].tolist() == [2, 4]


def test_only_types_that_cannot_draw_are_not_seeded() -> None:
    plain = TensorDataset(torch.ones(4))
    assert not any(may_draw(data) for data in (plain, Subset(plain, [1]), ConcatDataset([plain, plain]), [1], range(3)))
    assert all(may_draw(data) for data in (Augmented(), Subset(Augmented(), [1]), ConcatDataset([plain, Augmented()])))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_data_set_raises_comes_through_with_the_sample_named(workers: int) -> None:
    with pytest.raises(LookupError, match="no picture of a cat") as caught:
        read(loader(experiment(Broken()), shuffle=False, workers=workers), 3)
    assert caught.value.__notes__ == ["while sample 13 of the Broken was read, in epoch 0"]
    if workers:
        assert "raise LookupError" in str(caught.value.__cause__), "the worker's own traceback"


def test_steps_before_a_broken_sample_are_read() -> None:
    with_workers = iter(loader(experiment(Broken()), shuffle=False, workers=2))
    assert next(with_workers).samples == 8
    with pytest.raises(LookupError):
        next(with_workers)


def test_an_exception_that_does_not_pickle_is_told_in_words() -> None:
    with pytest.raises(ExperimentError, match="Unlucky while data was read: the moon is wrong") as caught:
        read(loader(experiment(BrokenInItsOwnWay()), workers=1), 1)
    assert "while sample" in caught.value.__notes__[0]


def test_samples_that_do_not_collate_are_named() -> None:
    data = [torch.ones(1 + i % 2) for i in range(LENGTH)]
    with pytest.raises(RuntimeError) as caught:
        read(loader(experiment(data), shuffle=False), 1)
    assert "samples [0, 1, 2, 3, 4, 5, 6, 7]" in caught.value.__notes__[0]


def test_a_data_loader_is_no_data_set() -> None:
    data = DataLoader(TensorDataset(torch.ones(LENGTH)))
    for refuse in (lambda: loader(experiment(data)), lambda: dataset_of(experiment(data))):
        with pytest.raises(ExperimentError, match=r"yields batches, not samples; .*Experiment\.batches"):
            refuse()


# Worker processes


class OnRanks:
    def read(self, place: Place) -> list[tuple[int, list[list[int]]]]:
        """(worker's process, indices of each micro-batch) of a few steps."""
        given = loader(experiment(Processes()), place.rank, (2, 2), workers=2)
        found = [
            (step.microbatches[0].batch["process"][0].item(), [p.batch["index"].tolist() for p in step.microbatches])
            for step in islice(given, 4)
        ]
        given.close()
        return found

    def leave_open(self, place: Place) -> list[int]:
        self.left = iter(loader(experiment(Processes()), place.rank, (2, 2), workers=2))
        return [next(self.left).microbatches[0].batch["process"][0].item() for _ in range(2)]

    def die(self, place: Place) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def left_by_the_dead(self, place: Place) -> set[int]:
        """Workers that live on when the process that reads is killed, and nobody ends its group."""
        reading, writing = os.pipe()
        reader = os.fork()
        if reader == 0:
            try:
                os.write(writing, json.dumps(self.leave_open(place)).encode())
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(writing)
        workers = set(json.loads(os.read(reading, 1000)))
        os.close(reading)
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
        return soon_alive(workers)


class Processes(Augmented):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "process": os.getpid()}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, OnRanks()) as ranks:
        yield ranks


def test_forked_ranks_have_workers_of_their_own_which_end_with_the_loader(ranks: Ranks) -> None:
    found = ranks.call("read")
    processes = {rank: [process for process, _ in steps] for rank, steps in found.items()}
    assert len({*processes[0], *processes[1]}) == 4
    for order in processes.values():
        assert order[0] == order[2] != order[1] == order[3], "workers take turns"
    assert not alive({*processes[0], *processes[1]})
    wanted = [batch[:, 0].tolist() for batch in whole(experiment(), (1, 1), 4)]
    for step in range(2):
        assert [i for rank in range(2) for own in found[rank][step][1] for i in own] == wanted[step]


def test_workers_end_with_their_rank() -> None:
    with start(1, OnRanks()) as alone:
        workers = set(alone.call("leave_open")[0])
        assert alive(workers) == workers
        with pytest.raises(RankDied):
            alone.call("die")
    assert not soon_alive(workers)


def test_workers_end_at_once_with_the_process_that_reads(ranks: Ranks) -> None:
    assert ranks.call("left_by_the_dead", ranks=[0]) == {0: set()}


def soon_alive(processes: set[int]) -> set[int]:
    """Those that live after 3 seconds; torch's own workers look after 5 whether anybody needs them."""
    deadline = time.monotonic() + 3
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive(processes)


def alive(processes: set[int]) -> set[int]:
    def lives(process: int) -> bool:
        try:
            with open(f"/proc/{process}/stat") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    return {process for process in processes if lives(process)}


def test_a_loader_that_is_closed_yields_no_more() -> None:
    given = loader(experiment(), workers=1)
    steps = iter(given)
    next(steps)
    given.close()
    assert list(steps) == []


# Evaluation


@pytest.mark.parametrize(
    ("length", "ranks", "workers"), [(1, 1, 0), (1, 3, 2), (16, 1, 0), (16, 3, 0), (22, 3, 0), (22, 8, 0), (22, 3, 2)]
)
@pytest.mark.parametrize("kind", ["data set", "stream"])
def test_an_evaluation_reads_every_sample_once_on_as_many_batches_on_every_rank(
    kind: str, length: int, ranks: int, workers: int
) -> None:
    data = Subset(Augmented(), range(length)) if kind == "data set" else Numbers(length)
    parts = [
        list(eval_batches(data, batch_size=SIZE, data_rank=rank, data_ranks=ranks, workers=workers))
        for rank in range(ranks)
    ]
    assert {len(own) for own in parts} == {-(-length // SIZE)}
    got = [row for batch in zip(*parts, strict=True) for part in batch if part.weight for row in flat(part.batch)]
    assert [row[0] for row in got] == list(range(length))
    for batch in zip(*parts, strict=True):
        assert sum(part.weight for part in batch) == pytest.approx(ranks)


def test_an_evaluation_draws_the_same_in_every_pass() -> None:
    once, again = (
        [flat(part.batch) for part in eval_batches(Augmented, batch_size=5, data_rank=0, data_ranks=1)] for _ in "ab"
    )
    assert len(once) == 5
    assert same(once, again)


@pytest.mark.parametrize("data", [[], 7, iter(())])
def test_nothing_to_evaluate_on_is_refused(data: Any) -> None:
    with pytest.raises(ExperimentError, match="sample"):
        list(eval_batches(data, batch_size=4, data_rank=0, data_ranks=1))
