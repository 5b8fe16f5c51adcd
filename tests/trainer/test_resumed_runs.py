"""A run that is broken off and gone on with is the run that nobody broke off, under whatever layout it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

import shardproof as sp
from shardproof.compare.measure import MULTIPLE
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.strategies import parse
from shardproof.train.disturb import Disturbance
from shardproof.trainer.loop import Loop

STRATEGIES = {
    "single": 1,
    "ddp": 2,
    "fsdp": 4,
    "hsdp": 4,
    "tp": 2,
    "tp_fsdp": 4,
    "tp_hsdp": 8,
    "fsdp1": 4,
    "tp_fsdp1": 4,
}
"""Strategy -> ranks."""

SAMPLES, BATCH = 21, 8
"""Three steps make an epoch, the last of them with five samples, which no number of ranks divides."""

BROKEN_OFF, STEPS = 4, 7
"""After the first step of the second epoch; after the first of the third."""

WIDTH, CLASSES = 8, 5


class Model(nn.Module):
    """Tied ends, a norm, two linear layers, and a buffer that training changes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.embedding(tokens)
        return self.head(hidden + self.down(self.dropout(F.gelu(self.up(self.norm(hidden))))))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    vectors = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    matrices = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "norm" in name)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "eps": 1e-6}]
    return torch.optim.AdamW(groups, lr=1e-2)


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Changes the learning rates and the betas of both groups at every step."""
    return OneCycleLR(optimizer, max_lr=[0.02, 0.01], total_steps=30)


def untold(model: nn.Module, batch: Any) -> Tensor:
    """The loss of `Notes`, without a note."""
    _, tokens = batch
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Tokens(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """(number of the sample, tokens)."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.tensor([index % CLASSES, (index * 3 + 1) % CLASSES, (index // CLASSES) % CLASSES])


class Notes(sp.Callback):
    """Notes what a run does; a part of it goes into checkpoints."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []
        """Numbers of the samples that this rank reads, by step."""
        self.rates: list[list[tuple[float, float]]] = []
        """Learning rate and first beta of every group, by step."""
        self.seen = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean cross entropy of the next token. Notes what was read."""
        if model.training:
            self.read[-1] += batch[0].tolist()
        return untold(model, batch)

    def number_loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """For samples that are nothing but their numbers."""
        self.read[-1] += batch.tolist()
        return (model(batch[:, None].double() / 100) - 1).square().mean()

    def step_start(self, loop: Loop) -> None:
        self.read.append([])
        self.rates.append([(group["lr"], group["betas"][0]) for group in loop.optimizer.param_groups])

    def step_end(self, loop: Loop) -> None:
        self.seen += loop.step_samples

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]

    def forget(self) -> None:
        """What a checkpoint does not hold."""
        self.read, self.rates = [], []


def experiment(notes: Notes, *, dropout: float = 0.0) -> sp.Experiment:
    return sp.Experiment(
        model=lambda: Model(dropout),
        data=Tokens(),
        loss=notes.loss,
        optimizer=optimizer,
        batch_size=BATCH,
        max_grad_norm=0.5,
        tp_plan={"embedding": "rowwise", "up": "colwise", "down": "rowwise", "head": "colwise_gather"},
        fsdp_units=("up", "down"),
    )


def stateful_loader(data: Any, mesh: Any, parallelism: sp.Parallelism) -> StatefulDataLoader:
    """Shuffled, in two worker processes."""
    sampler = StatefulDistributedSampler(data, parallelism.dp, mesh["dp"].get_local_rank())
    with warnings.catch_warnings():
        # torchdata asks newer torches for what they no longer have.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            data, BATCH // parallelism.dp, sampler=sampler, num_workers=2, multiprocessing_context="fork"
        )


def training(notes: Notes, **changes: Any) -> sp.Training:
    given: dict[str, Any] = {
        "max_duration": f"{STEPS}ba",
        "precision": "fp64",
        "scheduler": one_cycle,
        "eval_data": [Tokens()[number] for number in range(BATCH)],
        "eval_interval": "2ba",
        "callbacks": (notes, sp.EarlyStopping(patience=100)),
        "progress_bar": False,
    }
    return sp.Training(**given | changes)


def live(loop: Loop) -> Iterator[tuple[str, Any, Tensor]]:
    """Weights and optimizer state as this rank holds them: name, which piece of the whole, tensor."""
    for held in loop.parameters:
        yield held.name, held.piece, held.local(held.leaf).detach()
        for entry, value in loop.optimizer.state.get(held.leaf, {}).items():
            if value.dim():
                yield f"{held.name}/{entry}", held.piece_of(value), held.local(value)
            else:
                yield f"{held.name}/{entry}", None, value
    for name, buffer in loop.root.named_buffers():
        yield name.split(".")[-1], None, buffer


