"""The global gradient norm and clipping, against torch's own on one device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardproof.parallel import mesh as meshes
from shardproof.parallel.held import held_parameters
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.parallelism import Parallelism
from shardproof.train.norm import clip_, total_norm

LIMIT = 0.5
LAYOUTS = {
    "replicated": Parallelism(dp_replicate=4),
    "fsdp": Parallelism(dp_shard=4),
    "hsdp": Parallelism(dp_replicate=2, dp_shard=2),
    "tp": Parallelism(tp=4),
    "tp_fsdp": Parallelism(dp_shard=2, tp=2),
    "tp_fsdp of tp parameters only": Parallelism(dp_shard=2, tp=2),
    "fsdp1": Parallelism(dp_shard=4),
    "fsdp1 without original parameters": Parallelism(dp_shard=4),
    "by hand": Parallelism(tp=4),
}


class Model(nn.Module):
    """A dim of 3 or 5 leaves some ranks with little or nothing; `unused` never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(8, 3)
        self.unused = nn.Linear(1, 1)


def gradient(name: str, like: Tensor) -> Tensor:
    """Of the whole parameter; the same on every rank."""
    seed = sum(map(ord, name))
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lay_out(model: nn.Module, name: str, mesh: object) -> nn.Module:
    if name.startswith("tp"):
        parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "last": RowwiseParallel()})
    if name.endswith("only"):
        fully_shard(model.first, mesh=mesh["dp_shard"])
        fully_shard(model.last, mesh=mesh["dp_shard"])
    elif name in ("fsdp", "tp_fsdp"):
        fully_shard(model, mesh=mesh["dp_shard"])
    elif name == "hsdp":
        fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])
    elif name.startswith("fsdp1"):
        return FullyShardedDataParallel(
            model, device_mesh=mesh["dp_shard"], use_orig_params="without" not in name, device_id=torch.device("cpu")
        )
    elif name == "by hand":
        rank = mesh["tp"].get_local_rank()
        model.first.weight = nn.Parameter(model.first.weight.detach()[2 * rank : 2 * rank + 2].clone())
    return model


class OnRanks:
    def norm(self, place: Place, name: str) -> tuple[float, dict[str, float], float]:
        """The norm, the largest deviation of each clipped gradient from torch's, and torch's norm."""
        with place.world("norm", 4):
            mesh, _ = meshes.build(LAYOUTS[name], "cpu")
            whole = Model().double()
            shapes = {n: tuple(p.shape) for n, p in whole.named_parameters()}
            for n, p in whole.named_parameters():
                p.grad = None if n.startswith("unused") else gradient(n, p)
            wanted = torch.nn.utils.clip_grad_norm_(whole.parameters(), LIMIT)
            laid_out = lay_out(Model().double(), name, mesh)
            parameters = list(held_parameters(laid_out, shapes))
            for held in parameters:
                if not held.name.startswith("unused"):
                    self._give(held, gradient(held.name, torch.empty(held.piece.whole)), mesh)
            found = total_norm(parameters, mesh)
            clip_(parameters, found, LIMIT)
            far = {}
            for held in parameters:
                if held.leaf.grad is None or held.name.startswith("unused"):
                    continue
                want = self._part(held, dict(whole.named_parameters())[held.name].grad, mesh)
                got = held.local(held.leaf.grad)
                far[held.name] = float((got - want).abs().max()) if got.numel() else 0.0
            return found.item(), far, wanted.item()

    @staticmethod
    def _part(held: object, whole: Tensor, mesh: object) -> Tensor:
        if held.split_by_hand:
            rank = mesh["tp"].get_local_rank()
            return whole[2 * rank : 2 * rank + 2]
        return held.piece.take(whole)

    def _give(self, held: object, whole: Tensor, mesh: object) -> None:
        part, leaf = self._part(held, whole, mesh), held.leaf
        if held.window is not None:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            leaf.grad[held.window[0] : held.window[1]] = part
        elif isinstance(leaf, DTensor):
            local = part.reshape(leaf._local_tensor.shape)
            leaf.grad = DTensor.from_local(
                local, leaf.device_mesh, leaf.placements, shape=leaf.shape, stride=leaf.stride(), run_check=False
            )
        else:
            leaf.grad = part.reshape(leaf.shape).clone()

    def half(self, place: Place) -> tuple[str, float]:
        """The norm of bfloat16 gradients whose squares bfloat16 could not add up."""
        with place.world("half", 2):
            mesh, _ = meshes.build(Parallelism(dp_shard=2), "cpu")
            model = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            model.weight.grad = torch.ones_like(model.weight)
            norm = total_norm(list(held_parameters(model)), mesh)
            return str(norm.dtype), norm.item()

    def replicated_over_tp(self, place: Place) -> float:
        """A DTensor that is whole on every rank counts once."""
        with place.world("replicated", 4):
            mesh, _ = meshes.build(LAYOUTS["tp"], "cpu")
            model = nn.Linear(2, 2, bias=False, dtype=torch.float64)
            ones = torch.ones(2, 2, dtype=torch.float64)
            whole = DTensor.from_local(ones, mesh["tp"], (Replicate(),), run_check=False)
            model.weight = nn.Parameter(whole)
            model.weight.grad = whole
            return total_norm(list(held_parameters(model)), mesh).item()

    def reductions(self, place: Place) -> int:
        """How many reductions a fully sharded model of many parameters needs."""
        with place.world("reductions", 4):
            mesh, _ = meshes.build(LAYOUTS["fsdp"], "cpu")
            model = fully_shard(Model().double(), mesh=mesh["dp_shard"])
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            called = []
            before = dist.all_reduce
            dist.all_reduce = lambda *args, **kwargs: (called.append(1), before(*args, **kwargs))[1]
            try:
                total_norm(list(held_parameters(model)), mesh)
            finally:
                dist.all_reduce = before
            return len(called)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks()) as ranks:
        yield ranks


@pytest.mark.parametrize("name", LAYOUTS)
def test_norm_and_clipped_gradients_are_torchs_own_under_every_layout(ranks: Ranks, name: str) -> None:
    found = ranks.call("norm", name)
    norms = {norm for norm, _, _ in found.values()}
    assert len(norms) == 1, "every rank must clip alike"
    for norm, far, wanted in found.values():
        assert norm == pytest.approx(wanted, rel=1e-12)
        assert max(far.values()) < 1e-12


def test_half_precision_squares_are_summed_in_float32(ranks: Ranks) -> None:
    assert ranks.call("half", ranks=[0, 1]) == dict.fromkeys((0, 1), ("torch.float32", 64.0))


def test_a_replica_counts_once(ranks: Ranks) -> None:
    assert set(ranks.call("replicated_over_tp").values()) == {2.0}


def test_one_reduction_is_enough_for_all_parameters_of_a_kind(ranks: Ranks) -> None:
    assert set(ranks.call("reductions").values()) == {1}
