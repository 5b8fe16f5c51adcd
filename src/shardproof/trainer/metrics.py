"""What an evaluation measures: the loss, exactly, and metrics of torchmetrics, over all data ranks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from shardproof.errors import ExperimentError, UsageError
from shardproof.parallel.data import Microbatch
from shardproof.parallel.held import plain
from shardproof.spec.experiment import Batch
from shardproof.spec.loss import LossSum
from shardproof.trainer import states
from shardproof.trainer.optional import require

Inputs: TypeAlias = Callable[[nn.Module, Batch], tuple[Any, ...]]


def first_and_second(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """`(model(x), y)` of a batch `(x, y)`. Raises `UsageError` for any other batch."""
    x, y = _pair(batch)
    return model(x), y


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of torchmetrics, and what to feed them."""

    metrics: Any
    """A Metric, a MetricCollection, or {name: Metric}. They are copied, and never changed themselves."""

    inputs: Inputs = first_and_second
    """(model, batch) -> the arguments of `metric.update`. The default is `(model(x), y)` of a batch `(x, y)`.

    A function of your own runs the model once more, after the loss. The default does not where the loss has already
    called `model(x)`.
    """

    def __post_init__(self) -> None:
        if not callable(self.inputs):
            raise UsageError(
                f"Metrics.inputs is {self.inputs!r}, which cannot be called; pass a function of the model and a batch "
                "that returns the arguments of metric.update"
            )


def measured(metrics: Any) -> Metrics | None:
    """What `Training.metrics` may hold, as `Metrics` around a MetricCollection; None for None.

    The collection is a copy, without state. Raises `UsageError` for anything else, and where torchmetrics is missing.
    """
    if metrics is None:
        return None
    wanted = metrics if isinstance(metrics, Metrics) else Metrics(metrics=metrics)
    require("torchmetrics", extra="metrics", by="metrics=...")
    return Metrics(metrics=_collection(wanted.metrics), inputs=wanted.inputs)


