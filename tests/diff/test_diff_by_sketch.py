"""Recordings without values: sketches and statistics of right runs agree, and mistakes show in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from somebodys_loop import OnRanks

import shardproof as sp
from shardproof.ranks import Ranks, start

LAYOUTS = {"single": 1, "accumulated": 1, "ddp": 4, "fsdp": 4, "fsdp1": 2, "tp": 4, "tp-fsdp": 4}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks(), timeout_s=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def recorded(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(Layout, depth) -> recording."""
    folder = tmp_path_factory.mktemp("kept")
    found = {}
    for what in ("full", "sketch", "stats"):
        for kind, world in LAYOUTS.items():
            if what != "full" or kind == "single":
                found[kind, what] = folder / f"{kind}-{what}"
                ranks.call("train", found[kind, what], kind, world, "", what, ranks=list(range(world)))
    return found


@pytest.mark.parametrize("trusted", ["full", "sketch"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_sketches_of_right_runs_agree(recorded: dict[tuple[str, str], Path], kind: str, trusted: str) -> None:
    report = sp.diff(recorded["single", trusted], recorded[kind, "sketch"])
    assert report.ok, str(report)
    assert report.proven, str(report)
    gradients = [c for c in report.runs[0].comparisons if c.stage == "gradient"]
    assert {str(c.verdict) for c in gradients} <= {"rounding", "equal"}, str(report)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_statistics_of_right_runs_agree(recorded: dict[tuple[str, str], Path], kind: str) -> None:
    report = sp.diff(recorded["single", "stats"], recorded[kind, "stats"])
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("mistake", "kind", "cause"),
    [
        ("unwrapped", "ddp", "grad-not-reduced"),
        ("accumulate-twice", "accumulated", "grad-scale"),
        ("data-over-world", "tp", "batch-differs-in-group"),
        ("seeds", "fsdp", "initial-state"),
    ],
)
@pytest.mark.parametrize("what", ["sketch", "stats"])
def test_a_mistake_shows_without_values(
    ranks: Ranks, recorded: dict[tuple[str, str], Path], tmp_path: Path, mistake: str, kind: str, cause: str, what: str
) -> None:
    path, world = tmp_path / mistake, LAYOUTS[kind]
    ranks.call("train", path, kind, world, mistake, what, ranks=list(range(world)))
    report = sp.diff(recorded["single", what], path)
    assert not report.ok
    assert report.first is not None
    # Statistics tell that a gradient is wrong, and not that its mean over the ranks would be right.
    assert report.first.cause == (cause if (what, mistake) != ("stats", "unwrapped") else "unexplained"), str(report)


def test_two_processes_say_what_one_does(
    recorded: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = recorded["single", "sketch"], recorded["tp-fsdp", "sketch"]
    alone = sp.diff(*paths).runs[0].comparisons
    monkeypatch.setattr("shardproof.align.kept.MANY", 0)
    assert sp.diff(*paths).runs[0].comparisons == alone


def test_a_half_that_is_lost_is_done_here(
    recorded: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = recorded["single", "sketch"], recorded["fsdp", "sketch"]
    alone = sp.diff(*paths).runs[0].comparisons
    monkeypatch.setattr("shardproof.align.kept.MANY", 0)

    def ends(*_: object) -> None:
        os._exit(1)

    monkeypatch.setattr("shardproof.align.halves._answer", ends)
    assert sp.diff(*paths).runs[0].comparisons == alone
