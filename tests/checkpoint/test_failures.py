"""What goes wrong with checkpoints is told on every rank, and costs no earlier checkpoint."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardproof.checkpoint import folder, stream
from shardproof.checkpoint.export import export
from shardproof.checkpoint.load import load, load_weights, read_extra
from shardproof.checkpoint.save import save, save_async
from shardproof.errors import CheckpointError, RankDied
from shardproof.parallel import mesh as meshes
from shardproof.parallel.held import held_parameters
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.parallelism import Parallelism

KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "two groups": lambda parameters: torch.optim.AdamW([{"params": p} for p in parameters], lr=0.1),
    "fewer": lambda parameters: torch.optim.AdamW(list(parameters)[:1], lr=0.1),
}


class Trained:
    """A linear layer, sharded over two ranks, whose weights are all `value`."""

    def __init__(self, value: float, *, width: int = 64, kind: str = "adamw") -> None:
        mesh, _ = meshes.build(Parallelism(dp_shard=2), "cpu")
        self.model = fully_shard(nn.Linear(width, 64), mesh=mesh["dp_shard"])
        self.optimizer = KINDS[kind](self.model.parameters())
        self.parameters = list(held_parameters(self.model))
        self.fill(value)
        self.model(torch.ones(2, width)).sum().backward()
        self.optimizer.step()
        self.fill(value)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    @property
    def value(self) -> float:
        weight = self.model.weight
        assert isinstance(weight, DTensor)
        assert weight.to_local().unique().numel() == 1
        return weight.to_local()[0, 0].item()

    def save(self, path: Path, **options: Any) -> None:
        save(path, self.model, self.parameters, self.optimizer, {"value": self.value}, **options)


def die(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_rename(self: Path, target: Path) -> Path:
    """A kill between the two renames that put a checkpoint in the place of another."""
    if ".writing-" in self.name:
        die()
    os.rename(self, target)
    return target


DEATHS: dict[str, tuple[int, object, str, Callable[..., Any]]] = {
    "in a file of rank 1": (1, stream, "_content", die),
    "before the index": (0, folder, "put", die),
    "at the last rename": (0, Path, "rename", die_at_rename),
}


class OnRanks:
    def saves(self, place: Place, path: Path, value: float, death: str | None = None) -> None:
        with place.world("saves", 2):
            trained = Trained(value)
            if death is not None and place.rank == DEATHS[death][0]:
                setattr(*DEATHS[death][1:])
            trained.save(path)

    def loads(self, place: Place, path: Path, width: int = 64, kind: str = "adamw") -> object:
        """The value, or what the error says, and whether the model is as it was then."""
        with place.world("loads", 2):
            trained = Trained(-1.0, width=width, kind=kind)
            try:
                load(path, trained.model, trained.parameters, trained.optimizer)
            except CheckpointError as error:
                return str(error), trained.value
            return trained.value

    def too_full(self, place: Place, path: Path, background: bool) -> object:
        """What rank 1's full disk says to everybody; then a save that fits."""
        with place.world("full", 2):
            trained = Trained(2.0)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if place.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            try:
                if background:
                    arguments = (trained.model, trained.parameters, trained.optimizer)
                    save_async(path, *arguments).wait()
                else:
                    trained.save(path)
            except CheckpointError as error:
                return str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            return "saved"

    def one_rank_refuses(self, place: Place, path: Path) -> object:
        with place.world("refuses", 2):
            trained = Trained(2.0)
            extra = {"model": object()} if place.rank == 1 else {}
            try:
                save(path, trained.model, trained.parameters, trained.optimizer, extra)
            except CheckpointError as error:
                return str(error)
            return "saved"

    def in_the_background(self, place: Place, path: Path) -> None:
        """The same state at once and in the background, while training goes on; then another at once."""
        with place.world("background", 2):
            trained = Trained(3.0)
            trained.save(path / "step-00000001")
            arguments = (trained.model, trained.parameters, trained.optimizer)
            pending = save_async(path / "step-00000002", *arguments, {"value": 3.0})
            trained.fill(4.0)
            for state in trained.optimizer.state.values():
                state["exp_avg"].fill_(4.0)
            # Training goes on, with collectives of its own.
            trained.model(torch.ones(2, 64)).sum().backward()
            trained.fill(4.0)
            second = save_async(path / "step-00000003", *arguments, keep=2)
            assert pending.done
            pending.wait()
            second.wait()

    def weights(self, place: Place, path: Path) -> object:
        with place.world("weights", 2):
            trained = Trained(-1.0)
            try:
                load_weights(path, trained.model, trained.parameters)
            except CheckpointError as error:
                return str(error)
            return trained.value


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, OnRanks()) as ranks:
        yield ranks


