"""Accelerate: DDP. Asked for FSDP on a CPU it says nothing and trains under DDP.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/accelerate_loop.py --layout ddp
    torchrun --nproc-per-node 4 examples/frameworks/accelerate_loop.py --layout ddp
"""

import sys
from argparse import Namespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from task import GLOBAL_BATCH, build, data, launch, options, record, report
from torch.utils.data import DataLoader

LAYOUTS = ("single", "ddp", "fsdp")

MISTAKES = {"unwrapped": ("ddp", "fsdp"), "accumulate-twice": LAYOUTS}


def train(given: Namespace) -> None:
    """Three steps."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if given.layout == "fsdp" else None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=given.accumulate, fsdp_plugin=plugin)
    model = build(given.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(data(given.dtype), GLOBAL_BATCH // accelerator.num_processes // given.accumulate)
    # prepare cuts the data itself: batch i goes to rank i % ranks.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    called = accelerator.unwrap_model(model) if given.mistake == "unwrapped" else model

    with record(given, model, optimizer):
        step, total = 0, torch.zeros((), dtype=given.dtype)
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(called(inputs), labels)
                total += loss.detach() / given.accumulate
                if given.mistake == "accumulate-twice":
                    # accelerator.backward divides by the number of micro-batches already.
                    loss = loss / given.accumulate
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                report(step, total)
                step, total = step + 1, torch.zeros_like(total)


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
