"""Lightning Fabric: its DDP, and its ModelParallelStrategy for FSDP2, tensor parallelism, and both at once.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/fabric.py --layout tp_fsdp
    torchrun --nproc-per-node 4 examples/frameworks/fabric.py --layout tp_fsdp
"""

import sys
from argparse import Namespace

import lightning
import torch
import torch.nn.functional as F
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from task import batches, build, data, launch, options, record, report, shard, split
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

LAYOUTS = ("single", "ddp", "fsdp", "tp", "tp_fsdp")

MISTAKES = {
    "data-over-world": ("tp", "tp_fsdp"),
    "unwrapped": ("ddp",),
    "optimizer-first": ("fsdp", "tp", "tp_fsdp"),
    "accumulate-twice": LAYOUTS,
}


def strategy(layout: str, ranks: int) -> object:
    """Fabric's words for the layout."""
    if layout == "single":
        return "auto"
    if layout == "ddp":
        return DDPStrategy()

    def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if mesh["tensor_parallel"].size() > 1:
            split(model, mesh["tensor_parallel"])
        return shard(model, mesh["data_parallel"]) if mesh["data_parallel"].size() > 1 else model

    tp = {"fsdp": 1, "tp": ranks, "tp_fsdp": 2}[layout]
    return ModelParallelStrategy(parallelize, data_parallel_size=ranks // tp, tensor_parallel_size=tp)


def train(given: Namespace) -> None:
    """Three steps."""
    ranks = 1 if given.layout == "single" else given.ranks
    fabric = lightning.Fabric(accelerator="cpu", devices=ranks, strategy=strategy(given.layout, ranks))
    fabric.launch()
    model = build(given.dtype)
    early = torch.optim.AdamW(model.parameters(), lr=1e-2) if given.mistake == "optimizer-first" else None
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(early or torch.optim.AdamW(model.parameters(), lr=1e-2))
    called = model.module if given.mistake == "unwrapped" else model

    with record(given, model, optimizer):
        for step, micro_batches in enumerate(batches(data(given.dtype), given)):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=given.dtype)
            for inputs, labels in micro_batches:
                loss = F.cross_entropy(called(inputs), labels) / given.accumulate
                total += loss.detach()
                if given.mistake == "accumulate-twice":
                    loss = loss / given.accumulate
                fabric.backward(loss)
            optimizer.step()
            report(step, total)


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
