"""Loss scaling for float16, decided alike on all ranks.

torch's GradScaler asks the gradients of one rank whether they are finite. Where they are sharded, a rank may overflow
alone, skip its step alone, and every rank goes on with other weights. Here one small reduction makes the overflow of
one rank everybody's, whatever mesh a gradient lies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardproof.parallel.held import plain

LARGEST = 2.0**127
"""The largest power of two in float32."""


@dataclass
class LossScaler:
    """The factor on the loss, with the defaults of torch.amp.GradScaler."""

    scale: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000
    """Steps in a row without an overflow after which the scale grows."""

    good_steps: int = 0
    """Steps without an overflow since the scale last changed."""

    skipped: bool = False
    """Whether the last step found an overflow, and so changed no weight."""

    def unscale_(self, gradients: Sequence[Tensor], device: torch.device) -> bool:
        """Take the scale out of `gradients`, in place; whether they are finite on all ranks.

        A collective over the default process group, on `device`.
        """
        local = [plain(gradient) for gradient in gradients]
        overflow = torch.zeros(1, device=device)
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for gradient in local:
            by_kind.setdefault(gradient.dtype, []).append(gradient)
        for same in by_kind.values():
            torch._amp_foreach_non_finite_check_and_unscale_(
                same, overflow, torch.full((1,), 1 / self.scale, device=device)
            )
        dist.all_reduce(overflow, op=dist.ReduceOp.MAX)
        self.skipped = bool(overflow.item())
        return not self.skipped

    def update(self) -> None:
        """Shrink the scale after an overflow, grow it after many steps without one."""
        if self.skipped:
            self.scale *= self.backoff
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            # Gradients that are exactly zero never overflow, and an infinite scale would make NaN of them.
            self.scale = min(self.scale * self.growth, LARGEST)
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a run that is gone on with needs."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
