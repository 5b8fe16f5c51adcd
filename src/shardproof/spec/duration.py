"""How long to train, or how often to do something: `2ep`, `500ba`, `100000sp`, `1h`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shardproof.errors import UsageError

Unit: TypeAlias = Literal["ep", "ba", "sp", "s"]

_SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


@dataclass(frozen=True, slots=True)
class Duration:
    """A stretch of training."""

    count: float
    """How much of it, above 0. Whole where the unit is not time."""

    unit: Unit
    """`ep` epochs, `ba` optimizer steps (global batches), `sp` samples over all ranks, `s` seconds."""

    def __post_init__(self) -> None:
        if self.unit not in ("ep", "ba", "sp", "s"):
            raise UsageError(f"Duration: there is no unit {self.unit!r}; there are ep, ba, sp and s")
        if not 0 < self.count < math.inf or (self.unit != "s" and self.count != int(self.count)):
            raise UsageError(f"Duration: {self.count!r} {self.unit}; give a number above 0, whole but for seconds")

    def __str__(self) -> str:
        return f"{self.count:g}{self.unit}"


def parse_duration(value: str | Duration, *, field: str = "max_duration") -> Duration:
    """`2ep`, `500ba`, `100000sp`, `90s`, `30min`, `1h`, `2d`, with the names of Composer's time units.

    Raises `UsageError`, naming `field`, for anything else.
    """
    if isinstance(value, Duration):
        return value
    match = _TEXT.fullmatch(value) if isinstance(value, str) else None
    unit = match[2].lower() if match else ""
    if match is None or unit not in {"ep", "ba", "sp", *_SECONDS}:
        raise UsageError(
            f"{field}={value!r} is no duration; write a number and a unit: 2ep (epochs), 500ba (batches, which are "
            "optimizer steps), 100000sp (samples), 90s, 30min or 1h"
        )
    count = float(match[1])
    if not 0 < count < math.inf:
        raise UsageError(f"{field}={value!r}: a duration is longer than nothing, and has an end")
    if unit in _SECONDS:
        return Duration(count * _SECONDS[unit], "s")
    if count != int(count):
        raise UsageError(f"{field}={value!r}: give a whole number of {unit}")
    return Duration(int(count), unit)  # type: ignore[arg-type]  # one of the three that are left
