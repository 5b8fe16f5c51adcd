"""Optimizers, dtypes and layouts out of the ordinary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from shardproof.checkpoint import index as indices
from shardproof.checkpoint.export import assemble, export
from shardproof.checkpoint.load import load, load_weights
from shardproof.checkpoint.placed import Declared
from shardproof.checkpoint.plain import decode, encode
from shardproof.checkpoint.save import save, save_async
from shardproof.checkpoint.whole import whole_state
from shardproof.errors import CheckpointError
from shardproof.parallel import mesh as meshes
from shardproof.parallel.held import held_parameters
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.parallelism import Parallelism


class Factored(torch.optim.Optimizer):
    """Keeps one number per row. (torch's Adafactor cannot step DTensors that are sharded along their rows.)"""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                grad, state = parameter.grad, self.state[parameter]
                squares = grad.square().mean(-1, keepdim=True) if grad.dim() > 1 else grad.square()
                if not state:
                    state["row"], state["calls"] = grad.new_zeros(squares.shape), 0
                state["calls"] += 1
                state["row"].mul_(0.9).add_(squares)
                parameter.sub_(group["lr"] * grad / (state["row"].sqrt() + 1e-3))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.1),
    "tensor lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1), amsgrad=True, foreach=False),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "factored": Factored,
}


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


LAYOUTS: dict[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {
    "alike": lambda model, _mesh: model,
    "fsdp": lambda model, mesh: fully_shard(model, mesh=mesh["dp_shard"]),
    "fsdp1": lambda model, mesh: FullyShardedDataParallel(
        model, device_mesh=mesh["dp_shard"], use_orig_params=True, device_id=torch.device("cpu")
    ),
    "fsdp1 without original parameters": lambda model, mesh: FullyShardedDataParallel(
        model, device_mesh=mesh["dp_shard"], use_orig_params=False, device_id=torch.device("cpu")
    ),
}


class Setting:
    def __init__(self, layout: str, optimizer: str, dtype: torch.dtype = torch.float32) -> None:
        mesh, _ = meshes.build(Parallelism(dp_shard=2), "cpu")
        self.model = LAYOUTS[layout](model_of().to(dtype), mesh)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.parameters = list(held_parameters(self.model))

    @property
    def own(self) -> tuple[Any, ...]:
        return self.model, self.parameters, self.optimizer

    def step(self) -> None:
        self.optimizer.zero_grad()
        dtype = next(self.model.parameters()).dtype
        self.model(torch.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3)).square().mean().backward()
        self.optimizer.step()


def content(path: Path) -> dict[str, Tensor]:
    index = indices.read(path)
    return {name: assemble(path, index, saved) for name, saved in index.tensors.items()}


