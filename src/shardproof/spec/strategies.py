"""From the name of a strategy and a number of ranks to degrees per mesh axis."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from shardproof.errors import StrategyError
from shardproof.spec.parallelism import AXES, Parallelism

STRATEGIES: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": ("dp_replicate",),
    "fsdp": ("dp_shard",),
    "hsdp": ("dp_replicate", "dp_shard"),
    "tp": ("tp",),
    "tp_ddp": ("tp", "dp_replicate"),
    "tp_fsdp": ("tp", "dp_shard"),
    "tp_hsdp": ("tp", "dp_replicate", "dp_shard"),
    "fsdp1": ("dp_shard",),
    "tp_fsdp1": ("tp", "dp_shard"),
}
"""Name -> the axes that it uses. Every axis but the last gets 2 ranks, the last one all that are left."""

FLAT = frozenset({"fsdp1", "tp_fsdp1"})
"""The strategies on FSDP's older flat parameters."""


def named(name: str, ranks: int) -> Parallelism:
    """The degrees of a named strategy on `ranks` ranks; `single` always takes one.

    Raises `StrategyError` with the arithmetic where the ranks cannot be divided that way.
    """
    strategy = canonical_name(name)
    axes = STRATEGIES[strategy]
    if not axes:
        return Parallelism(strategy=strategy)
    outer = 2 ** (len(axes) - 1)
    rest, left_over = divmod(ranks, outer)
    if left_over or rest < 2:
        arithmetic = " x ".join([*(f"{axis} 2" for axis in axes[:-1]), f"{axes[-1]} n"])
        possible = f"{2 * outer}, {3 * outer}, {4 * outer} ..."
        raise StrategyError(
            f"{strategy} lays out {arithmetic} (n at least 2) and does not fit {ranks} ranks; "
            f"it fits {possible}, or give degrees such as --strategy {','.join(f'{a}=2' for a in axes)}"
        )
    degrees = dict.fromkeys(axes, 2) | {axes[-1]: rest}
    return _of(degrees, strategy)


def parse(text: str | Parallelism, ranks: int | None) -> Parallelism:
    """A strategy as a user writes it: a name (`tp-fsdp`), explicit degrees (`tp=2,dp_shard=3`), or a Parallelism.

    Explicit degrees bring their own number of ranks. Raises `StrategyError` for anything else.
    """
    if isinstance(text, Parallelism):
        return text
    if not isinstance(text, str):
        raise StrategyError(
            f"a strategy is a name, degrees or a Parallelism, and {text!r} is none of them; "
            "give 'fsdp' or 'tp=2,dp_shard=2'"
        )
    if "=" not in text:
        if ranks is None:
            raise StrategyError(f"{text}: a named strategy needs a number of ranks (--ranks)")
        return named(text, ranks)
    degrees: dict[str, int] = {}
    for item in text.split(","):
        axis, _, number = (part.strip() for part in item.partition("="))
        axis = axis.replace("-", "_")
        if axis not in AXES:
            raise StrategyError(f"{text}: there is no axis {axis!r}; the axes are {', '.join(AXES)}")
        if axis in degrees:
            raise StrategyError(f"{text}: the axis {axis} is given twice")
        if not number.isdecimal() or int(number) < 1:
            raise StrategyError(f"{text}: {axis} is {number!r}; a degree is a whole number of at least 1")
        degrees[axis] = int(number)
    return _of(degrees, ",".join(f"{axis}={n}" for axis, n in degrees.items()))


def _of(degrees: dict[str, int], strategy: str) -> Parallelism:
    return Parallelism(
        dp_replicate=degrees.get("dp_replicate", 1),
        dp_shard=degrees.get("dp_shard", 1),
        tp=degrees.get("tp", 1),
        flat_parameters=strategy in FLAT,
        strategy=strategy,
    )


def fitting(ranks: int, *, tp: bool) -> tuple[str, ...]:
    """Names of all strategies that fit `ranks` ranks; those that use `tp` only if `tp` is true."""
    names = []
    for name, axes in STRATEGIES.items():
        if "tp" in axes and not tp:
            continue
        try:
            named(name, ranks)
        except StrategyError:
            continue
        names.append(name)
    return tuple(names)


def canonical_name(name: str) -> str:
    """`TP-FSDP` -> `tp_fsdp`. Raises `StrategyError` with near names where there is no such strategy."""
    strategy = name.strip().lower().replace("-", "_")
    if strategy not in STRATEGIES:
        raise StrategyError(f"there is no strategy {name!r}; {suggest(strategy, STRATEGIES)}")
    return strategy


def suggest(name: str, names: Iterable[str]) -> str:
    """`did you mean a or b? (all: ...)`, for error messages."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    every = f"all: {', '.join(names)}" if names else "there are none"
    return f"did you mean {' or '.join(near)}? ({every})" if near else every
