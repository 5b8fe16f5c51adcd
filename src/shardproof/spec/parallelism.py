"""How a run is laid out: ranks per mesh axis, under a name or as explicit degrees."""

from __future__ import annotations

from dataclasses import dataclass

from shardproof.errors import StrategyError

AXES = ("dp_replicate", "dp_shard", "tp")
"""Mesh axes, outermost first: tensor-parallel peers are neighbours, as they talk most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """Ranks per mesh axis. Their product is the number of ranks.

    Raises `StrategyError` for degrees below 1.
    """

    dp_replicate: int = 1
    """Ranks that hold whole replicas and average their gradients (DDP, the outer axis of HSDP)."""

    dp_shard: int = 1
    """Ranks that share the storage of every parameter (FSDP)."""

    tp: int = 1
    """Ranks that share each weight matrix and its arithmetic."""

    flat_parameters: bool = False
    """Whether `dp_shard` is FSDP's older flat-parameter form (`fsdp1`) instead of fully_shard."""

    strategy: str = ""
    """The name it was asked for by, as `tp_fsdp` or `tp=2,dp_shard=2`; derived from the degrees when empty."""

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
                raise StrategyError(f"{axis}={degree!r}: a degree is a whole number of at least 1")
        if not self.strategy:
            object.__setattr__(self, "strategy", self._degrees() or "single")

    @property
    def dp(self) -> int:
        """Data-parallel ranks: the parts into which a global batch is cut, before micro-batches."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp * self.tp

    @property
    def degrees(self) -> tuple[int, int, int]:
        """Sizes of the mesh axes, in the order of `AXES`."""
        return (self.dp_replicate, self.dp_shard, self.tp)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` lies on the mesh: axis -> index, and `dp`, the index on the two data axes flattened."""
        rest, tp = divmod(rank, self.tp)
        replicate, shard = divmod(rest, self.dp_shard)
        return {"dp_replicate": replicate, "dp_shard": shard, "tp": tp, "dp": rest}

    def _degrees(self) -> str:
        return ",".join(f"{axis}={n}" for axis, n in zip(AXES, self.degrees, strict=True) if n > 1)

    def __str__(self) -> str:
        return f"{self.strategy} ({self._degrees() or 'one rank'})"
