"""A loop on four ranks, recorded under every layout: nothing that it computes changes, and what was seen is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loops import events
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from shardproof.compare.pending import settled
from shardproof.parallel.held import held_parameters, plain
from shardproof.parallel.piece import Piece
from shardproof.ranks import Place, Ranks, start
from shardproof.trace.folder.reader import open_recording

RANKS = 4
ROWS = 3
STEPS, MICROBATCHES = 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.25)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def lay_out(layout: str) -> nn.Module:
    torch.manual_seed(1)
    model = Model()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout.startswith("fsdp1"):
        options = {"use_orig_params": "flat" not in layout, "device_id": torch.device("cpu")}
        model.blocks[0] = FullyShardedDataParallel(model.blocks[0], **options)
        return FullyShardedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    if layout.startswith("tp"):
        plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    if layout in ("fsdp2", "tp_fsdp"):
        over = mesh["dp_shard"] if layout == "tp_fsdp" else init_device_mesh("cpu", (RANKS,))
        for block in model.blocks:
            fully_shard(block, mesh=over)
        fully_shard(model, mesh=over)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> list[float]:
    """Accumulates over micro-batches, clips where torch can, evaluates in between."""
    data = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for number in range(MICROBATCHES):
            quiet = isinstance(model, DistributedDataParallel | FullyShardedDataParallel) and number == 0
            with model.no_sync() if quiet else contextlib.nullcontext():
                loss = model(torch.randn(ROWS, 6, generator=data)).square().mean()
                (loss / MICROBATCHES).backward()
            losses.append(loss.item())
        meshes = {getattr(p, "device_mesh", None) for p in model.parameters()}
        if isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(0.01)
        elif len(meshes) == 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with torch.no_grad():
            model(torch.ones(1, 6))
        optimizer.step()
    return losses


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> list[Tensor]:
    """Everything that a loop leaves: losses, weights, optimizer state, random numbers."""
    state = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    kept = [torch.tensor(losses, dtype=torch.float64), torch.get_rng_state()]
    return kept + [plain(tensor.detach()).clone() for tensor in (*model.parameters(), *state)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def built(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = lay_out(layout)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


class OnRanks:
    def recorded(self, place: Place, layout: str, folder: str) -> dict[str, object]:
        """Train without and with `record`: whether that is the same, and what the trace says."""
        with place.world("recorded", RANKS):
            model, optimizer = built(layout)
            bare = outcome(model, optimizer, train(model, optimizer, place.rank))
            model, optimizer = built(layout)
            with sp.record(folder, model, optimizer, steps=[0, 2]):
                losses = train(model, optimizer, place.rank)
            dist.barrier()
            trace = open_recording(Path(folder)).ranks[place.rank]
            left = {n: r for n, r in enumerate(trace.records) if r.step == 2}
            updates = {r.name: trace.tensor(n) for n, r in left.items() if r.stage == "update"}
            held = list(held_parameters(model))
            return {
                "same": same(bare, outcome(model, optimizer, losses)),
                "others": [h.name for h in held if not torch.equal(updates[h.name], h.local(h.leaf).detach())],
                "losses": [trace.tensor(n).item() for n, r in left.items() if r.stage == "loss"],
                "wanted": [loss / MICROBATCHES for loss in losses[-2:]],
                "forward": [(r.name, r.call) for r in left.values() if r.stage == "forward"],
                "backward": [(r.name, r.call) for r in left.values() if r.stage == "backward"],
                "samples": [sample for r in left.values() if r.stage == "batch" for sample in r.samples],
                "facts": events(trace, "layout")[0],
                "rank": trace.header["rank"],
            }

    def by_hand(self, place: Place, folder: str) -> tuple[dict[str, object], Piece]:
        """A plain tensor with Megatron's attributes, on a mesh that only the user knows."""
        with place.world("by hand", RANKS):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tensor_parallel"))
            model = nn.Linear(3, 2, bias=False)
            model.weight.tensor_model_parallel, model.weight.partition_dim = True, 0
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with sp.record(folder, model, optimizer, mesh=mesh, steps=[0]):
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
            dist.barrier()
            trace = open_recording(Path(folder)).ranks[place.rank]
            return events(trace, "layout")[0], next(
                record.piece for record in trace.records if record.stage == "gradient"
            )

    def wrapped_later(self, place: Place, folder: str) -> tuple[dict[str, object], list[str]]:
        """As under a trainer that wraps the model for itself, where nobody can attach the wrapper."""
        with place.world("later", RANKS):
            model = Model()
            with sp.record(folder, model, steps=[0]):
                wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
                optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
                wrapped(torch.ones(1, 6)).sum().backward()
                optimizer.step()
            dist.barrier()
            trace = open_recording(Path(folder)).ranks[place.rank]
            cut = {r.name for r in trace.records if r.stage == "gradient" and r.piece.stretch is not None}
            return events(trace, "layout")[-1], sorted(cut)

    def filled_late(self, place: Place, folder: str) -> tuple[dict[str, object], list[str]]:
        """Sharded without values, which come as new parameters, and before any forward pass: as transformers does."""
        with place.world("filled", RANKS):
            with torch.device("meta"):
                model = fully_shard(Model())
            for module in model.modules():
                for name, empty in list(module.named_parameters(recurse=False)):
                    value = distribute_tensor(torch.ones(empty.shape), empty.device_mesh, empty.placements)
                    setattr(module, name, nn.Parameter(value))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with sp.record(folder, model, optimizer, steps=[0]):
                model(torch.ones(1, 6)).sum().backward()
                optimizer.step()
            dist.barrier()
            trace = open_recording(Path(folder)).ranks[place.rank]
            stages = [record.stage for record in trace.records if record.stage in ("initial-state", "update")]
            return events(trace, "layout")[0], stages


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(RANKS, OnRanks()) as ranks:
        yield ranks