@pytest.fixture
def good(ranks: Ranks, tmp_path: Path) -> Path:
    """A checkpoint of ones."""
    path = tmp_path / "step-00000001"
    ranks.call("saves", path, 1.0)
    return path


def refused(ranks: Ranks, path: Path, *args: Any) -> str:
    """What every rank says of a checkpoint that must not be loaded; the model must be as it was."""
    found = ranks.call("loads", path, *args)
    assert found[0] == found[1], "all ranks must say the same"
    text, value = found[0]
    assert value == -1.0
    return text


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("same_name", [False, True])
def test_a_save_that_is_killed_costs_no_earlier_checkpoint(tmp_path: Path, death: str, same_name: bool) -> None:
    first = tmp_path / "step-00000001"
    with start(2, OnRanks()) as ranks:
        ranks.call("saves", first, 1.0)
        with pytest.raises(RankDied):
            ranks.call("saves", first if same_name else tmp_path / "step-00000002", 2.0, death)
    assert len(list(tmp_path.iterdir())) > 1, "the killed save must have left something"
    folder.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [first]
    assert folder.newest(tmp_path) == first
    export(first, tmp_path / "first.safetensors")
    assert load_file(tmp_path / "first.safetensors")["weight"].unique().tolist() == [1.0]
    assert read_extra(first) == {"value": 1.0}


def test_a_checkpoint_whose_replacement_was_killed_is_found_without_tidying_up(tmp_path: Path) -> None:
    path = tmp_path / "best"
    with start(2, OnRanks()) as ranks:
        ranks.call("saves", path, 1.0)
        with pytest.raises(RankDied):
            ranks.call("saves", path, 2.0, "at the last rename")
    assert not path.exists()
    assert read_extra(path) == {"value": 1.0}


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_nothing(ranks: Ranks, good: Path, background: bool) -> None:
    found = ranks.call("too_full", good.with_name("step-00000002"), background)
    assert found[0] == found[1]
    assert "rank 1: " in found[0]
    assert "step-00000002 could not be written: [Errno 27] File too large" in found[0]
    assert [path.name for path in good.parent.iterdir()] == [good.name]
    assert ranks.call("loads", good) == {0: 1.0, 1: 1.0}


