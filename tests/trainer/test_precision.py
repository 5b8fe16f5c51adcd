"""What is computed, reduced and kept in which precision, and float16's loss scale, under every strategy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from stack import RANKS, STRATEGIES, among, experiment, loop, loss, samples, world
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import shardproof as sp
from shardproof.errors import UsageError
from shardproof.parallel.collectives import NAMESPACES, NOT_COLLECTIVE, _ranks
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.strategies import parse
from shardproof.train.scaling import LARGEST, LossScaler

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHARDED = ("fsdp", "hsdp", "tp_fsdp", "fsdp1")
POISONED = 10
"""A sample of the second batch: its inputs are beyond float16."""


class Sent(TorchDispatchMode):
    """Names of the collectives inside, with the dtypes of what is sent and the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if getattr(func, "namespace", "") in NAMESPACES:
            name = func._schema.name.split("::")[1].strip("_")
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.numel() and name not in NOT_COLLECTIVE:
                    self.seen.add((name, str(leaf.dtype), _ranks(func, args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def poisoned() -> TensorDataset:
    inputs, labels = samples().tensors
    inputs[POISONED] = 1e6
    return TensorDataset(inputs, labels)


class Diary(sp.Callback):
    """What each step did: whether it moved a weight, and the scale and the learning rate after it."""

    def __init__(self) -> None:
        self.steps: list[tuple[bool, float, float]] = []

    def step_start(self, loop: Any) -> None:
        self._before = [held.local(held.leaf).detach().clone() for held in loop.parameters]

    def step_end(self, loop: Any) -> None:
        moved = any(
            not torch.equal(held.local(held.leaf), before)
            for held, before in zip(loop.parameters, self._before, strict=True)
        )
        rate = loop.optimizer.param_groups[0]["lr"]
        self.steps.append((moved, loop.scaler.scale, rate))


def own_step(step: Any) -> Tensor:
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0])
    value.backward()
    step.optimizer.step()
    return value.detach()


class OnRanks:
    def kinds(self, place: Place, strategy: str, precision: str, gathered: bool) -> Any:
        """Dtypes of parameters, gradients, of gradients between two micro-batches, of states, and what was sent."""
        between = set()

        def watched(model: nn.Module, batch: Any) -> Tensor:
            between.update(str(p.grad.dtype) for p in model.parameters() if p.grad is not None)
            return loss(model, batch)

        with world(place, strategy):
            about = experiment(loss=watched, microbatches=2, max_grad_norm=0.3)
            low = precision if gathered else None
            trained = loop(place, about, strategy, precision=precision, gather_precision=low)
            with Sent() as sent:
                losses = trained.fit().losses
            leaves = [held.leaf for held in trained.parameters]
            parameters = {str(leaf.dtype) for leaf in leaves}
            gradients = {str(leaf.grad.dtype) for leaf in leaves if leaf.grad is not None}
            states = {str(leaf.dtype) for leaf in tree_leaves(dict(trained.optimizer.state)) if torch.is_tensor(leaf)}
        return parameters, gradients, between, states, sent.seen, losses

    def overflow(self, place: Place, strategy: str) -> Any:
        """Two epochs with a sample that overflows in the second batch of each."""
        diary = Diary()
        with world(place, strategy):
            trained = loop(
                place,
                experiment(data=poisoned(), microbatches=2 if strategy == "single" else 1),
                strategy,
                precision="fp16",
                max_duration="2ep",
                shuffle=False,
                callbacks=diary,
                check_every=1,
                scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            )
            trained.scaler.growth_interval = 3
            losses = trained.fit().losses
            state = trained.state_dict()
        return losses, diary.steps, None if state is None else sum(float(t.double().sum()) for t in state.values())

    def unscale(self, place: Place, guilty: int, value: float) -> Any:
        """Gradients of four ranks, of which one holds one number that is not finite, or no gradient at all."""
        with place.world("unscale", RANKS):
            gradients = [torch.full((3,), 8.0), torch.full((0,), 1.0)]
            if dist.get_rank() == guilty:
                gradients[0][1] = value
            if dist.get_rank() == (guilty + 1) % RANKS:
                gradients = []
            scaler = LossScaler(scale=4.0)
            finite = scaler.unscale_(gradients, torch.device("cpu"))
            scaler.update()
            return finite, scaler.skipped, scaler.scale, gradients[0][0].item() if gradients else None

    def own(self, place: Place, precision: str) -> Any:
        """Dtype of what the model returns inside a user's own step, of gradients, and whether anything scales."""
        computed = []

        def watched(model: nn.Module, batch: Any) -> Tensor:
            logits = model(batch[0])
            computed.append(str(logits.dtype))
            return torch.nn.functional.cross_entropy(logits.float(), batch[1])

        with world(place, "ddp"):
            trained = loop(place, experiment(loss=watched, train_step=own_step), "ddp", precision=precision)
            trained.fit()
            gradients = {str(held.leaf.grad.dtype) for held in trained.parameters}
        return set(computed), gradients, trained.scaler is None


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(RANKS, OnRanks()) as started:
        yield started


@pytest.mark.parametrize(
    ("strategy", "precision"), [*((strategy, "bf16") for strategy in STRATEGIES), ("ddp", "fp16"), ("tp_fsdp", "fp16")]
)
def test_weights_gradients_states_and_their_reductions_are_float32(ranks: Ranks, strategy: str, precision: str) -> None:
    parallelism = parse(strategy, RANKS)
    for rank, (*kept, sent, _) in ranks.call("kinds", strategy, precision, False, ranks=among(strategy)).items():
        # fully_shard keeps what it adds up between two micro-batches to itself.
        assert set.union(*kept) == {"torch.float32"}, rank
        peers = {peer for peer in range(RANKS) if peer // parallelism.tp == rank // parallelism.tp}
        low = {(name, group) for name, dtype, group in sent if dtype == str(HALF[precision])}
        # Nothing but the activations that tensor-parallel peers hand each other.
        assert {group for _, group in low} == ({tuple(sorted(peers))} if parallelism.tp > 1 else set())


@pytest.mark.parametrize("strategy", SHARDED)
def test_parameters_are_gathered_in_low_precision_and_gradients_reduced_in_float32(ranks: Ranks, strategy: str) -> None:
    parallelism = parse(strategy, RANKS)
    told = ranks.call("kinds", strategy, "bf16", True, ranks=among(strategy))
    for *kept, sent, losses in told.values():
        assert set.union(*kept) == {"torch.float32"}
        gathers = {dtype for name, dtype, _ in sent if name.startswith("allgather")}
        scatters = {dtype for name, dtype, _ in sent if name.startswith("reduce_scatter")}
        assert gathers == {"torch.bfloat16"}
        assert scatters == {"torch.float32"}
        low = {len(group) for name, dtype, group in sent if "reduce" in name and dtype == "torch.bfloat16"}
        assert low <= {parallelism.tp} - {1}, "but for activations, nothing is summed in bfloat16"
        assert losses[-1] < losses[0]


def test_a_precision_of_gathers_that_layers_could_not_work_with_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gather_precision='bf16' with precision='fp32'.*give precision='bf16'"):
        sp.Training(gather_precision="bf16")
    with pytest.raises(UsageError, match="gather_precision='fp16' with precision='bf16'"):
        sp.Training(gather_precision="fp16", precision="bf16")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp", "tp_fsdp", "fsdp1"])
def test_an_overflow_is_skipped_by_all_ranks_and_training_goes_on_as_on_one_device(ranks: Ranks, strategy: str) -> None:
    wanted, diary, total = ranks.call("overflow", "single", ranks=[0])[0]
    first = 2.0**16
    # The second and the sixth of eight steps overflow; after three good ones in a row the scale grows.
    assert [moved for moved, _, _ in diary] == [True, False, True, True, True, False, True, True]
    assert [scale / first for _, scale, _ in diary] == [1, 0.5, 0.5, 0.5, 1, 0.5, 0.5, 0.5]
    assert [rate / 1e-2 for _, _, rate in diary] == [0.5**n for n in (1, 1, 2, 3, 4, 4, 5, 6)]
    for rank, (losses, steps, got) in ranks.call("overflow", strategy, ranks=among(strategy)).items():
        assert steps == diary, rank
        for step, (ours, theirs) in enumerate(zip(losses, wanted, strict=True)):
            # float16 rounds logits of about 1 by 2**-11; both losses are means of eight that were rounded so.
            assert abs(ours - theirs) <= 2**-11 or step in (1, 5), (rank, step)
        if got is not None:
            assert got == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_overflow_of_one_rank_is_everybodys(ranks: Ranks, value: float) -> None:
    told = ranks.call("unscale", 2, value)
    assert {(finite, skipped, scale) for finite, skipped, scale, _ in told.values()} == {(False, True, 2.0)}


def test_without_an_overflow_all_go_on(ranks: Ranks) -> None:
    told = ranks.call("unscale", 2, 8.0)
    assert [told[rank] for rank in range(RANKS)] == [
        (True, False, 4.0, 2.0 if rank != 3 else None) for rank in range(4)
    ]


def test_the_scale_grows_after_many_good_steps_and_never_beyond_float32() -> None:
    scaler = LossScaler(scale=LARGEST / 2, growth_interval=2)
    scales = []
    for _ in range(6):
        scaler.update()
        scales.append(scaler.scale / LARGEST)
    assert scales == [0.5, 1, 1, 1, 1, 1]
    assert torch.isfinite(torch.tensor(scaler.scale))


def test_an_overflow_starts_the_count_of_good_steps_again() -> None:
    scaler = LossScaler(scale=8.0, growth_interval=2)
    scales = []
    for scaler.skipped in (False, True, False, False):
        scaler.update()
        scales.append(scaler.scale)
    assert scales == [8, 4, 4, 8]


@pytest.mark.parametrize("precision", HALF)
def test_a_step_of_the_users_own_gets_a_loss_under_autocast_and_no_scale(ranks: Ranks, precision: str) -> None:
    for computed, gradients, unscaled in ranks.call("own", precision).values():
        assert computed == {str(HALF[precision])}
        assert gradients == {"torch.float32"}
        assert unscaled
