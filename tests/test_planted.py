"""Faults planted in a user's own parallelize, batches or train_step, each beside the right code that it is like."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from shardproof.zoo.fixtures.megatron import Column, Row, Through, copy, reduce, replicated

LENGTH, WIDTH, HEADS, HIDDEN, CLASSES = 4, 6, 2, 10, 5
"""All but the number of heads differ, so that a transposed or misplaced slice cannot fit by chance."""

SAMPLES, BATCH = 48, 12
"""A batch that 2 and 3 data ranks can cut into 1, 2 and 3 micro-batches; four batches an epoch."""

DATA_PARALLEL = ["dp_replicate=2", "dp_replicate=3"]
TENSOR_PARALLEL = ["tp=2", "tp=2,dp_replicate=2", "tp=2,dp_replicate=3"]


# The model, on one device.


class Attention(nn.Module):
    """Query, key and value in one fused matrix, as many heads as its rows hold."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, LENGTH, WIDTH) -> (batch, LENGTH, WIDTH)
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Small(nn.Module):
    """One pre-norm block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor) -> Tensor:  # (batch, LENGTH, WIDTH) -> (batch, LENGTH, CLASSES)
        x = x + self.attn(self.norm1(x))
        x = x + self.down(torch.tanh(self.up(self.norm2(x))))
        return self.head(x)


class Samples(torch.utils.data.Dataset):
    """(inputs (LENGTH, WIDTH), targets (LENGTH, CLASSES)); no two samples are alike."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(LENGTH, WIDTH, generator=generator), torch.randn(LENGTH, CLASSES, generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


PLAIN = sp.Experiment(model=Small, data=Samples(), loss=loss, optimizer=sgd, batch_size=BATCH, steps=2)


def found(experiment: sp.Experiment, strategy: str, **options: Any) -> sp.Finding:
    """The first finding; the run must not pass."""
    report = sp.check(experiment, strategies=(strategy,), **options)
    assert not report.ok, f"a planted fault was not found:\n{report}"
    assert report.first is not None
    assert report.runs[0].findings[0] == report.first
    return report.first


def passes(experiment: sp.Experiment, *strategies: str, **options: Any) -> None:
    """Right code gets no finding, and no tensor that differs."""
    report = sp.check(experiment, strategies=strategies, **options)
    assert report.first is None, str(report)
    assert report.ok, str(report)


def world(strategy: str) -> int:
    return math.prod(int(item.split("=")[1]) for item in strategy.split(","))


def everyone(strategy: str) -> tuple[int, ...]:
    return tuple(range(world(strategy)))


# Layouts written by hand: plain tensors, torch's own collectives.


def same(x: Tensor, _group: Any) -> Tensor:
    """Neither the input nor its gradient is changed: what a split layer that forgets to sum does."""
    return x


class BiasedRow(Row):
    """Each rank adds the whole bias to its partial output, before the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(x, self.weight, self.bias), self.group)


def by_hand(
    model: Small,
    mesh: Any,
    parallelism: sp.Parallelism,
    *,
    blocks: int = 3,
    enter: Through = copy,
    row: type[Row] = Row,
    leave: Through = reduce,
) -> nn.Module:
    """Right as it is; each argument plants a fault. Attention by heads, MLP by columns and rows, then DDP."""
    if parallelism.tp > 1:
        group = mesh["tp"].get_group()
        model.attn.qkv = Column(model.attn.qkv, group, blocks=blocks)
        model.attn.proj = Row(model.attn.proj, group)
        model.up = Column(model.up, group, enter=enter)
        model.down = row(model.down, group, leave=leave)
    return replicated(model, mesh, parallelism)


def planned(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    """torch's own TP for the MLP and fully_shard around everything."""
    if parallelism.tp > 1:
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp_shard"])


HAND = replace(PLAIN, parallelize=by_hand)
DDP = replace(PLAIN, parallelize=replicated)


def test_tensor_parallelism_written_by_hand_passes_with_qkv_cut_per_block():
    passes(HAND, "single", *TENSOR_PARALLEL, "dp_replicate=2")


def test_torch_layouts_in_a_users_own_parallelize_pass():
    passes(replace(PLAIN, parallelize=planned), "dp_shard=3", "tp=2,dp_shard=2", "tp=2,dp_shard=3")


