"""Move numbers by one unit in the last place, to see how far rounding alone moves everything that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

LOSS_SCALES = (1.0, 1.125, 0.875, 1.375, 0.8125, 1.625, 0.6875)
"""Factors on the loss of a disturbed run: exact in bfloat16 too, and no powers of two, so that every product in the
backward pass is rounded anew. Without them the long sums of a gradient (over all tokens) round the same way in every
draw, as one unit in the last place of a small term does not move a large sum, and the floor comes out too low.

The first draw has none: a gradient that does not grow with the loss (of an auxiliary loss that is hung onto an
activation) would pass for noise of its own size otherwise."""


class Disturbance:
    """Random one-ulp changes of a model's parameters and of its inputs, the same for the same `draw`."""

    def __init__(self, draw: int) -> None:
        self.loss_scale = LOSS_SCALES[draw % len(LOSS_SCALES)]
        """To be put on the loss, and taken out of every gradient again."""
        self._generator = torch.Generator().manual_seed(0x5EED + draw)

    def model_(self, model: nn.Module) -> None:
        """Disturb every floating parameter of `model` in place."""
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.copy_(self.tensor(parameter))

    def batch(self, batch: Any) -> Any:
        """The batch with every floating tensor disturbed."""
        return tree_map_only(Tensor, lambda t: self.tensor(t) if t.is_floating_point() else t, batch)

    def tensor(self, tensor: Tensor) -> Tensor:
        """Each element moved up or down by about one unit in its last place; zeros stay zero."""
        signs = torch.randint(0, 2, tensor.shape, generator=self._generator).mul_(2).sub_(1).to(tensor.device)
        step = torch.finfo(tensor.dtype).eps * signs.to(torch.float64)
        # In float64, so that a half-precision 1 + eps is not rounded before it is applied.
        return (tensor.detach().to(torch.float64) * (1 + step)).to(tensor.dtype)
