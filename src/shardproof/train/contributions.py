"""What each micro-batch of each data rank contributes to a step's gradients, computed one by one on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from shardproof.parallel.data import cast
from shardproof.parallel.initial import default_dtype
from shardproof.parallel.names import canonical_buffers
from shardproof.parallel.seeding import seed_everything
from shardproof.spec.experiment import Batch
from shardproof.spec.loss import LossSum
from shardproof.trace.trace import Trace
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
    terms: Sequence[Mapping[str, Tensor]] = ()
    """The same for each addend of the loss (main and auxiliary), where it is a sum; they add up to `gradients`."""


LARGEST_SUM = 6
"""Addends of a loss that are looked at one by one."""

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
            terms = _terms(run, value)
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
                    terms=terms,
                )
            )
    return found


def _terms(run: TracedRun, value: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of the addends of a loss, told by how it was computed; empty where it is no sum of a few."""
    edges = list(_addends(value.grad_fn, 0, 1.0))
    if not 1 < len(edges) <= LARGEST_SUM:
        return []
    trained = [held for held in run.parameters if held.leaf.requires_grad]
    found = []
    for node, number, factor in edges:
        grads = torch.autograd.grad(
            (GradientEdge(node, number),),
            [held.leaf for held in trained],
            (torch.full_like(value.detach(), factor),),
            retain_graph=True,
            allow_unused=True,
        )
        found.append(
            {
                held.name: grad.detach().to("cpu", torch.float64)
                for held, grad in zip(trained, grads, strict=True)
                if grad is not None
            }
        )
    return found


def _addends(node: Any, number: int, factor: float) -> Iterator[tuple[Any, int, float]]:
    """(node, output, factor) of everything that a scalar is the sum of."""
    if node is None or type(node).__name__ != "AddBackward0":
        if node is not None and type(node).__name__ != "AccumulateGrad":
            yield node, number, factor
        return
    alpha = float(getattr(node, "_saved_alpha", 1.0))
    for place, (other, output) in enumerate(node.next_functions):
        yield from _addends(other, output, factor * (alpha if place else 1.0))


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
