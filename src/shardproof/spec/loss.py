"""A loss whose mean is not over samples: ragged token counts, class weights, masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossSum:
    """The loss of a batch as a sum and what to divide it by, so that the mean is exact however it is cut.

    The mean of the per-rank means is wrong where ranks hold different numbers of tokens. A loss that returns
    its sum and its count instead is divided once, by the count over all ranks and micro-batches.
    """

    total: Tensor
    """Sum of the losses, shape `()`; gradients flow from it."""

    count: Tensor | int | float
    """What the sum is divided by (tokens, for instance), as a number or a tensor of shape `()`."""
