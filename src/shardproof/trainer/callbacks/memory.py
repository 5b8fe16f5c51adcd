"""Log how much memory ranks use."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from shardproof.trainer.callback import Callback

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop

STATUS = Path("/proc/self/status")
"""What Linux tells of a process. Its peak is this process's own; `getrusage` tells a parent's in some kernels."""


class MemoryMonitor(Callback):
    """Logs the memory of the rank that uses most, whenever losses are logged, in GiB (2**30 bytes).

    On CUDA `memory/allocated_gib`, `memory/peak_allocated_gib` and `memory/peak_reserved_gib`, of torch's allocator;
    else `memory/resident_gib` and `memory/peak_resident_gib`, of the process. All ranks take part, as the one that runs
    out first need not be rank 0.
    """

    def losses(self, loop: Loop, first_step: int, losses: list[float]) -> None:
        """Ask every rank and log the largest."""
        del first_step, losses
        used = _on_cuda(loop.device) if loop.device.type == "cuda" else _of_process()
        largest = torch.tensor(list(used.values()), dtype=torch.float64, device=loop.device)
        if dist.is_initialized():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        loop.log({f"memory/{name}_gib": value / 2**30 for name, value in zip(used, largest.tolist(), strict=True)})


def _on_cuda(device: torch.device) -> dict[str, int]:
    """Bytes of torch's allocator."""
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
    }


def _of_process() -> dict[str, int]:
    """Bytes of this process that are in memory."""
    if not STATUS.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_resident": peak}
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    # The kernel counts in batches, and may be some pages behind with either.
    return {"resident": resident, "peak_resident": max(resident, peak)}