def test_a_rank_that_cannot_say_what_to_save_stops_all(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.call("one_rank_refuses", tmp_path / "step-00000002")
    assert found[0] == found[1]
    assert "rank 1: extra['model'] is a object, which a checkpoint cannot hold" in found[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint; saving there would delete it"):
        save_one(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def save_one(path: Path) -> None:
    """Save a model without any ranks."""
    model = nn.Linear(2, 2)
    save(path, model, list(held_parameters(model)), None)


def test_a_checkpoint_is_replaced_by_one_of_the_same_name(ranks: Ranks, good: Path) -> None:
    ranks.call("saves", good, 5.0)
    assert ranks.call("loads", good.parent) == {0: 5.0, 1: 5.0}
    assert list(good.parent.iterdir()) == [good]


def test_what_is_saved_in_the_background_is_the_state_at_the_call(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call("in_the_background", tmp_path)
    # The third kept two.
    assert [path.name for path in folder.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert ranks.call("loads", tmp_path / "step-00000002") == {0: 3.0, 1: 3.0}
    assert ranks.call("loads", tmp_path) == {0: 4.0, 1: 4.0}


def test_a_save_in_the_background_writes_the_same_bytes(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call("in_the_background", tmp_path / "both")
    ranks.call("saves", tmp_path / "alone", 3.0)
    for file in ("rank-00000.safetensors", "rank-00001.safetensors", "index.json"):
        assert (tmp_path / "both/step-00000002" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_missing_and_an_unfinished_checkpoint_are_told_apart(ranks: Ranks, tmp_path: Path) -> None:
    assert "does not exist" in refused(ranks, tmp_path / "step-00000009")
    assert "has no index.json" in refused(ranks, tmp_path)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((path / "index.json").read_text())
    change(index)
    (path / "index.json").write_text(json.dumps(index))


def chunk(index: dict[str, Any]) -> dict[str, Any]:
    return index["tensors"]["model/weight"]["chunks"][0]


def larger(index: dict[str, Any]) -> None:
    index["tensors"]["model/weight"]["shape"] = [1 << 40, 64]
    chunk(index)["shape"] = [(1 << 40) - 32, 64]
    index["tensors"]["model/weight"]["chunks"][1]["offset"] = [(1 << 40) - 32, 0]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a newer format": (lambda i: i.update(version=2), "has format version 2, and this shardproof reads up to 1"),
    "another format": (lambda i: i.update(format="pickle"), "is not the index of a shardproof checkpoint"),
    "a path out of the folder": (lambda i: chunk(i).update(file="../other.safetensors"), "is no file of a checkpoint"),
    "an absolute path": (lambda i: i["files"].update({"/etc/passwd": 1}), "is no file of a checkpoint"),
    "more than the files hold": (larger, "is to hold"),
    "chunks that overlap": (lambda i: chunk(i).update(offset=[32, 0]), "do not tile"),
    "a negative size": (lambda i: chunk(i).update(shape=[-32, 64]), "is no size"),
    "no tensors": (lambda i: i.pop("tensors"), "is damaged"),
    "another key": (lambda i: chunk(i).update(key="model/bias@0"), "and the index says"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_cannot_be_true_is_refused(ranks: Ranks, good: Path, damage: str) -> None:
    change, text = DAMAGES[damage]
    edit(good, change)
    assert text in refused(ranks, good)


def test_an_unreadable_index_is_refused(ranks: Ranks, good: Path) -> None:
    (good / "index.json").write_bytes(b'{"format": "shard')
    assert "cannot be read" in refused(ranks, good)
    (good / "index.json").write_bytes(b"[" * 100_000)
    assert "cannot be read" in refused(ranks, good)


def test_a_truncated_and_a_missing_file_are_refused_before_anything_is_read(ranks: Ranks, good: Path) -> None:
    file = good / "rank-00001.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 4)
    assert f"has {size - 4} bytes, and the index says {size}" in refused(ranks, good)
    file.unlink()
    assert "rank-00001.safetensors is part of the checkpoint and cannot be opened" in refused(ranks, good)


def test_a_damaged_header_is_refused(ranks: Ranks, good: Path) -> None:
    file = good / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    assert "rank-00000.safetensors is damaged" in refused(ranks, good)


def test_a_checkpoint_of_another_model_is_refused_by_name(ranks: Ranks, good: Path) -> None:
    text = refused(ranks, good, 32)
    assert "of another model" in text
    assert "model/weight (64, 64) against (64, 32)" in text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sgd", "holds the state of AdamW, and this optimizer is SGD"),
        ("two groups", "has 1 param groups, and this optimizer has 2"),
        ("fewer", "param group 0 holds other parameters than it did; only in the checkpoint: bias"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(ranks: Ranks, good: Path, kind: str, text: str) -> None:
    assert text in refused(ranks, good, 64, kind)


def test_exported_weights_are_read_back_by_slices(ranks: Ranks, good: Path) -> None:
    out = good.parent / "out.safetensors"
    export(good, out)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(out).items()} == {"weight": (64, 64), "bias": (64,)}
    assert ranks.call("weights", out) == {0: 1.0, 1: 1.0}
    out.write_bytes(out.read_bytes()[:-1])
    found = ranks.call("weights", out)
    assert found[0] == found[1]
    assert "is no whole safetensors file" in found[0]
    assert "does not exist" in ranks.call("weights", good / "nothing.safetensors")[0]
