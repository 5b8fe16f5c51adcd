"""What one rank held, tensor by tensor, with the strategies below each other: what `--show RANK` prints.

It takes the place of the prints that people write by hand, rank by rank, to find out why two layouts disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from shardproof.report import spelling, values
from shardproof.report.data import Report, Shown
from shardproof.report.lines import GAP, INDENT, wrapped

MEANING = {
    "initial-state": "parameters and buffers before the first step",
    "batch": "inputs that the rank read",
    "forward": "outputs of modules",
    "loss": "what a step computes and what it would log",
    "backward": "gradients of activations",
    "gradient": "of parameters",
    "grad-norm": "over all parameters, and the clipping",
    "optimizer-state": "after the step",
    "update": "parameters after the step",
    "buffer": "buffers after the step",
    "checkpoint": "parameters, saved and loaded again",
}
"""The stages in causal order, and what each holds, for a reader who sees the word for the first time.

The order is that of `spec.stages.STAGES`; a test holds them together.
"""


def show(report: Report, rank: int, console: Console) -> None:
    """Print on `console` what `rank` held in every run of `report`."""
    for line in view(report, rank, console.width):
        console.print(line, soft_wrap=True, highlight=False)


def view(report: Report, rank: int, width: int) -> Iterator[Text]:
    """What `rank` held, by step, stage and canonical name; below each name, the strategies one after the other."""
    yield Text(f"rank {rank}: what it held", "bold")
    absent = [run.strategy for run in report.runs if not run.shown.get(rank)]
    if absent:
        yield from (Text(line, "yellow") for line in wrapped(f"nothing is known of it in {', '.join(absent)}", width))
    held = _by_tensor(report, rank)
    before: tuple[int, str] | None = None
    for (step, stage, name, part), pieces in held.items():
        if (step, stage) != before:
            before = (step, stage)
            meaning = f": {MEANING[stage]}" if stage in MEANING else ""
            yield Text()
            yield Text.assemble((f"{spelling.step(step)}, {stage}", "bold"), (meaning, "dim"))
        yield Text()
        yield from (Text(INDENT + line) for line in wrapped(spelling.with_part(name, part), width - len(INDENT)))
        yield from _pieces(_alike(pieces, len(report.runs)), width)
    yield Text()


_Key = tuple[int, str, str, str]
"""Step, stage, name, part."""


def _by_tensor(report: Report, rank: int) -> dict[_Key, list[tuple[str, Shown]]]:
    """Tensor -> (strategy, what the rank held of it), in causal order."""
    held: dict[_Key, list[tuple[str, Shown]]] = {}
    for run in report.runs:
        for piece in run.shown.get(rank, ()):
            held.setdefault((piece.step, piece.stage, piece.name, piece.part), []).append((run.strategy, piece))
    order = {stage: position for position, stage in enumerate(MEANING)}
    # Stable: within a stage, tensors stay in the order in which the runs recorded them.
    return dict(sorted(held.items(), key=lambda entry: (entry[0][0], order.get(entry[0][1], len(order)))))


def _alike(pieces: list[tuple[str, Shown]], runs: int) -> list[tuple[str, Shown]]:
    """Strategies that held the very same piece, bit by bit, stand together: what differs then stands out."""
    groups: dict[str, tuple[list[str], Shown]] = {}
    for strategy, piece in pieces:
        # As text, so that NaN is the same as NaN.
        groups.setdefault(repr((piece.shape, piece.layout, piece.values)), ([], piece))[0].append(strategy)
    if len(groups) == 1 and len(pieces) == runs > 1:
        return [("every run", pieces[0][1])]
    return [(", ".join(strategies), piece) for strategies, piece in groups.values()]


def _pieces(pieces: list[tuple[str, Shown]], width: int) -> Iterator[Text]:
    """One piece a line: whose, its shape and layout, and the values beside that or, without room, below."""
    who_width = max(len(who) for who, _ in pieces)
    leads = [f"{INDENT * 2}{who:<{who_width}}{GAP}{_kind(piece)}" for who, piece in pieces]
    blocks = [_values(piece, width - len(INDENT) * 3) for _, piece in pieces]
    start = max(map(len, leads)) + len(GAP)
    beside = start + max(len(line) for block in blocks for line in block) <= width
    for lead, block, (who, _) in zip(leads, blocks, pieces, strict=True):
        if beside:
            text = [f"{lead if position == 0 else '':<{start}}{line}" for position, line in enumerate(block)]
        else:
            text = [*wrapped(lead, width), *(f"{INDENT * 3}{line}" for line in block)]
        for position, line in enumerate(text):
            styled = Text(line.rstrip())
            if position == 0:
                styled.stylize("cyan", 0, len(INDENT) * 2 + len(who))
            yield styled


def _kind(piece: Shown) -> str:
    return f"[{', '.join(map(str, piece.shape))}] {piece.layout}".rstrip()


def _values(piece: Shown, width: int) -> list[str]:
    if piece.values is None:
        return ["(none)"]
    return values.lines(piece.values, piece.shape, width) if math.prod(piece.shape) else ["(no part of it)"]
