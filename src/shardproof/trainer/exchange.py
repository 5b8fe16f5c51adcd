"""What ranks tell each other while they train: losses, the clock, and whether one of them has been asked to stop.

Done every step, such a reduction would cost as much as a small model's own. So it is put off until about a second is
over, and then holds the losses of all steps since the last time: none is left out, and all ranks decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

EVERY_S = 1.0
"""How long an exchange may be put off: how late a loss may be shown, or a signal heeded."""

MOST_STEPS = 1000
"""Steps of an exchange at most."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """The same on every rank."""

    losses: list[float]
    """Global loss of each step since the last exchange."""

    stop: bool
    """Whether any rank has been asked to stop."""

    elapsed_s: float
    """Rank 0's clock."""


class Exchange:
    """Collects this rank's losses until they are exchanged."""

    def __init__(self, *, data_ranks: int, data_rank: int, is_first_peer: bool, device: torch.device) -> None:
        self._data_ranks = data_ranks
        self._speaks = is_first_peer
        """Tensor-parallel peers have the same loss: one of them tells it."""
        self._speaks_for_all = is_first_peer and data_rank == 0
        self._device = device
        self._losses: list[Tensor | float] = []
        self._is_global: list[bool] = []
        self._every = 1
        self._last_s = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time; the same on every rank."""
        return len(self._losses) >= self._every

    @property
    def waiting(self) -> bool:
        """Whether there are losses that have not been exchanged; the same on every rank."""
        return bool(self._losses)

    def start(self, elapsed_s: float) -> None:
        """The clock starts at `elapsed_s`."""
        self._last_s = elapsed_s
        self._every = 1

    def add(self, loss: Tensor | float, *, is_global: bool) -> None:
        """This rank's loss of one step; `is_global` where it is that of the whole batch already."""
        self._losses.append(loss)
        self._is_global.append(is_global)

    def run(self, *, stop: bool, elapsed_s: float) -> Exchanged:
        """Exchange what was collected. A collective over the default process group."""
        steps = len(self._losses)
        told = torch.zeros(steps + 2, dtype=torch.float64, device=self._device)
        if steps and self._speaks:
            own = torch.stack([_number(loss).to(self._device) for loss in self._losses])
            is_global = torch.tensor(self._is_global, device=self._device)
            # Chosen, not multiplied by zero: a loss may be NaN.
            whole = own if self._speaks_for_all else torch.zeros_like(own)
            told[:steps] = torch.where(is_global, whole, own / self._data_ranks)
        told[steps] = float(stop)
        if dist.get_rank() == 0:
            told[steps + 1] = elapsed_s
        dist.all_reduce(told)
        *losses, stops, elapsed_s = told.tolist()
        self._losses.clear()
        self._is_global.clear()
        if steps:
            self._pace(steps, elapsed_s)
        return Exchanged(losses=losses, stop=stops > 0, elapsed_s=elapsed_s)

    def _pace(self, steps: int, elapsed_s: float) -> None:
        """Choose the number of steps until the next exchange from numbers that all ranks have."""
        per_step_s = max((elapsed_s - self._last_s) / steps, 1e-6)
        # Grown slowly: the first steps are slower than the others, or much faster than the one after.
        self._every = max(1, min(int(EVERY_S / per_step_s), 4 * steps, MOST_STEPS))
        self._last_s = elapsed_s


def _number(loss: Tensor | float) -> Tensor:
    """Shape `()`, in float64."""
    return torch.as_tensor(loss).detach().reshape(()).to(torch.float64)
