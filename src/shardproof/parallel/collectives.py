"""Which collectives really ran, and over which ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
"""Operator namespaces of torch.distributed's collectives, called directly and by DTensor."""

NOT_COLLECTIVE = frozenset({"wait_tensor", "wrap_tensor_autograd", "monitored_barrier_"})


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the collectives inside, by name and by the ranks that took part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let DTensor turn itself into plain tensors and collectives first; count those."""
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        if any(kind is DTensor for kind in types):
            return NotImplemented
        if func.namespace in NAMESPACES:
            name = func._schema.name.split("::")[1]
            if name not in NOT_COLLECTIVE:
                self.counts[name.strip("_"), _ranks(func, args, kwargs or {})] += 1
        return func(*args, **(kwargs or {}))


def _ranks(func: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """Global ranks of the process group among the arguments, found by the operator's schema."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "group_name":
            return _group_ranks(_resolve_process_group(value))
        if argument.name == "process_group":
            return _group_ranks(dist.ProcessGroup.unbox(value))
    if "group_name" in kwargs:
        return _group_ranks(_resolve_process_group(kwargs["group_name"]))
    return ()


def _group_ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))
