"""The sketches of one tensor on many ranks, read at once: a few hundred bytes of every rank's file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shardproof.trace.folder.line import SKETCH_SHAPE, Kept
from shardproof.trace.folder.reader import RankTrace


def read_sketches(held: Sequence[tuple[RankTrace, Kept]]) -> dict[torch.dtype, Tensor]:
    """Dtype -> the sketches of that dtype, in their order, shape (sketches, 16, 16), in memory of their own.

    Raises `TraceError` where a file has changed since its index was read.
    """
    found: dict[torch.dtype, list[np.ndarray]] = {}
    for trace, kept in held:
        if kept.sketch_dtype is not None:
            found.setdefault(kept.sketch_dtype, []).append(trace.words(kept))
    return {
        dtype: torch.from_numpy(np.concatenate(parts)).view(dtype).view(-1, *SKETCH_SHAPE)
        for dtype, parts in found.items()
    }
