"""What planted faults showed: how many a check would have caught, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from shardproof.report import spelling
from shardproof.report.data import Planted, Proof
from shardproof.report.lines import GAP, INDENT, heading, item


def proofs(found: Sequence[Proof], width: int, *, verbose: bool = False) -> Iterator[Text]:
    """A line a strategy, and below it what it missed; `verbose` adds what was caught and what does not apply."""
    if not found:
        return
    yield from heading("planted faults: would this check have caught them?")
    for proof in found:
        style = "green" if not proof.missed else "yellow"
        said = f"caught {proof.caught} of {spelling.count(len(proof.planted), 'planted fault')}"
        yield from item(f"{proof.strategy}: {said}", width, style=style)
        for planted in proof.planted:
            if not planted.caught or verbose:
                yield from item(_said(planted), width, indent=INDENT + GAP)
        if verbose:
            for fault, reason in proof.left_out.items():
                yield from item(f"does not apply: {fault}: {reason}", width, indent=INDENT + GAP)


def _said(planted: Planted) -> str:
    if not planted.caught:
        return f"missed: {planted.fault} ({planted.place}): {planted.reason}"
    if planted.stage is None:
        return f"caught: {planted.fault} ({planted.place}): {planted.reason}"
    at = spelling.tensor(planted.stage, planted.where or "")
    return f"caught: {planted.fault} ({planted.place}): {spelling.step(planted.step or 0)}, {at}: {planted.cause}"