def same(left: Path, right: Path) -> bool:
    one, two = content(left), content(right)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class ByHand(nn.Module):
    """Rows of a weight, split over `tp` without DTensor."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)


class OnRanks:
    def around(self, place: Place, optimizer: str, first: str, second: str, folder: Path) -> str | None:
        """Save under one layout, load under another and save again, twice; then train on there."""
        with place.world("around", 2):
            before = Setting(first, optimizer)
            before.step()
            save(folder / "first", *before.own)
            after = Setting(second, optimizer)
            for name in ("made", "filled"):
                rates = [group["lr"] for group in after.optimizer.param_groups]
                try:
                    load(folder / "first", *after.own)
                except CheckpointError as error:
                    return str(error)
                save(folder / name, *after.own)
                # A compiled step reads the very tensor.
                for group, rate in zip(after.optimizer.param_groups, rates, strict=True):
                    assert group["lr"] is rate or not isinstance(rate, Tensor)
                after.step()
            before.step()
            load(folder / "first", *after.own)
            after.step()
            save(folder / "trained there", *after.own)
            save(folder / "trained here", *before.own)
            return None

    def cast(self, place: Place, folder: Path) -> list[str]:
        with place.world("cast", 2):
            before = Setting("fsdp", "nadam", torch.float64)
            before.step()
            save(folder / "wide", *before.own)
            after = Setting("fsdp1", "nadam", torch.bfloat16)
            load(folder / "wide", *after.own)
            after.step()
            save(folder / "narrow", *after.own)
            return sorted({str(saved.dtype) for saved in indices.read(folder / "narrow").tensors.values()})

    def by_hand(self, place: Place, folder: Path, declared: bool) -> object:
        with place.world("by hand", 2):
            mesh, _ = meshes.build(Parallelism(tp=2), "cpu")
            whole = torch.arange(12.0).reshape(4, 3)
            model = ByHand(whole[2 * place.rank : 2 * place.rank + 2].clone())
            parameters = list(held_parameters(model, {"weight": (4, 3)}))
            options = {"declared": Declared({"weight": {"tp": 0}}, mesh)} if declared else {}
            try:
                save(folder / "split", model, parameters, None, **options)
                load(folder / "split", model, parameters, None, **options)
                state = whole_state(parameters, model, **options)
            except CheckpointError as error:
                return str(error)
            return None if state is None else torch.equal(state["weight"], whole)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, OnRanks()) as ranks:
        yield ranks


AROUND = [
    ("sgd", "fsdp", "fsdp1"),
    ("adagrad", "fsdp1", "fsdp"),
    ("nadam", "fsdp1 without original parameters", "fsdp"),
    ("nadam", "fsdp", "fsdp1 without original parameters"),
    ("tensor lr", "alike", "fsdp"),
    ("adafactor", "alike", "alike"),
    ("factored", "alike", "fsdp"),
    ("factored", "fsdp", "alike"),
]


@pytest.mark.parametrize(("optimizer", "first", "second"), AROUND)
def test_every_optimizer_goes_around_and_trains_on(
    ranks: Ranks, tmp_path: Path, optimizer: str, first: str, second: str
) -> None:
    assert set(ranks.call("around", optimizer, first, second, tmp_path).values()) == {None}
    assert same(tmp_path / "first", tmp_path / "made")
    assert same(tmp_path / "first", tmp_path / "filled")
    here, there = content(tmp_path / "trained here"), content(tmp_path / "trained there")
    assert here.keys() == there.keys()
    for name, value in here.items():
        # Sums over ranks round otherwise than sums over one batch.
        torch.testing.assert_close(there[name], value)


def test_state_that_is_not_shaped_like_a_stretch_of_parameter_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.call("around", "adafactor", "alike", "fsdp1", tmp_path)
    assert found[0] == found[1]
    assert "nothing says which part of the whole state that is" in found[0]


def test_values_are_cast_to_the_live_dtype_and_counters_are_not(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.call("cast", tmp_path)
    assert found[0] == ["torch.bfloat16", "torch.float32"]
    saved = content(tmp_path / "narrow")
    assert saved["optimizer/0.weight/step"].item() == 2.0


def test_what_was_split_by_hand_is_saved_where_it_was_declared(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call("by_hand", tmp_path, True) == {0: True, 1: None}
    assert torch.equal(content(tmp_path / "split")["model/weight"], torch.arange(12.0).reshape(4, 3))
    found = ranks.call("by_hand", tmp_path, False)
    assert found[0] == found[1]
    assert "weight was split by hand: this rank holds (2, 3) of (4, 3)" in found[0]


class Dtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.randn(()))
        self.narrow = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("phase", torch.randn(2, dtype=torch.complex128))


def test_all_dtypes_go_around_without_any_process_group(tmp_path: Path) -> None:
    model, other = Dtypes(), Dtypes()
    want = {name: value.clone() for name, value in model.state_dict().items()}
    for value in other.state_dict().values():
        value.zero_()
    save_async(tmp_path / "a", model, list(held_parameters(model)), None, {"x": 1}).wait()
    assert load(tmp_path / "a", other, list(held_parameters(other)), None) == {"x": 1}
    assert all(torch.equal(value, want[name]) for name, value in other.state_dict().items())
    export(tmp_path / "a", tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["narrow"].dtype == torch.bfloat16
    third = Dtypes()
    for value in third.state_dict().values():
        value.zero_()
    load_weights(tmp_path / "a.safetensors", third, list(held_parameters(third)))
    assert all(torch.equal(value, want[name]) for name, value in third.state_dict().items())


def test_a_plain_model_loads_what_was_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    save(tmp_path / "tied", model, list(held_parameters(model)), None)
    export(tmp_path / "tied", tmp_path / "all.safetensors")
    export(tmp_path / "tied", tmp_path / "first.safetensors", every_name=False)
    assert sorted(load_file(tmp_path / "all.safetensors")) == ["0.weight", "1.weight"]
    assert sorted(load_file(tmp_path / "first.safetensors")) == ["0.weight"]
    want = model[0].weight.detach().clone()
    for name in ("all", "first"):
        nn.init.zeros_(model[0].weight)
        load_weights(tmp_path / f"{name}.safetensors", model, list(held_parameters(model)))
        assert torch.equal(model[1].weight, want)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, "x", True],
        (1, (2, [3])),
        {"tuple": [1]},
        {"a": {"b": ()}},
        {3: 1, 5: 2},
        float("inf"),
        0.1 + 0.2,
    ],
)
def test_plain_data_comes_back_as_it_was(value: object) -> None:
    found = decode(encode(value, "extra"))
    assert found == value
    assert type(found) is type(value)


def test_data_that_is_not_plain_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"extra\['a'\]\[1\] is a set"):
        encode({"a": [1, {2}]}, "extra")
    assert torch.equal(decode(encode(torch.tensor([0.1, float("nan")]), "x"))[:1], torch.tensor([0.1]))
