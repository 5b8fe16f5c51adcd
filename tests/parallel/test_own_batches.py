"""A loader of the user's own under the trainer: steps, epochs, and going on inside one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from parallel.loaded import LENGTH, SIZE, Augmented, Numbers, experiment, flat, read, same
from shardproof.errors import ExperimentError, UsageError
from shardproof.parallel.loading import LoadedStep, Loader, joined
from shardproof.parallel.portable import NotPortable, packed, unpacked
from shardproof.parallel.source import SNAPSHOT_STEPS
from shardproof.spec.parallelism import Parallelism

MESH: Any = object()

# As torchdata is imported.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


def loader(batches: Callable[..., Any], *, ranks: int = 1, rank: int = 0, data: Any = None, **changes: Any) -> Loader:
    return Loader(
        experiment(data, batches=batches),
        data_rank=rank,
        data_ranks=ranks,
        seed=3,
        shuffle=True,
        mesh=MESH,
        parallelism=Parallelism(dp_replicate=ranks),
        **changes,
    )


def values(steps: list[LoadedStep]) -> list[Tensor]:
    return [torch.cat([flat(part.batch) for part in step.microbatches]) for step in steps]


def drawn(data: Any, mesh: Any, parallelism: Parallelism) -> Iterable[Any]:
    """Shuffled and augmented by the global generators."""
    return DataLoader(data, batch_size=4, shuffle=True, drop_last=True)


def test_so_many_micro_batches_make_a_step_and_the_end_ends_the_epoch() -> None:
    called = []

    def batches(data: Any, mesh: Any, parallelism: Parallelism) -> Iterator[Tensor]:
        called.append((mesh, parallelism.dp))
        yield from torch.arange(12).reshape(6, 2)

    steps = read(loader(batches, ranks=2, microbatches=2), 4)
    assert [[part.batch.tolist() for part in step.microbatches] for step in steps] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
        [[0, 1], [2, 3]],
    ]
    assert {part.weight for step in steps for part in step.microbatches} == {0.5}
    assert [(step.epoch, step.last, step.samples) for step in steps] == [
        (0, False, SIZE),
        (0, False, SIZE),
        (0, True, SIZE),
        (1, False, SIZE),
    ]
    assert called == [(MESH, 2)] * 2


def test_batches_without_end_are_one_epoch() -> None:
    def batches(*_: Any) -> Iterator[Tensor]:
        while True:
            yield torch.rand(2)

    steps = read(loader(batches), 20)
    assert {(step.epoch, step.last) for step in steps} == {(0, False)}
    assert len(torch.cat(values(steps)).unique()) == 40
    assert same(values(read(loader(batches), 3, steps[16].state)), values(steps)[17:])


def test_a_buffer_that_is_filled_again_is_copied() -> None:
    def batches(*_: Any) -> Iterator[Tensor]:
        buffer = torch.empty(2)
        for i in range(8):
            yield buffer.fill_(i)

    assert [batch[:, 0].tolist() for batch in values(read(loader(batches, microbatches=2), 2))] == [
        [0, 0, 1, 1],
        [2, 2, 3, 3],
    ]


def test_a_sampler_is_told_the_epoch() -> None:
    def batches(data: Any, mesh: Any, parallelism: Parallelism) -> Iterable[Any]:
        return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=2, rank=0))

    steps = read(loader(batches, data=TensorDataset(torch.arange(16)), ranks=2), 4)
    first, second = (torch.cat([step.microbatches[0].batch[0] for step in steps[at : at + 2]]) for at in (0, 2))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("after", range(7))
def test_a_loader_without_state_is_read_again_up_to_the_place(after: int) -> None:
    unbroken = read(loader(drawn), 9)
    assert [step.last for step in unbroken[:5]] == [False] * 4 + [True]
    assert same(values(read(loader(drawn), 8 - after, unbroken[after].state)), values(unbroken)[after + 1 :])


class Counted(Augmented):
    """Counts what is read of it, in this process."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 50 * 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        return super().__getitem__(index)


def stateful(data: Any, mesh: Any, parallelism: Parallelism, workers: int = 0) -> Iterable[Any]:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(data, batch_size=4, shuffle=True, num_workers=workers)