class Measurement:
    """One evaluation after the other on this rank. All ranks of the world take part in each."""

    def __init__(
        self,
        metrics: Any,
        *,
        loss: Callable[[nn.Module, Batch], Tensor | LossSum],
        data_group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raise `UsageError` as `measured` does.

        Args:
            metrics: whatever `Training.metrics` may hold.
            loss: the experiment's.
            data_group: the ranks over which batches are cut; tensor-parallel peers are not among each other's.
            device: where the batches lie.
            dtype: of the run. Metrics count in float64 where it is that, in float32 otherwise.
        """
        self._loss, self._data_group, self._device = loss, data_group, device
        wanted = measured(metrics)
        self._inputs = None if wanted is None else wanted.inputs
        self._metrics: Any = None if wanted is None else wanted.metrics.to(device)
        self._single: list[Any] = []
        if self._metrics is not None:
            single = importlib.import_module("torchmetrics").Metric
            self._single = [module for module in self._metrics.modules() if isinstance(module, single)]
            for metric in self._single:
                # `states.merge` brings the ranks together.
                metric.distributed_available_fn = _never
                if dtype == torch.float64:
                    metric.set_dtype(dtype)
        self.reset()

    def reset(self) -> None:
        """Forget what has been seen; `compute` does so too."""
        self._sum_and_count = torch.zeros(2, dtype=torch.float64, device=self._device)
        if self._metrics is not None:
            self._metrics.reset()
            for metric in self._single:
                # Not every wrapper of torchmetrics resets what it wraps.
                metric.reset()

    def update(self, model: nn.Module, microbatch: Microbatch) -> None:
        """See one part of a batch. A part of weight 0 is run, as other ranks need it, and counts for nothing.

        The caller puts the model in evaluation mode, and autocast around this; metrics are computed without autocast.
        """
        batch, counts = microbatch.batch, microbatch.weight > 0
        with torch.no_grad():
            with _watched(model, batch, self._inputs is first_and_second) as outputs:
                loss = self._loss(model, batch)
            if counts:
                self._sum_and_count += self._sum_of(loss, batch)
            if self._inputs is None:
                return
            arguments = (outputs[-1], _pair(batch)[1]) if outputs else self._inputs(model, batch)
            if not isinstance(arguments, tuple):
                raise UsageError(
                    f"Metrics.inputs returned a {type(arguments).__name__}; it must return the tuple of what "
                    "metric.update takes, as (model(x), y)"
                )
            # Also for a part that does not count: this may be a collective.
            arguments = tree_map_only(Tensor, _readable, arguments)
            if counts:
                with torch.autocast(self._device.type, enabled=False):
                    self._metrics.update(*arguments)

    def compute(self) -> dict[str, float]:
        """`loss` and the metrics over everything that all ranks have seen, and forget it. The same on every rank.

        The loss is the mean over samples, or over what `LossSum` counts, in float64. A metric with several results
        gives `name/0`, `name/1` ...

        Raises `ExperimentError` where there was nothing to measure.
        """
        dist.all_reduce(self._sum_and_count, group=self._data_group)
        total, count = self._sum_and_count.tolist()
        if not count > 0:
            raise ExperimentError(
                f"the evaluation measured nothing: its samples (or the counts of its LossSum parts) add up to {count:g}"
            )
        results = {"loss": total / count}
        if self._metrics is not None:
            states.merge(self._single, self._data_group, self._device)
            with torch.no_grad():
                for name, value in self._metrics.compute().items():
                    results.update(_numbers(name, value))
        self.reset()
        return self._agreed(results)

    def _agreed(self, results: dict[str, float]) -> dict[str, float]:
        """Rank 0's numbers: tensor-parallel peers may differ in the last bit, and then one of them might stop alone."""
        values = torch.tensor(list(results.values()), dtype=torch.float64, device=self._device)
        dist.broadcast(values, src=0)
        return dict(zip(results, values.tolist(), strict=True))

    def _sum_of(self, loss: Any, batch: Batch) -> Tensor:
        """Sum of the losses and what to divide it by, shape `(2,)`, float64."""
        if isinstance(loss, LossSum):
            total, count = _scalar(loss.total), torch.as_tensor(loss.count)
        else:
            samples = _samples_in(batch)
            total, count = _scalar(loss).double() * samples, torch.tensor(samples)
        return torch.stack([_whole(part).to(self._device, torch.float64) for part in (total, count)])


def _collection(metrics: Any) -> Any:
    """A MetricCollection of copies."""
    torchmetrics: Any = importlib.import_module("torchmetrics")
    single, collection = torchmetrics.Metric, torchmetrics.MetricCollection
    prefix = postfix = None
    if isinstance(metrics, single):
        copies: Any = [metrics.clone()]
    elif isinstance(metrics, collection):
        # Names without prefix and postfix, which the copy adds again.
        copies = {name: metric.clone() for name, metric in metrics.items(keep_base=True)}
        prefix, postfix = metrics.prefix, metrics.postfix
    elif isinstance(metrics, Mapping) and metrics and all(isinstance(m, single | collection) for m in metrics.values()):
        copies = {name: metric.clone() for name, metric in metrics.items()}
    else:
        raise UsageError(
            f"metrics is {metrics!r}; give a torchmetrics Metric, a MetricCollection, a mapping "
            '{"accuracy": Metric}, or sp.Metrics(metrics=..., inputs=...)'
        )
    if isinstance(copies, dict) and (bad := [name for name in copies if not isinstance(name, str) or "." in name]):
        raise UsageError(f"metrics: {bad[0]!r} cannot be the name of a metric; write a text without dots")
    # No compute groups: they share states of metrics that agree after their first batch, which in a part of one sample
    # different metrics may do.
    made = collection(copies, prefix=prefix, postfix=postfix, compute_groups=False)
    if "loss" in set(made.keys()):
        raise UsageError("metrics: the name 'loss' is taken by the loss of the evaluation; choose another one")
    made.reset()
    return made


@contextmanager
def _watched(model: nn.Module, batch: Batch, wanted: bool) -> Iterator[list[Any]]:
    """What `model(x)` returns inside for the `x` of a batch `(x, y)`, so that metrics need not run it again.

    Copies, as a loss may change them. Nothing where the call is of another form, which is then the same on all ranks.
    """
    outputs: list[Any] = []
    # torch.compile looks into hooks, and would compile again for ours.
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    if not wanted or compiled:
        yield outputs
        return
    x, _ = _pair(batch)
    plainly: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plainly.append(len(args) == 1 and args[0] is x and not kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if plainly.pop():
            outputs.append(tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output))

    # The first to see the arguments, which FSDP may cast, and the last to see the output.
    hooks = (
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        model.register_forward_hook(after),
    )
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _pair(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        names = [str(name) for name in batch]
        x, y = repr(names[0]), repr(names[-1])
        form = f"a dict with the keys {', '.join(names)}"
        example = f"(model(batch[{x}]), batch[{y}])"
    else:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        form, example = f"a {type(batch).__name__}{length}", "(model(batch), batch)"
    raise UsageError(
        f"metrics take (model(x), y) of a batch (x, y), and the batch is {form}; say what metric.update takes: "
        f"metrics=sp.Metrics(metrics=..., inputs=lambda model, batch: {example})"
    )


def _samples_in(batch: Batch) -> int:
    """How many samples were collated: the first dim of the first tensor that has one."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ExperimentError(
        f"the evaluation cannot tell how many samples a batch of type {type(batch).__name__} holds, as no tensor in it "
        "has a first dim; return sp.LossSum(total, count) from the loss"
    )


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim():
        form = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ExperimentError(
            f"Experiment.loss returned {form} in an evaluation; it must return a scalar tensor or "
            "sp.LossSum(total, count)"
        )
    return _whole(loss)


def _whole(tensor: Tensor) -> Tensor:
    """A plain tensor: a DTensor's may still be a slice, or a partial sum over `tp`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else plain(tensor)


def _readable(tensor: Tensor) -> Tensor:
    """What metrics can read: plain, and in float32 where it was less, as they square and sum what they get."""
    tensor = _whole(tensor.detach())
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """A result as numbers, each with the indices that lead to it in its name."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(f"{name}/{key}", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _numbers(f"{name}/{index}", part)
    else:
        yield name, float(value)


def _never() -> bool:
    return False
