"""Reads a rank's index: its records and events up to the first line that is not whole and valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from shardproof.trace.folder.line import QUICK, Invalid, Kept, Reader, checked, loads, wrong
from shardproof.trace.folder.uncollected import uncollected
from shardproof.trace.folder.usual import Usual
from shardproof.trace.record import Record

LONGEST_LINE = 2**26
"""Bytes. The digests of a batch of a million samples take half of it."""

BLOCK_BYTES = 2**20
"""Bytes of lines that are read at once."""


Found = tuple[Record, Kept, bytes | None]
"""A record, what is kept of it, and the text of its statistics where that has been left for later."""


@dataclass(slots=True)
class Index:
    """What an index says, as far as it can be read."""

    records: list[Record] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    """What is kept of each of them; statistics left out where `stats` has their text."""

    stats: list[bytes | None] = field(default_factory=list)
    """The text of its statistics, of which few are ever asked for (`usual.numbers`)."""

    events: list[dict[str, Any]] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    """Of each event, how many records stand before it."""
    problem: str = ""
    """Why reading ended before the closing line; empty where it did not."""

    closed: bool = False
    """Whether the recording came to its own end."""


def read(file: BinaryIO, world_size: int, size_of: Callable[[int], int], usual: Usual) -> Index:
    """The rest of an index file whose header has been read; for `size_of` see `line.Reader`.

    `usual` knows what other ranks' lines had in common.

    Raises `OSError` only: what is wrong with the content is the index's `problem`.
    """
    index = Index()
    reader = Reader(world_size, size_of)
    number = 1  # the header
    try:
        with uncollected():
            for lines in _blocks(file):
                for found in _found(lines, index, reader, usual):
                    if found is not None:
                        record, kept, stats = found
                        index.records.append(record)
                        index.kept.append(kept)
                        index.stats.append(stats)
                    number += 1
    except _Torn:
        index.problem = f"line {number + 1} is not whole: the run was cut off"
    except Invalid as error:
        index.problem = f"line {number + 1} is not valid: {error}"
    except RecursionError:
        # Just not too deep to be read, and too deep to be looked at.
        index.problem = f"line {number + 1} is not valid: it is nested too deep"
    else:
        if not index.closed:
            index.problem = "there is no closing line: the run was cut off, or still goes on"
    if index.problem:
        index.closed = False
    return index


class _Torn(Exception):
    """The last line has no end."""


def _blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """Whole lines, without their ends, as many at once as are quick to read."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        if lines:
            yield lines
        if len(rest) > LONGEST_LINE:
            raise Invalid(f"it is longer than {LONGEST_LINE} bytes")
    if rest:
        raise _Torn


def _found(lines: list[bytes], index: Index, reader: Reader, usual: Usual) -> Iterator[Found | None]:
    """What stands on each line. Raises `Invalid` where the first bad one stands."""
    apart = usual.taken_apart(lines)
    if apart is None:
        for line, plain in zip(lines, _parsed(lines), strict=True):
            yield _taken(line, plain, index, reader, usual)
        return
    others = _parsed([line for line, parts in zip(lines, apart, strict=True) if parts is None])
    for line, parts in zip(lines, apart, strict=True):
        found = usual.read(parts, reader) if parts is not None and not index.closed else None
        if found is None:
            found = _taken(line, next(others) if parts is None else loads(line), index, reader, usual)
        yield found


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """The objects on `lines`. Raises `Invalid` where the first bad line stands."""
    yield from _at_once(lines) or map(loads, lines)


def _at_once(lines: list[bytes]) -> list[dict[str, Any]] | None:
    """All lines in one go, which is quickest; None where one of them may be bad: then each is looked at alone."""
    joined = b",".join(lines)
    try:
        found: list[dict[str, Any]] = QUICK.decode(f"[{joined.decode()}]")
        if len(found) != len(lines):
            return None
        keys = 0
        for plain in found:
            if plain.__class__ is not dict:
                return None
            if "event" in plain:
                keys += checked(plain)
                continue
            keys += len(plain)
            for value in plain.values():
                if value.__class__ is dict:
                    keys += len(value)
    except (ValueError, RecursionError):
        return None
    # A key that stands twice is one key less than there are colons behind quotes. Names may hold such colons too, and
    # a quote may have a blank behind it: all that is rare, and looked at line by line.
    if joined.count(b'":') != keys or any(blank in joined and b'"' + blank in joined for blank in (b" ", b"\t", b"\r")):
        return None
    return found


def _taken(line: bytes, plain: dict[str, Any], index: Index, reader: Reader, usual: Usual) -> Found | None:
    """The record of a line; None of an event, which is put down."""
    if index.closed:
        raise Invalid("it stands behind the closing line")
    if "event" not in plain:
        record, kept = reader.record(plain)
        usual.learn(line, record, kept)
        return record, kept, None
    checked(plain)
    kind = plain["event"]
    if type(kind) is not str or not kind:
        raise wrong("event", kind, "the name of an event")
    if kind == "closed":
        if type(plain.get("records")) is not int or plain["records"] != len(index.records):
            raise wrong("records", plain.get("records"), f"{len(index.records)}, of which the lines before it tell")
        index.closed = True
    index.events.append(plain)
    index.behind.append(len(index.records))
    return None
