"""What plain tensors say of their layout: attributes that Megatron sets, and the plan of a transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardproof.parallel.held import Held
from shardproof.parallel.names import canonical_modules
from shardproof.parallel.piece import Piece
from shardproof.spec.patterns import matches

PLAN_DIMS = {"colwise": {"weight": 0, "bias": 0}, "rowwise": {"weight": 1}}
"""Style of a plan -> the dim along which it cuts each parameter of a linear layer; any other is whole."""


def hints(model: nn.Module, parameters: Iterable[Held]) -> dict[str, dict[str, object]]:
    """Parameter -> what it says of itself, as `{"axis": "tp", "dim": 0, "from": "partition_dim"}`."""
    plan = dict(_plan(model))
    found: dict[str, dict[str, object]] = {}
    for held in parameters:
        dim = partition_dim(held)
        if dim is not None:
            stride = getattr(held.leaf, "partition_stride", 1)
            found[held.name] = {"axis": "tp", "dim": dim, "stride": stride, "from": "partition_dim"}
            continue
        module, _, attribute = held.name.rpartition(".")
        style = next((style for pattern, style in plan.items() if matches(module, pattern)), None)
        if style is not None:
            dims = next((dims for start, dims in PLAN_DIMS.items() if style.startswith(start)), {})
            found[held.name] = {"axis": "tp", "dim": dims.get(attribute), "style": style, "from": "tp_plan"}
    return found


def partition_dim(held: Held) -> int | None:
    """The dim along which Megatron says that this parameter is cut over its tensor-parallel group."""
    if not getattr(held.leaf, "tensor_model_parallel", False) or isinstance(held.leaf, DTensor):
        return None
    dim = getattr(held.leaf, "partition_dim", -1)
    return dim if isinstance(dim, int) and 0 <= dim < held.leaf.dim() else None


def hinted(parameters: Iterable[Held], peers: Sequence[int]) -> list[Held]:
    """The parameters, those with a declared piece that say how they are cut over these `peers` (global ranks)."""
    return [replace(held, piece=_declared(held, peers)) for held in parameters]


def _declared(held: Held, peers: Sequence[int]) -> Piece:
    dim, piece = partition_dim(held), held.piece
    # Only where the parts are contiguous blocks, one a rank; the flat parameters of FSDP have pieces of their own.
    if dim is None or piece.stretch is not None or getattr(held.leaf, "partition_stride", 1) != 1 or len(peers) < 2:
        return piece
    size = held.leaf.shape[dim]
    offset, whole = [0] * held.leaf.dim(), list(held.leaf.shape)
    offset[dim], whole[dim] = size * list(peers).index(dist.get_rank()), size * len(peers)
    return Piece(whole=tuple(whole), offset=tuple(offset), shape=tuple(held.leaf.shape))


def _plan(model: nn.Module) -> Iterable[tuple[str, str]]:
    """(name pattern, style) of the plan that a transformers model carries."""
    _, own = next(iter(canonical_modules(model)))
    for attribute in ("tp_plan", "_tp_plan"):
        plan = getattr(own, attribute, None)
        if isinstance(plan, Mapping) and plan:
            return [(name, style) for name, style in plan.items() if isinstance(name, str) and isinstance(style, str)]
    return []
