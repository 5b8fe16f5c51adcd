"""How numbers, ranks, layouts, names and durations are spelled in a report. Plain ASCII, so that any log shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import PurePath

from shardproof.spec.parallelism import AXES

LARGEST_DENOMINATOR = 64
"""Factors of reduction bugs are products of axis sizes and micro-batch counts: small fractions."""

DIGITS = 6
"""Significant digits of a value where nothing asks for more."""

ROOT = "(root)"
"""How a trace names the model itself."""

OF_THE_WHOLE = ("batch", "loss", "grad-norm")
"""Stages that have no tensor for each module: naming the model as well says nothing."""

SHORTEST_NAME = 20
"""Characters that a tensor's name keeps however little room there is."""

ALL_DIGITS = 17
"""Significant digits that tell any two float64 numbers apart."""


def printable(text: str, keep: str = "") -> str:
    """`text` with escapes for the characters that would steer a terminal, except those to `keep`.

    Names and messages come from whoever wrote a recording or a model.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def apart(first: str, second: str) -> tuple[str, str]:
    """Two paths by as many of their last parts as tell them apart: `single` and `tp2`, `old/tp2` and `new/tp2`."""
    one, two = (PurePath(path).parts or (path,) for path in (first, second))
    for count in range(1, max(len(one), len(two))):
        if one[-count:] != two[-count:]:
            return str(PurePath(*one[-count:])), str(PurePath(*two[-count:]))
    return first, second


def number(value: float, digits: int = 4) -> str:
    """`0.00123`, `4.1e+14`, `nan`: a few significant digits, whatever the size."""
    return f"{value:.{digits}g}"


def factor(value: float) -> str:
    """`0.5`, `0.3333 (1/3)`: with the fraction of small numbers that it stands for, where there is one."""
    spelled = number(value)
    if not math.isfinite(value) or value == 0 or float(spelled) == value:
        return spelled
    fraction = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
    # 1e-4: factors are fitted to measured tensors, in bfloat16 too.
    return f"{spelled} ({fraction})" if abs(float(fraction) - value) <= 1e-4 * abs(value) else spelled


def digits_apart(pairs: Iterable[tuple[float, float]]) -> int:
    """Significant digits at which both numbers of every pair look different, as far as they are."""
    needed = DIGITS
    for got, want in pairs:
        if number(got, ALL_DIGITS) == number(want, ALL_DIGITS):
            continue
        while number(got, needed) == number(want, needed):
            needed += 1
    return needed


def floors(distance: float) -> str:
    """`1.2 floors`, `4.1e+14 floors`, `NaN`: an error in units of the noise floor."""
    if math.isnan(distance):
        return "NaN"
    if math.isinf(distance):
        # The floor is 0: integers, copies.
        return "not bitwise equal"
    return f"{distance:.1f} floors" if distance < 100 else f"{number(distance, 2)} floors"


def ranks(numbers: Iterable[int]) -> str:
    """`0-3,7`: runs of ranks are joined."""
    spans: list[list[int]] = []
    for rank in sorted(set(numbers)):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ",".join("-".join(map(str, span)) for span in spans)


def of_ranks(numbers: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-3,7`, or the empty text where there is none."""
    listed = set(numbers)
    return f"rank{'s' if len(listed) > 1 else ''} {ranks(listed)}" if listed else ""


def step(index: int) -> str:
    """`step 2`, or `before step 0`."""
    return f"step {index}" if index >= 0 else "before step 0"


def degrees(mesh: Mapping[str, int]) -> str:
    """`dp_shard 2 x tp 2`: the mesh axes that are really used, outermost first; `1 rank` where there is none."""
    order = (*(axis for axis in AXES if axis in mesh), *(axis for axis in mesh if axis not in AXES))
    return " x ".join(f"{axis} {mesh[axis]}" for axis in order if mesh[axis] > 1) or "1 rank"


def duration(seconds: float) -> str:
    """`0.3 s`, `42 s`, `3 min 20 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


def count(number_of: int, noun: str) -> str:
    """`1 tensor`, `3 tensors`, `2 strategies`."""
    if number_of == 1:
        return f"1 {noun}"
    return f"{number_of} {noun[:-1]}ies" if noun.endswith("y") else f"{number_of} {noun}s"


def shorten(name: str, width: int) -> str:
    """`blocks.11...k_proj.bias`: cut in the middle, as both ends of a dotted name carry the meaning."""
    if len(name) <= width:
        return name
    # The end gets more: it says which parameter, the beginning only which block.
    tail = max((width - 3) * 3 // 5, 1)
    head = max(width - 3 - tail, 1)
    return f"{name[:head].rstrip('.')}...{name[-tail:].lstrip('.')}"


def with_part(name: str, part: str) -> str:
    """`batch[0]` for a leaf of a structure, `fc1.weight [exp_avg]` for anything else; the name alone without a part."""
    if not part:
        return name
    return f"{name}{part}" if part.startswith("[") else f"{name} [{part}]"


def tensor(stage: str, name: str, part: str = "", room: int = 1000) -> str:
    """`gradient of blocks.0.fc1.weight`: one tensor of a step, its name shortened where `room` is too small."""
    suffix = with_part("", part)
    if name == stage or (name == ROOT and stage in OF_THE_WHOLE):
        return f"{stage}{suffix}"
    lead = f"{stage} of "
    return f"{lead}{shorten(name, max(room - len(lead) - len(suffix), SHORTEST_NAME))}{suffix}"
