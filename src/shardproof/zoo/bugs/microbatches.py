"""Micro-batches that are lost, or count too much or too little, on all ranks alike (catalogue section 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shardproof.parallel.held import plain
from shardproof.spec.experiment import Experiment
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.layouts import fully_sharded, split_alone
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.steps import plain_step, silent
from shardproof.zoo.setting import Setting


def _multiply(step: Step, factor: float, only: str = "") -> None:
    """Multiply every gradient in place, of parameters whose name holds `only`."""
    for name, parameter in step.model.named_parameters():
        if parameter.grad is not None and only in name:
            plain(parameter.grad).mul_(factor)


@bug(
    cause="microbatch-misweighted",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="allenai/open-instruct PR #1498, deepspeedai/DeepSpeed PR #7981",
)
def last_mb_only(setting: Setting) -> Experiment:
    """Every backward pass is taken for the first of a window and overwrites what was accumulated."""

    def step(step: Step) -> Tensor:
        def overwritten(step: Step, m: int) -> None:
            if m < len(step.microbatches) - 1:
                _multiply(step, 0)

        return plain_step(step, after_backward=overwritten)

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


def _last_mb_unsynced(turn: Callable[[FSDPModule, bool], None]) -> Callable[[Step], Tensor]:
    """A step in which `turn(model, on)` is off in the last micro-batch, instead of in all others."""

    def step(step: Step) -> Tensor:
        model: Any = step.model
        count = len(step.microbatches)
        turn(model, count > 1)
        return plain_step(step, after_backward=lambda _step, m: turn(model, m != count - 2))

    return step


@bug(
    cause="microbatch-misweighted",
    layout="fsdp",
    stages="gradient",
    where="fc3.*",
    source="modelscope/FunASR PR #3472 (the same mistake under DDP)",
)
def fsdp2_sync_off_on_last(setting: Setting) -> Experiment:
    """FSDP2's gradient sync is off in the last micro-batch, which never reaches the sharded gradient."""
    step = _last_mb_unsynced(lambda model, on: model.set_requires_gradient_sync(on))
    return mlp(setting, parallelize=fully_sharded, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="microbatch-misweighted",
    layout="hsdp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch PR #125484",
)
def hsdp_all_reduce_off_on_last(setting: Setting) -> Experiment:
    """HSDP's all-reduce over the replicas is off in the last micro-batch, which stays in a buffer of partial sums."""
    step = _last_mb_unsynced(lambda model, on: model.set_requires_all_reduce(on))
    return mlp(setting, parallelize=fully_sharded, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="microbatch-misweighted",
    layout="fsdp",
    stages="gradient",
    where="fc1.*",
    source="NVIDIA-NeMo/Automodel PR #3530",
)
def pp_reinit_wipes_grads(setting: Setting) -> Experiment:
    """The first stage is set up again before the last micro-batch, which wipes its gradients."""

    def step(step: Step) -> Tensor:
        def wiped(step: Step, m: int) -> None:
            if m == len(step.microbatches) - 2:
                _multiply(step, 0, only="fc1")

        return plain_step(step, after_backward=wiped)

    return mlp(setting, parallelize=fully_sharded, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="microbatch-misweighted",
    layout="fsdp",
    stages="gradient",
    where="fc2.*",
    source="NVIDIA/Megatron-LM #6660",
)
def grad_buffer_doubling(setting: Setting) -> Experiment:
    """The reduction of some gradients adds the buffer to itself, so that micro-batch m counts 2^(M-1-m) times."""

    def step(step: Step) -> Tensor:
        def doubled(step: Step, m: int) -> None:
            if m < len(step.microbatches) - 1:
                _multiply(step, 2, only="fc2")

        return plain_step(step, after_backward=doubled)

    return mlp(setting, parallelize=fully_sharded, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="microbatch-misweighted",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/torchtitan #1733, PR #1732",
)
def pp_scale_grads_ema(setting: Setting) -> Experiment:
    """The accumulated gradient is divided by the number of micro-batches after each of them, not once."""

    def step(step: Step) -> Tensor:
        def divided(step: Step, m: int) -> None:
            del m
            _multiply(step, 1 / len(step.microbatches))

        return plain_step(step, after_backward=divided, divide=lambda _count: 1.0)

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-scale",
    layout="fsdp",
    stages="gradient",
    where="fc3.*",
    source="Lightning-AI/pytorch-lightning #19987",
)
def ga_tail_window(setting: Setting) -> Experiment:
    """The short window at the end of an epoch is divided by the full number of micro-batches."""

    # Every step of a check has as many micro-batches, so the last one stands for a window that lacks one.
    def step(step: Step) -> Tensor:
        return plain_step(step, divide=lambda count: float(count + (step.index == 2)))

    return mlp(setting, parallelize=fully_sharded, train_step=step, microbatches=setting.microbatches, steps=3)


@bug(
    cause="microbatch-misweighted",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="tracel-ai/burn #5695",
)
def ga_tail_dropped(setting: Setting) -> Experiment:
    """The last micro-batch is read and its loss is logged, but no update ever holds its gradient."""

    def step(step: Step) -> Tensor:
        step.optimizer.zero_grad()
        count, total = len(step.microbatches), torch.zeros(())
        for m, batch in enumerate(step.microbatches):
            if m == count - 2:
                value = step.loss(step.model, batch)
            else:
                with silent(step.model):
                    value = step.loss(step.model, batch)
            if not isinstance(value, Tensor):
                raise TypeError("this step takes a mean loss")
            if m <= count - 2:
                (value / count).backward()  # type: ignore[no-untyped-call]
            total += value.detach() / count
        step.optimizer.step()
        return total

    return mlp(setting, parallelize=replicated, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="grad-norm",
    layout="ddp",
    stages=("grad-norm", "gradient"),
    where="fc3.*",
    source="facebookresearch/lingua PR #59, huggingface/accelerate #641",
)
def clip_per_micro_batch(setting: Setting) -> Experiment:
    """The gradient is clipped after every micro-batch, each time as far as it has been accumulated."""

    def step(step: Step) -> Tensor:
        def clipped(step: Step, m: int) -> None:
            del m
            nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm or 1e30)

        # Synchronised every time, so that all ranks clip alike.
        return plain_step(step, after_backward=clipped, syncs=lambda _m, _count: True)

    microbatches = setting.microbatches
    return mlp(setting, parallelize=replicated, train_step=step, microbatches=microbatches, max_grad_norm=0.05)


@bug(
    cause="microbatch-misweighted",
    layout="tp_ddp",
    stages="gradient",
    where="head.weight",
    source="hpcaitech/ColossalAI #247",
)
def zero_ga_multi_reduce(setting: Setting) -> Experiment:
    """What was summed over the data ranks is summed again after every further micro-batch."""

    def step(step: Step) -> Tensor:
        def summed(step: Step, m: int) -> None:
            del m
            for parameter in step.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=step.mesh["dp"].get_group())

        ranks = step.parallelism.dp
        return plain_step(step, after_backward=summed, divide=lambda count: float(ranks * count))

    return decoder(setting, parallelize=split_alone, train_step=step, microbatches=setting.microbatches)
