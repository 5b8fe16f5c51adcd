"""Training that resumes from something else than it had come to (catalogue section 13).

What a load gets wrong is done in memory, before the second step: what differs from there on was right until then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from shardproof.parallel.held import plain
from shardproof.spec.experiment import Experiment
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.mlp import mlp
from shardproof.zoo.fixtures.optimizers import decaying, momentum, schedule_of, scheduled_step
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


def _resumed(reload: Callable[[Step], None], then: Callable[[Step], Tensor] = plain_step) -> Callable[[Step], Tensor]:
    """`then`, with `reload` before the second step."""

    def step(step: Step) -> Tensor:
        if step.index == 1:
            with torch.no_grad():
                reload(step)
        return then(step)

    return step


@bug(
    cause="checkpoint",
    layout="tp_fsdp",
    stages="checkpoint",
    where="fc1.*",
    source="pytorch/pytorch #129206, PR #130760",
)
def fsdp_tp_shard_order_resumed(setting: Setting) -> Experiment:
    """Shards over both axes are put together in another order than they were cut in: rows are permuted."""

    def reload(step: Step) -> None:
        layer: Any = step.model.fc1
        dp, tp = step.mesh["dp_shard"], step.mesh["tp"]
        for tensor in (layer.weight, layer.bias):
            taken_for = DTensor.from_local(plain(tensor), tensor.device_mesh, (Shard(0), Shard(0)), run_check=False)
            rows = taken_for.full_tensor().chunk(tp.size())[tp.get_local_rank()]
            plain(tensor).copy_(rows.chunk(dp.size())[dp.get_local_rank()])

    return mlp(setting, train_step=_resumed(reload))


@bug(
    cause="checkpoint",
    layout="fsdp",
    stages="checkpoint",
    where="fc1.weight",
    source="NVIDIA/Megatron-LM PR #5714",
)
def swiglu_tp_dp_order(setting: Setting) -> Experiment:
    """A fused gate and up matrix is taken apart inside each data rank's shard, as if that held a part of both."""

    def reload(step: Step) -> None:
        layer: Any = step.model.fc1
        group = step.mesh["dp_shard"]
        shards = layer.weight.full_tensor().chunk(group.size())
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        whole = torch.cat((*gates, *ups))
        plain(layer.weight).copy_(whole.chunk(group.size())[group.get_local_rank()])

    return mlp(setting, train_step=_resumed(reload))


@bug(
    cause="checkpoint",
    layout="ddp",
    stages="checkpoint",
    where=("blocks.1.*.*", "blocks.1.*.*.*"),
    source="NVIDIA/Megatron-LM #7452 finding 12",
)
def pp_local_layer_names(setting: Setting) -> Experiment:
    """Layers are saved under their number inside a stage, and the second stage's take the first one's."""

    def reload(step: Step) -> None:
        blocks: Any = step.model.module.blocks  # type: ignore[union-attr]
        saved = {f"layers.0.{name}": tensor.clone() for name, tensor in blocks[0].state_dict().items()}
        for block in blocks:
            block.load_state_dict({name.removeprefix("layers.0."): tensor for name, tensor in saved.items()})

    return decoder(setting, train_step=_resumed(reload))


@bug(
    cause="checkpoint",
    layout="tp",
    stages="checkpoint",
    where=("fc1.*", "fc2.weight"),
    source="save_drop_nonzero_ranked_tp_shards, a mutation of ART",
)
def save_drops_tp_shards(setting: Setting) -> Experiment:
    """Only the first tensor-parallel rank saves its shards, and all of them load those."""

    def reload(step: Step) -> None:
        for parameter in step.model.parameters():
            dist.broadcast(plain(parameter), src=0)

    return mlp(setting, train_step=_resumed(reload))


@bug(
    cause="checkpoint",
    layout="fsdp",
    stages=("checkpoint", "optimizer-state"),
    where="fc*.*",
    source="KempnerInstitute/KempnerForge PR #115, huggingface/transformers #23034",
)
def momentum_not_restored(setting: Setting) -> Experiment:
    """The optimizer's state is loaded into an optimizer that has none yet, and is dropped in silence."""

    def reload(step: Step) -> None:
        step.optimizer.state.clear()

    return mlp(setting, optimizer=momentum, train_step=_resumed(reload))


@bug(
    cause="checkpoint",
    layout="fsdp",
    stages=("checkpoint", "optimizer-state"),
    where="fc*.*",
    source="huggingface/nanotron PR #37, huggingface/transformers #23034",
)
def momentum_of_rank_0(setting: Setting) -> Experiment:
    """Only rank 0 saves the optimizer's state, and all ranks load its shards."""

    def reload(step: Step) -> None:
        for state in step.optimizer.state.values():
            whole = state["momentum_buffer"].full_tensor()
            held = plain(state["momentum_buffer"])
            # Shards are cut as torch.chunk cuts, so that the first one is the longest.
            held.copy_(whole.chunk(step.parallelism.dp_shard)[0][: len(held)])

    return mlp(setting, optimizer=momentum, train_step=_resumed(reload))


@bug(
    cause="checkpoint",
    layout="ddp",
    stages=("checkpoint", "update"),
    where=("fc*.*", "(root)"),
    source="PolymathicAI/the_well #77",
    trusted=partial(mlp, optimizer=decaying, train_step=scheduled_step),
)
def sched_scaler_not_saved(setting: Setting) -> Experiment:
    """The learning rate's schedule is not saved, and training resumes with the first rate."""

    def reload(step: Step) -> None:
        schedule = schedule_of(step)
        schedule.last_epoch = 0
        for group in step.optimizer.param_groups:
            group["lr"] = group["initial_lr"]

    return mlp(setting, optimizer=decaying, train_step=_resumed(reload, scheduled_step))
