"""Recordings to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardproof.parallel.piece import Piece
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record

Entry = tuple[Record, Tensor | None, str]


def entries(rank: int = 0) -> list[Entry]:
    """Records of every kind, with their tensors and depths."""
    generator = torch.Generator().manual_seed(rank)
    half = Piece(whole=(8, 3), offset=(4 * (rank % 2), 0), shape=(4, 3))
    full = Piece(
        whole=(4, 2),
        offset=(2, 0),
        shape=(2, 2),
        stretch=(1, 3),
        pending=(("sum", (0, 1)),),
        declared=False,
    )
    weight = torch.randn(4, 3, generator=generator)
    return [
        (Record(step=-1, stage="initial-state", name="fc1.weight", piece=half), weight, "full"),
        (Record(step=0, stage="batch", name="(root)", part="[0]", weight=0.25, samples=("0a", "0b")), weight, "full"),
        (Record(step=0, stage="forward", name="fc1", call=1, draws=-77), weight.to(torch.bfloat16), "sketch"),
        (Record(step=0, stage="gradient", name="fc1.weight", piece=half, missing=True), None, "full"),
        (Record(step=0, stage="gradient", name="fc2.weight", piece=full), torch.tensor([1.5, float("nan")]), "full"),
        (Record(step=0, stage="update", name="fc2.bias"), torch.tensor([0.0, float("inf"), -2.0]), "stats"),
        (Record(step=0, stage="buffer", name="blöcke.注意", unknown=True), None, "full"),
        (Record(step=1, stage="loss", name="(root)"), torch.tensor(3.5, dtype=torch.float64), "full"),
    ]


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., Path]:
    """Makes a recording of some ranks, in `tmp_path / "run"` if it is not told where."""

    def make(ranks: int = 2, folder: Path = tmp_path / "run") -> Path:
        for rank in range(ranks):
            writer = Writer(folder, rank, ranks, {"what": "full"})
            writer.event("layout", axes={"tp": ranks})
            for record, tensor, depth in entries(rank):
                writer.write(record, tensor, depth=depth)
                if record.stage == "buffer":
                    writer.event("step", step=0)
                    writer.flush()
            writer.close()
        return folder

    return make
