"""A loop written by hand in plain torch: DDP, FSDP2, tensor parallelism by torch's own styles, and both at once.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/by_hand.py --layout tp_fsdp
    torchrun --nproc-per-node 4 examples/frameworks/by_hand.py --layout tp_fsdp
"""

import sys
from argparse import Namespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from task import batches, build, data, launch, options, record, report, shard, split
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

LAYOUTS = ("single", "ddp", "fsdp", "tp", "tp_fsdp")

MISTAKES = {
    "data-over-world": ("tp", "tp_fsdp"),
    "unwrapped": ("ddp",),
    "optimizer-first": ("fsdp", "tp", "tp_fsdp"),
    "accumulate-twice": LAYOUTS,
}


def lay_out(model: nn.Module, layout: str) -> nn.Module:
    """The model as torch's tutorials lay it out."""
    if layout == "single":
        return model
    ranks = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp":
        return shard(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",)))
    if layout == "tp":
        return split(model, init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",)))
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    # TP first: fully_shard must see the split parameters to split them once more.
    return shard(split(model, mesh["tp"]), mesh["dp"])


def train(given: Namespace) -> None:
    """Three steps."""
    if given.layout != "single":
        dist.init_process_group("gloo")
    model = build(given.dtype)
    # optimizer-first: sharding replaces the parameters, and this optimizer keeps the old ones.
    early = torch.optim.AdamW(model.parameters(), lr=1e-2) if given.mistake == "optimizer-first" else None
    model = lay_out(model, given.layout)
    optimizer = early or torch.optim.AdamW(model.parameters(), lr=1e-2)
    # unwrapped: DDP reduces gradients only after a forward of its own.
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
                loss.backward()
            optimizer.step()
            report(step, total)


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
