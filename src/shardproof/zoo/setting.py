"""What a bug must not be recognised by: its seed, the width of its model and the sizes of its mesh axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardproof.errors import UsageError
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import parse


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to run the whole zoo. Raises `UsageError` for sizes that the fixtures cannot be cut into."""

    seed: int = 0
    """Of the weights, the data and the random draws."""

    width: int = 4
    """Features of a token per attention head, an even number; all other sizes of a model follow from it."""

    dp: int = 4
    """Ranks of a layout with one data axis."""

    tp: int = 4
    """Ranks of a layout with the tensor-parallel axis alone; it divides the number of heads."""

    grid: tuple[int, int] = (2, 2)
    """Ranks of a layout with two axes: the data axis (or `dp_replicate`) and then `tp` (or `dp_shard`)."""

    microbatches: int = 3
    """Micro-batches of an entry that has several."""

    def __post_init__(self) -> None:
        for name in ("seed", "width", "dp", "tp", "microbatches"):
            least = 0 if name == "seed" else 2
            if getattr(self, name) < least:
                raise UsageError(f"zoo: {name}={getattr(self, name)}; it must be at least {least}")
        if self.width % 2:
            raise UsageError(f"zoo: width={self.width}; it must be even, as rotary positions turn pairs of features")
        if min(self.grid) < 2:
            raise UsageError(f"zoo: grid={self.grid[0]}x{self.grid[1]}; both axes must have 2 ranks or more")

    def layout(self, kind: str) -> Parallelism:
        """The parallelism of a kind of layout: `ddp`, `fsdp`, `hsdp`, `tp`, `tp_ddp` or `tp_fsdp`."""
        first, second = self.grid
        degrees = {
            "ddp": f"dp_replicate={self.dp}",
            "fsdp": f"dp_shard={self.dp}",
            "hsdp": f"dp_replicate={first},dp_shard={second}",
            "tp": f"tp={self.tp}",
            "tp_ddp": f"dp_replicate={first},tp={second}",
            "tp_fsdp": f"dp_shard={first},tp={second}",
        }
        return parse(degrees[kind], None)

    @property
    def heads(self) -> int:
        """Attention heads: as many for every tensor-parallel rank."""
        return math.lcm(4, self.tp, self.grid[1])

    @property
    def batch(self) -> int:
        """Samples of a global batch: every layout cuts it into equal micro-batches of two or more."""
        return 2 * math.lcm(self.dp, self.grid[0] * self.grid[1]) * self.microbatches

    @property
    def length(self) -> int:
        """Tokens of a sample: as many for every tensor-parallel rank, as sequence parallelism cuts it into slices."""
        return math.lcm(self.tp, self.grid[1]) * (2 if self.tp > 2 else 4)


def grid(text: str) -> tuple[int, int]:
    """`2x3` -> (2, 3). Raises `UsageError` for anything else."""
    first, _, second = text.lower().partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        raise UsageError(f"zoo: --grid {text}: give the ranks of two axes, as in 2x3")
    return int(first), int(second)
