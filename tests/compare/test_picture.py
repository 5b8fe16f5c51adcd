"""What is kept of a tensor: bounded, and true to what the ranks held."""

from __future__ import annotations

import math

import pytest
import torch

from shardproof.compare import drawn, picture
from shardproof.compare.drawn import chosen, pictures
from shardproof.compare.held import Part
from shardproof.compare.picture import Picture
from shardproof.compare.verdict import Comparison, Verdict


def compared(error: float, *, ranks: tuple[int, ...] = (), floor: float = 1e-16, **more: object) -> Comparison:
    verdict = Verdict.DIFFERENT if ranks else Verdict.EQUAL
    values = {"step": 0, "stage": "gradient", "name": "w", "verdict": verdict, "shape": (4, 6), **more}
    return Comparison(error=error, floor=floor, ranks=ranks, **values)  # type: ignore[arg-type]


def columns(got: torch.Tensor, want: torch.Tensor, peers: int = 2) -> list[Part]:
    """Each of `peers` ranks holds some columns."""
    index = torch.arange(want.numel()).reshape(want.shape)
    cut = [tensor.chunk(peers, 1) for tensor in (got, want, index)]
    return [
        Part(rank=rank, got=g, want=w, places=i.reshape(-1), shape=tuple(want.shape))
        for rank, (g, w, i) in enumerate(zip(*cut, strict=True))
    ]


def only(comparison: Comparison, parts: list[Part]) -> Picture:
    (kept,) = pictures([comparison], lambda _: parts)
    return kept


def test_owners_values_and_heat_are_those_of_the_ranks():
    want = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    got = want.clone()
    got[1, 4] += 0.5
    kept = only(compared(0.5, ranks=(1,)), columns(got, want))
    assert kept.owners == ((0,), (1,))
    assert list(kept.held) == [0, 0, 0, 1, 1, 1] * 4
    assert (kept.rows, kept.columns, kept.cells) == (4, 6, (4, 6))
    assert [place for place, value in enumerate(kept.heat) if value] == [10]
    assert kept.want == tuple(map(float, range(24)))
    of_rank = dict(kept.got)
    assert of_rank[1][10] == 10.5
    assert of_rank[0][10] is None


def test_a_large_tensor_is_pooled_and_its_worst_element_stays_in_sight():
    want = torch.zeros(1000, 300, dtype=torch.float64)
    got = want.clone()
    got[777, 222] = 3.0
    kept = only(compared(3.0, ranks=(1,), shape=(1000, 300)), columns(got, want))
    assert max(kept.cells) <= picture.CELLS
    assert max(kept.heat) == 3.0
    assert sum(value > 0 for value in kept.heat) == 1
    row, column = kept.first
    assert row <= 777 < row + picture.WINDOW
    assert column <= 222 < column + picture.WINDOW
    assert 3.0 in dict(kept.got)[1]


def test_nan_is_the_worst_there_is():
    want = torch.ones(4, 6, dtype=torch.float64)
    got = want.clone()
    got[2, 5] = math.nan
    got[0, 0] = 9.0
    kept = only(compared(math.nan, ranks=(0, 1)), columns(got, want))
    assert kept.heat[17] == math.inf


def test_a_reading_that_is_not_the_verdicts_is_not_shown():
    """Ranks whose values only add up to the reference's are right, and each of them alone is far from it."""
    want = torch.ones(4, 6, dtype=torch.float64)
    assert pictures([compared(0.0)], lambda _: columns(want / 2, want)) == ()


def test_many_ranks_and_huge_tensors_stay_small(monkeypatch: pytest.MonkeyPatch):
    want = torch.ones(64, 64, dtype=torch.float64)
    kept = only(compared(1.0, ranks=tuple(range(64)), shape=(64, 64)), columns(want + 1, want, peers=64))
    assert len(kept.got) <= picture.RANKS
    assert len(kept.owners) == 64
    monkeypatch.setattr(drawn, "ELEMENTS", 100)
    assert pictures([compared(1.0, shape=(64, 64))], lambda _: columns(want, want)) == ()


def test_what_findings_are_about_comes_first_then_what_differs():
    fine = [compared(0.0, name=f"fine{number}") for number in range(300)]
    wrong = [compared(1.0, name=f"wrong{number}", ranks=(0,), stage="update") for number in range(3)]
    wanted = [c.name for c in chosen([*fine, *wrong], [fine[7].key])]
    assert wanted[:2] == ["fine7", "wrong0"]
    assert set(wanted[1:4]) == {"wrong0", "wrong1", "wrong2"}
    assert len(wanted) <= 4 * picture.KEPT


def test_more_sets_of_ranks_than_can_be_told_apart_are_not_drawn():
    want = torch.zeros(64, 64, dtype=torch.float64)
    flat, places = want.view(-1), torch.arange(want.numel())
    parts = [
        Part(
            rank=rank,
            got=flat[rank::600],
            want=flat[rank::600],
            places=places[rank::600],
            shape=(64, 64),
        )
        for rank in range(600)
    ]
    kept = only(compared(0.0, shape=(64, 64)), parts)
    assert kept.owners == ()
    assert kept.held == b""
