"""What a contestant really shards, told from the parameters that its rank holds and from nothing it says of itself."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def layout(model: nn.Module, elements: int) -> str:
    """`DDP, 18 plain, 100% here`: wrapper, parameters by kind, and the share of all `elements` that this rank holds."""
    kinds: Counter[str] = Counter()
    here = 0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here += local.numel()
        kinds[_kind(parameter)] += 1
    wrapper = ["DDP"] if any(isinstance(module, DistributedDataParallel) for module in model.modules()) else []
    shown = [f"{count} {kind}" for kind, count in sorted(kinds.items())]
    return ", ".join([*wrapper, *shown, f"{here / elements:.0%} here"])


def _kind(parameter: nn.Parameter) -> str:
    if not isinstance(parameter, DTensor):
        return "plain"
    sizes = "x".join(str(size) for size in parameter.device_mesh.shape)
    return f"{' '.join(map(_short, parameter.placements))} over {sizes}"


def _short(placement: object) -> str:
    """`S0` for a shard of dim 0 (`S0*` where strided, as TP under FSDP leaves it), `R` for a replica."""
    if placement.is_replicate():
        return "R"
    return f"S{placement.dim}" + ("*" if type(placement).__name__ == "_StridedShard" else "")
