"""How large each parameter is as a whole, where plain tensors are parts of it and nobody said so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from shardproof.trace.trace import Trace

SHAPED = frozenset({"initial-state", "gradient", "update"})
"""Stages in which a record has the shape of its parameter or buffer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What the ranks of one run hold of a parameter or buffer."""

    shape: tuple[int, ...]
    """Of the whole where that is declared, else of the tensor that the first rank holds."""
    declared: bool


def held(traces: Sequence[Trace], rename: Callable[[str], str] = str) -> dict[str, Held]:
    """Name -> what is held of it, parameters and buffers, in the order in which they were recorded."""
    found: dict[str, Held] = {}
    for trace in traces:
        for record in trace.records:
            if record.stage not in SHAPED or record.part or record.piece is None:
                continue
            name = rename(record.name)
            if name not in found or (record.piece.declared and not found[name].declared):
                found[name] = Held(shape=record.piece.whole, declared=record.piece.declared)
        if found:
            # Every rank holds some of every parameter, if nothing of it.
            break
    return found


def whole_shapes(
    first: Mapping[str, Held],
    second: Mapping[str, Held],
    degrees: tuple[int, int],
    worlds: tuple[int, int],
    apart: Collection[str] = (),
) -> dict[str, tuple[int, ...]]:
    """Name -> shape on one device, of what both runs hold; `degrees` are their ranks per tp group, `worlds` all ranks.

    What a DTensor declares is right, as is what a run on one rank holds; else a dim in which the two runs' parts differ
    is the one that is cut. Where they do not differ, and the ranks' values do (`apart`), they are cut alike: put one
    after the other along the first dim they make up something that is the same on both sides.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in first.keys() & second.keys():
        one, two = first[name], second[name]
        known = [h for h, world in ((one, worlds[0]), (two, worlds[1])) if h.declared or world == 1]
        if known:
            # A part may be declared as if it were the whole: FSDP over hand-written tensor parallelism.
            found[name] = max((h.shape for h in known), key=prod)
        elif len(one.shape) == len(two.shape) and one.shape != two.shape:
            joint = tuple(
                a if a == b else a * degrees[0] if a * degrees[0] == b * degrees[1] else 0
                for a, b in zip(one.shape, two.shape, strict=True)
            )
            if all(joint):
                found[name] = joint
        elif name in apart and one.shape and degrees[0] == degrees[1] > 1:
            found[name] = (one.shape[0] * degrees[0], *one.shape[1:])
    return found


def split(own: Mapping[str, Held], other: Mapping[str, Held], world_size: int) -> int:
    """Over how many ranks plain parameters are cut, seen by what the other run holds whole; 1 where none is."""
    times = {
        prod(other[name].shape) // prod(one.shape)
        for name, one in own.items()
        if not one.declared and name in other and 0 < prod(one.shape) < prod(other[name].shape)
    }
    return max((n for n in times if world_size % n == 0), default=1)
