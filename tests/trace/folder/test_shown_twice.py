"""A tensor that is recorded twice in a row is summed up once, and never where it may have changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardproof.parallel.piece import Piece
from shardproof.trace.folder import writer as module
from shardproof.trace.folder.reader import open_recording
from shardproof.trace.folder.writer import Depth, Writer
from shardproof.trace.record import Record
from shardproof.trace.sketch import sketch
from shardproof.trace.stats import stats_of


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors whose statistics were made."""
    found: list[Tensor] = []

    def counted(of: Callable[..., Any]) -> Callable[..., Any]:
        def counting(tensor: Tensor, *rest: object) -> Any:
            found.append(tensor)
            return of(tensor, *rest)

        return counting

    for name in ("stats_of", "sketch_and_stats"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return found


def test_what_a_module_hands_on_is_summed_up_once(tmp_path: Path, summed: list[Tensor]) -> None:
    tensor = torch.randn(30, 40)
    writer = Writer(tmp_path, 0, 1, {})
    for name in ("blocks.1", "blocks"):
        writer.write(Record(step=0, stage="forward", name=name), tensor, depth="sketch")
    writer.close()
    trace = open_recording(tmp_path).ranks[0]
    assert len(summed) == 1
    assert trace.stats(0) == trace.stats(1) == stats_of(tensor)
    assert torch.equal(trace.sketch(0), sketch(tensor))
    assert torch.equal(trace.sketch(1), sketch(tensor))


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda tensor: tensor.mul_(2),
    "past the version": lambda tensor: tensor.data.mul_(2),
    "by NumPy": lambda tensor: np.multiply(tensor.numpy(), 2, out=tensor.numpy()),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("size", [40, 10_000])
def test_what_was_written_to_in_between_is_summed_up_anew(tmp_path: Path, way: str, size: int) -> None:
    tensor = torch.randn(size)
    writer = Writer(tmp_path, 0, 1, {})
    writer.write(Record(step=0, stage="forward", name="fc"), tensor, depth="sketch")
    WRITES[way](tensor)
    writer.write(Record(step=0, stage="forward", name="(root)"), tensor, depth="sketch")
    writer.close()
    trace = open_recording(tmp_path).ranks[0]
    assert trace.stats(1) == stats_of(tensor)
    assert torch.equal(trace.sketch(1), sketch(tensor))


def test_at_another_place_or_depth_it_is_summed_up_anew(tmp_path: Path, summed: list[Tensor]) -> None:
    tensor = torch.randn(4, 3)
    places = [None, Piece(whole=(8, 3), offset=(4, 0), shape=(4, 3))]
    writer = Writer(tmp_path, 0, 1, {})
    depths: tuple[Depth, ...] = ("stats", "sketch")
    for depth in depths:
        for where in places:
            writer.write(Record(step=0, stage="forward", name="fc", piece=where), tensor, depth=depth)
    writer.write(Record(step=0, stage="forward", name="fc"), tensor, depth="sketch", samples=["a", "b", "c", "d"])
    writer.close()
    trace = open_recording(tmp_path).ranks[0]
    assert len(summed) == 5
    assert torch.equal(trace.sketch(3), sketch(tensor, places[1]))
    assert torch.equal(trace.sketch(4), sketch(tensor, samples=["a", "b", "c", "d"]))


@pytest.mark.parametrize("kind", ["complex", "sparse", "inference", "NaN"])
def test_tensors_of_any_kind_may_be_shown_twice(tmp_path: Path, kind: str) -> None:
    tensor = torch.randn(6, 4)
    with torch.inference_mode(kind == "inference"):
        made = {"complex": tensor * 1j, "sparse": tensor.to_sparse(), "inference": tensor * 2, "NaN": tensor / 0 * 0}
    writer = Writer(tmp_path, 0, 1, {})
    for name in ("fc", "(root)"):
        writer.write(Record(step=0, stage="forward", name=name), made[kind], depth="sketch")
    writer.close()
    trace = open_recording(tmp_path).ranks[0]
    assert trace.stats(0) == trace.stats(1) == stats_of(made[kind])


def test_no_tensor_is_kept_alive(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 0, 1, {})
    tensor = torch.randn(30, 40)
    writer.write(Record(step=0, stage="forward", name="fc"), tensor, depth="sketch")
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None
    writer.close()