def told(loop: Loop) -> dict[str, Any]:
    """All else that a run holds, as plain data."""
    stopping = loop.training.callbacks[1]
    return {
        "progress": {**loop.progress.state_dict(), "elapsed_s": None},
        "scheduler": None if loop.scheduler is None else loop.scheduler.state_dict(),
        "scaler": None if loop.scaler is None else loop.scaler.state_dict(),
        "loader": loop.loader_state,
        "notes": loop.training.callbacks[0].state_dict(),
        "waited": stopping.state_dict()["waited"],
        "groups": [{key: value for key, value in g.items() if key != "params"} for g in loop.optimizer.param_groups],
    }


class OnRanks:
    """What warm ranks do; nothing that they return is large."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unbroken(self, place: Place, strategy: str, size: int, case: dict[str, Any]) -> Any:
        """All steps, with a checkpoint on the way. Every rank leaves in a file what it holds at the end."""
        notes, parallelism = Notes(), parse(strategy, size)
        about = training(notes, save_folder=self.saved(strategy, case).parent, save_interval=f"{BROKEN_OFF}ba", **case)
        with place.world("unbroken", parallelism.world_size):
            loop = made(notes, parallelism, about, place)
            fit = loop.fit()
            torch.save({name: tensor for name, _, tensor in live(loop)}, self.end(strategy, case, loop.rank))
            state = loop.state_dict()
            if state is not None:
                torch.save(state, self.end(strategy, case, "whole"))
            return notes.read, notes.rates, told(loop), loop.training.callbacks[1].best, fit.losses

    def resumed(self, place: Place, strategy: str, size: int, case: dict[str, Any], others: list[str]) -> Any:
        """The last steps from each of the checkpoints. The first is loaded by a new run, the others by that very run,
        of which nothing may stay."""
        found = {}
        with place.world("resumed", parse(strategy, size).world_size):
            notes, loop = Notes(), None
            for other in others:
                if loop is None:
                    about = training(notes, load_path=self.saved(other, case), **case)
                    loop = made(notes, parse(strategy, size), about, place)
                else:
                    loop.load(self.saved(other, case))
                notes.forget()
                fit = loop.fit()
                far = self.apart(loop, strategy, case) if other == strategy else self.from_single(loop, case)
                found[other] = (
                    notes.read,
                    notes.rates,
                    told(loop),
                    loop.training.callbacks[1].best,
                    (fit.first_step, fit.losses),
                    far,
                )
        return found

    def apart(self, loop: Loop, strategy: str, case: dict[str, Any]) -> dict[str, float]:
        """How far each tensor is from what this rank held at the end of the unbroken run; nothing that is equal."""
        want = torch.load(self.end(strategy, case, loop.rank), weights_only=True)
        got = {name: tensor for name, _, tensor in live(loop)}
        assert got.keys() == want.keys()
        return {name: distance(got[name], want[name]) for name in got if not torch.equal(got[name], want[name])}

    def from_single(self, loop: Loop, case: dict[str, Any]) -> dict[str, float]:
        """How far each tensor is from its piece of what one device held at the end."""
        want = torch.load(self.end("single", case, 0), weights_only=True)
        return {
            name: distance(tensor, want[name] if piece is None else piece.take(want[name]))
            for name, piece, tensor in live(loop)
        }

    def whole(self, place: Place, strategy: str) -> Any:
        """The state dict of the unbroken run: what it has otherwise than a plain model, and than one device's run."""
        state = torch.load(self.end(strategy, {}, "whole"), weights_only=True)
        want, plain = torch.load(self.end("single", {}, "whole"), weights_only=True), Model().double()
        plain.load_state_dict(state)
        kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in plain.state_dict().items()}
        wrong = [name for name, tensor in state.items() if (tuple(tensor.shape), tensor.dtype) != kinds.get(name)]
        return wrong, {name: distance(state[name], want[name]) for name in want}

    def evaluated(self, place: Place, strategy: str, size: int, weights: bool) -> Any:
        """The loss on held-out samples at the start, after some steps, and once the start is loaded again."""
        notes, start = Notes(), self.folder / f"start-{strategy}{'.safetensors' if weights else ''}"
        with place.world("evaluated", size):
            loop = made(notes, parse(strategy, size), training(notes, eval_interval="50ba", max_duration="2ba"), place)
            (loop.export if weights else loop.save)(start)
            losses = [loop.evaluate()["loss"]]
            loop.fit()
            losses.append(loop.evaluate()["loss"])
            loop.load(start)
            return [*losses, loop.evaluate()["loss"]], loop.progress.step

    def stopped(self, place: Place) -> Any:
        """A run that ends because evaluations get no better, or the resumption of it."""
        notes, folder = Notes(), self.folder / "stopped"
        stopping = sp.EarlyStopping(patience=2, min_delta=100.0)
        about = training(
            notes,
            save_folder=folder,
            load_path="auto",
            eval_interval="1ba",
            save_interval="1ba",
            keep=1,
            callbacks=(stopping,),
        )
        with place.world("stopped", 2):
            loop = Loop(replace(experiment(notes), loss=untold), parse("fsdp", 2), about, place)
            fit = loop.fit()
            return fit.first_step, fit.step, stopping.waited, fit.stop_reason, len(fit.evaluations), fit.checkpoint

    def own_loader(self, place: Place, stop: bool) -> Any:
        """Epochs of 20 steps through a loader of the user's own, broken off after step 18 of the first or not at all:
        the samples and the last weights. The state of such a loader is saved every 16 steps."""
        notes, folder = Notes(), self.folder / "own-loader"
        about = {"save_folder": folder, "save_interval": "18ba", "max_duration": "23ba", "eval_data": None}
        about |= {"callbacks": (notes,), "load_path": folder / "step-00000018" if stop else None}
        with place.world("own loader", 2):
            own = replace(experiment(notes), data=range(160), batches=stateful_loader, loss=notes.number_loss)
            own = replace(own, model=lambda: nn.Linear(1, 1), tp_plan=None, fsdp_units=())
            loop = Loop(own, parse("fsdp", 2), training(notes, **about), place)
            fit = loop.fit()
            return fit.first_step, notes.read, {name: tensor.tolist() for name, _, tensor in live(loop)}

    def moved(self, place: Place) -> Any:
        """How far rounding moves one device's run: one draw on each rank."""
        draw = Disturbance(place.rank)
        notes = Notes()

        def model() -> nn.Module:
            built = Model().double()
            draw.model_(built)
            return built

        with place.world("moved", 1):
            disturbed = replace(experiment(notes), model=model)
            loop = Loop(disturbed, parse("single", 1), training(notes), place)
            loop.template = replace(loop.template, loss_scale=draw.loss_scale)
            fit = loop.fit()
            return self.from_single(loop, {}), fit.losses, loop.training.callbacks[1].best

    def saved(self, strategy: str, case: dict[str, Any]) -> Path:
        return self.folder / f"{strategy}{named(case)}" / f"step-{BROKEN_OFF:08d}"

    def end(self, strategy: str, case: dict[str, Any], rank: int | str) -> Path:
        return self.folder / f"{strategy}{named(case)}-{rank}.pt"


