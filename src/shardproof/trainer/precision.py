"""From the name of a precision to dtypes and to autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardproof.spec.training import Precision

COMPUTED_IN: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that autocast, over weights in float32."""


def weights_in(precision: Precision) -> torch.dtype:
    """The dtype of parameters, gradients and optimizer state."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocasting(function: Callable[..., Any], precision: Precision, device_type: str) -> Callable[..., Any]:
    """`function` (of a model and a batch) under autocast, where the precision asks for it.

    Without autocast's cache of cast weights: it would keep FSDP's gathered weights alive, and add up the gradients of
    tied weights in low precision.
    """
    if precision not in COMPUTED_IN:
        return function

    def low(*args: Any) -> Any:
        with torch.autocast(device_type, dtype=COMPUTED_IN[precision], cache_enabled=False):
            return function(*args)

    return low
