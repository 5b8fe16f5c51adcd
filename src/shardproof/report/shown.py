"""What one rank held, taken from its trace."""

from __future__ import annotations

from shardproof.parallel.piece import Piece
from shardproof.report.data import Shown
from shardproof.trace.trace import Trace


def shown_by(trace: Trace) -> tuple[Shown, ...]:
    """Every tensor of a trace as plain numbers, in the order in which the rank saw them."""
    return tuple(
        Shown(
            step=record.step,
            stage=record.stage,
            name=record.name,
            part=record.part,
            layout=place(record.piece),
            shape=() if record.missing else tuple(trace.tensor(number).shape),
            values=None if record.missing else trace.tensor(number).tolist(),
        )
        for number, record in enumerate(trace.records)
    )


def place(piece: Piece | None) -> str:
    """Where a piece lies: `[0:2, 0:4] of (4, 4)`; empty for the whole, and for activations of unknown place."""
    if piece is None or (piece.local_shape == piece.whole and not piece.pending):
        return ""
    box = ", ".join(f"{start}:{start + size}" for start, size in zip(piece.offset, piece.shape, strict=True))
    said = f"[{box}] of {piece.whole}"
    if piece.stretch is not None:
        said = f"elements {piece.stretch[0]}:{piece.stretch[1]} of {said}"
    return f"partial sum, {said}" if piece.pending else said
