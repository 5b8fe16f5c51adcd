"""Right code that looks like a bug: none of it may get a finding."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from shardproof.spec.experiment import Experiment
from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import control
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.layouts import bare, fully_sharded
from shardproof.zoo.fixtures.megatron import replicated, split_sequence
from shardproof.zoo.fixtures.mlp import MlpWithSpare, mlp, uneven_parts
from shardproof.zoo.fixtures.steps import average, average_gradients, plain_step, silent
from shardproof.zoo.setting import Setting


@control(layout="tp_ddp")
def sequence_parallel_by_hand(setting: Setting) -> Experiment:
    """Megatron's sequence parallelism, with every partial gradient summed."""
    return decoder(setting, parallelize=split_sequence)


@control(layout="ddp")
def no_sync_backward_only(setting: Setting) -> Experiment:
    """Only the backward pass is inside no_sync, which changes nothing: DDP arms its reducer in the forward pass."""

    def step(step: Step) -> Tensor:
        step.optimizer.zero_grad()
        count, total = len(step.microbatches), torch.zeros(())
        for m, batch in enumerate(step.microbatches):
            value: Any = step.loss(step.model, batch)
            if m == count - 1:
                (value / count).backward()
            else:
                with silent(step.model):
                    (value / count).backward()
            total += value.detach() / count
        step.optimizer.step()
        return total

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


@control(layout="ddp")
def no_sync_but_for_the_last(setting: Setting) -> Experiment:
    """All micro-batches but the last are inside no_sync, forward and backward."""
    return mlp(setting, parallelize=replicated, train_step=plain_step, microbatches=setting.microbatches)


@control(layout="hsdp")
def fsdp2_sync_on_last(setting: Setting) -> Experiment:
    """Replicas are reduced in the last micro-batch alone; what was accumulated before it goes with it."""

    def step(step: Step) -> Tensor:
        model: Any = step.model
        count = len(step.microbatches)
        # Both ways to put it off: the first micro-batch is not reduced at all, the next ones within shard groups.
        model.set_requires_gradient_sync(False)
        model.set_requires_all_reduce(False)

        def due(_step: Step, m: int) -> None:
            model.set_requires_gradient_sync(True)
            model.set_requires_all_reduce(m == count - 2)

        return plain_step(step, after_backward=due)

    return mlp(setting, parallelize=fully_sharded, train_step=step, microbatches=setting.microbatches)


@control(layout="ddp")
def unused_layer_found(setting: Setting) -> Experiment:
    """A layer that nobody calls, and a DDP that was told to look for such layers."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group(), find_unused_parameters=True)

    return mlp(setting, model=lambda: MlpWithSpare(setting), parallelize=parallelize, microbatches=setting.microbatches)


@control(layout="ddp")
def static_graph(setting: Setting) -> Experiment:
    """DDP over a graph that it was told never changes, synchronised in every micro-batch."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group(), static_graph=True)

    def step(step: Step) -> Tensor:
        return plain_step(step, syncs=lambda _m, _count: True)

    return mlp(setting, parallelize=parallelize, train_step=step, microbatches=setting.microbatches)


@control(layout="ddp")
def gradients_in_buckets(setting: Setting) -> Experiment:
    """Gradients are views into DDP's buckets, small ones, and are kept and zeroed rather than dropped."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        group = mesh["dp"].get_group()
        return DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True, bucket_cap_mb=1e-4)

    def step(step: Step) -> Tensor:
        logged = plain_step(step)
        step.optimizer.zero_grad(set_to_none=False)
        return logged

    return mlp(setting, parallelize=parallelize, train_step=step, microbatches=setting.microbatches)


@control(layout="fsdp")
def ragged_tokens(setting: Setting) -> Experiment:
    """Parts with different numbers of tokens, as sums and counts, in several micro-batches."""
    return decoder(setting, ragged=True, microbatches=setting.microbatches)


@control(layout="ddp")
def ragged_tokens_by_hand(setting: Setting) -> Experiment:
    """The tokens of all micro-batches and data ranks are counted first, and every sum is divided by them."""

    def step(step: Step) -> Tensor:
        step.optimizer.zero_grad()
        count = torch.stack([(batch[1] >= 0).sum() for batch in step.microbatches]).sum()
        dist.all_reduce(count, group=step.mesh["dp"].get_group())
        logged = torch.zeros(())
        for batch in step.microbatches:
            value = step.loss(step.model, batch)
            if not isinstance(value, LossSum):
                raise TypeError("this step takes a LossSum")
            # DDP averages over the data ranks, and the sum is wanted.
            share = value.total * step.parallelism.dp / count
            share.backward()  # type: ignore[no-untyped-call]
            logged += share.detach()
        average(logged, step.mesh["dp"].get_group())
        step.optimizer.step()
        return logged

    return decoder(setting, ragged=True, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


@control(layout="ddp")
def uneven_parts_weighted(setting: Setting) -> Experiment:
    """A batch that is cut unevenly, with every rank's mean weighted by its samples."""

    def step(step: Step) -> Tensor:
        step.optimizer.zero_grad()
        batch: Any = step.microbatches[0]
        value: Any = step.loss(step.model, batch)
        value = value * (len(batch[1]) * step.parallelism.dp / setting.batch)
        value.backward()
        step.optimizer.step()
        logged: Tensor = value.detach()
        average(logged, step.mesh["dp"].get_group())
        return logged

    return mlp(setting, batches=uneven_parts(setting), parallelize=replicated, train_step=step)


@control(layout="fsdp")
def uneven_shards(setting: Setting) -> Experiment:
    """Layers whose rows do not divide by the ranks, so that the last shards are short or empty."""
    return mlp(setting, fsdp_units=("fc3", "fc1"), microbatches=setting.microbatches)


@control(layout="ddp")
def averaged_by_hand(setting: Setting) -> Experiment:
    """A bare model, whose gradients the step averages over the data ranks itself."""

    def step(step: Step) -> Tensor:
        return plain_step(step, before_update=average_gradients)

    return mlp(setting, parallelize=bare, train_step=step, microbatches=setting.microbatches)


@control(layout="hsdp", dtype="bfloat16")
def hybrid_in_bfloat16(setting: Setting) -> Experiment:
    """Shard groups and their replicas in bfloat16, whose rounding is large and right."""
    return decoder(setting, microbatches=setting.microbatches)


@control(layout="ddp", dtype="bfloat16")
def replicas_in_bfloat16(setting: Setting) -> Experiment:
    """Data parallelism in bfloat16, with clipping."""
    return mlp(setting, microbatches=setting.microbatches, max_grad_norm=0.1)
