"""One constant factor on every gradient, or on what is left of it by clipping (catalogue section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardproof.spec.experiment import Experiment
from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import Parallelism
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder, token_mean
from shardproof.zoo.fixtures.layouts import fully_sharded
from shardproof.zoo.fixtures.megatron import replicated, split, split_sequence
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


@bug(
    cause="grad-scale",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="huggingface/transformers #37766, #46731",
)
def ga_not_divided(setting: Setting) -> Experiment:
    """The losses of the micro-batches are added up and never divided by their number."""

    def step(step: Step) -> Tensor:
        return plain_step(step, divide=lambda _count: 1.0)

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-scale",
    layout="fsdp",
    stages="gradient",
    where="head.weight",
    source="pytorch/torchtitan #2972",
)
def pp_missing_token_divide(setting: Setting) -> Experiment:
    """The backward pass starts from the sum over tokens, and only the logged loss is divided by their number."""

    def step(step: Step) -> Tensor:
        step.optimizer.zero_grad()
        total, count = torch.zeros(()), torch.zeros(())
        for batch in step.microbatches:
            value = step.loss(step.model, batch)
            if not isinstance(value, LossSum):
                raise TypeError("this step takes a LossSum")
            value.total.backward()  # type: ignore[no-untyped-call]
            total, count = total + value.total.detach(), count + value.count
        step.optimizer.step()
        return total / count

    return decoder(setting, parallelize=fully_sharded, train_step=step, ragged=True)


@bug(
    cause="grad-scale",
    layout="tp_ddp",
    stages="gradient",
    where="head.weight",
    source="areal-project/AReaL PR #1273",
)
def pp_extra_mb_divide(setting: Setting) -> Experiment:
    """Losses are divided by the number of micro-batches twice: by the schedule, and by the engine around it."""

    def step(step: Step) -> Tensor:
        return plain_step(step, divide=lambda count: float(count * count))

    return decoder(setting, parallelize=split, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-scale",
    layout="tp_ddp",
    stages="loss",
    where="(root)",
    source="huggingface/transformers PR #45994",
)
def tp_overcount_loss(setting: Setting) -> Experiment:
    """The loss is multiplied by all ranks to undo the average over data ranks, though tp peers hold the same batch."""

    def overcounted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        replicas = dist.get_world_size(model.process_group) if isinstance(model, DistributedDataParallel) else 1
        return token_mean(model, batch) * (dist.get_world_size() / replicas)

    return decoder(setting, parallelize=split, loss=overcounted)


@bug(
    cause="grad-scale",
    layout="tp_fsdp",
    stages="gradient",
    where="fc3.*",
    source="NVIDIA/Megatron-LM #906, NovaSky-AI/SkyRL PR #1420",
)
def cp_loss_scale(setting: Setting) -> Experiment:
    """FSDP divides gradients by all ranks, though it sums them over the data ranks alone."""

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
        laid_out: Any = fully_shard(model, mesh=mesh["dp_shard"])
        laid_out.set_gradient_divide_factor(parallelism.world_size)
        return model

    return mlp(setting, parallelize=parallelize)


@bug(
    cause="grad-scale",
    layout="tp_ddp",
    stages="gradient",
    where="head.weight",
    source="ByteDance-Seed/VeOmni PR #338, deepspeedai/DeepSpeed #5248",
)
def sp_loss_scale(setting: Setting) -> Experiment:
    """The loss of a sequence-parallel group is divided by its ranks once more than its gradients are summed."""

    def step(step: Step) -> Tensor:
        return plain_step(step, divide=lambda count: float(count * step.parallelism.tp))

    return decoder(setting, parallelize=split_sequence, train_step=step)


@bug(
    cause="grad-scale",
    layout="tp_ddp",
    stages="gradient",
    where="head.weight",
    source="pytorch/pytorch #36516",
)
def ddp_divide_world_not_replicas(setting: Setting) -> Experiment:
    """DDP's communication hook sums over the replicas and divides by all ranks of the world."""

    def summed(group: dist.ProcessGroup, bucket: Any) -> Any:
        work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0] / dist.get_world_size())

    def parallelize(model: nn.Module, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        laid_out = split(model, mesh, parallelism)
        if isinstance(laid_out, DistributedDataParallel):
            # DDP refuses a hook whose annotations are text; a lambda has none.
            laid_out.register_comm_hook(mesh["dp"].get_group(), lambda group, bucket: summed(group, bucket))
        return laid_out

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="grad-norm",
    layout="ddp",
    stages=("grad-norm", "gradient"),
    where="fc3.*",
    source="allenai/allennlp PR #5426, NVIDIA/apex PR #1512",
)
def fp16_clip_scaled_grads(setting: Setting) -> Experiment:
    """Gradients are clipped while they still carry the loss scale, and divided by it afterwards."""
    scale = 1024.0

    def step(step: Step) -> Tensor:
        def clip_then_unscale(step: Step) -> None:
            nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm or 1e30)
            for parameter in step.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale

        return plain_step(step, before_update=clip_then_unscale, divide=lambda count: count / scale)

    return mlp(setting, parallelize=replicated, train_step=step, max_grad_norm=0.05)