AXES = {
    "ddp": {"dp_replicate": [0, 1, 2, 3]},
    "fsdp2": {"dp_shard": [0, 1, 2, 3]},
    "fsdp1": {"dp_shard": [0, 1, 2, 3]},
    "fsdp1 flat": {"dp_shard": [0, 1, 2, 3]},
    "tp": {"tp": [2, 3]},
    "tp_fsdp": {"dp_shard": [1, 3], "tp": [2, 3]},
}
"""Those of rank 3."""

WRAPPERS = {
    "ddp": {"DistributedDataParallel": ["(root)"]},
    "fsdp2": {"FSDPModule": ["(root)", "blocks.0", "blocks.1"]},
    "fsdp1": {"FullyShardedDataParallel": ["(root)", "blocks.0"]},
    "fsdp1 flat": {"FullyShardedDataParallel": ["(root)", "blocks.0"]},
    "tp": {},
    "tp_fsdp": {"FSDPModule": ["(root)", "blocks.0", "blocks.1"]},
}


@pytest.mark.parametrize("layout", AXES)
def test_a_recorded_loop_computes_the_same_and_is_seen_as_it_is(ranks: Ranks, layout: str, tmp_path: Path) -> None:
    found = ranks.call("recorded", layout, str(tmp_path))
    for rank, seen in found.items():
        assert seen["same"], f"rank {rank} computed something else"
        assert seen["rank"] == rank
        assert seen["others"] == [], "the last update is what the model holds"
        assert seen["losses"] == seen["wanted"]
        assert len(seen["forward"]) == len(set(seen["forward"])) == 10 * MICROBATCHES
        assert sorted(seen["backward"]) == sorted(seen["forward"])
        assert len(set(seen["samples"])) == ROWS * MICROBATCHES
    assert found[3]["facts"]["axes"] == AXES[layout]
    assert found[3]["facts"]["wrappers"] == WRAPPERS[layout]
    assert found[3]["facts"]["strangers"] == found[3]["facts"]["left_behind"] == []
    pieces_and_norms_are_of_one_run(tmp_path, layout)


def pieces_and_norms_are_of_one_run(folder: Path, layout: str) -> None:
    """Gradients are put together from their pieces, and are as long as the norm says that was clipped."""
    recording = open_recording(folder)
    norms: dict[int, Tensor] = {}
    clipped: dict[int, Piece] = {}
    wholes: dict[str, Tensor] = {}
    for rank, trace in recording.ranks.items():
        for number, record in enumerate(trace.records):
            if record.step != 2 or record.missing:
                continue
            if record.stage == "gradient":
                whole = wholes.setdefault(record.name, torch.full(record.piece.whole, torch.nan))
                own = record.piece.take(whole)
                if record.piece.stretch is None:
                    own.copy_(trace.tensor(number))
                else:
                    at = [record.piece.index((i,)) for i in range(own.numel())]
                    for index, value in zip(at, trace.tensor(number).tolist(), strict=True):
                        whole[index] = value
            elif record.part == "norm":
                norms[rank], clipped[rank] = trace.tensor(number), record.piece
    assert len(wholes) == 10
    squares = sum(whole.square().sum() for whole in wholes.values())
    assert not torch.isnan(squares), "some elements are on no rank"
    if layout.startswith("tp"):
        assert norms == {}
    else:
        assert torch.allclose(torch.stack(list(settled(norms, clipped).values())), squares.sqrt())


def test_a_plain_tensor_that_says_how_it_is_cut_has_a_declared_piece(ranks: Ranks, tmp_path: Path) -> None:
    facts, piece = ranks.call("by_hand", str(tmp_path))[3]
    assert facts["hints"] == {"weight": {"axis": "tp", "dim": 0, "stride": 1, "from": "partition_dim"}}
    assert (facts["axes"], facts["axes_from"]) == ({"dp_replicate": [1, 3], "tp": [2, 3]}, "mesh=")
    assert piece == Piece(whole=(4, 3), offset=(2, 0), shape=(2, 3))


def test_a_wrapper_that_nobody_attached_is_found(ranks: Ranks, tmp_path: Path) -> None:
    facts, cut = ranks.call("wrapped_later", str(tmp_path))[3]
    assert facts["wrappers"] == {"FullyShardedDataParallel": ["(root)"]}
    assert facts["axes"] == {"dp_shard": [0, 1, 2, 3]}
    assert facts["optimizers"] == ["SGD"]
    assert facts["strangers"] == facts["left_behind"] == []
    assert len(cut) == 10


def test_a_model_that_was_sharded_before_it_had_values_is_known_to_its_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    facts, stages = ranks.call("filled_late", str(tmp_path))[3]
    assert facts["strangers"] == facts["left_behind"] == []
    assert stages == ["initial-state"] * 10 + ["update"] * 10
