"""A training for tests that start processes of their own: small, slow where `STEP_S` says so, and talkative."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn

import shardproof as sp

STEPS = 20


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    time.sleep(float(os.environ.get("STEP_S", "0")))
    return model(batch).square().mean()


class Says(sp.Callback):
    """Tells on rank 0 how far it is, and which process it is."""

    def fit_start(self, loop: object) -> None:
        print(f"rank {loop.rank} is {os.getpid()}\n", end="", flush=True)

    def step_end(self, loop: object) -> None:
        if loop.rank == 0:
            print(f"step {loop.progress.step}\n", end="", flush=True)


experiment = sp.Experiment(
    model=_model,
    data=torch.arange(256.0).reshape(64, 4).sin(),
    loss=_loss,
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    batch_size=8,
    steps=2,
    tp_plan={"0": "colwise", "2": "rowwise"},
)
training = sp.Training(max_duration=f"{STEPS}ba", save_interval="5ba", callbacks=[Says()], progress_bar=False)
