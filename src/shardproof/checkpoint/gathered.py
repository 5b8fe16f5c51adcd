"""What FSDP keeps gathered between two steps, and would compute with after its shards have been written over."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def let_go(root: nn.Module) -> None:
    """Free whole parameters, so that the next forward pass gathers them from their shards anew.

    After a forward pass FSDP leaves its root as it is, for the backward pass to come. After an evaluation none comes.
    """
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            handle = module._handle
            # Nothing is gathered before the first forward pass, nor where a unit is not sharded at all.
            begun = hasattr(handle.flat_param, "_full_param_padded")
            if handle.uses_sharded_strategy and begun and not handle.needs_unshard():
                handle.reshard(True)
