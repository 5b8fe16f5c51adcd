"""What every script of this folder trains: one small model, one data set, the same options, ranks on this machine.

Nothing here is special to shardproof, except that `record` adds its one line where `--record` asks for it. Not an
experiment of `shardproof check`: the scripts around it own their loops.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

GLOBAL_BATCH = 8
STEPS = 3


class Block(nn.Module):
    """A residual MLP of two linear layers, the usual pair for tensor parallelism."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, width) -> (batch, width)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Two blocks between a stem and a head; a width that four ranks divide."""

    def __init__(self, inputs: int = 16, width: int = 32, classes: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (batch, inputs) -> (batch, classes)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(dtype: torch.dtype = torch.float32) -> Classifier:
    """The model with the same weights in every layout and on every rank."""
    torch.manual_seed(0)
    # Drawn in float64, so that both dtypes begin with the same weights but for rounding.
    with torch.random.fork_rng():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        model = Classifier()
        torch.set_default_dtype(default)
    return model.to(dtype)


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Samples for all steps: inputs (24, 16), labels (24,)."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(GLOBAL_BATCH * STEPS, 16, generator=draw, dtype=torch.float64)
    labels = torch.randint(8, (len(inputs),), generator=draw)
    return TensorDataset(inputs.to(dtype), labels)


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallelism: `up` by columns, `down` by rows, in each block."""
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2: each block is a unit, what is left is the root's."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data_parallel(options: argparse.Namespace) -> tuple[int, int]:
    """This rank's index among the ranks that read different samples, and how many these are.

    Tensor-parallel peers read the same samples. `data-over-world` forgets that.
    """
    if not dist.is_initialized():
        return 0, 1
    rank, ranks = dist.get_rank(), dist.get_world_size()
    peers = {"tp": ranks, "tp_auto": ranks, "tp_fsdp": 2, "tp_ddp": 2}.get(options.layout, 1)
    if options.mistake == "data-over-world":
        peers = 1
    return rank // peers, ranks // peers


def batches(samples: TensorDataset, options: argparse.Namespace) -> list[list[list[Tensor]]]:
    """This rank's part of each step, cut into micro-batches: a list over steps of lists of batches."""
    part, parts = data_parallel(options)
    size = GLOBAL_BATCH // parts
    steps = []
    for step in range(STEPS):
        first = GLOBAL_BATCH * step + size * part
        mine = samples[first : first + size]
        steps.append(
            [list(micro) for micro in zip(*(tensor.chunk(options.accumulate) for tensor in mine), strict=True)]
        )
    return steps


def report(step: int, loss: Tensor | float) -> None:
    """Print the mean loss over all ranks; tensor-parallel peers have the same."""
    loss = torch.as_tensor(loss).detach().to(torch.float64, copy=True)
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.7f}", flush=True)


def record(options: argparse.Namespace, *objects: Any) -> contextlib.AbstractContextManager[Any]:
    """`sp.record(directory, model, optimizer)` where `--record` was given, and nothing otherwise."""
    if options.record is None:
        return contextlib.nullcontext()
    import shardproof as sp

    return sp.record(options.record, *objects, steps=range(STEPS), what=options.what)


def options(
    description: str,
    layouts: Sequence[str],
    mistakes: Mapping[str, Sequence[str]],
    arguments: Sequence[str] | None = None,
) -> argparse.Namespace:
    """The command line that all scripts share; `mistakes` says under which layouts one can make each of them."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--layout", choices=layouts, default="single")
    parser.add_argument("--ranks", type=int, default=4, help="processes of every layout but single; or use torchrun")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches in each step")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--mistake", choices=list(mistakes), help="one that raises no error")
    parser.add_argument("--record", type=Path, metavar="DIR", help="record the run there (needs shardproof)")
    parser.add_argument("--what", choices=("full", "sketch", "stats"), default="full", help="how much is recorded")
    given = parser.parse_args(arguments)
    given.dtype = getattr(torch, given.dtype)
    if given.mistake and given.layout not in mistakes[given.mistake]:
        where = ", ".join(mistakes[given.mistake])
        parser.error(f"--mistake {given.mistake}: cannot be made under --layout {given.layout}; it can under {where}")
    if given.mistake in {"accumulate-twice", "accumulate-undivided"} and given.accumulate == 1:
        given.accumulate = 2
    return given


def launch(train: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run `train` under torchrun's ranks, or on ranks of its own, or here if the layout is `single`."""
    if "RANK" in os.environ:
        options.ranks = int(os.environ["WORLD_SIZE"])
        # Composer's launcher sets it, torchrun calls it by another name.
        os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
        _on_rank(int(os.environ["RANK"]), train, options, None)
    elif options.layout == "single":
        torch.set_num_threads(1)
        train(options)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sys.stdout.flush()
        # Forked: what the parent has imported need not be imported again by each rank.
        mp.start_processes(_on_rank, (train, options, port), nprocs=options.ranks, start_method="fork")


def _on_rank(
    rank: int, train: Callable[[argparse.Namespace], None], options: argparse.Namespace, port: int | None
) -> None:
    if port is not None:
        ranks = str(options.ranks)
        # As torchrun sets them.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"OMP_NUM_THREADS": "1", "GROUP_RANK": "0", "NODE_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        train(options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
