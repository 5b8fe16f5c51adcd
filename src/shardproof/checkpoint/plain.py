"""Plain Python data as JSON and back, without loss: tuples stay tuples, and not every float has a JSON number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardproof.checkpoint.stream import BY_NAME, NAMES
from shardproof.errors import CheckpointError
from shardproof.parallel.held import plain

LARGEST = 1024
"""Elements of a tensor that is written as numbers; larger ones belong into a safetensors file."""


def encode(value: Any, where: str) -> Any:
    """`value` as JSON can hold it. Numbers, texts and lists are themselves; all else is an object of one key.

    Raises `CheckpointError` that says `where` in the data there is something that is no plain data.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {"dict": {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}}
        return {"items": [[encode(k, where), encode(v, f"{where}[{k!r}]")] for k, v in value.items()]}
    if isinstance(value, Tensor) and value.numel() <= LARGEST and value.dtype in NAMES and not value.is_complex():
        numbers = encode(plain(value.detach()).tolist(), where)
        return {"tensor": numbers, "dtype": NAMES[value.dtype]}
    shown = f"a tensor of {value.numel()} elements" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise CheckpointError(
        f"{where} is {shown}, which a checkpoint cannot hold; keep numbers, texts, lists, tuples, dicts "
        f"and tensors of up to {LARGEST} real elements there"
    )


def decode(value: Any) -> Any:
    """What `encode` was given. Raises `CheckpointError` for what it never writes."""
    try:
        return _decoded(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"the index holds a value that shardproof never writes ({error}); it is damaged"
        ) from error


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"float": str(text)}:
            return float(text)
        case {"tuple": list(items)}:
            return tuple(_decoded(item) for item in items)
        case {"dict": dict(items)}:
            return {key: _decoded(item) for key, item in items.items()}
        case {"items": list(pairs)}:
            return {_decoded(key): _decoded(item) for key, item in pairs}
        case {"tensor": numbers, "dtype": str(name)} if name in BY_NAME:
            return torch.tensor(_decoded(numbers), dtype=BY_NAME[name])
    raise CheckpointError(
        f"the index holds {ascii(value)[:80]}, which is no value that shardproof writes; it is damaged"
    )