# Faults of the forward pass.


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_a_bias_added_on_every_tp_rank_is_found_at_its_module(strategy: str):
    first = found(replace(HAND, parallelize=partial(by_hand, row=BiasedRow)), strategy)
    assert (first.stage, first.where, first.step) == ("forward", "down", 0)
    assert first.ranks == everyone(strategy)
    assert (first.cause, first.axis) == ("bias-counted-k-times", "tp")
    assert first.factor == pytest.approx(2)


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_a_forgotten_all_reduce_is_found_at_its_module(strategy: str):
    first = found(replace(HAND, parallelize=partial(by_hand, row=BiasedRow, leave=same)), strategy)
    assert (first.stage, first.where, first.step) == ("forward", "down", 0)
    assert first.cause == "forward-not-reduced"
    assert first.axis == "tp"


class Biasless(Small):
    """Without a bias behind the row-parallel layer, partial outputs add up to the right ones exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.down.bias = None


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_a_forgotten_all_reduce_without_a_bias_is_found_at_its_module(strategy: str):
    layout = partial(by_hand, leave=same)
    first = found(replace(HAND, model=Biasless, parallelize=layout), strategy)
    assert (first.stage, first.where, first.step) == ("forward", "down", 0)
    assert first.cause == "forward-not-reduced"
    assert first.axis == "tp"
    passes(replace(HAND, model=Biasless), strategy)


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_a_fused_qkv_cut_without_regard_to_its_blocks_is_found_in_the_attention(strategy: str):
    first = found(replace(HAND, parallelize=partial(by_hand, blocks=1)), strategy)
    # The slices tile the matrix, so weights and the projection itself say nothing; what mixes them does.
    assert (first.stage, first.where, first.step) == ("forward", "attn.proj", 0)
    assert (first.cause, first.axis) == ("layout-permuted", "tp")
    assert first.ranks == everyone(strategy)


# Faults of the backward pass.


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_a_column_layer_whose_input_gradient_is_not_summed_is_found_above_it(strategy: str):
    first = found(replace(HAND, parallelize=partial(by_hand, enter=same)), strategy)
    assert (first.stage, first.where, first.step) == ("gradient", "norm2.bias", 0)
    assert first.ranks == everyone(strategy)
    assert (first.cause, first.axis) == ("grad-not-summed", "tp")


def past_the_wrapper(model: nn.Module, batch: Any) -> Tensor:
    return loss(model.module if isinstance(model, DistributedDataParallel) else model, batch)


@pytest.mark.parametrize("strategy", [*DATA_PARALLEL, "tp=2,dp_replicate=3"])
def test_a_loss_through_ddp_module_is_found_on_every_rank(strategy: str):
    first = found(replace(HAND, loss=past_the_wrapper), strategy)
    assert (first.stage, first.where, first.step) == ("gradient", "head.bias", 0)
    assert first.ranks == everyone(strategy)
    assert first.factor is None
    assert (first.cause, first.axis) == ("grad-not-reduced", "dp_replicate")


def test_a_model_that_nobody_reduces_is_no_ddp():
    first = found(replace(PLAIN, parallelize=lambda model, mesh, parallelism: model), "dp_replicate=3")
    # Nothing is laid out otherwise for DDP; what tells is what its gradients lack.
    assert (first.cause, first.stage, first.axis) == ("grad-not-reduced", "gradient", "dp_replicate")


def summing(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    ddp = by_hand(model, mesh, parallelism)

    def total(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(mesh["dp"].get_group(), total)
    return ddp


@pytest.mark.parametrize(
    ("strategy", "axis"),
    [
        ("dp_replicate=2", "dp_replicate"),
        ("dp_replicate=3", "dp_replicate"),
        ("tp=2,dp_replicate=3", "dp_replicate"),
        # Both axes have two ranks: the factor cannot tell, and the finding must not pretend that it can.
        ("tp=2,dp_replicate=2", "dp_replicate or tp"),
    ],
)
def test_gradients_summed_instead_of_averaged_are_too_large_by_dp(strategy: str, axis: str):
    first = found(replace(PLAIN, parallelize=summing), strategy)
    assert (first.cause, first.stage, first.where, first.step) == ("grad-scale", "gradient", "head.bias", 0)
    assert first.factor == pytest.approx(int(strategy[-1]))
    assert first.axis == axis
    assert first.ranks == everyone(strategy)


def summing_shards(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    sharded = planned(model, mesh, parallelism)
    sharded.set_gradient_divide_factor(1.0)
    return sharded


@pytest.mark.parametrize("strategy", ["dp_shard=2", "tp=2,dp_shard=3"])
def test_shards_summed_instead_of_averaged_are_too_large_by_dp_shard(strategy: str):
    first = found(replace(PLAIN, parallelize=summing_shards), strategy)
    assert (first.cause, first.stage, first.step) == ("grad-scale", "gradient", 0)
    assert first.factor == pytest.approx(int(strategy[-1]))
    assert first.axis == "dp_shard"


def swapping_step(step: sp.Step) -> Tensor:
    """Each tp rank steps its rows of `up` and of the fused qkv with the gradients of its neighbour's."""
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0])
    value.backward()
    group, rank = step.mesh["tp"].get_group(), step.mesh["tp"].get_local_rank()
    for name, parameter in step.model.named_parameters():
        if name.endswith(("up.weight", "qkv.weight")):
            both = [torch.empty_like(parameter.grad) for _ in range(2)]
            dist.all_gather(both, parameter.grad, group=group)
            parameter.grad = both[1 - rank]
    step.optimizer.step()
    return value.detach()


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_gradients_swapped_between_tp_peers_are_found_though_they_tile_the_whole(strategy: str):
    first = found(replace(HAND, train_step=swapping_step), strategy)
    assert (first.stage, first.where, first.step) == ("gradient", "up.weight", 0)
    assert (first.cause, first.axis) == ("layout-permuted", "tp")
    assert first.ranks == everyone(strategy)


