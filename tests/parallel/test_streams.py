"""Data that is read one sample after the other: the same under every layout, with workers, and after a resumption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from parallel.loaded import LAYOUTS, SIZE, Numbers, experiment, loader, read, rows, same, whole
from shardproof.errors import ExperimentError
from shardproof.parallel.data import dataset_of
from shardproof.parallel.source import SNAPSHOT_STEPS

LENGTH = 22


class Noisy:
    """Draws, is told the epoch, and is no class of torch's."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        start = random.random()
        for i in range(self.length):
            yield torch.tensor([i, self.epoch, start, random.random(), float(torch.rand(()))], dtype=torch.float64)


class Shuffled(IterableDataset):
    """Shuffles in a buffer, and knows where it is; `read` counts what it was asked for."""

    def __init__(self, length: int, held: Any = None) -> None:
        self.length, self.held = length, held
        self.at, self.buffer = 0, []
        self.read = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "buffer": self.buffer, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.buffer = state["at"], state["buffer"]

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < self.length or self.buffer:
            while self.at < self.length and len(self.buffer) < 5:
                self.buffer.append(torch.tensor(self.at))
                self.at += 1
            self.read += 1
            yield self.buffer.pop(random.randrange(len(self.buffer)))
        self.at = 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_read_the_same_stream(layout: tuple[int, int]) -> None:
    want = whole(experiment(Noisy()), (1, 1), 7)
    assert [len(batch) for batch in want] == [8, 8, 6, 8, 8, 6, 8]
    assert torch.cat(want[:3])[:, 0].tolist() == list(range(LENGTH))
    assert same(whole(experiment(Noisy()), layout, 7), want)


def test_a_stream_draws_anew_in_every_epoch_and_is_told_which_it_is() -> None:
    found = torch.cat(whole(experiment(Noisy()), (1, 1), 6))
    assert found[:, 1].tolist() == [0] * LENGTH + [1] * LENGTH
    assert len(found[:, 3:].unique()) == 4 * LENGTH


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    for data in (Noisy, lambda: Shuffled(LENGTH)):
        want = [read(loader(experiment(data), rank, (2, 2)), 7) for rank in range(2)]
        got = [read(loader(experiment(data), rank, (2, 2), workers=workers), 7) for rank in range(2)]
        assert same(rows(got), rows(want))
        assert [step.state for step in got[1]] == [step.state for step in want[1]]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16])
