"""Recordings that say what cannot be of where their tensors lie: an answer or a clear error, in little memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import bounded

import shardproof as sp
from shardproof.parallel.piece import Piece
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record

Place = Callable[[int], Piece | None]

VALUES = torch.linspace(-1, 1, 32).reshape(8, 4)

FACTS: dict[str, Any] = dict.fromkeys(("ties", "strangers", "left_behind"), ()) | {
    "wrappers": {},
    "axes_from": "",
    "declared": "",
    "optimizers": ["SGD"],
    "train": True,
    "hints": {},
}


def record(path: Path, ranks: int, place: Place, *, stage: str = "gradient", samples: int = 8) -> Path:
    """`fc.weight`, or the output of `fc`, of shape [8, 4], as each rank says that it holds it."""
    for rank in range(ranks):
        writer = Writer(path, rank, ranks, {"what": "full"})
        writer.event("layout", axes={"tp": ranks}, **FACTS)
        digests = tuple(map(str, range(8))) if samples == 8 else ("0",) * samples
        writer.write(Record(step=0, stage="batch", name="(root)", part="[0]", samples=digests), VALUES, depth="full")
        piece = place(rank)
        held = VALUES if piece is None else piece.take(VALUES) if piece.whole == (8, 4) else VALUES[:4]
        name = "fc" if stage == "forward" else "fc.weight"
        writer.write(Record(step=0, stage=stage, name=name, piece=piece), held, depth="full")
        writer.event("step", step=0, microbatches=1, backwards=1, evaluations=0)
        writer.close()
    return path


def whole(rank: int) -> Piece:
    return Piece(whole=(8, 4), offset=(0, 0), shape=(8, 4))


def half_of(*sizes: int, declared: bool = True, pending: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> Place:
    """Four rows, of a whole with as many rows as is said for each rank."""
    return lambda rank: Piece(
        whole=(sizes[rank % len(sizes)], 4), offset=(4 * rank, 0), shape=(4, 4), declared=declared, pending=pending
    )


PLACES: dict[str, Place] = {
    "a few rows of very many": half_of(2**40),
    "a few rows of as many as memory may hold": half_of(2**28),
    "such rows of plain tensors": half_of(2**28, declared=False),
    "wholes that differ from rank to rank": half_of(8, 2**28),
    "a reduction that nobody knows": half_of(8, pending=(("xor", (0, 1)),)),
    "a reduction over a rank that is not there": half_of(8, pending=(("sum", (1,)),)),
    "sums of rows of very many": half_of(2**40, pending=(("sum", (0, 1)),)),
}


def answer(a: Path, b: Path, **options: Any) -> str:
    """The last line of a comparison, or the error that it ends in."""
    try:
        return str(sp.diff(a, b, **options)).splitlines()[-1]
    except (sp.TraceError, sp.StrategyError) as error:
        return str(error)


@pytest.mark.parametrize("stage", ["gradient", "forward", "update"])
@pytest.mark.parametrize("kind", PLACES)
def test_places_that_cannot_be_end_in_an_answer(kind: str, stage: str, tmp_path: Path) -> None:
    one = record(tmp_path / "one", 1, whole, stage=stage)
    two = record(tmp_path / "two", 2, PLACES[kind], stage=stage)
    again = record(tmp_path / "again", 2, PLACES[kind], stage=stage)
    with bounded(512 * 2**20, seconds=60):
        for a, b in ((one, two), (two, one), (two, again)):
            for layouts in ({}, {"layout_a": "tp=2" if a == two else None, "layout_b": "tp=2" if b != one else None}):
                said = answer(a, b, **layouts)
                assert said.replace("\n", "").isprintable()
                assert not said.startswith("parity") or b == again or kind == "such rows of plain tensors"


def test_right_places_are_put_together(tmp_path: Path) -> None:
    one, two = record(tmp_path / "one", 1, whole), record(tmp_path / "two", 2, half_of(8))
    rows = [json.loads(line) for line in (two / "rank-00001.jsonl").read_text().splitlines()]
    assert rows[3]["piece"]["whole"] == [8, 4]
    assert sp.diff(two, one, layout_a="tp=2").runs[0].verdicts["equal"] == 2


def test_one_sample_half_a_million_times_is_no_reason_to_wait(tmp_path: Path) -> None:
    one, two = (record(tmp_path / name, 1, whole, samples=600_000) for name in ("one", "two"))
    with bounded(1024 * 2**20, seconds=20):
        assert sp.diff(one, two).runs[0].verdicts["different"] == 0
