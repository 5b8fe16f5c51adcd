"""Bring the states of metrics together over the data ranks.

torchmetrics can do so itself, but not where a rank has seen no sample (it sends flat float32 for what the others hold
as rows of integers, and averages that are 0/0), nor where ranks have seen different numbers of batches and a state is a
list that stays one. Here every rank that has seen anything hands over its whole states, and each rank reduces them: the
metrics are then as if this process had seen all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only


def merge(metrics: Sequence[Any], group: dist.ProcessGroup, device: torch.device) -> None:
    """Give each torchmetrics Metric the state of all ranks of `group`; a collective.

    The metrics must come in the same order on every rank, and those inside others must be among them.
    """
    own = [(metric.update_count, _states(metric)) if metric.update_called else None for metric in metrics]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    for metric, parts in zip(metrics, zip(*everyone, strict=True), strict=True):
        seen = [part for part in parts if part is not None]
        if not seen:
            continue
        for name, reduce in metric._reductions.items():
            states = tree_map_only(Tensor, lambda tensor: tensor.to(device), [part[name] for _, part in seen])
            setattr(metric, name, _joined(states, reduce))
        # Says that there is something to compute, also on a rank that has seen nothing itself.
        metric._update_count = sum(count for count, _ in seen)
        metric._computed = None


def _states(metric: Any) -> dict[str, Any]:
    """Copies in main memory: a tensor is sent with all of the storage that it is a view of."""
    # `_reductions` is what torchmetrics has had since its first version; it has no public name for it.
    return {
        name: tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), getattr(metric, name))
        for name in metric._reductions
    }


def _joined(states: list[Any], reduce: Any) -> Any:
    if isinstance(states[0], list):
        # One list of all parts is what one process would hold, whatever is made of it later.
        return [part for state in states for part in state]
    if len(states) == 1:
        # Nothing to reduce; and where nothing reduces it, torchmetrics expects one more dim only from several.
        return states[0]
    stacked = torch.stack(states)
    return stacked if reduce is None else reduce(stacked)
