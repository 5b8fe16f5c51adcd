"""Evaluation and prediction: every sample once, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isroutine
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from shardproof.errors import UsageError
from shardproof.parallel import initial
from shardproof.parallel.data import Microbatch, cast
from shardproof.parallel.gathered import flat_gradients_aside, let_go
from shardproof.parallel.loading import eval_batches
from shardproof.parallel.seeding import seed_everything
from shardproof.spec.experiment import Batch
from shardproof.trainer.metrics import Measurement
from shardproof.trainer.precision import autocasting

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop

_EVALUATION = 1_000_003
"""Set apart from the numbers of steps, so that evaluation and training draw other random numbers."""


class Evaluating:
    """What a `Loop` evaluates and predicts with."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """The mean loss and the metrics over all samples, the same on every rank."""
        loop = self._loop
        with self._set_aside():
            metrics = loop.training.metrics
            measurement = Measurement(
                metrics() if isroutine(metrics) else metrics,
                loss=loop.experiment.loss,
                data_group=loop.data_group,
                device=loop.device,
                dtype=loop.dtype,
            )
            update = autocasting(measurement.update, loop.training.precision, loop.device.type)
            for part in self._batches(data):
                update(loop.model, part)
            return measurement.compute()

    def predict(self, data: Any, forward: Callable[[nn.Module, Batch], Any] | None) -> Any:
        """Outputs of every sample in order, on rank 0; None elsewhere."""
        loop = self._loop
        forward = autocasting(forward or first_of, loop.training.precision, loop.device.type)
        own: list[Any] = []
        with self._set_aside():
            for part in self._batches(data):
                output = forward(loop.model, part.batch)
                # A part without samples took part in the collectives, and has nothing to say.
                own.append(tree_map_only(Tensor, _whole, output) if part.weight else None)
        parts: list[list[Any]] | None = None
        first = dist.get_process_group_ranks(loop.data_group)[0]
        if loop.rank == first:
            parts = [[] for _ in range(loop.parallelism.dp)]
        dist.gather_object(own, parts, dst=first, group=loop.data_group)
        if parts is None or loop.rank != 0:
            return None
        return _joined([output for batch in zip(*parts, strict=True) for output in batch if output is not None])

    def _batches(self, data: Any) -> Iterator[Microbatch]:
        loop = self._loop
        data = loop.training.eval_data if data is None else data
        if data is None:
            raise UsageError("there is nothing to evaluate on; give evaluate() its data, or the Trainer eval_data=...")
        seed_everything(loop.experiment.seed, _EVALUATION, loop.data_rank)
        for part in eval_batches(
            data,
            batch_size=loop.training.eval_batch_size or loop.experiment.batch_size,
            data_rank=loop.data_rank,
            data_ranks=loop.parallelism.dp,
            workers=loop.training.workers,
        ):
            loop.alive()
            yield Microbatch(cast(part.batch, loop.dtype, loop.device), part.weight)

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Evaluation mode without gradients inside; afterwards every module is in the mode in which it was."""
        modes = {module: module.training for module in self._loop.model.modules()}
        self._loop.model.eval()
        try:
            with torch.no_grad(), initial.default_dtype(self._loop.dtype), flat_gradients_aside(self._loop.model):
                try:
                    yield
                finally:
                    let_go(self._loop.model)
        finally:
            for module, mode in modes.items():
                module.training = mode


def first_of(model: nn.Module, batch: Batch) -> Any:
    """The model's output for the first tensor of a tuple, or for a batch that is one tensor.

    Raises `UsageError` for any other batch.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return model(batch[0])
    raise UsageError(
        f"a batch is a {type(batch).__name__}, and nothing says how the model takes it; "
        'pass predict(forward=lambda model, batch: model(batch["tokens"]))'
    )


def _whole(output: Tensor) -> Tensor:
    output = output.full_tensor() if isinstance(output, DTensor) else output
    return output.detach().cpu()


def _joined(outputs: list[Any]) -> Any:
    """Outputs of batches, leaf by leaf along their first dim."""
    if not outputs:
        return None
    flat = [tree_flatten(output) for output in outputs]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [
        torch.cat(column) if all(isinstance(leaf, Tensor) and leaf.dim() for leaf in column) else list(column)
        for column in columns
    ]
    return tree_unflatten(joined, flat[0][1])
