"""Two recordings of a loop that is nobody's trainer: right ones agree, and a mistake is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from somebodys_loop import OnRanks, kinds

import shardproof as sp
from shardproof.ranks import Ranks, start

MISTAKES = {
    "unwrapped": ("ddp", 4, "grad-not-reduced", "gradient"),
    "not-averaged": ("tp-by-hand", 4, "grad-not-reduced", "gradient"),
    "optimizer-first": ("fsdp", 4, "optimizer", "optimizer-state"),
    "accumulate-twice": ("ddp-accumulated", 2, "grad-scale", "gradient"),
    "data-over-world": ("tp", 4, "batch-differs-in-group", "batch"),
    "repeated": ("ddp", 4, "batch-repeated-across-dp", "batch"),
    "seeds": ("fsdp", 4, "initial-state", "initial-state"),
}
"""Mistake -> where it is made, and what `diff` should say."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks(), timeout_s=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def recorded(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Every layout, recorded once."""
    folder = tmp_path_factory.mktemp("recorded")
    found = {}
    for kind, world in kinds():
        found[kind, world] = folder / f"{kind}-{world}"
        ranks.call("train", found[kind, world], kind, world, ranks=list(range(world)))
    return found


def held_against(trusted: tuple[str, int]) -> list[tuple[str, int]]:
    """One device and the next three layouts; with SHARDPROOF_FULL=1 all others, 110 pairs."""
    every = list(kinds())
    at = every.index(trusted)
    others = [*every[at + 1 :], *every[:at]]
    return others if os.environ.get("SHARDPROOF_FULL") == "1" else list(dict.fromkeys([("single", 1), *others[:3]]))


@pytest.mark.parametrize("trusted", list(kinds()), ids=lambda at: f"{at[0]}-{at[1]}")
def test_every_layout_agrees_with_every_other(recorded: dict[tuple[str, int], Path], trusted: tuple[str, int]) -> None:
    for other in held_against(trusted):
        if other != trusted:
            report = sp.diff(recorded[trusted], recorded[other])
            assert report.ok, f"{other}\n{report}"
            assert report.proven, f"{other}\n{report}"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_loop_is_named(
    ranks: Ranks, recorded: dict[tuple[str, int], Path], tmp_path: Path, mistake: str
) -> None:
    kind, world, cause, stage = MISTAKES[mistake]
    path = tmp_path / mistake
    ranks.call("train", path, kind, world, mistake, ranks=list(range(world)))
    report = sp.diff(recorded["single", 1], path)
    assert not report.ok
    assert report.first is not None
    assert (report.first.cause, report.first.stage) == (cause, stage), str(report)


def test_what_the_page_needs_is_kept_of_recordings(recorded: dict[tuple[str, int], Path]) -> None:
    report = sp.diff(recorded["single", 1], recorded["tp", 4])
    owners = {ranks for picture in report.runs[0].pictures for ranks in picture.owners}
    assert {0, 1, 2, 3} == {rank for ranks in owners for rank in ranks}
    assert (0,) in owners
