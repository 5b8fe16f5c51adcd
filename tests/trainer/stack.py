"""A small model of two blocks, and how it is trained on ranks that are there already."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shardproof as sp
from shardproof.ranks import Place
from shardproof.spec.strategies import parse
from shardproof.trainer.loop import Loop

RANKS = 4
STRATEGIES = ("ddp", "fsdp", "hsdp", "tp", "tp_ddp", "tp_fsdp", "fsdp1", "tp_fsdp1")
SAMPLES = 32


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def samples(count: int = SAMPLES) -> TensorDataset:
    inputs = torch.linspace(-2, 2, 4 * count, dtype=torch.float64).mul(7).sin().reshape(count, 4)
    return TensorDataset(inputs, torch.arange(count) % 3)


def experiment(**fields: Any) -> sp.Experiment:
    about: dict[str, Any] = {
        "model": Stack,
        "data": samples(),
        "loss": loss,
        "optimizer": adamw,
        "batch_size": 8,
        "tp_plan": {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"},
        "fsdp_units": ("blocks.*",),
    }
    return sp.Experiment(**(about | fields))


def laid_out(strategy: str) -> sp.Parallelism:
    """A strategy on all ranks, or on as many as stand behind an @: what gloo sums over two has one order only."""
    name, _, ranks = strategy.partition("@")
    return parse(name, int(ranks or RANKS))


def loop(place: Place, about: sp.Experiment, strategy: str, **training: Any) -> Loop:
    """Call it inside `world(place, strategy)`."""
    fields: dict[str, Any] = {"max_duration": "4ba", "precision": "fp64", "progress_bar": False}
    return Loop(about, laid_out(strategy), sp.Training(**(fields | training)), place)


def world(place: Place, strategy: str) -> Any:
    """The ranks that a strategy takes; a rank that is not among them must not be asked."""
    return place.world(strategy, laid_out(strategy).world_size)


def among(strategy: str) -> range:
    """The ranks to ask."""
    return range(laid_out(strategy).world_size)
