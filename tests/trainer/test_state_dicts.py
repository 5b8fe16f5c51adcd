"""The whole state and the parts of it that ranks hold are those of one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import shardproof as sp
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.strategies import parse
from shardproof.trainer.loop import Loop

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"


class OnRanks:
    """Tied weights, several shapes, some of them split over two axes."""

    def __init__(self, folder: Path) -> None:
        self.experiment, self.folder = replace(sp.load(str(EXAMPLE)), batch_size=4), folder

    def whole(self, place: Place, strategy: str) -> tuple[list[str], list[str]]:
        """Names of the whole state and of this rank's parts, after each part was held against the whole."""
        parallelism = parse(strategy, 4)
        training = sp.Training(max_duration="2ba", precision="fp64", progress_bar=False)
        with place.world(strategy, parallelism.world_size):
            loop = Loop(self.experiment, parallelism, training, place)
            loop.fit()
            file, state = self.folder / f"{strategy}.pt", loop.state_dict()
            if state is not None:
                torch.save(state, file)
            torch.distributed.barrier()
            state, parts = torch.load(file, weights_only=True), loop.sharded_state_dict()
            for held in loop.parameters:
                torch.testing.assert_close(
                    held.local(parts[held.name]), held.piece.take(state[held.name]), rtol=0, atol=0
                )
        return sorted(state), sorted(parts)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start(4, OnRanks(tmp_path_factory.mktemp("states"))) as started:
        yield started


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp", "tp_fsdp", "fsdp1", "tp_fsdp1"])
def test_every_part_is_a_slice_of_the_whole_under_the_plain_names(ranks: Ranks, strategy: str) -> None:
    whole, parts = ranks.call("whole", "single", ranks=[0])[0]
    assert "head.weight" in whole, "tied to tok_emb.weight, and there under both names"
    for names in ranks.call("whole", strategy).values():
        assert names == (whole, parts)
