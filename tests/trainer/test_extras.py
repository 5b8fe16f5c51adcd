"""Activation checkpointing, compilation, models without storage, and replicas held against each other on the way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from stack import RANKS, Stack, among, experiment, loop, loss, samples, world
from torch import Tensor, nn

import shardproof as sp
from shardproof.errors import InvariantError, PatternError, RankFailed, UsageError
from shardproof.parallel.held import plain
from shardproof.ranks import Place, Ranks, start


class Tied(nn.Module):
    """Two names of one matrix, statistics that each rank keeps for itself, and a parameter that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.wide = nn.Linear(4, 8)
        self.narrow = nn.Linear(8, 4)
        self.out = nn.Linear(4, 4, bias=False)
        self.out.weight = self.into.weight
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.narrow(self.wide(self.norm(self.into(x)) * self.scale)))


class Moves(sp.Callback):
    """Changes one number of one weight on one rank after a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self.last = 0

    def step_start(self, loop: Any) -> None:
        self.last = loop.progress.step
        if (loop.rank, loop.progress.step) == (self.rank, self.step):
            weight = next(held for held in loop.parameters if held.name == "head.weight")
            with torch.no_grad():
                plain(weight.leaf).view(-1)[0] += 1e-9


class OnRanks:
    def train(self, place: Place, strategy: str, training: dict[str, Any]) -> Any:
        """Losses, names of the state, what autograd kept in the second step, and names that an optimizer saw."""
        seen: list[str] = []
        kept = [0]

        def optimizer(model: nn.Module) -> torch.optim.Optimizer:
            seen.extend(name for name, _ in model.named_parameters())
            return torch.optim.AdamW(model.parameters(), lr=1e-2)

        def count(tensor: Tensor) -> Tensor:
            kept[0] += plain(tensor).numel()
            return tensor

        def watched(model: nn.Module, batch: Any) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                return loss(model, batch)

        about = experiment(model=partial(Stack, 0.5), optimizer=optimizer, loss=watched)
        with world(place, strategy):
            trained = loop(place, about, strategy, **training)
            losses = trained.fit().losses
            state = trained.state_dict()
        return losses, None if state is None else list(state), kept[0], seen

    def refused(self, place: Place, patterns: Any, units: tuple[str, ...]) -> str:
        with world(place, "single"), contextlib.suppress(UsageError):
            try:
                loop(place, experiment(fsdp_units=units), "single", activation_checkpointing=patterns)
            except PatternError as error:
                return f"PatternError: {error}"
            except UsageError as error:
                return f"UsageError: {error}"
        return ""

    def compiled(self, place: Place, strategy: str, again: bool) -> Any:
        """Whether the trained blocks were compiled by the backend that stands in for the real one, and the run."""
        graphs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(len(inputs))
            return graph.forward

        usual = torch.compile
        torch.compile = partial(usual, backend=backend)
        try:
            # The compiler looks at attributes of which torch itself warns.
            with warnings.catch_warnings(action="ignore"):
                told = self.train(
                    place, strategy, {"compile": True, "activation_checkpointing": again, "eval_data": samples(5)}
                )
        finally:
            torch.compile = usual
            torch._dynamo.reset()
        return len(graphs), *told

    def watch(self, place: Place, strategy: str, action: str) -> Any:
        """The step after which a run that is checked every second step ended, and what it said."""
        mover = Moves(rank=1, step=2)
        with world(place, strategy), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trained = loop(
                place, experiment(), strategy, check_every=2, check_action=action, callbacks=mover,
                max_duration="6ba",
            )  # fmt: skip
            try:
                trained.fit()
            except InvariantError as error:
                return trained.progress.step, str(error)
        return trained.progress.step, "".join(str(warning.message) for warning in said)

    def alarms(self, place: Place, strategy: str, precision: str) -> Any:
        about = experiment(
            model=Tied,
            tp_plan={"wide": "colwise", "narrow": "rowwise"},
            fsdp_units=(),
            microbatches=1 if strategy == "single" else 2,
            batch_size=16,
            loss=lambda model, batch: model(batch[0]).float().square().mean(),
        )
        with world(place, strategy):
            trained = loop(place, about, strategy, check_every=1, precision=precision)
            return trained.fit().step


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(RANKS, OnRanks()) as started:
        yield started


_plain: dict[str, Any] = {}


def plainly(ranks: Ranks, strategy: str) -> Any:
    """The run without any extras."""
    if strategy not in _plain:
        _plain[strategy] = ranks.call("train", strategy, {}, ranks=among(strategy))
    return _plain[strategy]


@pytest.mark.parametrize(
    ("strategy", "patterns"),
    [("ddp", True), ("fsdp@2", True), ("tp_fsdp", True), ("fsdp1@2", True), ("tp_fsdp", ("blocks.*.up", "head"))],
)
def test_activations_computed_again_change_no_bit(ranks: Ranks, strategy: str, patterns: Any) -> None:
    """With dropout, which must draw the same again."""
    names = list(Stack().state_dict())
    kept = plainly(ranks, strategy)
    again = ranks.call("train", strategy, {"activation_checkpointing": patterns}, ranks=among(strategy))
    for rank in kept:
        losses, state, size, seen = again[rank]
        assert losses == kept[rank][0], rank
        assert state in (names, None)
        assert seen == names
        if patterns is True:
            assert size < kept[rank][2], "nothing was saved"


@pytest.mark.parametrize(
    ("patterns", "units", "says"),
    [
        (
            ("block.*",),
            (),
            "PatternError: activation_checkpointing: 'block.*' matches no module of the model; near names",
        ),
        (True, (), "UsageError: activation_checkpointing=True checkpoints Experiment.fsdp_units, and there are none"),
        ("blocks.*", (), "UsageError: activation_checkpointing is the text 'blocks.*'; write the tuple ('blocks.*',)"),
    ],
)
def test_modules_that_are_not_there_cannot_be_checkpointed(
    ranks: Ranks, patterns: Any, units: tuple[str, ...], says: str
) -> None:
    assert ranks.call("refused", patterns, units, ranks=[0])[0].startswith(says)


@pytest.mark.parametrize("strategy", ["ddp", "tp_fsdp", "fsdp1@2"])
@pytest.mark.parametrize("again", [False, True])
def test_compiled_units_keep_their_names_and_compute_the_same(ranks: Ranks, strategy: str, again: bool) -> None:
    names = list(Stack().state_dict())
    alone = plainly(ranks, strategy)
    for rank, (graphs, losses, state, _, seen) in ranks.call(
        "compiled", strategy, again, ranks=among(strategy)
    ).items():
        assert graphs, "something was compiled"
        # DDP orders its buckets by when gradients arrive, which compiling changes: sums are taken in another order.
        rounding = 1e-14 if strategy == "ddp" else 0
        assert losses == pytest.approx(alone[rank][0], rel=rounding, abs=0), rank
        assert state in (names, None)
        assert seen == names


@pytest.mark.parametrize("strategy", ["ddp", "fsdp@2", "tp_fsdp", "fsdp1@2"])
def test_a_model_built_without_storage_trains_bit_by_bit_as_any_other(ranks: Ranks, strategy: str) -> None:
    alone = plainly(ranks, strategy)
    deferred = ranks.call("train", strategy, {"init_device": "meta"}, ranks=among(strategy))
    assert [told[0] for told in deferred.values()] == [told[0] for told in alone.values()]


@pytest.mark.parametrize(("strategy", "axis"), [("ddp", "dp_replicate"), ("tp", "tp"), ("tp_fsdp", "tp")])
def test_a_replica_that_moved_ends_the_run_on_all_ranks(ranks: Ranks, strategy: str, axis: str) -> None:
    told = ranks.call("watch", strategy, "stop", ranks=among(strategy))
    assert len(set(told.values())) == 1
    step, said = told[0]
    assert step == 4, "moved before the third step, looked at after the fourth"
    assert f"weight of head.weight differs along {axis}" in said


def test_a_warning_lets_the_run_go_on(ranks: Ranks) -> None:
    told = ranks.call("watch", "ddp", "warn")
    assert {step for step, _ in told.values()} == {6}
    assert [told[rank][1].count("after step") for rank in range(RANKS)] == [2, 0, 0, 0], "rank 0 speaks for all"
    assert "after step 4: ranks that should hold the same do not" in told[0][1]


@pytest.mark.parametrize(
    ("strategy", "precision"), [("ddp", "fp16"), ("fsdp", "fp64"), ("tp_fsdp", "fp16"), ("fsdp1", "fp64")]
)
def test_tied_frozen_and_normalising_layers_raise_no_alarm(ranks: Ranks, strategy: str, precision: str) -> None:
    assert set(ranks.call("alarms", strategy, precision, ranks=among(strategy)).values()) == {4}


def test_replicas_that_differ_are_no_failure_of_a_rank() -> None:
    with (
        sp.Trainer(
            experiment(), "ddp", ranks=2, fork=True, max_duration="4ba", check_every=1, callbacks=Moves(1, 1),
            precision="fp64", progress_bar=False,
        ) as trainer,
        pytest.raises(InvariantError, match=r"weight of head\.weight differs along dp_replicate") as caught,
    ):  # fmt: skip
        trainer.fit()
    assert caught.value.exit_code == 1
    assert {violation.name for violation in caught.value.violations} == {"head.weight"}
    assert not isinstance(caught.value, RankFailed)