def test_the_last_step_of_an_epoch_is_known_when_it_is_read(length: int) -> None:
    steps = read(loader(experiment(Numbers(length))), 5)
    per_epoch = -(-length // SIZE)
    assert [step.last for step in steps] == [(i + 1) % per_epoch == 0 for i in range(5)]
    assert [step.epoch for step in steps] == [i // per_epoch for i in range(5)]
    assert steps[per_epoch - 1].samples == (length - 1) % SIZE + 1


def test_a_users_own_step_gets_whole_batches_only() -> None:
    described = experiment(Numbers(LENGTH), train_step=print)
    steps = read(loader(described), 3)
    assert [(step.samples, step.last) for step in steps] == [(8, False), (8, True), (8, False)]
    assert [row[0] for row in rows([steps])[1].tolist()] == list(range(8, 16))
    with pytest.raises(ExperimentError, match="7 samples, less than one batch of 8"):
        read(loader(experiment(Numbers(7), train_step=print)), 1)


@pytest.mark.parametrize("after", range(6))
def test_a_stream_without_state_is_read_again_up_to_the_place(after: int) -> None:
    unbroken = [read(loader(experiment(Noisy()), rank, (2, 1)), 8) for rank in range(2)]
    state = unbroken[0][after].state
    assert same(whole(experiment(Noisy()), (4, 2), 7 - after, state), rows(unbroken)[after + 1 :])


@pytest.mark.parametrize("after", [0, 14, 15, 16, 20, 34, 35, 52])
def test_a_stream_with_state_goes_on_from_it(after: int) -> None:
    length, steps = 36 * SIZE - 3, 56
    unbroken = read(loader(experiment(Shuffled(length))), steps)
    state = unbroken[after].state
    for workers in (0, 2) if after == 20 else (0,):
        resumed = Shuffled(length)
        got = read(loader(experiment(resumed), workers=workers), 3, state)
        assert same(rows([got]), rows([unbroken])[after + 1 : after + 4])
        assert [step.state for step in got] == [step.state for step in unbroken[after + 1 : after + 4]]
        assert resumed.read <= (SNAPSHOT_STEPS + 3) * SIZE, "no more than the steps since the newest state"


def test_a_state_that_cannot_be_saved_is_done_without() -> None:
    given = loader(experiment(Shuffled(40 * SIZE, held=object())))
    with pytest.warns(UserWarning, match=r"the stream \(Shuffled\) cannot be saved, because state\['held'\] is"):
        unbroken = read(given, 22)
    resumed = read(loader(experiment(Shuffled(40 * SIZE))), 2, unbroken[19].state)
    assert same(rows([resumed]), rows([unbroken])[20:])


def test_a_function_may_return_a_new_iterator_for_every_epoch() -> None:
    def made() -> Iterator[int]:
        yield from range(9)

    for workers in (0, 1):
        steps = read(loader(experiment(made), workers=workers), 4)
        assert [step.epoch for step in steps] == [0, 0, 1, 1]
        assert [batch[:, 0].tolist() for batch in rows([steps])] == [[*range(8)], [8], [*range(8)], [8]]


def test_workers_do_not_share_the_position_of_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_text("".join(f"{i}\n" for i in range(5000)))
    with ExitStack() as opened:
        steps = read(loader(experiment(lambda: map(int, opened.enter_context(path.open()))), workers=2), 40)
    assert [batch[:, 0].tolist() for batch in rows([steps])] == [[*range(8 * at, 8 * at + 8)] for at in range(40)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterator_that_is_used_up_is_an_error_with_a_way_out(workers: int) -> None:
    steps = iter(loader(experiment(iter(range(9))), workers=workers))
    assert [next(steps).last for _ in range(2)] == [False, True]
    with pytest.raises(ExperimentError, match=r"no sample in epoch 1: .*give a function that returns it"):
        next(steps)


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(ExperimentError, match=r"the stream \(Numbers\) yielded no sample in epoch 0; add data"):
        read(loader(experiment(Numbers(0))), 1)


def test_a_stream_that_ends_before_the_place_to_go_on_is_an_error() -> None:
    state = read(loader(experiment(Numbers(LENGTH))), 2)[1].state
    with pytest.raises(ExperimentError, match=r"ended after 9 samples of epoch 0; .* had read 16 and went on"):
        read(loader(experiment(Numbers(9))), 1, state)


def test_the_length_of_a_stream_is_used_where_it_is_known() -> None:
    class Known(Numbers):
        def __len__(self) -> int:
            return self.length

    assert loader(experiment(Numbers(LENGTH))).steps_per_epoch is None
    assert loader(experiment(Known(LENGTH))).steps_per_epoch == 3
    assert loader(experiment(Known(LENGTH), train_step=print)).steps_per_epoch == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_raises_comes_through_with_the_sample_named(workers: int) -> None:
    def torn() -> Iterator[int]:
        yield from range(10)
        raise LookupError("the tape is torn")

    with pytest.raises(LookupError, match="the tape is torn") as caught:
        read(loader(experiment(torn), workers=workers), 3)
    assert caught.value.__notes__ == ["while sample 10 of the stream (generator) was read, in epoch 0"]


def test_a_check_says_that_it_takes_no_streams() -> None:
    with pytest.raises(ExperimentError, match=r"Numbers without len\(\) and \[i\], a stream, which only sp\.Trainer"):
        dataset_of(experiment(Numbers(LENGTH)))
