"""What was measured, as plain data and as a table."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from trainers.field import BASE
from trainers.measure import Seen
from trainers.task import Task

AGREE_EARLY, AGREE_LATE = 1e-6, 1e-3
"""Relative differences of float32 losses that rounding explains, after a few steps and after all of them.

Sums are taken in another order under another layout, and training makes such a difference grow.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant under one layout."""

    contestant: str
    layout: str
    steps_per_s: float
    """Median over rounds."""
    ratio: float
    """Median over rounds of this one's seconds over the loop's by hand in the same round: above 1 is slower."""
    ratio_least: float
    ratio_most: float
    cpu_ratio: float
    """The same median of processor time, which tells overhead from waiting."""
    cpu_step_s: float
    """Processor time of a step, all ranks together: median over rounds."""
    peak_bytes: int | None
    """High-water mark of resident memory during the steps, in processes of its own; the rank with most."""
    added_bytes: int | None
    """Of these what set-up and steps added to a rank that had loaded torch."""
    early_loss: float
    last_loss: float
    same_loss: bool
    """Whether its losses are those of the loop by hand, so that the two did the same work."""


def rows(seen: dict[str, Seen], weights: dict[str, tuple[int, int]], steps: int) -> list[Row]:
    """One for each contestant."""
    base = seen[BASE]
    made = []
    for name, one in seen.items():
        ratios = [own / hand for own, hand in zip(one.seconds, base.seconds, strict=True)]
        cpu_ratios = [own / hand for own, hand in zip(one.cpu_seconds, base.cpu_seconds, strict=True)]
        peak, added = weights.get(name, (None, None))
        made.append(
            Row(
                contestant=name,
                layout=one.layout,
                steps_per_s=steps / statistics.median(one.seconds),
                ratio=statistics.median(ratios),
                ratio_least=min(ratios),
                ratio_most=max(ratios),
                cpu_ratio=statistics.median(cpu_ratios),
                cpu_step_s=statistics.median(one.cpu_seconds) / steps,
                peak_bytes=peak,
                added_bytes=added,
                early_loss=one.early_loss,
                last_loss=one.last_loss,
                same_loss=math.isclose(one.early_loss, base.early_loss, rel_tol=AGREE_EARLY)
                and math.isclose(one.last_loss, base.last_loss, rel_tol=AGREE_LATE),
            )
        )
    return made


def show(task: Task, made: list[Row], *, flops: int | None = None, peak_tflops: float | None = None) -> None:
    """The table of one model under one layout; with the share of the device's peak where both numbers are known."""
    print(f"\n{task.model} under {task.strategy}, ranks: {task.parallelism.world_size}")
    if flops is not None and peak_tflops is not None:
        used = ", ".join(f"{row.contestant} {flops * row.steps_per_s / (peak_tflops * 1e12):.1%}" for row in made)
        print(f"  {flops / 1e9:.3g} GFLOP a step by torch's count; of {peak_tflops:g} TFLOP/s: {used}")
    print(
        f"  {'':18} {'steps/s':>8} {'ratio':>6} {'least-most':>12} {'cpu':>8} {'ratio':>6} {'peak':>8} {'added':>8} "
        f"{'last loss':>10}  holds"
    )
    for row in made:
        spread = f"{row.ratio_least:.2f}-{row.ratio_most:.2f}"
        holds = row.layout if row is made[0] or row.layout != made[0].layout else "the same"
        loss = f"{row.last_loss:.6f}" + ("" if row.same_loss else " !")
        print(
            f"  {row.contestant:18} {row.steps_per_s:8.1f} {row.ratio:6.3f} {spread:>12} "
            f"{row.cpu_step_s * 1e3:6.1f}ms {row.cpu_ratio:6.3f} {_mib(row.peak_bytes):>8} {_mib(row.added_bytes):>8} "
            f"{loss:>10}  {holds}"
        )
    for row in made:
        if not row.same_loss:
            print(
                f"  ! {row.contestant} did not train alike: loss {row.early_loss:.8f} after the first steps and "
                f"{row.last_loss:.8f} at the end, by hand {made[0].early_loss:.8f} and {made[0].last_loss:.8f}; "
                "do not compare its speed"
            )
    for row in made:
        if row.layout != made[0].layout:
            print(f"  ! {row.contestant} does not hold what the loop by hand holds: its layout is another one")


def plain(task: Task, made: list[Row], seen: dict[str, Seen]) -> dict[str, Any]:
    """For JSON, every round's seconds included."""
    return {
        "model": task.model,
        "strategy": task.strategy,
        "ranks": task.parallelism.world_size,
        "contestants": {row.contestant: asdict(row) | asdict(seen[row.contestant]) for row in made},
    }


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"
