"""The state of somebody's loader or stream as plain data that JSON can hold, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TAG = "@"
"""First character of the only key of a dict that stands for something that JSON has no word for."""


class NotPortable(TypeError):
    """Some value is neither plain data nor a tensor or array; the message names its place and type."""


def packed(value: Any, where: str = "state") -> Any:
    """`value` as a copy that JSON can hold: numbers, text, dicts, lists, tuples, bytes, tensors and arrays.

    Raises `NotPortable` for anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        pairs = [(key, packed(item, f"{where}[{key!r}]")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith(_TAG) for key, _ in pairs):
            return dict(pairs)
        return {"@dict": [[packed(key, f"{where}: key {key!r}"), item] for key, item in pairs]}
    if isinstance(value, list | tuple):
        items = [packed(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"@tuple": items}
    if isinstance(value, bytes):
        return {"@bytes": base64.b64encode(value).decode()}
    if isinstance(value, Tensor) and value.layout == torch.strided:
        # NumPy has no bfloat16, so the bytes are taken and the type is told beside them.
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _raw("@tensor", flat.numpy().tobytes(), str(value.dtype).removeprefix("torch."), value.shape)
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return _raw("@array", value.tobytes(), value.dtype.str, value.shape)
    raise NotPortable(f"{where} is a {type(value).__module__}.{type(value).__qualname__}")


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith(_TAG):
        return {key: unpacked(item) for key, item in value.items()}
    held = value[tag]
    if tag == "@dict":
        return {unpacked(key): unpacked(item) for key, item in held}
    if tag == "@tuple":
        return tuple(unpacked(item) for item in held)
    if tag == "@bytes":
        return base64.b64decode(held)
    raw, kind, shape = bytearray(base64.b64decode(held["bytes"])), held["dtype"], held["shape"]
    if tag == "@tensor":
        dtype = getattr(torch, kind)
        return torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
    array = np.frombuffer(raw, dtype=np.dtype(kind)).reshape(shape)
    return array if shape else array[()]


def _raw(tag: str, raw: bytes, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {tag: {"bytes": base64.b64encode(raw).decode(), "dtype": dtype, "shape": list(shape)}}