# Steps written by hand.


def hand_step(
    step: sp.Step,
    *,
    reduce: bool = False,
    divide: str = "before",
    keep: str = "all",
    no_sync: str = "never",
    log: str = "own",
) -> Tensor:
    """Right with its defaults, for a model that reduces by itself; each argument sets it apart."""
    step.optimizer.zero_grad()
    parts = len(step.microbatches)
    total = torch.zeros(())
    for m, batch in enumerate(step.microbatches):
        if keep == "last":
            step.optimizer.zero_grad()
        skip = m < parts - 1 and no_sync != "never" and hasattr(step.model, "no_sync")
        if skip and no_sync == "forward and backward":
            with step.model.no_sync():
                value = step.loss(step.model, batch)
                (value / parts).backward()
        else:
            value = step.loss(step.model, batch)
            scaled = value / parts if divide == "before" else value
            if skip:
                with step.model.no_sync():
                    scaled.backward()
            else:
                scaled.backward()
        total += value.detach() / parts
    for parameter in step.model.parameters():
        if divide == "after":
            parameter.grad /= parts
        if reduce:
            dist.all_reduce(parameter.grad, group=step.mesh["dp"].get_group())
            parameter.grad /= step.parallelism.dp
    step.optimizer.step()
    if log == "mean":
        dist.all_reduce(total, group=step.mesh["dp"].get_group())
        total /= step.parallelism.dp
    return total


