"""Let go of parameters that FSDP has gathered for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from shardproof.parallel.held import flat_handles


def let_go(model: nn.Module) -> None:
    """Leave nothing on this rank but its shards.

    Both kinds of FSDP keep the root's parameters gathered after a forward pass, for a backward pass that never comes
    after an evaluation. The next forward pass would work on what was gathered then, whatever the shards hold by now.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            handle = module._handle
            # Nothing is gathered before the first forward pass, nor where a unit is not sharded at all.
            begun = hasattr(handle.flat_param, "_full_param_padded")
            if handle.uses_sharded_strategy and begun and not handle.needs_unshard():
                _reshard(module, handle, True)


@contextlib.contextmanager
def flat_gradients_aside(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP's flat parameters have no gradients; afterwards they have those that they had.

    Such a gradient is of a shard, and the parameter may be gathered. A compiler that looks at both, as it does where a
    forward pass without gradients is compiled, takes the one for as large as the other, and fails.
    """
    handles = list(flat_handles(model))
    # FSDP would make the gradient of a flat parameter anew from those of the parameters in it.
    inside = [original for handle in handles for original in handle.flat_param._params or ()]
    parameters = [*(handle.flat_param for handle in handles), *inside]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