@pytest.mark.parametrize("after", [0, 15, 16, 30, 47, 48, 49, 66])
def test_a_stateful_data_loader_goes_on_from_its_state(after: int) -> None:
    unbroken = read(loader(stateful, data=Counted()), 70)
    resumed = Counted()
    got = read(loader(stateful, data=resumed), 3, unbroken[after].state)
    assert same(values(got), values(unbroken)[after + 1 : after + 4])
    assert [step.last for step in got] == [step.last for step in unbroken[after + 1 : after + 4]]
    assert resumed.read <= 4 * (SNAPSHOT_STEPS + 4), "no more than the steps since the newest state"


def test_a_stateful_data_loader_with_workers_of_its_own_goes_on_from_its_state() -> None:
    def batches(*given: Any) -> Iterable[Any]:
        return stateful(*given, workers=2)

    data = TensorDataset(torch.arange(100))
    unbroken = read(loader(batches, data=data), 20)
    got = read(loader(batches, data=data), 2, unbroken[17].state)
    assert [step.microbatches[0].batch[0].tolist() for step in got] == [
        step.microbatches[0].batch[0].tolist() for step in unbroken[18:]
    ]


def test_a_rank_goes_on_from_its_own_state_only() -> None:
    unbroken = [read(loader(stateful, data=Counted(), ranks=2, rank=rank), 20) for rank in range(2)]
    states = [steps[16].state for steps in unbroken]
    wanted = values(unbroken[1])[17:]
    for state, cheap in ((states[0], False), (states[1], True), (joined(states), True)):
        data = Counted()
        assert same(values(read(loader(stateful, data=data, ranks=2, rank=1), 3, state)), wanted)
        assert (data.read < 10 * 4) == cheap
    data = Counted()
    read(loader(stateful, data=data, ranks=4, rank=1), 1, joined(states))
    assert data.read > 16 * 4, "another number of ranks reads from the start"


def test_states_of_other_data_are_joined_to_the_first() -> None:
    states = [read(loader(drawn, rank=rank, ranks=2), 1)[0].state for rank in range(2)]
    assert joined(states) == states[0]


@pytest.mark.parametrize(
    ("yielded", "says"),
    [
        (3, "ended after 3 micro-batches of epoch 0, inside a step: a step takes 2"),
        (1, "ended after 1 micro-batches of epoch 0, inside a step: a step takes 2"),
        (0, "yielded nothing in epoch 0"),
    ],
)
def test_an_end_inside_a_step_is_an_error(yielded: int, says: str) -> None:
    with pytest.raises(ExperimentError, match=says):
        read(loader(lambda *_: torch.ones(yielded, 2), microbatches=2), 3)


def test_an_end_before_the_place_to_go_on_is_an_error() -> None:
    state = read(loader(lambda *_: torch.ones(6, 2)), 4)[3].state
    with pytest.raises(ExperimentError, match=r"ended after 2 micro-batches of epoch 0; .* had read 4 and went on"):
        read(loader(lambda *_: torch.ones(2, 2)), 1, state)


def test_what_is_no_iterable_is_refused() -> None:
    with pytest.raises(ExperimentError, match="returned int; it must return an iterable"):
        read(loader(lambda *_: 7), 1)


def test_the_mesh_is_asked_for() -> None:
    with pytest.raises(UsageError, match="the mesh and the parallelism"):
        Loader(experiment(batches=drawn), data_rank=0, data_ranks=1, seed=0, shuffle=False)


def test_a_stream_is_handed_to_the_users_own_loader() -> None:
    steps = read(loader(lambda data, *_: DataLoader(data, batch_size=4), data=Numbers(LENGTH)), 2)
    assert values(steps)[1][:, 0].tolist() == [4, 5, 6, 7]


def test_a_state_survives_json() -> None:
    state = {
        "generator": torch.get_rng_state(),
        "nested": [(1, None, 0.1, True, b"\x00\xff"), {"deep": {3: "three", (1, 2): []}}],
        "half": torch.tensor([1.5, float("inf")]).bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "number": np.float32(0.1),
        "@odd": {"@dict": 1},
        "plain": {"a": 1},
    }
    text = json.dumps(packed(state))
    back = unpacked(json.loads(text))
    assert repr(back) == repr(state)
    assert torch.equal(back["generator"], state["generator"])
    assert (back["half"].dtype, back["empty"].shape) == (torch.bfloat16, (0, 3))
    assert (back["array"].dtype, type(back["number"])) == (np.uint32, np.float32)
    assert packed({"a": 1, "b": [True]}) == {"a": 1, "b": [True]}, "plain data stays readable"


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(NotPortable, match=r"state\['a'\]\[1\] is a builtins\.set"):
        packed({"a": [1, {2}]})