def bare(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return model


THREE = replace(DDP, microbatches=3)


@pytest.mark.parametrize("log", ["own", "mean"])
def test_a_bare_model_reduced_by_hand_is_a_right_ddp(log: str):
    step = partial(hand_step, reduce=True, log=log)
    passes(replace(PLAIN, parallelize=bare, train_step=step, microbatches=2), *DATA_PARALLEL)


@pytest.mark.parametrize("no_sync", ["backward", "forward and backward"])
def test_no_sync_around_backward_or_around_both_is_right(no_sync: str):
    passes(replace(THREE, train_step=partial(hand_step, no_sync=no_sync)), "dp_replicate=2")


def test_dividing_by_the_micro_batches_after_the_backward_is_right():
    passes(replace(HAND, microbatches=3, train_step=partial(hand_step, divide="after")), *DATA_PARALLEL[:1], "tp=2")


@pytest.mark.parametrize("strategy", ["dp_replicate=2", "tp=2,dp_replicate=2"])
def test_a_micro_batch_loss_that_is_not_divided_is_too_large_by_their_number(strategy: str):
    first = found(replace(HAND, microbatches=3, train_step=partial(hand_step, divide="never")), strategy)
    assert (first.cause, first.stage, first.where, first.step) == ("grad-scale", "gradient", "head.bias", 0)
    assert first.factor == pytest.approx(3)
    assert first.axis == "micro-batch"
    assert first.ranks == everyone(strategy)


def test_a_gradient_of_the_last_micro_batch_only_is_found():
    first = found(replace(THREE, train_step=partial(hand_step, keep="last")), "dp_replicate=2")
    assert (first.stage, first.where, first.step) == ("gradient", "head.bias", 0)
    assert first.ranks == (0, 1)
    assert first.factor is None
    assert (first.cause, first.axis) == ("microbatch-misweighted", "micro-batch")


def sync_first(step: sp.Step) -> Tensor:
    """Synchronises the first micro-batch, and puts the others inside no_sync."""
    step.optimizer.zero_grad()
    parts = len(step.microbatches)
    total = torch.zeros(())
    for m, batch in enumerate(step.microbatches):
        if m == 0:
            value = step.loss(step.model, batch)
            (value / parts).backward()
        else:
            with step.model.no_sync():
                value = step.loss(step.model, batch)
                (value / parts).backward()
        total += value.detach() / parts
    step.optimizer.step()
    return total


def test_gradients_reduced_for_the_first_micro_batch_only_are_found():
    first = found(replace(THREE, train_step=sync_first), "dp_replicate=2")
    assert (first.stage, first.where, first.step) == ("gradient", "head.bias", 0)
    assert first.ranks == (0, 1)
    assert (first.cause, first.axis) == ("grad-partly-reduced", "micro-batch")


def clipping_step(step: sp.Step, *, over: str | None) -> Tensor:
    """Clips by the norm of what this rank holds, or of what all ranks of one axis hold together."""
    step.optimizer.zero_grad()
    value = step.loss(step.model, step.microbatches[0])
    value.backward()
    grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in step.model.parameters()]
    square = sum(grad.square().sum() for grad in grads)
    if over is not None:
        dist.all_reduce(square, group=step.mesh[over].get_group())
    scale = (step.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad *= scale
    step.optimizer.step()
    return value.detach()


CLIPPED = replace(PLAIN, parallelize=planned, max_grad_norm=0.05)


def test_clipping_by_the_norm_of_all_shards_is_right():
    passes(replace(CLIPPED, train_step=partial(clipping_step, over="dp_shard")), "dp_shard=3")


def test_clipping_by_the_norm_of_the_own_shard_is_found_after_right_gradients():
    first = found(replace(CLIPPED, train_step=partial(clipping_step, over=None)), "dp_shard=3")
    assert (first.cause, first.stage, first.where, first.step) == ("grad-norm", "grad-norm", "head.bias", 0)
    assert first.ranks == (0, 1, 2)


def test_gradients_that_were_wrong_before_a_users_clipping_are_found_as_gradients():
    step = partial(clipping_step, over="dp_shard")
    first = found(replace(CLIPPED, parallelize=summing_shards, train_step=step), "dp_shard=3")
    assert (first.cause, first.stage, first.step) == ("grad-scale", "gradient", 0)
    assert first.factor == pytest.approx(3)
    assert first.axis == "dp_shard"


# Initial weights and the optimizer.


def seeded_by_rank() -> nn.Module:
    """Everything alike but the MLP's first layer, which each rank draws for itself."""
    model = Small()
    torch.manual_seed(100 + dist.get_rank())
    model.up.reset_parameters()
    return model


@pytest.mark.parametrize(
    ("strategy", "wrong"),
    # torch's parallelize_module hands rank 0's weights to its tp peers, so that whole tp groups are right or wrong.
    [("dp_shard=2", (1,)), ("dp_shard=3", (1, 2)), ("tp=2,dp_shard=2", (2, 3)), ("tp=2,dp_shard=3", (2, 3, 4, 5))],
)
def test_weights_drawn_under_the_ranks_own_seed_are_found_before_the_first_step(strategy: str, wrong: tuple[int, ...]):
    first = found(replace(PLAIN, model=seeded_by_rank, parallelize=planned), strategy)
    assert (first.cause, first.stage, first.where) == ("initial-state", "initial-state", "up.weight")
    assert first.step == -1
    assert first.ranks == wrong


def test_ddp_broadcasts_what_each_rank_drew_for_itself():
    passes(replace(DDP, model=seeded_by_rank), *DATA_PARALLEL)


BUILT: list[nn.Parameter] = []


def remembered() -> nn.Module:
    model = Small()
    BUILT[:] = model.parameters()
    return model


def over_what_was_built(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(BUILT, lr=0.1)


STALE = replace(PLAIN, model=remembered, optimizer=over_what_was_built)


@pytest.mark.parametrize(
    ("layout", "strategy"), [(by_hand, "tp=2"), (by_hand, "tp=2,dp_replicate=3"), (planned, "dp_shard=3")]
)
def test_an_optimizer_over_parameters_from_before_the_layout_is_found(layout: Callable[..., Any], strategy: str):
    first = found(replace(STALE, parallelize=layout), strategy)
    assert (first.cause, first.stage) == ("optimizer", "optimizer-state")
    assert first.ranks == everyone(strategy)


def test_an_optimizer_over_parameters_that_the_layout_kept_is_right():
    passes(replace(STALE, parallelize=replicated), *DATA_PARALLEL)


# What was declared and what was done.


def test_fsdp_that_is_really_ddp_is_not_applied():
    first = found(replace(PLAIN, parallelize=replicated), "dp_shard=3")
    assert (first.cause, first.axis) == ("strategy-not-applied", "dp_shard")
    assert (first.stage, first.step) == ("initial-state", -1)
    assert first.ranks == (0, 1, 2)


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_tensor_parallelism_that_splits_nothing_is_not_applied(strategy: str):
    first = found(replace(PLAIN, parallelize=replicated), strategy)
    assert (first.cause, first.axis) == ("strategy-not-applied", "tp")
    assert (first.stage, first.step) == ("initial-state", -1)
    assert first.ranks == everyone(strategy)


def test_ddp_that_is_really_sharded_is_not_applied():
    def sharded(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        return fully_shard(model, mesh=mesh["dp_replicate"])

    first = found(replace(PLAIN, parallelize=sharded), "dp_replicate=3")
    assert (first.cause, first.axis) == ("strategy-not-applied", "dp_replicate")


# Loaders written by hand.


def loader(
    data: Samples,
    mesh: Any,
    parallelism: sp.Parallelism,
    *,
    cut: str = "dp",
    order: Callable[[int], list[int]] = lambda step: list(range(step * BATCH, (step + 1) * BATCH)),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right with its defaults: the samples `order(step)` of each step, cut over the data ranks."""
    if cut == "world":
        rank, size = dist.get_rank(), dist.get_world_size()
    else:
        rank, size = mesh["dp"].get_local_rank(), parallelism.dp
    for step in range(4):
        samples = order(step)
        each = len(samples) // size
        own = [0, each] if cut == "nobody" else [rank * each, (rank + 1) * each]
        inputs, targets = zip(*(data[i] for i in samples[own[0] : own[1]]), strict=True)
        yield torch.stack(inputs), torch.stack(targets)


def read(**options: Any) -> sp.Experiment:
    return replace(HAND, batches=partial(loader, **options))


ALL_LAYOUTS = ["dp_replicate=3", "tp=2", "tp=2,dp_replicate=3"]


def backwards(step: int) -> list[int]:
    return list(reversed(range(step * BATCH, (step + 1) * BATCH)))


def strided(step: int) -> list[int]:
    """As a DistributedSampler deals samples out: neighbours go to different ranks."""
    return [step * BATCH + i for start in range(3) for i in range(start, BATCH, 3)]


def shuffled(step: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randperm(SAMPLES, generator=generator)[step * BATCH : (step + 1) * BATCH].tolist()


@pytest.mark.parametrize("order", [backwards, strided, shuffled])
def test_a_permutation_within_a_batch_and_a_shuffle_of_the_users_own_are_right(order: Callable[[int], list[int]]):
    passes(read(order=order), *ALL_LAYOUTS)


@pytest.mark.parametrize("strategy", TENSOR_PARALLEL)
def test_a_loader_over_the_world_feeds_tp_peers_different_samples(strategy: str):
    first = found(read(cut="world"), strategy)
    assert (first.cause, first.stage, first.where, first.axis) == (
        "batch-differs-in-group",
        "batch",
        "batch[0]",
        "tp",
    )
    assert first.step == 0
    assert first.ranks == everyone(strategy)


def test_a_loader_over_the_world_is_right_without_tensor_parallelism():
    passes(read(cut="world"), *DATA_PARALLEL)


@pytest.mark.parametrize("strategy", [*DATA_PARALLEL, "tp=2,dp_replicate=3"])
def test_data_ranks_that_all_read_the_same_batch_are_found(strategy: str):
    first = found(read(cut="nobody"), strategy)
    assert (first.cause, first.stage, first.step) == ("batch-repeated-across-dp", "batch", 0)
    assert first.axis == "dp_replicate"
    assert first.ranks == everyone(strategy)


def one_twice(step: int) -> list[int]:
    """In the second step one sample is read again, and one is left out."""
    samples = list(range(step * BATCH, (step + 1) * BATCH))
    return samples if step == 0 else [0, *samples[1:]]


@pytest.mark.parametrize("strategy", ALL_LAYOUTS)
def test_a_sample_read_twice_while_another_is_left_out_is_found(strategy: str):
    first = found(read(order=one_twice), strategy)
    assert (first.cause, first.stage, first.step) == ("data-order", "batch", 1)
    # Data rank 0 reads it.
    assert set(first.ranks) <= ({0, 1} if "tp" in strategy else {0})
    assert 0 in first.ranks
