"""A record as plain data for JSON, and back: fields in a fixed order, and only those that say something."""

from __future__ import annotations

from typing import Any

from shardproof.parallel.piece import Piece
from shardproof.trace.record import Record


def as_plain(record: Record) -> dict[str, Any]:
    """The fields of `record` in the order of their declaration; those that have their default value are left out."""
    plain: dict[str, Any] = {"step": record.step, "stage": record.stage, "name": record.name}
    if record.part:
        plain["part"] = record.part
    if record.call:
        plain["call"] = record.call
    if record.piece is not None:
        plain["piece"] = _piece_as_plain(record.piece)
    if record.missing:
        plain["missing"] = True
    if record.unknown:
        plain["unknown"] = True
    if record.draws:
        plain["draws"] = record.draws
    if record.weight != 1.0:
        plain["weight"] = record.weight
    if record.samples:
        plain["samples"] = list(record.samples)
    return plain


def from_plain(plain: dict[str, Any]) -> Record:
    """The record that `as_plain` made `plain` of. Trusts it: what strangers wrote goes through `trace.folder.line`."""
    fields = {key: _tuples(value) for key, value in plain.items() if key != "piece"}
    if "piece" in plain:
        fields["piece"] = Piece(**{key: _tuples(value) for key, value in plain["piece"].items()})
    return Record(**fields)


def _piece_as_plain(piece: Piece) -> dict[str, Any]:
    plain: dict[str, Any] = {"whole": list(piece.whole), "offset": list(piece.offset), "shape": list(piece.shape)}
    if piece.stretch is not None:
        plain["stretch"] = list(piece.stretch)
    if piece.pending:
        plain["pending"] = [[operation, list(ranks)] for operation, ranks in piece.pending]
    if not piece.declared:
        plain["declared"] = False
    return plain


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