def made(notes: Notes, parallelism: sp.Parallelism, about: sp.Training, place: Place) -> Loop:
    """Float16 runs, whose steps no layout but their own repeats bit by bit, also draw dropout masks."""
    half = about.precision == "fp16"
    loop = Loop(experiment(notes, dropout=0.25 if half else 0.0), parallelism, about, place)
    if loop.scaler is not None:
        # The scale grows until a gradient overflows, within a few steps.
        loop.scaler.growth_interval, loop.scaler.growth = 1, 2.0**8
    return loop


def named(case: dict[str, Any]) -> str:
    return "".join(f"-{name}-{value}" for name, value in sorted(case.items()))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max()) if got.numel() else 0.0


def in_order(told: dict[int, Any], strategy: str, size: int, steps: int) -> list[list[int]]:
    """Numbers of the samples of each global batch, in order, from what each rank has read."""
    parallelism = parse(strategy, size)
    firsts = [rank for rank in range(parallelism.world_size) if not parallelism.coordinates(rank)["tp"]]
    # A rank with nothing to read takes part with the first sample, at weight 0.
    return [list(dict.fromkeys(n for rank in firsts for n in told[rank][0][step])) for step in range(steps)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with start(8, OnRanks(tmp_path_factory.mktemp("resumed"))) as started:
        yield started


@pytest.fixture(scope="module")
def unbroken(ranks: Ranks) -> dict[str, Any]:
    """Strategy -> rank -> what its unbroken run told."""
    return {name: ranks.call("unbroken", name, size, {}, ranks=range(size)) for name, size in STRATEGIES.items()}


@pytest.fixture(scope="module")
def floors(ranks: Ranks, unbroken: dict[str, Any]) -> tuple[dict[str, float], list[float], float]:
    """How far rounding alone moves weights and optimizer state, losses, and the best loss of an evaluation."""
    losses, best = unbroken["single"][0][4], unbroken["single"][0][3]
    draws = list(ranks.call("moved").values())
    return (
        {name: max(draw[0][name] for draw in draws) for name in draws[0][0]},
        [max(abs(draw[1][step] - losses[step]) for draw in draws) for step in range(STEPS)],
        max(abs(draw[2] - best) for draw in draws),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_from_the_checkpoint_of_any_layout(
    ranks: Ranks, unbroken: dict[str, Any], floors: Any, strategy: str
) -> None:
    size = STRATEGIES[strategy]
    found = ranks.call("resumed", strategy, size, {}, list(STRATEGIES), ranks=range(size))
    tensors, loss_floors, best_floor = floors
    single = unbroken["single"][0]
    order = in_order(unbroken["single"], "single", 1, STEPS)
    assert [len(batch) for batch in order] == [8, 8, 5, 8, 8, 5, 8]
    assert order[:3] != order[3:6], "epochs must differ, or a place in the wrong one would not be seen"
    for other in STRATEGIES:
        told = {rank: found[rank][other] for rank in found}
        assert in_order(told, strategy, size, STEPS - BROKEN_OFF) == order[BROKEN_OFF:]
        for rank, (_, rates, state, best, (first, losses), far) in told.items():
            about = f"{other} resumed under {strategy}, rank {rank}"
            assert rates == single[1][BROKEN_OFF:], about
            assert first == BROKEN_OFF, about
            # Plain data of a run is the same under every layout.
            assert state == single[2], about
            if other == strategy:
                assert far == {}, about
                assert (best, losses) == (unbroken[strategy][rank][3], unbroken[strategy][rank][4][BROKEN_OFF:]), about
                continue
            beyond = {name: (far[name], tensors[name]) for name in far if not far[name] <= MULTIPLE * tensors[name]}
            assert not beyond, about
            assert abs(best - single[3]) <= MULTIPLE * best_floor, about
            for step, loss in enumerate(losses, BROKEN_OFF):
                assert abs(loss - single[4][step]) <= MULTIPLE * loss_floors[step], about


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_weights_have_the_names_of_the_plain_model_and_one_devices_values(
    ranks: Ranks, unbroken: dict[str, Any], floors: Any, strategy: str
) -> None:
    wrong, far = ranks.call("whole", strategy, ranks=[0])[0]
    assert wrong == []
    # A tied parameter is there under both names, and has one floor.
    known = {**floors[0], "head.weight": floors[0]["embedding.weight"]}
    assert far.keys() == {name for name in known if "/" not in name}
    assert {name: distance for name, distance in far.items() if distance > MULTIPLE * known[name]} == {}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp_fsdp", "fsdp1", "tp_fsdp1"])
def test_what_is_loaded_after_an_evaluation_is_what_is_computed_with(
    ranks: Ranks, strategy: str, weights: bool
) -> None:
    """An evaluation leaves FSDP's root gathered, which a load must not leave in use."""
    size = STRATEGIES[strategy]
    for losses, step in ranks.call("evaluated", strategy, size, weights, ranks=range(size)).values():
        assert losses[0] != losses[1]
        assert losses[2] == losses[0]
        assert step == (2 if weights else 0), "weights alone are no place in a run"


def test_a_run_that_stopped_early_stays_stopped(ranks: Ranks) -> None:
    first, step, waited, reason, evaluations, path = ranks.call("stopped", ranks=range(2))[0]
    assert (first, step, waited, evaluations, path.name) == (0, 3, 2, 3, "step-00000003")
    assert reason.startswith("loss was no better in 2 evaluations")
    assert os.listdir(path.parent) == [path.name], "one checkpoint is kept"
    before = (path / "index.json").stat().st_mtime_ns
    again = ranks.call("stopped", ranks=range(2))[0]
    assert again[:3] == (3, 3, 2)
    assert again[3].startswith("loss was no better in 2 evaluations")
    assert again[4:] == (1, path), "it has the results that it ended with"
    assert (path / "index.json").stat().st_mtime_ns == before, "nothing changed, so nothing is saved"


@pytest.mark.parametrize("strategy", ["ddp", "tp_fsdp"])
def test_scale_of_the_loss_and_dropout_go_on_bit_by_bit(ranks: Ranks, strategy: str) -> None:
    """In float16, whose loss scale grows until steps are skipped, and with dropout."""
    size, case = STRATEGIES[strategy], {"precision": "fp16"}
    whole = ranks.call("unbroken", strategy, size, case, ranks=range(size))
    again = ranks.call("resumed", strategy, size, case, [strategy], ranks=range(size))
    for rank, (read, rates, state, best, losses) in whole.items():
        assert rates[0] in rates[1:], "no step was skipped, so that nothing of it could be lost"
        assert again[rank][strategy] == (
            read[BROKEN_OFF:],
            rates[BROKEN_OFF:],
            state,
            best,
            (BROKEN_OFF, losses[BROKEN_OFF:]),
            {},
        )


def test_workers_and_saves_in_the_background_change_nothing(ranks: Ranks, unbroken: dict[str, Any]) -> None:
    case = {"workers": 2, "save_async": True}
    read, rates, state, *rest = ranks.call("unbroken", "ddp", 2, case, ranks=range(2))[0]
    assert (read, rates, state, *rest) == unbroken["ddp"][0]
    again = ranks.call("resumed", "ddp", 2, case, ["ddp"], ranks=range(2))
    assert again[0]["ddp"][0] == read[BROKEN_OFF:]
    assert again[0]["ddp"][2] == state
    assert [told["ddp"][-1] for told in again.values()] == [{}, {}]


def test_a_loader_of_ones_own_goes_on_inside_an_epoch(ranks: Ranks) -> None:
    whole = ranks.call("own_loader", False, ranks=range(2))
    again = ranks.call("own_loader", True, ranks=range(2))
    for rank in whole:
        assert len(whole[rank][1]) == 23
        assert (whole[rank][0], again[rank][0]) == (0, 18)
        assert again[rank][1] == whole[rank][1][18:]
        assert again[rank][2] == whole[rank][2]
    first = [sample for rank in whole for step in whole[rank][1][:20] for sample in step]
    assert sorted(first) == list(range(160)), "an epoch reads every sample once"
    assert first != sorted(first)


PROGRAM = """
import os, signal
import torch
from torch import nn
import shardproof as sp
from shardproof.checkpoint import folder

FIRST = os.getpid()
WHEN, _, STEP = os.environ.get("KILLED", "").partition(":")


def die():
    os.kill(FIRST, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(sp.Callback):
    def step_end(self, loop):
        if WHEN == "between" and loop.progress.step == int(STEP) and loop.rank == 3:
            die()


def put(written, path, put=folder.put):
    if WHEN == "saving" and path.name == folder.step_name(int(STEP)):
        die()
    put(written, path)


folder.put = put


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


experiment = sp.Experiment(
    model=Model,
    data=[torch.randn(4, generator=torch.Generator().manual_seed(number)) for number in range(21)],
    loss=lambda model, batch: (model(batch) - batch).square().mean(),
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    batch_size=8,
    tp_plan={"up": "colwise", "down": "rowwise"},
    fsdp_units=("up", "down"),
)
training = sp.Training(
    max_duration="8ba",
    callbacks=[Killer()],
    scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
)
"""
"""A run that kills itself, as nobody else could at the right moment: its first process and the rank that notices."""


def run(file: Path, folder: Path, *options: str, killed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardproof", "train", str(file), "--strategy", "tp_fsdp", "--ranks", "4"]
    command += ["--save-folder", str(folder), "--save-interval", "1ba", "--keep", "2", "--quiet", *options]
    return subprocess.run(
        command, env={**os.environ, "KILLED": killed}, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_run_that_is_killed_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    file, folder = tmp_path / "killed.py", tmp_path / "killed"
    file.write_text(PROGRAM)
    whole = run(file, tmp_path / "whole", "--export", str(tmp_path / "whole.safetensors"))
    assert whole.returncode == 0, whole.stderr
    # Between two saves, then in the middle of one that is written in the background.
    assert run(file, folder, "--resume", killed="between:3").returncode == -signal.SIGKILL
    assert "step-00000002" in os.listdir(folder)
    assert run(file, folder, "--resume", "--save-async", killed="saving:6").returncode == -signal.SIGKILL
    left = os.listdir(folder)
    assert any(name.startswith(".step-00000006.writing-") for name in left), left
    assert "step-00000006" not in left
    again = run(file, folder, "--resume", "--export", str(tmp_path / "again.safetensors"))
    assert again.returncode == 0, again.stderr
    assert sorted(os.listdir(folder)) == ["step-00000007", "step-00000008"]
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert again.stdout.startswith("tp_fsdp: 8 steps, 2 epochs")
