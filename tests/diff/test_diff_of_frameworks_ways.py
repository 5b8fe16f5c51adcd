"""Two loops that train alike in the ways of two frameworks, without either framework."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardproof as sp
from shardproof.compare.verdict import Verdict

SAMPLES, STEPS = 4, 2

Loop = Callable[[Path], None]


class Net(nn.Module):
    """Computes its loss by itself where it is given labels, and does not use its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.head = nn.Linear(5, 7)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ...] | Tensor:
        del mask
        logits = self.head(torch.tanh(self.fc(x)))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


def built() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(SAMPLES, 3, generator=draw), torch.randint(7, (SAMPLES,), generator=draw)) for _ in range(STEPS)
    ]


def plain(path: Path) -> None:
    model, optimizer = built()
    with sp.record(path, model, optimizer):
        for x, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()


def by_closure(path: Path) -> None:
    """As Composer: what is left of the step before is cleared, and all is computed, inside of `step`."""
    model, optimizer = built()
    with sp.record(path, model, optimizer):
        for x, labels in batches():

            def closure(x: Tensor = x, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), labels)
                loss.backward()
                return loss

            optimizer.step(closure=closure)


def with_a_mask(path: Path, *, reverse: bool, dtype: torch.dtype = torch.float32) -> None:
    """As a collator that pads: keywords in an order of its own, and one that is the same for every sample."""
    model, optimizer = built()
    with sp.record(path, model, optimizer):
        for x, labels in batches():
            optimizer.zero_grad()
            if reverse:
                # A sampler of its own: the same samples in another order.
                x, labels = x.flip(0), labels.flip(0)
            F.cross_entropy(model(mask=torch.ones(SAMPLES, 3, dtype=dtype), x=x), labels).backward()
            optimizer.step()


def loss_inside(path: Path, *, microbatches: int) -> None:
    """As transformers: the loss is an output of the model."""
    model, optimizer = built()
    with sp.record(path, model, optimizer):
        for x, labels in batches():
            optimizer.zero_grad()
            for own, wanted in zip(x.chunk(microbatches), labels.chunk(microbatches), strict=True):
                (model(own, labels=wanted)[0] / microbatches).backward()
            optimizer.step()


def scaled(path: Path) -> None:
    """Under a gradient scaler: the first attempt at each step overflows, in micro-batches that the second has not."""
    model, optimizer = built()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with sp.record(path, model, optimizer):
        for x, labels in batches():
            for parts, overflow in ((2, torch.inf), (1, 1.0)):
                optimizer.zero_grad()
                for own, wanted in zip(x.chunk(parts), labels.chunk(parts), strict=True):
                    scaler.scale(F.cross_entropy(model(own), wanted) * overflow).backward()
                scaler.step(optimizer)
                scaler.update()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (plain, by_closure),
        (plain, partial(with_a_mask, reverse=False)),
        (partial(with_a_mask, reverse=False, dtype=torch.float64), partial(with_a_mask, reverse=True)),
        (partial(loss_inside, microbatches=1), partial(loss_inside, microbatches=2)),
        (partial(loss_inside, microbatches=2), partial(loss_inside, microbatches=4)),
    ],
    ids=["closure", "mask", "masks, another order", "loss inside", "loss inside, accumulated"],
)
def test_the_same_training_in_another_way_agrees_tensor_by_tensor(tmp_path: Path, first: Loop, second: Loop) -> None:
    first(tmp_path / "a")
    second(tmp_path / "b")
    report = sp.diff(tmp_path / "a", tmp_path / "b")
    assert report.ok, str(report)
    assert report.proven
    assert [c.key for c in report.runs[0].comparisons if c.verdict is Verdict.NOT_CHECKED] == []


def test_attempts_that_a_gradient_scaler_skipped_are_left_out(tmp_path: Path) -> None:
    plain(tmp_path / "a")
    scaled(tmp_path / "b")
    report = sp.diff(tmp_path / "a", tmp_path / "b")
    assert report.ok, str(report)
    assert any("attempts at a step skipped by a gradient scaler" in note for note in report.runs[0].notes)
    checked = {c.stage for c in report.runs[0].comparisons if c.verdict is not Verdict.NOT_CHECKED}
    assert {"gradient", "optimizer-state", "update"} <= checked


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, 3) -> the same
        return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)


class Attending(nn.Module):
    """The gradient of the bias on its keys is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(torch.stack([x, x.roll(1, 1), 2 * x], 1)).mean(1))


@pytest.mark.parametrize("what", ["full", "sketch"])
def test_a_gradient_that_is_all_rounding_does_not_hide_a_factor_on_all(tmp_path: Path, what: str) -> None:
    for name, parts, factor in (("a", 1, 1.0), ("b", 2, 0.5)):
        torch.manual_seed(0)
        model = Attending()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        with sp.record(tmp_path / name, model, optimizer, what=what):
            for x, labels in batches():
                optimizer.zero_grad()
                for own, wanted in zip(x.chunk(parts), labels.chunk(parts), strict=True):
                    (F.cross_entropy(model(own), wanted) / parts * factor).backward()
                optimizer.step()
    first = sp.diff(tmp_path / "a", tmp_path / "b").first
    assert first is not None
    assert (first.cause, first.factor) == ("grad-scale", pytest.approx(0.5))
