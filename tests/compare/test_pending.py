"""Reductions that DTensors still owe."""

from __future__ import annotations

import pytest
import torch

from shardproof.compare.pending import settled
from shardproof.parallel.piece import Piece

PARTS = {rank: torch.tensor([10.0**rank]) for rank in range(4)}
ROWS = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
COLUMNS = {0: (0, 2), 2: (0, 2), 1: (1, 3), 3: (1, 3)}


def owing(rank: int, *pending: tuple[str, tuple[int, ...]]) -> Piece:
    return Piece(whole=(1,), offset=(0,), shape=(1,), pending=pending)


def test_what_is_pending_over_two_axes_is_a_sum_over_both() -> None:
    pieces = {rank: owing(rank, ("sum", ROWS[rank]), ("sum", COLUMNS[rank])) for rank in range(4)}
    assert [float(tensor) for tensor in settled(PARTS, pieces).values()] == [1111.0] * 4


@pytest.mark.parametrize(("operation", "want"), [("sum", 11.0), ("avg", 5.5), ("max", 10.0), ("min", 1.0)])
def test_every_reduction_is_carried_out(operation: str, want: float) -> None:
    pieces = {rank: owing(rank, (operation, ROWS[rank])) for rank in range(4)}
    assert float(settled(PARTS, pieces)[0]) == want


def test_a_plain_tensor_owes_nothing() -> None:
    assert settled(PARTS, dict.fromkeys(PARTS, None)) == PARTS
