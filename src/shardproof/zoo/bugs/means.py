"""Means of means: parts that count equally though they hold different numbers of tokens (catalogue section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardproof.spec.experiment import Experiment
from shardproof.spec.loss import LossSum
from shardproof.train.step import Step
from shardproof.train.sync import gradient_sync
from shardproof.zoo.entry import bug
from shardproof.zoo.fixtures.decoder import decoder, token_mean
from shardproof.zoo.fixtures.megatron import replicated
from shardproof.zoo.fixtures.mlp import Mlp, mlp, sizes, uneven_parts
from shardproof.zoo.fixtures.steps import average
from shardproof.zoo.setting import Setting


def _summed_step(step: Step, divisor: Callable[[Step, list[Tensor], int], Tensor | float]) -> Tensor:
    """A step for `LossSum` in which micro-batch m is divided by `divisor(step, the counts of all, m)`.

    Its gradients are averaged over the data ranks. Right would be the tokens of all micro-batches of a mean rank.
    """
    step.optimizer.zero_grad()
    counts = [(batch[1] >= 0).sum().to(torch.float64) for batch in step.microbatches]
    last = len(counts) - 1
    total = torch.zeros(())
    for m, batch in enumerate(step.microbatches):
        with gradient_sync(step.model, m == last):
            value = step.loss(step.model, batch)
            if not isinstance(value, LossSum):
                raise TypeError("this step takes a LossSum")
            (value.total / divisor(step, counts, m)).backward()  # type: ignore[no-untyped-call]
        total += value.total.detach()
    step.optimizer.step()
    # What is logged is right: the mean over this rank's tokens.
    return total / torch.stack(counts).sum()


@bug(
    cause="mean-of-means",
    layout="ddp",
    stages=("loss", "gradient"),
    where=("(root)", "head.weight"),
    source="huggingface/transformers #34242, PrimeIntellect-ai/prime-rl PR #2562",
)
def dp_mean_of_means(setting: Setting) -> Experiment:
    """Every rank takes the mean over its own tokens, and the ranks are averaged as if they held equally many."""
    return decoder(setting, ragged=True, loss=token_mean)


@bug(
    cause="mean-of-means",
    layout="hsdp",
    stages="gradient",
    where="head.weight",
    source="huggingface/transformers #34242, vllm-project/speculators PR #942",
)
def dp_mean_of_means_hsdp(setting: Setting) -> Experiment:
    """The sum over a rank's tokens is divided by that rank's own number of them, in every shard group."""

    def step(step: Step) -> Tensor:
        return _summed_step(step, lambda _step, counts, _m: sum(counts, torch.zeros(())))

    return decoder(setting, ragged=True, train_step=step)


@bug(
    cause="mean-of-means",
    layout="fsdp",
    stages="gradient",
    where="head.weight",
    source="huggingface/transformers PR #34191, #35203",
)
def ga_mean_of_means(setting: Setting) -> Experiment:
    """Every micro-batch is divided by its own number of tokens, and the means are averaged."""

    def step(step: Step) -> Tensor:
        return _summed_step(step, lambda _step, counts, m: counts[m] * len(counts))

    return decoder(setting, ragged=True, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="mean-of-means",
    layout="hsdp",
    stages="gradient",
    where="head.weight",
    source="mosaicml/composer PR #3273",
)
def composer_token_weight(setting: Setting) -> Experiment:
    """Every micro-batch is weighted by its tokens over their mean over the ranks at that micro-batch alone."""

    def step(step: Step) -> Tensor:
        def divisor(step: Step, counts: list[Tensor], m: int) -> Tensor:
            mean = counts[m].clone()
            average(mean, step.mesh["dp"].get_group())
            return mean * len(counts)

        return _summed_step(step, divisor)

    return decoder(setting, ragged=True, train_step=step, microbatches=setting.microbatches)


@bug(
    cause="mean-of-means",
    layout="fsdp",
    stages=("loss", "gradient"),
    where=("(root)", "fc3.*"),
    source="pytorch/pytorch #185167",
)
def weighted_nll_mean(setting: Setting) -> Experiment:
    """A mean with class weights is divided by the weights on each rank, which differ, and averaged over the ranks."""
    _, _, classes = sizes(setting)
    weight = 1.0 + 3.0 * torch.arange(classes, dtype=torch.float64) / classes

    def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=weight.to(batch[0].dtype))

    return mlp(setting, loss=weighted)


@bug(
    cause="mean-of-means",
    layout="ddp",
    stages="gradient",
    where="fc3.*",
    source="pytorch/pytorch #162692, PR #163241",
)
def dtensor_mean_uneven(setting: Setting) -> Experiment:
    """A batch that is cut unevenly is averaged shard by shard, and the shards count equally."""

    def step(step: Step) -> Tensor:
        step.optimizer.zero_grad()
        batch: Any = step.microbatches[0]
        value: Any = step.loss(step.model, batch)
        value.backward()
        step.optimizer.step()
        # What is logged is right: the mean over all samples.
        logged: Tensor = value.detach() * (len(batch[1]) * step.parallelism.dp / setting.batch)
        average(logged, step.mesh["dp"].get_group())
        return logged

    return mlp(setting, batches=uneven_parts(setting), parallelize=replicated, train_step=step)


class _TwoHeads(Mlp):
    """An `Mlp` with a second head, which is trained on some of the samples."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        _, hidden, classes = sizes(setting)
        self.extra = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = torch.tanh(self.fc2(torch.tanh(self.fc1(x))))
        return self.fc3(hidden), self.extra(hidden)


@bug(
    cause="mean-of-means",
    layout="ddp",
    stages=("loss", "gradient"),
    where=("(root)", "extra.*"),
    source="NVIDIA/Megatron-LM #7452 (finding 3)",
)
def mtp_per_token(setting: Setting) -> Experiment:
    """The loss of a second head is averaged over the samples in its own mask on each rank, and then over the ranks."""

    def both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        main, extra = model(batch[0])
        mask = (batch[0][:, 0] > 0).to(extra.dtype)
        masked = (F.cross_entropy(extra, batch[1], reduction="none") * mask).sum() / mask.sum().clamp(min=1)
        return F.cross_entropy(main, batch[1]) + masked

    return mlp(setting, model=lambda: _TwoHeads(setting), loss=both)
