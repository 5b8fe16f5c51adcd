"""The values of a tensor as lines of aligned numbers: small ones whole, big ones by their size and first values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from shardproof.report.lines import GAP, wrapped

SMALL = 64
"""Elements of a tensor that is printed whole: a matrix of 8 x 8."""

FIRST = 8
"""Values of a big tensor that are printed."""

DECIMALS = 4
"""As torch prints tensors: enough to tell numbers apart, few enough to scan."""


def lines(values: object, shape: tuple[int, ...], width: int) -> list[str]:
    """`values` (nested lists of `shape`), rounded, one row of the last dim a line, in at most `width` characters."""
    flat = list(_flat(values))
    if len(flat) > SMALL:
        return _summary(flat, width)
    cells = _spelled(flat)
    row = shape[-1] if shape else 1
    if max(map(len, cells)) * row + len(GAP) * (row - 1) > width:
        return wrapped(" ".join(cells), width)
    indices = _leading(shape)
    printed: list[str] = []
    for position, start in enumerate(range(0, len(cells), row)):
        if len(shape) > 2 and position % shape[-2] == 0:
            printed.append(f"[{', '.join(map(str, indices[position // shape[-2]]))}, :, :]")
        printed.append(GAP.join(cells[start : start + row]))
    return printed


def _flat(values: object) -> Iterator[float]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, bool | int | float):
        yield values
    else:
        raise TypeError(f"{values!r} is not a number: a shown tensor holds nested lists of numbers")


def _leading(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every index into all dims but the last two, in order."""
    found: list[tuple[int, ...]] = [()]
    for size in shape[:-2]:
        found = [(*index, position) for index in found for position in range(size)]
    return found


def _spelled(flat: Sequence[float]) -> list[str]:
    """All in one notation and of one width; an exact zero is a bare 0, so that it is not taken for a small value."""
    sizes = [abs(value) for value in flat if isinstance(value, float) and value and math.isfinite(value)]
    # Fixed notation while it neither rounds everything away nor prints digits that mean nothing.
    form = "f" if not sizes or (max(sizes) < 1e5 and max(sizes) >= 1e-3) else "e"
    cells = [_one(value, form) for value in flat]
    longest = max(map(len, cells))
    return [cell.rjust(longest) for cell in cells]


def _one(value: float, form: str) -> str:
    if isinstance(value, int):
        return str(value)
    return "0" if value == 0 else f"{value:.{DECIMALS}{form}}"


def _summary(flat: Sequence[float], width: int) -> list[str]:
    finite = [value for value in flat if math.isfinite(value)]
    facts = [f"{len(flat)} values"]
    if finite:
        low, high, mean = (
            cell.strip() for cell in _spelled([float(min(finite)), float(max(finite)), sum(finite) / len(finite)])
        )
        facts += [f"from {low} to {high}", f"mean {mean}"]
    if len(finite) < len(flat):
        facts.append(f"{len(flat) - len(finite)} NaN or infinite")
    first = " ".join(cell.strip() for cell in _spelled(flat[:FIRST]))
    return [*wrapped(", ".join(facts), width), *wrapped(f"first: {first} ...", width)]
