"""Models built without storage, against the same models built on one device, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardproof.errors import ExperimentError, StrategyError
from shardproof.parallel import initial
from shardproof.parallel import mesh as meshes
from shardproof.parallel import piece as pieces
from shardproof.parallel.data import GlobalBatches
from shardproof.parallel.deferred import Recipe, build_deferred, fills_first
from shardproof.parallel.held import Held, held_parameters, plain, ties
from shardproof.parallel.layout import lay_out
from shardproof.parallel.names import canonical_buffers
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.experiment import Experiment
from shardproof.spec.loading import load
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import STRATEGIES, named
from shardproof.train.optimizer import build_optimizer
from shardproof.train.step import Step, train_step

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")
ON_FOUR_RANKS = [name for name in STRATEGIES if name != "tp_hsdp"]


class Odd(nn.Module):
    """Initial values that are made in every way we know of."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.embedding = nn.Embedding(11, 8, padding_idx=2)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.copied = copy.deepcopy(self.encoder)
        self.lstm = nn.LSTM(8, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.ragged = nn.Linear(5, 3)
        nn.init.trunc_normal_(self.up.weight, std=0.5)
        nn.init.orthogonal_(self.down.weight)
        nn.init.sparse_(self.ragged.weight, 0.3)
        nn.init.kaiming_normal_(self.conv.weight)
        self.counted = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.from_numpy = nn.Parameter(torch.from_numpy(np.random.standard_normal(5)))
        self.cut = nn.Parameter(torch.empty(6, 4).uniform_(-1, 1))
        with torch.no_grad():
            self.cut[1:3, ::2].fill_(7)
            self.cut[4] = 0
            self.cut[:, 1].mul_(self.cut[:, 0])
        angles = torch.outer(torch.arange(6.0), 1 / 100 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("rotary", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).bool())
        self.table = torch.randn(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def sum_of_squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def experiment_of(model: Callable[[], nn.Module], **fields: object) -> Experiment:
    """`model` on eight samples of eight numbers."""
    return Experiment(model=model, data=torch.ones(8, 8), loss=sum_of_squares, optimizer=adam, batch_size=8, **fields)


def experiment_named(name: str) -> Experiment:
    if name == "odd":
        return experiment_of(Odd, tp_plan={"up": "colwise", "down": "rowwise"}, fsdp_units=("up", "encoder"))
    return load(str(EXAMPLES / f"{name}.py"))


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {held.name: tuple(held.leaf.shape) for held in held_parameters(model)}


def build_both(experiment: Experiment, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Recipe]:
    """The model as one device builds it, and filled by its recipe."""
    with initial.default_dtype(dtype):
        want = initial.build(experiment, dtype, CPU)
    got, recipe = build_deferred(experiment, dtype)
    recipe.fill(got, held_parameters(got), CPU)
    return want, got, recipe


def differing(want: nn.Module, got: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are not the same, bit for bit."""
    wanted = dict(want.named_parameters(remove_duplicate=False)) | dict(canonical_buffers(want))
    found = dict(got.named_parameters(remove_duplicate=False)) | dict(canonical_buffers(got))
    if wanted.keys() != found.keys():
        return sorted(wanted.keys() ^ found.keys())
    same = {n: found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items()}
    return [name for name, is_same in same.items() if not is_same]


class Wide(nn.Module):
    """Equal large layers, each initialised by torch first and once more at the end, as GPT implementations do."""

    LAYERS, WIDTH = 12, 256

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH, bias=False) for _ in range(self.LAYERS))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight /= (2 * self.LAYERS) ** 0.5


class OnRanks:
    def differing_shards(self, place: Place, example: str, strategy: str) -> list[str]:
        """Names of what this rank holds that is not its part of what one device builds."""
        parallelism = named(strategy, 4)
        with place.world("shards", parallelism.world_size):
            mesh, _ = meshes.build(parallelism, "cpu")
            experiment = experiment_named(example)
            want = initial.build(experiment, torch.float32, CPU)
            root, held = self._deferred(experiment, parallelism, mesh)
            values, wrong = dict(want.named_parameters()), []
            for own in held:
                got = own.local(own.leaf.detach())
                if not torch.equal(got, own.piece.take(values.pop(own.name)).detach()):
                    wrong.append(own.name)
            for name, buffer in canonical_buffers(root):
                if not torch.equal(plain(buffer), pieces.of_tensor(buffer).take(dict(canonical_buffers(want))[name])):
                    wrong.append(name)
            tied = ties(root) == ties(want)
            return [*wrong, *values, *([] if tied else ["ties"])]

    def losses(self, place: Place, strategy: str, deferred: bool) -> list[float]:
        """Of three steps of the GPT example."""
        parallelism = named(strategy, 4)
        with place.world("losses", parallelism.world_size):
            mesh, data_group = meshes.build(parallelism, "cpu")
            experiment = experiment_named("gpt")
            if deferred:
                root, held = self._deferred(experiment, parallelism, mesh)
            else:
                model = initial.build(experiment, torch.float32, CPU)
                shapes = whole_shapes(model)
                root = lay_out(model, experiment, mesh, parallelism)
                held = list(held_parameters(root, shapes))
            optimizer = build_optimizer(experiment, root)
            rank = parallelism.coordinates(place.rank)["dp"]
            batches = GlobalBatches(experiment, data_ranks=parallelism.dp, microbatches=1).of_rank(rank)
            found = []
            for index in range(3):
                step = Step(
                    model=root,
                    optimizer=optimizer,
                    microbatches=[next(batches).batch],
                    loss=experiment.loss,
                    mesh=mesh,
                    parallelism=parallelism,
                    max_grad_norm=experiment.max_grad_norm,
                    index=index,
                    data_group=data_group,
                )
                found.append(train_step(step, held).item())
            return found

    def peak(self, place: Place) -> tuple[int, int]:
        """Most bytes of whole tensors alive at a time, and bytes of shards, under fsdp."""
        parallelism = named("fsdp", 4)
        with place.world("peak", 4):
            mesh, _ = meshes.build(parallelism, "cpu")
            model, recipe = build_deferred(experiment_of(Wide, fsdp_units=("layers.*",)), torch.float32)
            root = lay_out(model, experiment_of(Wide, fsdp_units=("layers.*",)), mesh, parallelism)
            held = list(held_parameters(root))
            recipe.fill(root, held, CPU)
            return recipe.peak_bytes, sum(plain(own.leaf).untyped_storage().nbytes() for own in held)

    def refusal(self, place: Place, kind: str) -> str:
        """What is said of a layout whose parts cannot be told, or that was filled too late."""
        parallelism = named("tp", 4)
        with place.world("refusal", 4):
            mesh, _ = meshes.build(parallelism, "cpu")

            def by_hand(model: nn.Module, *_: object) -> nn.Module:
                model.up.weight = nn.Parameter(model.up.weight.detach()[:3])
                return model

            def added(model: nn.Module, *_: object) -> nn.Module:
                model.adapter = nn.Linear(8, 2)
                return model

            experiment = experiment_of(Odd, parallelize={"by hand": by_hand, "added": added}[kind])
            try:
                self._deferred(experiment, parallelism, mesh)
            except (StrategyError, ExperimentError) as error:
                return str(error)
            return ""

    @staticmethod
    def _deferred(experiment: Experiment, parallelism: Parallelism, mesh: object) -> tuple[nn.Module, list[Held]]:
        model, recipe = build_deferred(experiment, torch.float32)
        shapes = whole_shapes(model)
        if fills_first(parallelism):
            recipe.fill(model, held_parameters(model), CPU)
        root = lay_out(model, experiment, mesh, parallelism)
        held = list(held_parameters(root, shapes))
        if not fills_first(parallelism):
            recipe.fill(root, held, CPU)
        return root, held


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks()) as ranks:
        yield ranks


def call(ranks: Ranks, strategy: str, method: str, *args: object) -> dict[int, object]:
    return ranks.call(method, *args, ranks=range(named(strategy, 4).world_size))


@pytest.mark.parametrize("strategy", ON_FOUR_RANKS)
@pytest.mark.parametrize("example", ["gpt", "odd"])
def test_each_rank_holds_its_part_of_what_one_device_builds(ranks: Ranks, example: str, strategy: str) -> None:
    found = call(ranks, strategy, "differing_shards", example, strategy)
    assert all(names == [] for names in found.values()), found


@pytest.mark.parametrize("strategy", ["fsdp", "tp_fsdp", "ddp"])
def test_a_filled_model_trains_like_one_that_was_built_whole(ranks: Ranks, strategy: str) -> None:
    assert call(ranks, strategy, "losses", strategy, True) == call(ranks, strategy, "losses", strategy, False)


def test_a_rank_needs_memory_for_its_shards_and_two_whole_tensors_at_most(ranks: Ranks) -> None:
    largest = Wide.WIDTH**2 * 4
    for peak, shards in ranks.call("peak").values():
        assert shards == Wide.LAYERS * largest // 4
        assert 0 < peak <= 2 * largest


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("by hand", "up.weight has shape (3, 8) of (12, 8) and does not say which part it is"),
        ("added", "adapter.weight is not among the parameters that Experiment.model built"),
    ],
)
def test_a_parameter_whose_values_nobody_knows_is_refused(ranks: Ranks, kind: str, words: str) -> None:
    assert all(words in text for text in ranks.call("refusal", kind).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("example", ["gpt", "digits"])
def test_every_dtype_has_the_values_of_one_device(example: str, dtype: torch.dtype) -> None:
    want, got, _ = build_both(experiment_named(example), dtype)
    assert differing(want, got) == []


def test_a_cast_at_the_end_keeps_no_whole_model_alive() -> None:
    class Single(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.float()

    want, got, recipe = build_both(experiment_of(Single), torch.float64)
    assert differing(want, got) == []
    assert recipe.peak_bytes <= 3 * Wide.WIDTH**2 * 8


def of(fill: Callable[[nn.Module], object]) -> Experiment:
    """A model of one parameter, to which `fill` does something."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(6, 4))
            nn.init.normal_(self.weight)
            with torch.no_grad():
                fill(self)
            self.last = nn.Linear(4, 4)

    return experiment_of(Model)


def own_generator(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    model.weight.normal_(generator=generator)
    model.other = nn.Parameter(torch.rand(3, generator=generator))


def forked_stream(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.weight.uniform_()
    model.other = nn.Parameter(torch.rand(3))


def put_back(model: nn.Module) -> None:
    model.other = nn.Parameter(torch.rand(3))
    state = torch.get_rng_state()
    model.weight.uniform_()
    torch.set_rng_state(state)
    model.third = nn.Parameter(torch.rand(3))


def seeded_anew(model: nn.Module) -> None:
    for _ in range(3):
        torch.manual_seed(7)
        model.weight.add_(torch.randn(6, 4))


def by_its_own_values(model: nn.Module) -> None:
    while model.weight.max() > 1:
        model.weight.normal_()
    if model.weight.sum().item() < 100:
        model.other = nn.Parameter(torch.randn(3 if model.weight.tolist()[0][0] > 0 else 2))


def as_lists(model: nn.Module) -> None:
    model.rates = torch.linspace(0, 0.1, 3).tolist()
    model.other = nn.Parameter(torch.tensor(model.rates) + torch.from_numpy(torch.arange(3).numpy() * 2))
    model.weight[[1, 3]] = 0.5


def by_a_mask(model: nn.Module) -> None:
    model.weight[model.weight > 0.5] = 0
    model.register_buffer("where", (torch.arange(5) % 2).nonzero())
    model.other = nn.Parameter(model.weight[model.weight < 0])


def by_pointing_elsewhere(model: nn.Module) -> None:
    model.weight.data = torch.randn(4, 6).t()
    model.weight.data[0] = 2


def asking_for_the_device(model: nn.Module) -> None:
    if model.weight.is_meta or model.weight.device.type != "cpu":
        return
    model.weight.cpu().to("cpu", torch.float32).fill_(2)


def weight_norm(model: nn.Module) -> None:
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))


def looking_back(model: nn.Module) -> None:
    """Values asked for out of order: of a tensor as it was before it was changed, after it was changed."""
    before = model.weight * 2
    model.weight.mul_(3)
    if model.weight.sum() > 0:
        model.weight.add_(1)
    if before.sum() > 0:
        model.weight.add_(before)
    model.weight.add_(model.weight.max().item()).normal_(before.min().item())


def at_random(model: nn.Module) -> None:
    """Forty arbitrary operations on a few tensors that are views of each other."""
    choices = random.Random(11)
    tensors = [torch.zeros(4, 4), torch.empty(4, 4).uniform_(), model.weight.data[1:5], model.weight.data[:4].t()]
    states = [torch.get_rng_state()]
    for _ in range(40):
        a, b = choices.choice(tensors), choices.choice(tensors)
        match choices.randrange(9):
            case 0:
                a.normal_()
            case 1:
                a.copy_(b.clone())
            case 2:
                a[choices.randrange(4)].uniform_()
            case 3:
                a.add_(b * 0.5).clamp_(-9, 9)
            case 4:
                tensors.append(a @ b.t())
            case 5 if a.sum() > 0:
                b.neg_()
            case 6:
                torch.set_rng_state(choices.choice(states))
            case 7:
                states.append(torch.get_rng_state())
            case _:
                a[b > 0.5] = 0.25
    model.all = nn.ParameterList(tensor.clone() for tensor in tensors)


def narrow(model: nn.Module) -> None:
    model.half = nn.Linear(3, 3).half()


@pytest.mark.parametrize(
    "fill",
    [
        own_generator,
        forked_stream,
        put_back,
        seeded_anew,
        by_its_own_values,
        as_lists,
        by_a_mask,
        by_pointing_elsewhere,
        asking_for_the_device,
        weight_norm,
        narrow,
        looking_back,
        at_random,
    ],
    ids=lambda fill: fill.__name__,
)
def test_a_constructor_may_do(fill: Callable[[nn.Module], object]) -> None:
    want, got, _ = build_both(of(fill))
    assert differing(want, got) == []


def test_attributes_and_the_random_stream_end_as_on_one_device() -> None:
    with initial.default_dtype(torch.float32):
        want = initial.build(experiment_named("odd"), torch.float32, CPU)
    after = torch.rand(3)
    _, got, _ = build_both(experiment_named("odd"))
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(got.table, want.table)
    assert got.head.weight is got.embedding.weight


def on_meta(model: nn.Module) -> None:
    model.other = nn.Parameter(torch.randn(3, device="meta"))


def in_a_list(model: nn.Module) -> None:
    model.tables = [torch.randn(3)]


def elsewhere(model: nn.Module) -> None:
    ELSEWHERE.copy_(model.weight[0, :2])


def resized(model: nn.Module) -> None:
    model.weight.data.resize_(2, 2)


ELSEWHERE = torch.zeros(2)


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (on_meta, "reads a tensor that was made on the meta device and has no values"),
        (in_a_list, "tables holds a tensor in a list"),
        (elsewhere, r"aten.copy_.default, called at .*test_deferred.py:\d+, changes a tensor that was made elsewhere"),
        (resized, "aten.resize_.default, called at"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_built_without_storage_is_refused(fill: Callable[[nn.Module], object], words: str) -> None:
    with pytest.raises(ExperimentError, match=words) as raised:
        build_deferred(of(fill), torch.float32)
    assert "init_device='cpu'" in str(raised.value)
