"""How an experiment is trained for real: for how long, how precisely, and what is evaluated, saved and logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from shardproof.errors import UsageError
from shardproof.spec.duration import Duration, parse_duration
from shardproof.spec.strategies import suggest

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from shardproof.trainer.callback import Callback
    from shardproof.trainer.logger import Logger

Precision: TypeAlias = Literal["fp64", "fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp64", "fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything about a training run that is neither the experiment nor its layout.

    Raises `UsageError` at once for values that no run could use.
    """

    max_duration: str | Duration = "1ep"
    """When to stop, counted from the first step of all, not from a resumption: `2ep`, `500ba`, `100000sp`, `1h`."""

    eval_data: Any = None
    """A map-style dataset or a stream, or a function that returns one, to evaluate on; None for no evaluation."""

    eval_interval: str | Duration = "1ep"
    """How often to evaluate. The end of training is always evaluated."""

    eval_batch_size: int | None = None
    """Samples per evaluation batch, over all ranks; the experiment's `batch_size` where None."""

    metrics: Any = None
    """What to measure on `eval_data` beside the loss: a torchmetrics Metric or MetricCollection, {name: Metric},
    `sp.Metrics`, or a function that returns one of these (torchmetrics is slow to import)."""

    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    """Makes the learning rate scheduler, which is stepped after every optimizer step; not ReduceLROnPlateau."""

    precision: Precision = "fp32"
    """`fp32`, `fp64`, or autocast to `bf16` or `fp16` over float32 weights.

    Under all of them parameters, gradients and optimizer states are kept in float32 (float64 under `fp64`), and
    gradients are reduced in it. What layers of a tensor-parallel plan hand each other is reduced as it is computed, in
    `bf16` or `fp16`.

    `fp16` also scales the loss, as torch.amp.GradScaler does: from 2**16, halved where a gradient overflows on any
    rank, doubled after 2000 steps without. All ranks then skip the step, and the scheduler's. How large the numbers of
    a backward pass are depends on how the batch is cut, so that two layouts may skip different steps; each of them
    finds the scale that fits it.

    A `train_step` of the experiment's own gets `Step.loss` under autocast, and nothing else: under `fp16` it has to
    scale the loss, look for overflows on all ranks and skip by itself. `Step.model` called directly is not under
    autocast.
    """

    gather_precision: Literal["bf16", "fp16"] | None = None
    """What FSDP casts parameters to before it gathers them, the same as `precision`; other layouts gather nothing, and
    leave it. Gradients are reduced in float32 all the same. It halves the traffic, and rounds parameters that autocast
    would have left alone (norms, embeddings), so that FSDP no longer computes the very same as other layouts. A module
    that autocast leaves alone must take its weights in that precision: BatchNorm on a CPU does not."""

    callbacks: Sequence[Callback] = ()
    """Called at the events of `sp.Callback`, on every rank, in this order."""

    loggers: Sequence[Logger] = ()
    """Where values go, from rank 0 alone. The command line adds a `ConsoleLogger`."""

    save_folder: str | Path | None = None
    """Where checkpoints go, one folder each, `step-00000500`; None for no checkpoints."""

    save_interval: str | Duration = "1ep"
    """How often to save. The end of training is always saved."""

    keep: int | None = 3
    """How many of the newest checkpoints of `save_folder` stay; None for all of them."""

    save_async: bool = False
    """Whether training goes on while a checkpoint is written, from a copy in memory."""

    load_path: str | Path | None = None
    """What to start from: a checkpoint, a folder of checkpoints (the newest is taken), a `.safetensors` file (weights
    alone), or `auto`: the newest in `save_folder` where there is one."""

    load_weights_only: bool = False
    """Whether `load_path` gives its weights alone, to start a training of its own from them."""

    seed: int | None = None
    """In place of the experiment's seed."""

    device: Literal["cpu", "cuda"] = "cpu"

    compile: bool = False
    """Whether to `torch.compile` each FSDP unit, or the whole model where the experiment names none."""

    activation_checkpointing: bool | tuple[str, ...] = False
    """Modules whose activations are computed again in the backward pass: name patterns, or True for `fsdp_units`."""

    progress_bar: bool = True
    """Drawn by one process on stderr, and only where that is a terminal."""

    shuffle: bool = True
    """Whether each epoch reads the samples in an order of its own, drawn from the seed; of map-style datasets."""

    workers: int = 0
    """Processes per rank that read samples ahead; 0 reads them in the training process, as `Experiment.batches` always
    is."""

    check_every: int | None = None
    """Every so many steps, hold replicas against each other (`sp.check_invariants`)."""

    check_action: Literal["stop", "warn"] = "stop"
    """What a violation does: raise `InvariantError`, or warn and train on."""

    unused_parameters: bool = False
    """For DDP: whether parameters may be left without a gradient in some step (modules that are not always called).
    Looking for them costs time in every step; without it, such a step is an error, never a wrong sum."""

    init_device: Literal["cpu", "meta"] = "cpu"
    """`meta` builds the model without storage and then initialises each rank's shards alone, to the same values."""

    def __post_init__(self) -> None:
        for name in ("max_duration", "eval_interval", "save_interval"):
            object.__setattr__(self, name, parse_duration(getattr(self, name), field=name))
        self._one_of("precision", PRECISIONS)
        if self.gather_precision is not None:
            self._one_of("gather_precision", ("bf16", "fp16"))
            if self.gather_precision != self.precision:
                raise UsageError(
                    f"gather_precision={self.gather_precision!r} with precision={self.precision!r}: layers would get "
                    f"inputs and weights of two kinds; give precision={self.gather_precision!r} too, or leave it out"
                )
        self._one_of("device", ("cpu", "cuda"))
        self._one_of("check_action", ("stop", "warn"))
        self._one_of("init_device", ("cpu", "meta"))
        self._whole("eval_batch_size", 1)
        self._whole("keep", 1)
        self._whole("seed", 0)
        self._whole("check_every", 1)
        self._whole("workers", 0)
        if self.scheduler is not None and not callable(self.scheduler):
            raise UsageError(
                f"scheduler={self.scheduler!r} cannot be called; pass a function of the optimizer, as "
                "lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)"
            )
        for name in ("save_folder", "load_path"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | Path):
                raise UsageError(f"{name}={value!r}; it must be a path")
        self._each("callbacks", "fit_start", "sp.Callback")
        self._each("loggers", "log", "sp.Logger")
        if isinstance(self.activation_checkpointing, str):
            raise UsageError(
                f"activation_checkpointing is the text {self.activation_checkpointing!r}; write the tuple "
                f"({self.activation_checkpointing!r},)"
            )
        if self.metrics is not None and self.eval_data is None:
            raise UsageError("metrics are measured on eval_data, and there is none; give eval_data as well")
        if self.load_path == "auto" and self.save_folder is None:
            raise UsageError(
                "load_path='auto' (--resume) takes the newest checkpoint of save_folder; "
                "give save_folder (--save-folder) as well"
            )

    def _one_of(self, name: str, allowed: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise UsageError(f"{name}={value!r}; {suggest(str(value), allowed)}")

    def _each(self, name: str, method: str, kind: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            value = (value,)
            object.__setattr__(self, name, value)
        for item in value:
            # A class has these methods too, and is no object of it.
            if isinstance(item, type) or not callable(getattr(item, method, None)):
                raise UsageError(f"{name} holds {item!r}, which is no {kind}; give objects of its subclasses")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UsageError(f"{name}={value!r}; it must be a whole number of at least {least}")


class Changes(TypedDict, total=False):
    """The fields of `Training`, each of them optional: keyword arguments of `Trainer`."""

    max_duration: str | Duration
    eval_data: Any
    eval_interval: str | Duration
    eval_batch_size: int | None
    metrics: Any
    scheduler: Callable[[Optimizer], LRScheduler] | None
    precision: Precision
    gather_precision: Literal["bf16", "fp16"] | None
    callbacks: Sequence[Callback]
    loggers: Sequence[Logger]
    save_folder: str | Path | None
    save_interval: str | Duration
    keep: int | None
    save_async: bool
    load_path: str | Path | None
    load_weights_only: bool
    seed: int | None
    device: Literal["cpu", "cuda"]
    compile: bool
    activation_checkpointing: bool | tuple[str, ...]
    progress_bar: bool
    shuffle: bool
    workers: int
    check_every: int | None
    check_action: Literal["stop", "warn"]
    unused_parameters: bool
    init_device: Literal["cpu", "meta"]


def changed(training: Training, changes: Changes) -> Training:
    """`training` with some fields replaced. Raises `UsageError` for a field that does not exist."""
    if not isinstance(training, Training):
        raise UsageError(f"training is a {type(training).__name__}; make it an sp.Training(...)")
    names = [field.name for field in fields(Training)]
    for name in changes:
        if name not in names:
            raise UsageError(f"Trainer takes no {name!r}; {suggest(name, names)}")
    return replace(training, **changes)
