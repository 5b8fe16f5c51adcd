"""What a trainer does to a model beside laying it out: activation checkpointing, compilation, precision of gathers.

All of it in place: no wrapper, so that modules and parameters keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from shardproof.errors import UsageError
from shardproof.spec.patterns import select


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """Nothing of it changes what is computed, but `param_dtype`. The defaults are what a check does."""

    compiled: bool = False
    """Whether each FSDP unit, or the whole model where there is none, is compiled."""

    checkpointed: tuple[str, ...] = ()
    """Name patterns of modules whose activations are computed again in the backward pass."""

    param_dtype: torch.dtype | None = None
    """What FSDP casts parameters to before it gathers them; None gathers them as they are."""

    unused_parameters: bool = True
    """Whether DDP looks, in every step, for parameters that the loss does not depend on. It costs a walk over the graph
    and a reduction; without it, such a parameter leaves its whole bucket unreduced."""

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """For `fully_shard`. Gradients are reduced in float32 in any case."""
        if self.param_dtype is None:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    @property
    def flat_policy(self) -> MixedPrecision | None:
        """The same for `FullyShardedDataParallel`."""
        if self.param_dtype is None:
            return None
        return MixedPrecision(param_dtype=self.param_dtype, reduce_dtype=torch.float32, cast_root_forward_inputs=False)


def extras_of(activation_checkpointing: bool | tuple[str, ...], units: tuple[str, ...], **others: object) -> Extras:
    """`Extras` from the fields of a `Training` and the FSDP units of its experiment.

    Raises `UsageError` where activation checkpointing is asked for and nothing says of which modules.
    """
    if activation_checkpointing is True and not units:
        raise UsageError(
            "activation_checkpointing=True checkpoints Experiment.fsdp_units, and there are none; "
            'name the modules, as activation_checkpointing=("blocks.*",)'
        )
    patterns = units if activation_checkpointing is True else tuple(activation_checkpointing or ())
    return Extras(checkpointed=patterns, **others)  # type: ignore[arg-type]


def checkpoint_activations(model: nn.Module, patterns: tuple[str, ...], *, compiled: bool = False) -> None:
    """Compute the forward pass of the modules that match again in the backward pass, instead of keeping activations.

    With `compiled`, what is computed again is compiled: torch's compiler passes over a checkpoint that it meets from
    outside, and leaves everything in it as it is, without a word.

    Raises `PatternError` where a pattern matches nothing.
    """
    modules = dict(model.named_modules())
    names = {name for pattern in patterns for name in select(modules, pattern, field="activation_checkpointing")}
    for name in names:
        module = modules[name]
        # Not a wrapper module, which would stand in every name. Hooks (FSDP's, tensor parallelism's) stay outside.
        forward = torch.compile(module.forward) if compiled else module.forward
        module.forward = partial(checkpoint, forward, use_reentrant=False)


def compile_units(model: nn.Module, units: list[nn.Module]) -> None:
    """Compile each unit in place, or the model where there is none: equal blocks are compiled once for all."""
    for module in units or [model]:
        # Of a unit that is checkpointed, all that can be compiled already is.
        if not _is_checkpointed(module):
            module.compile()


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module.forward, partial) and module.forward.func is checkpoint
