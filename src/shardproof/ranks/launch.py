"""What torchrun says in the environment about the process it has started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shardproof.errors import UsageError

RANKS = 4
"""How many a named strategy has where neither the user nor a launcher says it."""
_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One process of a launch by torchrun, or by anything that sets the same variables."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this machine."""
    host: str
    port: int
    agent_store: bool
    """Whether the launcher hosts the store at `host:port`; if not, rank 0 has to."""
    attempt: str
    """Torchrun's restart count: the keys of an attempt that failed must not be read by the next."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch | None:
        """The launch that this process is part of, or None. Raises `UsageError` where only a part of it is set."""
        missing = [name for name in _REQUIRED if name not in environment]
        if missing:
            if "TORCHELASTIC_RUN_ID" in environment:
                raise UsageError(f"TORCHELASTIC_RUN_ID is set, but {', '.join(missing)} is not: start me with torchrun")
            return None
        try:
            world_size = int(environment["WORLD_SIZE"])
            return cls(
                rank=int(environment["RANK"]),
                world_size=world_size,
                local_rank=int(environment["LOCAL_RANK"]),
                local_world_size=int(environment.get("LOCAL_WORLD_SIZE", world_size)),
                host=environment["MASTER_ADDR"],
                port=int(environment["MASTER_PORT"]),
                agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            )
        except ValueError as error:
            values = ", ".join(f"{name}={environment[name]}" for name in _REQUIRED)
            raise UsageError(f"the launcher's environment does not hold numbers ({values}): {error}") from None


def ranks_or_launched(ranks: int | None) -> int:
    """`ranks`, or as many as a launcher has started, or `RANKS`. Raises `UsageError` as `Launch.of` does."""
    if ranks is not None:
        return ranks
    launch = Launch.of(os.environ)
    return RANKS if launch is None else launch.world_size
