"""Gradient reduction only where it is due: in the last micro-batch's backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn.parallel import DistributedDataParallel

from shardproof.parallel.held import flat_handles


@contextlib.contextmanager
def gradient_sync(model: nn.Module, due: bool) -> Iterator[None]:
    """Inside, the modules that reduce gradients by themselves (DDP, FSDP) do so only if `due`.

    Any other module keeps its own habits: a user's `parallelize` owes averaged gradients after the last backward.
    """
    with contextlib.ExitStack() as stack:
        for module in _reducers(model):
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(due)
            elif not due and not (_is_static(module) or _flattens_tp_shards(module) or _adds_in_low_precision(module)):
                stack.enter_context(module.no_sync())
        yield


def unreduced(model: nn.Module) -> bool:
    """Whether DDP still waits for gradients that this step's backward pass did not bring, and so reduced nothing of the
    buckets that they lie in. To be asked after the last backward pass, where DDP does not look for them itself."""
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters or model.static_graph:
        return False
    try:
        model.reducer._check_reducer_finalized()
    except RuntimeError:
        return True
    return False


def _is_static(module: nn.Module) -> bool:
    """Whether DDP was told that its graph never changes.

    Torch 2.13 then counts on a reduction in the first backward pass, and stops with an internal error under `no_sync`.
    Reduced after every micro-batch, the gradients add up to the same mean.
    """
    return isinstance(module, DistributedDataParallel) and bool(module.static_graph)


def _flattens_tp_shards(module: nn.Module) -> bool:
    """Whether FSDP's flat parameters hold tensor-parallel shards.

    Torch 2.13 then leaves `no_sync` with gradients that its next forward cannot look into ("invalid python storage").
    Reduced after every micro-batch, the shards add up to the same sum.
    """
    return any(
        isinstance(extension, DTensorSpec)
        for handle in flat_handles(module)
        for extension in handle.flat_param._param_extensions
    )


def _adds_in_low_precision(module: nn.Module) -> bool:
    """Whether FSDP's flat parameters are gathered in less than their own precision.

    Under `no_sync` torch 2.13 adds up the gradients of micro-batches in that precision. Reduced after every
    micro-batch, they are added up in the precision of the parameters, as `fully_shard` does.
    """
    return any(handle._uses_param_mixed_precision for handle in flat_handles(module))


def _reducers(module: nn.Module) -> Iterator[DistributedDataParallel | FullyShardedDataParallel | FSDPModule]:
    """The outermost modules that reduce gradients; each of them speaks for those inside it."""
    if isinstance(module, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _reducers(child)
