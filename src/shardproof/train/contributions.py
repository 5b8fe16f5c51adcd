"""What each micro-batch of each data rank contributes to a step's gradients, computed one by one on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.parallel.data import cast
from shardproof.parallel.initial import default_dtype
from shardproof.parallel.names import canonical_buffers
from shardproof.parallel.seeding import seed_everything
from shardproof.spec.experiment import Batch
from shardproof.spec.loss import LossSum
from shardproof.trace.file import Trace
from shardproof.train.run import TracedRun
from shardproof.train.step import checked


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """The mean loss of one part of the batch, and its gradients."""

    reader: int
    """The rank that read it; the first of its tensor-parallel group where all of them did."""
    microbatch: int
    count: float
    """Tokens (or whatever the loss counts), or samples."""
    loss: float
    gradients: Mapping[str, Tensor]
    """Canonical parameter name -> gradient of the part's mean loss, on the CPU in float64."""


Part = tuple[int, int, int, Batch]
"""Reader, micro-batch, samples, batch."""


def contributions(
    run: TracedRun, trace: Trace, step: int, parts: Sequence[Part], data_rank: Callable[[int], int]
) -> list[Contribution]:
    """One per part, with the weights that `trace` (a run on one device) shows before step `step`.

    `run` is built on one device and not trained; `data_rank` maps a reader to its index on the data axes.
    """
    found = []
    with default_dtype(run.dtype):
        for reader, microbatch, samples, batch in parts:
            restore(run, trace, step)
            seed_everything(run.experiment.seed, step + 1, data_rank(reader))
            run.optimizer.zero_grad(set_to_none=True)
            batch = cast(batch, run.settings.dtype, run.settings.device)
            loss = run.experiment.loss(run.template.model, cast(batch, run.dtype, run.settings.device))
            value, count = checked(loss), float(samples)
            if isinstance(loss, LossSum):
                count = float(torch.as_tensor(loss.count))
                value = value / max(count, 1.0)
            value.backward()  # type: ignore[no-untyped-call]
            found.append(
                Contribution(
                    reader=reader,
                    microbatch=microbatch,
                    count=count,
                    loss=float(value.detach()),
                    gradients={
                        held.name: held.leaf.grad.detach().to("cpu", torch.float64)
                        for held in run.parameters
                        if held.leaf.grad is not None
                    },
                )
            )
    return found


def restore(run: TracedRun, trace: Trace, step: int) -> None:
    """Give a model on one device the weights and buffers that `trace` shows before step `step`."""
    values = dict(_before(trace, step))
    with torch.no_grad():
        for held in run.parameters:
            if held.name in values:
                held.leaf.copy_(_like(values[held.name], held.leaf))
        for name, buffer in canonical_buffers(run.root):
            if isinstance(buffer, Tensor) and name in values:
                buffer.copy_(_like(values[name], buffer))


def _before(trace: Trace, step: int) -> Iterable[tuple[str, Tensor]]:
    for number, record in enumerate(trace.records):
        initial = step == 0 and record.stage == "initial-state"
        later = record.step == step - 1 and record.stage in ("update", "buffer")
        if (initial or later) and not record.part and not record.missing and not record.unknown:
            yield record.name, trace.tensor(number)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return torch.view_as_complex(tensor) if other.is_complex() and not tensor.is_complex() else tensor
