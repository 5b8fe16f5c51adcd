"""Right training loops as people write them raise no alarm, whichever of two recordings is trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_gpt import Loop, OnRanks
from torch import Tensor, nn

import shardproof as sp
from shardproof.compare.run import RANDOM
from shardproof.ranks import Place, Ranks, start

PAIRS: Mapping[str, tuple[tuple[int, Loop], tuple[int, Loop]]] = {
    "fused blocks cut by hand": ((1, Loop()), (2, Loop("by-hand-tp"))),
    "fused blocks, two degrees": ((2, Loop("by-hand-tp")), (4, Loop("by-hand-tp", tp=4))),
    "fused blocks against DTensors": ((2, Loop("by-hand-tp")), (4, Loop("fsdp"))),
    "peers that are no neighbours": ((1, Loop()), (4, Loop("by-hand-tp", tp_outside=True))),
    "peers of DTensors that are no neighbours": ((1, Loop()), (4, Loop("tp", tp_outside=True))),
    "key heads that peers share": ((1, Loop(kv=2)), (4, Loop("by-hand-tp", tp=4, kv=2))),
    "tokens counted over ranks": ((1, Loop(counted=True)), (2, Loop("ddp", counted=True, microbatches=2))),
    "clipped by hand": ((1, Loop(clip=True)), (4, Loop("fsdp", clip=True))),
    "float64 and float32": ((1, Loop()), (2, Loop("ddp", single=True))),
    "dropout under one layout": ((2, Loop("ddp", dropout=0.3)), (2, Loop("by-hand-ddp", dropout=0.3))),
    "dropout under tensor parallelism": ((1, Loop(dropout=0.3)), (2, Loop("tp", dropout=0.3))),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks(), timeout_s=60) as pool:
        yield pool


def recorded(ranks: Ranks, path: Path, world: int, loop: Loop) -> Path:
    ranks.call("train", path, world, asdict(loop), ranks=list(range(world)))
    return path


@pytest.mark.parametrize("pair", PAIRS)
def test_two_right_loops_agree_both_ways(ranks: Ranks, tmp_path: Path, pair: str) -> None:
    one, other = (recorded(ranks, tmp_path / name, *at) for name, at in zip("ab", PAIRS[pair], strict=True))
    for trusted, path in ((one, other), (other, one)):
        report = sp.diff(trusted, path)
        assert report.ok, str(report)
        assert report.proven, str(report)


def test_masks_that_data_ranks_draw_for_their_own_samples_are_not_checked(ranks: Ranks, tmp_path: Path) -> None:
    one = recorded(ranks, tmp_path / "a", 1, Loop(dropout=0.3))
    four = recorded(ranks, tmp_path / "b", 4, Loop("ddp", dropout=0.3))
    for trusted, path in ((one, four), (four, one)):
        report = sp.diff(trusted, path)
        assert report.ok, str(report)
        assert not report.proven
        said = Counter(c.reason for c in report.runs[0].comparisons if c.stage == "update")
        assert set(said) == {RANDOM}


def test_parts_that_are_padded_to_lengths_of_their_own_read_the_same_samples(ranks: Ranks, tmp_path: Path) -> None:
    one = recorded(ranks, tmp_path / "a", 1, Loop(padded=True))
    four = recorded(ranks, tmp_path / "b", 4, Loop("ddp", padded=True))
    for trusted, path in ((one, four), (four, one)):
        report = sp.diff(trusted, path)
        assert report.ok, str(report)
        checked = {c.stage for c in report.runs[0].comparisons if c.verdict in ("equal", "rounding")}
        assert {"batch", "gradient", "update"} <= checked


class WithClosure:
    """Trains by LBFGS, which remembers the loss of this rank's own part."""

    def train(self, place: Place, path: Path, world: int) -> None:
        with place.world("closure", world):
            self._train(path, place.rank, world)

    def _train(self, path: Path, rank: int, world: int) -> None:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        inputs, targets = torch.randn(3, 16, 6, dtype=torch.float64), torch.randint(0, 3, (3, 16))
        model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        with sp.record(path, model, optimizer):
            for x, y in zip(inputs.chunk(world, 1)[rank], targets.chunk(world, 1)[rank], strict=True):

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)


def test_an_optimizer_that_keeps_the_loss_of_its_own_part(tmp_path: Path) -> None:
    with start(2, WithClosure(), timeout_s=60) as ranks:
        for world in (1, 2):
            ranks.call("train", tmp_path / f"{world}", world, ranks=list(range(world)))
    report = sp.diff(tmp_path / "1", tmp_path / "2")
    assert report.ok, str(report)
    assert {c.part for c in report.runs[0].comparisons if c.stage == "optimizer-state"} >= {"prev_flat_grad", "H_diag"}
