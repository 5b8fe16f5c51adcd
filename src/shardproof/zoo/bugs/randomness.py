"""Random draws that are alike where they must differ, or differ where they must be alike (catalogue section 12)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardproof.spec.experiment import Experiment
from shardproof.train.step import Step
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.mlp import Mlp, mlp
from shardproof.zoo.fixtures.steps import plain_step
from shardproof.zoo.setting import Setting


class _Dropped(Mlp):
    """The perceptron with dropout where every tensor-parallel rank holds all features."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:  # (batch, inputs) -> (batch, classes)
        return self.fc3(self.drop(torch.tanh(self.fc2(torch.tanh(self.fc1(x))))))  # type: ignore[no-any-return]


def _dropped(setting: Setting, **changes: Any) -> Experiment:
    return mlp(setting, model=lambda: _Dropped(setting), **changes)


@bug(
    cause="rng",
    layout="ddp",
    stages="forward",
    where="drop",
    source="huggingface/transformers #31412, huggingface/accelerate #114",
)
def dp_same_dropout(setting: Setting) -> Experiment:
    """All data ranks draw their dropout masks under the same seed."""

    def step(step: Step) -> Tensor:
        torch.manual_seed(setting.seed + step.index)
        return plain_step(step)

    return _dropped(setting, train_step=step)


@bug(
    cause="rng",
    layout="tp",
    stages="forward",
    where="drop",
    source="awslabs/slapo #21, tenstorrent/tt-metal #55947",
)
def tp_rank_seeded_dropout(setting: Setting) -> Experiment:
    """Tensor-parallel ranks drop different features of an activation that they all hold, as each has its own seed."""

    def step(step: Step) -> Tensor:
        # Rank 0 goes on with the stream that it has, as it would where each rank's seed is its number added to one.
        if dist.get_rank():
            torch.manual_seed(1000 * step.index + dist.get_rank())
        return plain_step(step)

    return _dropped(setting, train_step=step)


@bug(
    cause="rng",
    layout="ddp",
    stages="forward",
    where="drop",
    source="NVIDIA/Megatron-LM PR #6858",
)
def rng_not_restored_per_rank(setting: Setting) -> Experiment:
    """Only rank 0's random state was saved, so that all data ranks resume on its stream."""

    def step(step: Step) -> Tensor:
        if step.index == 1:
            saved = torch.get_rng_state()
            dist.broadcast(saved, src=0)
            torch.set_rng_state(saved)
        return plain_step(step)

    return _dropped(setting, train_step=step)
