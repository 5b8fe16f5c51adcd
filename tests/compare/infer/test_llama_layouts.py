"""Every parameter and activation of a Llama under real layouts, with the placements hidden: only values are read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardproof.compare.floor import Moved, floor_of
from shardproof.compare.infer import Inferred, infer
from shardproof.compare.measure import ulp
from shardproof.ranks import start
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.file import TraceFile
from shardproof.trace.record import Record
from shardproof.train.run import Variant
from shardproof.worker import Worker

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import llama

LAYOUTS = {
    "tp 2": Parallelism(strategy="tp", tp=2),
    "tp 4": Parallelism(strategy="tp", tp=4),
    "dp 2 x tp 2": Parallelism(strategy="tp_fsdp", dp_shard=2, tp=2),
}
DRAWS = 3

ACTIVATIONS = {
    "wq": 2,
    "wk": 2,
    "wv": 2,
    "w1": 2,
    "w3": 2,
    "output": None,
    "(root)": None,
}
"""Last part of a module's name -> the dim along which tp peers share its output: the columns of what is cut by column,
nothing where it was gathered for the loss, and the sequence everywhere else."""

SEQUENCE = 1


@dataclass
class Runs:
    """The traces of all layouts, and of one device."""

    reference: TraceFile
    floors: Mapping[int, float]
    ranks: Mapping[str, list[TraceFile]]

    def floor(self, number: int) -> float:
        return max(self.floors.get(number, 0.0), ulp(self.reference.tensor(number)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("traces")
    worker = Worker(
        experiment=llama.experiment,
        trusted=llama.experiment,
        folder=folder,
        dtype=torch.float64,
        steps=1,
        shuffle=False,
    )
    with start(4, worker) as ranks:
        ranks.call("reference", "reference", None, Variant(), ranks=[0])
        drawn = ranks.call("draws", "reference", None, [Variant(draw=n) for n in range(DRAWS)], [0], ranks=[0])
        moved: dict[int, list[Moved]] = drawn[0]
        traces = {}
        for name, layout in LAYOUTS.items():
            own = name.replace(" ", "")
            ranks.call("run", own, layout, Variant(), ranks=range(layout.world_size))
            traces[name] = [TraceFile(worker.trace(own, rank)) for rank in range(layout.world_size)]
    floors = {number: floor_of(moves) for number, moves in moved.items()}
    return Runs(reference=TraceFile(worker.trace("reference", 0)), floors=floors, ranks=traces)


def truth(record: Record, shape: tuple[int, ...], layout: Parallelism, rank: int) -> Tensor:
    """Numbers of the elements of the whole that a rank holds, shaped as it holds them; from metadata and the plan."""
    held = torch.arange(torch.Size(shape).numel()).reshape(shape)
    at = layout.coordinates(rank)
    activation = record.stage in ("forward", "backward")
    if activation:
        held = held.chunk(layout.dp, 0)[at["dp"]]
    if record.piece is not None:
        return record.piece.take(held)
    assert activation, "a parameter knows its place"
    dim = ACTIVATIONS.get(record.name.rpartition(".")[2], SEQUENCE)
    return held if dim is None else held.chunk(layout.tp, dim)[at["tp"]]


def expected_sums(records: Mapping[int, Record]) -> tuple[tuple[int, ...], ...]:
    groups = {record.piece.pending[0][1] for record in records.values() if record.piece and record.piece.pending}
    return tuple(sorted(groups))


STAGES = ("initial-state", "gradient", "update", "forward", "backward")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_layout_of_every_tensor_is_told_by_its_values(runs: Runs, name: str, stage: str) -> None:
    layout, traces = LAYOUTS[name], runs.ranks[name]
    looked_at = 0
    for number, own in enumerate(runs.reference.records):
        if own.stage != stage or own.missing or own.step > 0 or (own.part and stage == "initial-state"):
            continue
        looked_at += 1
        whole = runs.reference.tensor(number)
        # The mean loss of half of the batch: its gradients are twice the whole batch's.
        whole = whole * layout.dp if stage == "backward" else whole
        numbers = {rank: trace.by_key[own.key] for rank, trace in enumerate(traces)}
        assert {len(found) for found in numbers.values()} == {1}
        pieces = {rank: traces[rank].tensor(found[0]) for rank, found in numbers.items()}
        records = {rank: traces[rank].records[found[0]] for rank, found in numbers.items()}
        found = infer(pieces, whole, runs.floor(number) * (layout.dp if stage == "backward" else 1))
        where = f"{own.name}: {found}"
        assert found.fits, where
        assert not found.ambiguous, where
        assert found.sums == expected_sums(records), where
        places = torch.arange(whole.numel()).reshape(whole.shape)
        for rank, record in records.items():
            assert torch.equal(found.take(rank, places), truth(record, tuple(whole.shape), layout, rank)), where
    assert looked_at >= 2 + 9 * llama.LAYERS


# Written by hand: several projections in one matrix, and rows in another order. No DTensor, no process.


def attention_input(runs: Runs) -> tuple[Tensor, Tensor, float]:
    """What the first block's projections read, their weights in one matrix, and the floor of what comes out."""
    by_key = runs.reference.by_key
    x = runs.reference.tensor(by_key[0, "forward", "layers.0.attention_norm", ""][0])
    blocks = [
        runs.reference.tensor(by_key[-1, "initial-state", f"layers.0.attention.{p}.weight", ""][0])
        for p in ("wq", "wk", "wv")
    ]
    floor = max(runs.floor(by_key[0, "forward", f"layers.0.attention.{p}", ""][0]) for p in ("wq", "wk", "wv"))
    return x, torch.cat(blocks), floor


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_query_key_and_value_in_one_matrix_are_three_blocks(runs: Runs, tp: int) -> None:
    """On 8 ranks each of the 4 key and value heads is held by two."""
    x, weight, floor = attention_input(runs)
    sizes = [heads * llama.HEAD_DIM for heads in (llama.HEADS, llama.KV_HEADS, llama.KV_HEADS)]
    query, key, value = weight.split(sizes)
    own = min(tp, llama.KV_HEADS)
    cut = {
        rank: torch.cat([query.chunk(tp)[rank], *(block.chunk(own)[rank * own // tp] for block in (key, value))])
        for rank in range(tp)
    }
    check_blocks(infer(cut, weight, 0.0), 0, tuple(sizes), tp)
    outputs = {rank: x @ own.t() for rank, own in cut.items()}
    check_blocks(infer(outputs, x @ weight.t(), floor), 2, tuple(sizes), tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_gate_and_up_in_one_matrix_are_two_blocks_and_down_gives_partial_sums(runs: Runs, tp: int) -> None:
    by_key = runs.reference.by_key
    x = runs.reference.tensor(by_key[0, "forward", "layers.0.ffn_norm", ""][0])
    gate, down, up = (
        runs.reference.tensor(by_key[-1, "initial-state", f"layers.0.feed_forward.{p}.weight", ""][0])
        for p in ("w1", "w2", "w3")
    )
    floors = {p: runs.floor(by_key[0, "forward", f"layers.0.feed_forward.{p}", ""][0]) for p in ("w1", "w2", "w3")}
    cut = {rank: torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]) for rank in range(tp)}
    sizes = (llama.HIDDEN, llama.HIDDEN)
    check_blocks(infer(cut, torch.cat([gate, up]), 0.0), 0, sizes, tp)
    outputs = {rank: x @ own.t() for rank, own in cut.items()}
    whole = x @ torch.cat([gate, up]).t()
    check_blocks(infer(outputs, whole, max(floors["w1"], floors["w3"])), 2, sizes, tp)

    def mixed(both: Tensor) -> Tensor:
        first, second = both.chunk(2, -1)
        return torch.nn.functional.silu(first) * second

    terms = {rank: mixed(both) @ down.chunk(tp, 1)[rank].t() for rank, both in outputs.items()}
    found = infer(terms, mixed(whole) @ down.t(), floors["w2"])
    assert (found.kind, found.sums, found.ambiguous) == ("partial", (tuple(range(tp)),), False)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_in_the_order_of_another_rotary_embedding_are_permuted(runs: Runs, tp: int) -> None:
    """Pairs of neighbours here, halves of a head there: checkpoints are converted by a permutation of rows."""
    _, weight, _ = attention_input(runs)
    query = weight[: llama.HEADS * llama.HEAD_DIM]
    order = torch.arange(len(query)).unflatten(0, (llama.HEADS, llama.HEAD_DIM // 2, 2)).transpose(1, 2).flatten()
    found = infer(dict(enumerate(query[order].chunk(tp))), query, 0.0)
    assert (found.kind, found.dim, found.ambiguous) == ("permuted", 0, False)
    assert torch.equal(torch.cat([found.cuts[0].index[rank] for rank in range(tp)]), order)


def check_blocks(found: Inferred, dim: int, sizes: tuple[int, ...], tp: int) -> None:
    assert (found.kind, found.dim, found.ambiguous) == ("fused", dim, False), found
    assert found.cuts[0].blocks == sizes
    assert len(found.groups) == tp
