"""One constant factor on some of the gradients, copies agreeing (catalogue sections 4 and 6)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from shardproof.spec.experiment import Experiment
from shardproof.spec.parallelism import Parallelism
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import Decoder, decoder
from shardproof.zoo.fixtures.experts import Attached, mixture, split_experts, weighed
from shardproof.zoo.fixtures.megatron import (
    Column,
    Entered,
    Parts,
    Row,
    cut,
    gathered,
    replicated,
    split,
    split_sequence,
)
from shardproof.zoo.fixtures.mlp import cross_entropy, mlp
from shardproof.zoo.fixtures.steps import average, average_gradients, plain_step
from shardproof.zoo.setting import Setting


@bug(
    cause="grad-scale-subset",
    layout="tp",
    stages="gradient",
    where="blocks.1.down.bias",
    source="pytorch/torchtitan PR #4332",
)
def rowwise_bias_div(setting: Setting) -> Experiment:
    """Each rank adds bias / tp before the sum, so that the bias's gradient is divided by tp as well."""

    class DividedBias(Row):
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias / dist.get_world_size(self.group)
            return self.leave(F.linear(x, self.weight, bias), self.group)

    return decoder(setting, parallelize=partial(split, parts=Parts(row=DividedBias)))


@bug(
    cause="grad-scale-subset",
    layout="tp_ddp",
    stages="gradient",
    where="fc2.weight",
    source="pytorch #58005 as quoted in pytorch/xla #2989",
)
def double_reduce_autograd_allreduce(setting: Setting) -> Experiment:
    """Partial outputs are summed by an all-reduce whose backward sums again: all that lies before it gets x tp."""

    def again(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return differentiable.all_reduce(x, group=group)  # type: ignore[no-any-return, no-untyped-call]

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        group = mesh["tp"].get_group()
        model.fc1 = Column(model.fc1, group)
        model.fc2 = Row(model.fc2, group, leave=again)
        return replicated(model, mesh, parallelism)

    return mlp(setting, parallelize=parallelize)


@bug(
    cause="grad-scale-subset",
    layout="tp",
    stages="gradient",
    where=("blocks.1.down.weight", "blocks.1.down"),
    source="pytorch PR #175867",
)
def dtensor_extra_allreduce(setting: Setting) -> Experiment:
    """The last MLP's output leaves its DTensor with a gradient declared partial, which is summed once too often."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        def leave(x: Tensor, _group: dist.ProcessGroup) -> Tensor:
            whole = DTensor.from_local(x, mesh["tp"], (Partial(),)).redistribute(placements=(Replicate(),))
            return whole.to_local(grad_placements=(Partial(),))

        model = split(model, mesh, parallelism)
        model.blocks[1].down.leave = leave
        return model  # type: ignore[no-any-return]

    return decoder(setting, parallelize=parallelize)


@bug(
    cause="grad-scale-subset",
    layout="tp",
    stages="gradient",
    where=("norm.*", "blocks.*norm*"),
    source="EleutherAI/gpt-neox PR #1259",
)
def sp_norm_averaged(setting: Setting) -> Experiment:
    """Norm gradients of sequence slices are averaged over tp where they have to be summed."""

    def averaged_over(parameter: nn.Parameter, group: dist.ProcessGroup) -> None:
        def mean(grad: Tensor) -> Tensor:
            grad = grad.clone()
            average(grad, group)
            return grad

        parameter.register_hook(mean)  # type: ignore[no-untyped-call]

    return decoder(setting, parallelize=partial(split_sequence, sums=averaged_over))


@bug(
    cause="grad-scale-subset",
    layout="tp_ddp",
    stages="gradient",
    where=("blocks.1.down.*", "blocks.1"),
    source="modelscope/ms-swift PR #9516",
)
def cp_gather_nograd(setting: Setting) -> Experiment:
    """Sequence slices are gathered without autograd, the own one put back, and gradients averaged over all ranks.

    A gather whose backward sums what all ranks have to say of a slice would make up for the average over slices.
    """

    def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = list(gathered(x.detach(), group).chunk(dist.get_world_size(group), 1))
        parts[dist.get_rank(group)] = x
        return torch.cat(parts, 1)

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        del parallelism
        # Only the last MLP works on slices, as it looks at one token at a time.
        group = mesh["tp"].get_group()
        block = model.blocks[1]
        block.norm2 = Entered(block.norm2, cut, group)
        block.down = Entered(block.down, gather, group)
        for parameter in (*block.norm2.parameters(), *block.up.parameters(), *block.down.parameters()):
            parameter.of_slices = True
        return model  # type: ignore[no-any-return]

    def average_over_slices(step: Any) -> None:
        average_gradients(step)
        for parameter in step.model.parameters():
            if hasattr(parameter, "of_slices"):
                average(parameter.grad, step.mesh["tp"].get_group())

    return decoder(setting, parallelize=parallelize, train_step=partial(plain_step, before_update=average_over_slices))


@bug(
    cause="grad-scale-subset",
    layout="tp_ddp",
    stages="gradient",
    where="experts.*",
    source="DeepSpeed PR #5259, #6546; Megatron-LM PR #5956; pytorch #160285",
)
def expert_grad_x_ep(setting: Setting) -> Experiment:
    """Gradients of experts, which already hold the tokens of all expert-parallel ranks, are divided by dp / ep."""

    def bare(model: Any, mesh: DeviceMesh, _parallelism: Parallelism) -> nn.Module:
        return split_experts(model, mesh, Parallelism(tp=mesh["tp"].size()))

    def reduce_by_kind(step: Any) -> None:
        average_gradients(step)
        for parameter in step.model.experts.parameters():
            parameter.grad *= step.parallelism.tp

    return mixture(setting, parallelize=bare, train_step=partial(plain_step, before_update=reduce_by_kind))


def _auxiliary_times(factor: Callable[[Parallelism], float]) -> Callable[..., nn.Module]:
    """A layout of a `Mixture` whose auxiliary loss has `factor` times its gradient."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model.weight = factor(parallelism)
        return split_experts(model, mesh, parallelism)

    return parallelize


@bug(
    cause="grad-scale-subset",
    layout="ddp",
    stages="gradient",
    where="gate.weight",
    source="NVIDIA-NeMo/Automodel PR #1412; Megatron-LM #3672, PR #3769",
)
def moe_aux_div_dp(setting: Setting) -> Experiment:
    """The auxiliary loss is divided by dp, and averaged over the data ranks on top of that."""
    return mixture(setting, parallelize=_auxiliary_times(lambda parallelism: 1 / parallelism.dp))


@bug(
    cause="grad-scale-subset",
    layout="ddp",
    stages="gradient",
    where="gate.weight",
    source="NVIDIA-NeMo/Automodel PR #3359",
)
def moe_aux_x_m(setting: Setting) -> Experiment:
    """The main loss is divided by the number of micro-batches, and the auxiliary loss is not."""
    times = setting.microbatches
    return mixture(setting, parallelize=_auxiliary_times(lambda _parallelism: times), microbatches=times)


@bug(
    cause="grad-scale-subset",
    layout="tp_ddp",
    stages="gradient",
    where="gate.weight",
    source="Megatron-LM PR #5047",
)
def moe_aux_tp_dependent(setting: Setting) -> Experiment:
    """The auxiliary loss is scaled by the tokens of one tp rank as if each had a part of them."""
    return mixture(setting, parallelize=_auxiliary_times(lambda parallelism: 1 / parallelism.tp))


@bug(
    cause="grad-scale-subset",
    layout="ddp",
    stages="gradient",
    where="gate.weight",
    source="NVIDIA-NeMo/Automodel PR #1412",
)
def aux_not_attached(setting: Setting) -> Experiment:
    """What the auxiliary loss was hung onto is thrown away, so that its gradient never flows."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        attached = model.attached

        def discarded(x: Tensor) -> Tensor:
            attached(x)
            return x

        model.attached = discarded
        return replicated(model, mesh, parallelism)

    return mixture(setting, model=lambda: Attached(setting), loss=cross_entropy, parallelize=parallelize)


@bug(
    cause="grad-scale-subset",
    layout="tp",
    stages="gradient",
    where="mtp.weight",
    source="Megatron-LM #3943",
)
def mtp_loss_div_cp(setting: Setting) -> Experiment:
    """A second head, which predicts one token further, has its loss divided by the number of sequence slices."""

    def parallelize(model: Any, mesh: DeviceMesh, parallelism: Parallelism) -> nn.Module:
        model.weight = 1 / parallelism.tp
        return split(model, mesh, parallelism)

    def both(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        near, far = model(batch[0])
        further = F.cross_entropy(far[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())
        return F.cross_entropy(near.flatten(0, 1), batch[1].flatten()) + weighed(further, model.weight)

    return decoder(setting, model=lambda: _TwoHeads(setting), loss=both, parallelize=parallelize)


class _TwoHeads(Decoder):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.mtp = nn.Linear(self.head.in_features, self.head.out_features, bias=False)
        self.weight = 1.0

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.tok(tokens) + self.pos.weight
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x), self.mtp(x)
