"""Mistakes in training loops are found where they are made, and named, from two recordings alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
from small_gpt import Loop, OnRanks

import shardproof as sp
from shardproof.ranks import Ranks, start

MISTAKES: Mapping[str, tuple[int, Loop, str, str, str | None]] = {
    "bias-on-each-rank": (2, Loop("by-hand-tp"), "bias-counted-k-times", "block.down", "tp"),
    "no-sum-in-backward": (2, Loop("by-hand-tp"), "grad-not-summed", "block.norm.bias", "tp"),
    "not-averaged": (4, Loop("by-hand-tp"), "grad-not-reduced", "head.weight", "dp_replicate"),
    "summed": (4, Loop("by-hand-ddp"), "grad-scale", "head.weight", "dp_replicate"),
    "all-but-last-synchronised": (2, Loop("ddp", microbatches=2), "grad-partly-reduced", "head.weight", "micro-batch"),
    "micro-batch-lost": (2, Loop("ddp", microbatches=2), "microbatch-misweighted", "head.weight", "micro-batch"),
    "mean-of-means": (2, Loop("ddp", counted=True, microbatches=2), "mean-of-means", "head.weight", "dp_replicate"),
    "norm-of-the-rank": (4, Loop("fsdp", clip=True), "grad-norm", "head.weight", "dp_shard"),
    "sum-in-bfloat16": (2, Loop("ddp", microbatches=2), "precision", "head.weight", None),
    "evaluation-mode": (2, Loop("ddp", dropout=0.3), "rng", "block.attention.drop", None),
}
"""Mistake -> the loop in which it is made, and what `diff` should say: cause, where, axis."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks(), timeout_s=60) as pool:
        yield pool


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_where_it_was_made(ranks: Ranks, tmp_path: Path, mistake: str) -> None:
    world, loop, cause, where, axis = MISTAKES[mistake]
    right = Loop(counted=loop.counted, clip=loop.clip, dropout=loop.dropout)
    ranks.call("train", tmp_path / "right", 1, asdict(right), ranks=[0])
    wrong = asdict(loop) | {"mistake": mistake}
    ranks.call("train", tmp_path / "wrong", world, wrong, ranks=list(range(world)))
    report = sp.diff(tmp_path / "right", tmp_path / "wrong")
    assert not report.ok
    assert report.first is not None
    assert (report.first.cause, report.first.where, report.first.axis) == (cause, where, axis), str(report)
