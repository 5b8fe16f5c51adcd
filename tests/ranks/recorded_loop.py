"""A training loop of somebody's own under torchrun, recorded, whose rank 1 breaks in the third step."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp

FAULT, FOLDER = os.environ.get("FAULT", "none"), sys.argv[1]


def begin() -> None:
    Path(os.environ["FAULT_BEGAN"]).write_text(repr(time.time()))


def break_now() -> None:
    if FAULT == "killed":
        begin()
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "raises":
        begin()
        raise ValueError("3 is not 4")  # <- raises


def train() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.linspace(-1, 1, 40 * 64).reshape(40, 64).sin()
    with sp.record(FOLDER, model, optimizer):
        for step in range(5):
            own = inputs[8 * step : 8 * step + 8].chunk(dist.get_world_size())[dist.get_rank()]
            optimizer.zero_grad()
            model(own).square().mean().backward()
            if step == 2 and dist.get_rank() == 1:
                break_now()
            optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()
