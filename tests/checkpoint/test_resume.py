"""Saved under one layout, loaded under another: every bit is where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.checkpoint import index as indices
from shardproof.checkpoint.export import assemble
from shardproof.checkpoint.load import load
from shardproof.checkpoint.save import save
from shardproof.checkpoint.whole import whole_state
from shardproof.parallel import mesh as meshes
from shardproof.parallel.held import held_parameters, settle_gradients
from shardproof.parallel.layout import lay_out
from shardproof.parallel.names import canonical_buffers
from shardproof.parallel.piece import Piece
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.experiment import Experiment
from shardproof.spec.strategies import named
from shardproof.train.optimizer import build_optimizer

LAYOUTS = {
    "single": 1,
    "ddp": 2,
    "fsdp": 4,
    "fsdp uneven": 3,
    "hsdp": 4,
    "tp": 2,
    "tp_ddp": 4,
    "tp_fsdp": 4,
    "tp_hsdp": 8,
    "fsdp1": 4,
    "fsdp1 uneven": 3,
    "tp_fsdp1": 4,
}
"""Layout -> ranks. No dim of the model divides by 4, and only some by 3."""

STEPS = 2


class Model(nn.Module):
    """Tied ends, a norm, a frozen parameter, one without gradient, a buffer that counts and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 14)
        self.down = nn.Linear(14, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += torch.arange(3.0)
        self.scratch += 1
        hidden = self.embedding(tokens)
        hidden = hidden + self.down(torch.tanh(self.up(self.norm(hidden))))
        return self.head(hidden) * self.frozen.sum()


def optimizer_of(model: nn.Module) -> Optimizer:
    """Two groups, with options that differ; the frozen parameter is in none."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.1},
            {"params": groups[False], "weight_decay": 0.0, "betas": (0.8, 0.95)},
        ],
        lr=0.01,
    )


EXPERIMENT = Experiment(
    model=Model,
    data=range(8),
    loss=lambda _model, _batch: None,
    optimizer=optimizer_of,
    batch_size=8,
    tp_plan={"embedding": "rowwise", "norm": "replicate", "up": "colwise", "down": "rowwise", "head": "colwise_gather"},
    fsdp_units=("up", "down"),
)


class LaidOut:
    """The model under one layout in the default process group."""

    def __init__(self, layout: str, seed: int) -> None:
        parallelism = named(layout.split()[0], LAYOUTS[layout])
        self.mesh, _ = meshes.build(parallelism, "cpu")
        torch.manual_seed(seed)
        model = Model()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.root = lay_out(model, EXPERIMENT, self.mesh, parallelism)
        self.optimizer = build_optimizer(EXPERIMENT, self.root)
        self.parameters = list(held_parameters(self.root, shapes))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.root(torch.arange(8).reshape(2, 4)).square().mean().backward()
        settle_gradients(self.parameters)
        self.optimizer.step()

    def spoil(self) -> None:
        """Overwrite everything that a checkpoint holds."""
        for _, _, local in self._live():
            local.detach().fill_(-1)
        for group in self.optimizer.param_groups:
            group.update(lr=-1.0, betas=(-1.0, -1.0), weight_decay=-1.0)

    def differences(self, path: Path) -> list[str]:
        """Names of what this rank holds otherwise than the checkpoint, and of what either lacks."""
        whole = load_file(path.with_suffix(".whole"))
        wrong = []
        for name, piece, local in self._live():
            if name not in whole or not torch.equal(piece.take(whole.pop(name)), local):
                wrong.append(name)
        # FSDP's flat parameters leave some ranks nothing of a parameter, and then no state of it.
        nothing = {held.name for held in self.parameters if held.piece.stretch and not held.local(held.leaf).numel()}
        return wrong + [name for name in whole if name.split("/")[1] not in nothing]

    def _live(self) -> Iterator[tuple[str, Piece, Tensor]]:
        for held in self.parameters:
            yield f"model/{held.name}", held.piece, held.local(held.leaf)
            for entry, value in self.optimizer.state.get(held.leaf, {}).items():
                if value.dim():
                    yield f"optimizer/{held.name}/{entry}", held.piece_of(value), held.local(value)
                else:
                    yield f"optimizer/{held.name}/{entry}", Piece(whole=(), offset=(), shape=()), value
        for name, buffer in canonical_buffers(self.root):
            if name != "scratch":
                shape = tuple(buffer.shape)
                yield f"buffer/{name}", Piece(whole=shape, offset=(0,) * len(shape), shape=shape), buffer


class OnRanks:
    def saved(self, place: Place, layout: str, folder: Path) -> list[str]:
        with place.world(layout, LAYOUTS[layout]):
            laid_out = LaidOut(layout, seed=1)
            for _ in range(STEPS):
                laid_out.step()
            laid_out.optimizer.param_groups[1]["lr"] = 0.005
            path = folder / layout
            save(path, laid_out.root, laid_out.parameters, laid_out.optimizer, {"layout": layout, "at": (STEPS, 0.5)})
            if place.rank == 0:
                index = indices.read(path)
                whole = {name: assemble(path, index, saved) for name, saved in index.tensors.items()}
                save_file(whole, path.with_suffix(".whole"))
            dist.barrier()
            return laid_out.differences(path)

    def loaded(self, place: Place, layout: str, folder: Path, others: Sequence[str]) -> dict[str, object]:
        """What differs after each of the checkpoints was loaded."""
        found: dict[str, object] = {}
        with place.world(f"loaded {layout}", LAYOUTS[layout]):
            laid_out = LaidOut(layout, seed=2)
            laid_out.step()
            for number, other in enumerate(others):
                # Checkpoints of different layouts hold nearly the same values: none must stay from the last one.
                laid_out.spoil()
                if number % 2:
                    # There is no state to be written over; it has to be made.
                    laid_out.optimizer = build_optimizer(EXPERIMENT, laid_out.root)
                extra = load(folder / other, laid_out.root, laid_out.parameters, laid_out.optimizer)
                options = [
                    {key: group[key] for key in ("lr", "betas", "weight_decay")}
                    for group in laid_out.optimizer.param_groups
                ]
                found[other] = (laid_out.differences(folder / other), options, extra)
            # What was loaded can be trained.
            laid_out.step()
            assert all(local.isfinite().all() for _, _, local in laid_out._live())
        return found

    def whole(self, place: Place, layout: str) -> object:
        """The whole state of a model, loaded into a plain one: what differs from the model that was laid out."""
        with place.world(f"whole {layout}", LAYOUTS[layout]):
            laid_out = LaidOut(layout, seed=3)
            state = whole_state(laid_out.parameters, laid_out.root)
        if state is None:
            return None
        torch.manual_seed(3)
        fresh, plain = Model(), Model()
        plain.load_state_dict(state)
        want = fresh.state_dict()
        return sorted(name for name, value in plain.state_dict().items() if not torch.equal(value, want[name]))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(8, OnRanks()) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for layout, size in LAYOUTS.items():
        found = ranks.call("saved", layout, folder, ranks=list(range(size)))
        assert set(map(tuple, found.values())) == {()}, f"{layout}: what was saved is not what was live"
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_checkpoint_is_restored_bit_by_bit_under_every_layout(ranks: Ranks, saved: Path, layout: str) -> None:
    size = LAYOUTS[layout]
    for rank, found in ranks.call("loaded", layout, saved, list(LAYOUTS), ranks=list(range(size))).items():
        assert found.keys() == LAYOUTS.keys()
        for other, (differences, options, extra) in found.items():
            assert differences == [], f"{other} loaded under {layout}, rank {rank}"
            assert extra == {"layout": other, "at": (STEPS, 0.5)}
            assert options == [
                {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1},
                {"lr": 0.005, "betas": (0.8, 0.95), "weight_decay": 0.0},
            ]


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp uneven", "tp_fsdp", "tp_hsdp", "tp_fsdp1"])
def test_the_whole_state_loads_into_the_plain_model(ranks: Ranks, layout: str) -> None:
    found = ranks.call("whole", layout, ranks=list(range(LAYOUTS[layout])))
    assert found[0] == []
    assert all(value is None for rank, value in found.items() if rank)


def test_replicas_are_written_once_and_whole_tensors_keep_their_names(saved: Path) -> None:
    sizes = {layout: sum(f.stat().st_size for f in (saved / layout).glob("*.safetensors")) for layout in LAYOUTS}
    data = {
        layout: sum(
            t.dtype.itemsize * torch.Size(t.shape).numel() for t in indices.read(saved / layout).tensors.values()
        )
        for layout in LAYOUTS
    }
    assert len(set(data.values())) == 1, "every layout saves the same tensors"
    assert sizes["ddp"] < 2 * data["ddp"] + 16_000
    single = indices.read(saved / "single")
    assert all(saved.chunks[0].key == name for name, saved in single.tensors.items())
    assert single.ties == (("embedding.weight", "head.weight"),)
