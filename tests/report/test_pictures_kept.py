"""What a check keeps for the page, from real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardproof as sp
from shardproof.compare.picture import KEPT, Picture
from shardproof.report.data import Report
from shardproof.spec.loading import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "composer_mlp.py"


@pytest.fixture(scope="module")
def mixed() -> Report:
    report = sp.check(load(f"{EXAMPLE}:mixed_inputs"), strategies=("fsdp", "tp_fsdp"), ranks=4)
    assert report is not None
    return report


def kept(report: Report, run: int, stage: str, name: str) -> Picture:
    return next(one for one in report.runs[run].pictures if one.key[1:3] == (stage, name))


def test_peers_that_read_other_samples_stand_side_by_side(mixed: Report):
    batch = kept(mixed, 1, "batch", "batch")
    assert batch.key == (mixed.first.comparison.key if mixed.first and mixed.first.comparison else None)
    assert batch.owners == ((0, 1), (2, 3))
    of_rank = dict(batch.got)
    # What the log prints of ranks 0 and 1.
    assert of_rank[0][:2] == (0.0611, -0.939)
    assert of_rank[1][:2] == (0.3092, -0.24)
    assert max(batch.heat) == mixed.runs[1].findings[0].comparison.error  # type: ignore[union-attr]


def test_the_map_is_that_of_the_layout(mixed: Report):
    gradient = kept(mixed, 1, "gradient", "2.weight")
    assert gradient.owners == ((0,), (1,), (2,), (3,))
    assert list(gradient.held) == [0, 1, 2, 3]
    assert kept(mixed, 0, "gradient", "2.weight").owners == ((0,), (1,))


def test_errors_are_kept_rank_by_rank(mixed: Report):
    wrong = next(c for c in mixed.runs[1].comparisons if c.stage == "gradient")
    assert len(wrong.errors) == 4
    assert max(error for error in wrong.errors if error is not None) == wrong.error
    assert all(not c.errors for c in mixed.runs[0].comparisons if c.verdict == "equal")


def test_no_more_than_promised_is_kept(mixed: Report):
    assert all(0 < len(run.pictures) <= KEPT for run in mixed.runs)
