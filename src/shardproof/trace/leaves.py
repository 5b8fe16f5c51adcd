"""The tensors inside a batch or a module's output, each with its path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path


def leaves(value: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in tuples, lists, dicts and whatever else is registered with torch's pytree.

    The path is empty for a bare tensor, `[0]` or `['logits']` inside.
    """
    if isinstance(value, Tensor):
        yield "", value
        return
    for path, leaf in tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            yield keystr(path), leaf
