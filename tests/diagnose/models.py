"""Models, data and layouts that the zoo does not have: convolution, recurrence, grouped queries, tied words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shardproof as sp
from shardproof.zoo.fixtures.megatron import Column, Row, Through, copy, reduce, replicated
from shardproof.zoo.fixtures.steps import plain_step

SAMPLES, BATCH = 48, 12
"""A batch that 2, 3 and 4 data ranks can cut, 2 of them into 3 micro-batches as well."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(module: nn.Module) -> None:
    """No parameter starts as zero or one: zeros hide what is added twice."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Pictures(nn.Module):
    """A convolution, a norm over groups of channels, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.mix = nn.Conv2d(4, 6, 2)
        self.head = nn.Linear(24, 5)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 2, 5, 5) -> (batch, 5)
        return self.head(self.mix(self.norm(self.conv(x)).tanh()).tanh().flatten(1))


PIXELS = TensorDataset(numbers(SAMPLES, 2, 5, 5), torch.arange(SAMPLES) % 5)


def classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


PICTURES = sp.Experiment(
    model=Pictures, data=PIXELS, loss=classes, optimizer=sgd, batch_size=BATCH, steps=2, parallelize=replicated
)

WORDS = 11


class Recurrent(nn.Module):
    """Words, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.lstm = nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(6, WORDS)
        drawn(self)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, WORDS)
        return self.head(self.lstm(self.words(tokens))[0])


LENGTH = 9


def text(counts: Tensor) -> TensorDataset:
    """(tokens (LENGTH,), how many of them count) of each sample."""
    tokens = torch.randint(WORDS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens, counts)


RAGGED = text(torch.arange(SAMPLES) * 5 % 7 + 2)
NEARLY_EVEN = text(torch.full((SAMPLES,), 8) + (torch.arange(SAMPLES) % BATCH == 0))
EVEN = text(torch.full((SAMPLES,), 8))


def token_sum(model: nn.Module, batch: tuple[Tensor, Tensor]) -> sp.LossSum:
    """Each sample's first tokens count, as many as it says."""
    tokens, counts = batch
    entropy = F.cross_entropy(model(tokens).transpose(1, 2), tokens.roll(1, 1), reduction="none")
    counted = torch.arange(LENGTH) < counts[:, None]
    return sp.LossSum((entropy * counted).sum(), counted.sum())


def token_mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found = token_sum(model, batch)
    return found.total / found.count


def all_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[0].roll(1, 1))


TEXT = sp.Experiment(
    model=Recurrent, data=RAGGED, loss=all_tokens, optimizer=sgd, batch_size=BATCH, steps=2, parallelize=replicated
)

WIDTH, HEAD, HIDDEN = 12, 3, 10


class GroupedQueries(nn.Module):
    """Four query heads and two heads of keys and values, without a causal mask (arXiv:2305.13245)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH // 2)
        self.v = nn.Linear(WIDTH, WIDTH // 2)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Grouped queries and a gated MLP, each behind a norm without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(WIDTH, eps=1e-6)
        self.attn = GroupedQueries()
        self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, 5)
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


POINTS = TensorDataset(numbers(SAMPLES, 4, WIDTH), numbers(SAMPLES, 4, 5, seed=1))


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def split(
    model: Gated,
    mesh: Any,
    parallelism: sp.Parallelism,
    *,
    enter: Mapping[str, Through] | None = None,
    row: type[Row] = Row,
    leave: Through = reduce,
) -> nn.Module:
    """Heads and hidden features over `tp`, then DDP. Right as it is; each argument plants a fault.

    `enter` says what the input of a column layer passes through, by the layer's name; `row` and `leave` are `down`'s.
    """
    if parallelism.tp > 1:
        group, through = mesh["tp"].get_group(), enter or {}
        for owner, name in [(model.attn, "q"), (model.attn, "k"), (model.attn, "v"), (model, "gate"), (model, "up")]:
            setattr(owner, name, Column(getattr(owner, name), group, enter=through.get(name, copy)))
        model.attn.proj = Row(model.attn.proj, group)
        model.down = row(model.down, group, leave=leave)
    return replicated(model, mesh, parallelism)


def same(x: Tensor, _group: Any) -> Tensor:
    """Neither the value nor the gradient is changed."""
    return x


class BiasedRow(Row):
    """Each rank adds the whole bias to its partial output, before the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(x, self.weight, self.bias), self.group)


GATED = sp.Experiment(
    model=Gated, data=POINTS, loss=squares, optimizer=sgd, batch_size=BATCH, steps=2, parallelize=split
)


class Tied(nn.Module):
    """Words whose matrix is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, WORDS, bias=False)
        self.head.weight = self.words.weight
        drawn(self)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, WORDS)
        return self.head(self.fc(self.words(tokens)).tanh())


TIED = sp.Experiment(
    model=Tied, data=RAGGED, loss=all_tokens, optimizer=sgd, batch_size=BATCH, steps=2, parallelize=replicated
)


def bare(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return model


def gradient(step: sp.Step, name: str) -> Tensor:
    """The gradient of one parameter, by its name in the model."""
    grad = getattr(step.model, "module", step.model).get_parameter(name).grad
    assert grad is not None
    return grad


def edited(edit: Callable[[sp.Step], None]) -> Callable[[sp.Step], Tensor]:
    """A right step in which `edit(step)` stands between the gradients and the optimizer."""
    return partial(plain_step, before_update=edit)


def found(experiment: sp.Experiment, strategy: str, **options: Any) -> sp.Finding:
    """The first finding; the run must not pass."""
    report = sp.check(experiment, strategies=(strategy,), **options)
    assert report.first is not None, f"a planted fault was not found:\n{report}"
    return report.first


def passes(experiment: sp.Experiment, *strategies: str, **options: Any) -> None:
    report = sp.check(experiment, strategies=strategies, **options)
    assert report.proven, str(report)


def named(finding: sp.Finding) -> tuple[str, str | None]:
    return finding.cause, finding.axis


def at(finding: sp.Finding) -> tuple[str, int, str]:
    return finding.stage, finding.step, finding.where
