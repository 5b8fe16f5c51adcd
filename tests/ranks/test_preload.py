"""What ranks import must have been imported before the fork."""

import gc
import sys
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardproof.ranks import Place, start
from shardproof.ranks.preload import MODULES, preload


def _ddp(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return fully_shard(model, mesh=mesh["dp_shard"])


def _hsdp(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    mesh["dp_replicate", "dp_shard"]._flatten("dp")
    return fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])


def _fsdp1(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def _tp(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    return parallelize_module(model, mesh["dp_shard"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Trains:
    def step(self, place: Place, lay_out: Any, optimizer: Any) -> list[str]:
        loaded = set(sys.modules)
        with place.world("train", 2):
            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
            model = lay_out(model, mesh)
            steps = optimizer(model.parameters(), lr=0.1)
            for _ in range(2):
                model(torch.ones(2, 4)).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                steps.step()
                steps.zero_grad()
        return sorted(set(sys.modules) - loaded)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lay_out", [_ddp, _fsdp, _hsdp, _fsdp1, _tp])
def test_a_rank_has_nothing_left_to_import_for_a_training_step(lay_out: Any, optimizer: Any) -> None:
    with start(2, Trains()) as ranks:
        assert ranks.call("step", lay_out, optimizer) == {0: [], 1: []}


def test_what_is_preloaded_is_loaded_and_the_collector_runs_on() -> None:
    preload()
    assert set(MODULES) <= set(sys.modules)
    assert gc.isenabled()
