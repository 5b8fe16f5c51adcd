"""One line of an index: a record, or an event. Written from a `Record`; read back with every field looked at.

What is read may come from anybody. Nothing gets past `Reader` that is not a valid record of a tensor whose bytes are
there, so that no one behind it has to ask again.
"""

from __future__ import annotations

import json
import marshal
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import Any, NamedTuple

import torch

from shardproof.parallel.piece import Piece
from shardproof.spec.stages import STAGES
from shardproof.trace.folder.dtypes import BY_NAME, NAMES
from shardproof.trace.folder.names import LAST_FILE
from shardproof.trace.plain import as_plain
from shardproof.trace.record import Record
from shardproof.trace.stats import Stats

DEPTHS = ("full", "sketch", "stats")
"""What is kept of a tensor: its values; a sketch and statistics; statistics alone."""

KNOWN_STAGES = frozenset((*STAGES, "input", "input-gradient"))
"""Stages of a step, and what enters a module and leaves it backwards, where that is asked for."""

KEYED = ("index", "samples")
"""What the rows of a sketch are drawn by: the global index along dim 0, or the content of each sample."""

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: a cache line, and the widest vector that a CPU loads."""

LARGEST = 2**53
"""Whole numbers up to here are the same in every JSON reader."""

LONGEST_NAME = 10_000
"""Characters of a name or part."""

MOST_DIMS = 64
"""Dims of a tensor, as in torch."""

DEEPEST = 32
"""Levels of lists and objects in an event or header."""

SKETCH_SHAPE = (16, 16)
"""Of every sketch."""

STATS_FIELDS = tuple(field.name for field in fields(Stats))
_COUNTS = frozenset(("count", "zeros", "nans", "infs"))

_KEPT_FIELDS = frozenset(("depth", "shape", "dtype", "stats", "sketch", "file", "at", "bytes"))
_FIELDS = frozenset(field.name for field in fields(Record)) | _KEPT_FIELDS
_PIECE_FIELDS = frozenset(field.name for field in fields(Piece))
_SKETCH_FIELDS = frozenset(("by", "dtype", "file", "at", "bytes"))
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Invalid(ValueError):
    """A line that breaks the rules of the format; the message says which."""


class Kept(NamedTuple):
    """What a recording keeps of a record's tensor, and where."""

    depth: str | None = None
    """One of `DEPTHS`; None where there was no tensor."""

    shape: tuple[int, ...] = ()
    """Of the tensor as the rank held it; a complex one has a last dim of 2."""

    dtype: torch.dtype | None = None
    file: int = 0
    """Number of the data file in which the values or the sketch lie."""

    at: int = 0
    """First byte in that file."""

    bytes: int = 0

    keyed: str | None = None
    """What a sketch's rows are drawn by, one of `KEYED`; None without a sketch."""

    sketch_dtype: torch.dtype | None = None
    stats: tuple[int | float, ...] | None = None
    """In the order of `STATS_FIELDS`."""


# Writing.


_AS_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dumps(plain: Mapping[str, Any]) -> bytes:
    """`plain` as one line, its end included."""
    text = _AS_JSON.encode(plain)
    # A name that no reader of UTF-8 would take (half a surrogate pair) is not worth a run that stops.
    return text.encode("utf-8", "replace") + b"\n"


def record_line(record: Record, kept: Kept) -> bytes:
    """A record and what is kept of it as one line, fields always in the same order."""
    plain = as_plain(record)
    if record.weight != 1.0:
        plain["weight"] = jsonable(record.weight)
    if kept.depth is not None and kept.dtype is not None:
        plain |= {"depth": kept.depth, "shape": list(kept.shape), "dtype": NAMES[kept.dtype]}
        if kept.stats is not None:
            numbers = kept.stats if all(map(math.isfinite, kept.stats)) else map(jsonable, kept.stats)
            plain["stats"] = dict(zip(STATS_FIELDS, numbers, strict=True))
        place = {"file": kept.file, "at": kept.at, "bytes": kept.bytes}
        if kept.sketch_dtype is not None:
            plain["sketch"] = {"by": kept.keyed, "dtype": NAMES[kept.sketch_dtype], **place}
        elif kept.depth == "full":
            plain |= place
    return dumps(plain)


def jsonable(value: object) -> Any:
    """`value` in what JSON knows; NaN and infinities as the texts "nan", "inf" and "-inf", as in reports.

    Raises `TypeError` for what is no plain data.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"{value!r} has no place in a recording: {type(value).__name__} is not plain data")


# Reading.


def loads(line: bytes) -> dict[str, Any]:
    """One line as plain data, with nothing in it that two readers of JSON could take differently."""
    try:
        plain = _STRICT.decode(line.decode())
    except UnicodeDecodeError as error:
        raise Invalid(f"it is no UTF-8: byte {line[error.start]:#04x}") from None
    except RecursionError:
        raise Invalid("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"it is no JSON: {error.msg}") from None
    except Invalid:
        raise
    except ValueError:
        # Python's own limit, against numbers that take minutes to read.
        raise Invalid("it holds a number of thousands of digits") from None
    if type(plain) is not dict:
        raise Invalid(f"it is no JSON object: {shown(plain)}")
    return plain


def shown(value: object) -> str:
    """A value from a file as it may stand in a message: short, and without characters that steer a terminal."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked(value: object, deepest: int = DEEPEST) -> int:
    """The number of keys in plain data, at any depth. Raises `Invalid` for data too deep, or texts that are none."""
    if isinstance(value, str):
        _check_text(value)
    if not isinstance(value, dict | list):
        return 0
    if deepest == 0:
        raise Invalid(f"it is nested more than {DEEPEST} deep")
    if isinstance(value, list):
        return sum(checked(entry, deepest - 1) for entry in value)
    for key in value:
        _check_text(key)
    return len(value) + sum(checked(entry, deepest - 1) for entry in value.values())


def inside(whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box lies in a whole."""
    if not len(whole) == len(offset) == len(shape):
        return False
    return all(start + size <= extent for extent, start, size in zip(whole, offset, shape, strict=True))


class Reader:
    """Reads the records of one rank, line by line, in their order: each tensor lies behind the one before it."""

    def __init__(self, world_size: int, size_of: Callable[[int], int]) -> None:
        """`size_of` gives the size in bytes of the data file with a number, and raises `Invalid` where it has none."""
        self._world_size = world_size
        self._size_of = size_of
        self._sizes: dict[int, int] = {}
        self._file, self._end = 0, 0
        # A model shows the same few names, shapes and pieces again and again: each is checked and kept once.
        self._texts: dict[str, str] = {}
        self._shapes: dict[bytes, tuple[int, ...]] = {}
        self._pieces: dict[bytes, Piece] = {}

    def record(self, plain: dict[str, Any]) -> tuple[Record, Kept]:
        """The record of a line. Raises `Invalid`."""
        if not plain.keys() <= _FIELDS:
            raise Invalid(f"{shown(min(plain.keys() - _FIELDS))} is no field of a record")
        get = plain.get
        stage = get("stage")
        if type(stage) is not str or stage not in KNOWN_STAGES:
            raise wrong("stage", stage, "the name of a stage")
        name = self._text("name", get("name"))
        if not name:
            raise wrong("name", name, "a name")
        missing, unknown, piece = get("missing", False), get("unknown", False), get("piece")
        if type(missing) is not bool or type(unknown) is not bool:
            raise Invalid('"missing" and "unknown" are true or false')
        weight = get("weight", 1.0)
        record = Record(
            step=_whole("step", get("step"), -1),
            stage=stage,
            name=name,
            part=self._text("part", get("part", "")),
            call=_whole("call", get("call", 0)),
            piece=None if piece is None else self.piece(piece),
            missing=missing,
            unknown=unknown,
            draws=_whole("draws", get("draws", 0), -(2**64), 2**64),
            weight=weight if weight.__class__ is float and math.isfinite(weight) else _number("weight", weight),
            samples=() if "samples" not in plain else _digests(plain["samples"]),
        )
        return record, self._kept(plain, record)

    def _kept(self, plain: dict[str, Any], record: Record) -> Kept:
        depth = plain.get("depth")
        if record.missing or record.unknown:
            if not plain.keys().isdisjoint(_KEPT_FIELDS):
                raise Invalid("it keeps something of a tensor that it says was not there")
            return _NOTHING
        if type(depth) is not str or depth not in DEPTHS:
            raise wrong("depth", depth, "full, sketch or stats")
        shape, dtype = self._shape("shape", plain.get("shape")), _dtype(plain.get("dtype"))
        if record.piece is not None and record.piece.local_shape != shape:
            raise Invalid(f'"shape" is {shown(list(shape))}, and that of its piece {list(record.piece.local_shape)}')
        if depth == "full":
            if "sketch" in plain or "stats" in plain:
                raise Invalid("it keeps values, and a sketch or statistics beside them")
            return Kept(depth, shape, dtype, *self._place(plain, math.prod(shape) * dtype.itemsize))
        if not plain.keys().isdisjoint(("file", "at", "bytes")):
            raise Invalid(f'"depth" is {depth}, yet it says where values lie')
        stats = _stats(plain.get("stats"), math.prod(shape))
        if depth == "stats":
            if "sketch" in plain:
                raise Invalid('"depth" is stats, yet it keeps a sketch')
            return Kept(depth, shape, dtype, stats=stats)
        return self._sketched(plain.get("sketch"), shape, dtype, stats)

    def _sketched(
        self, sketch: Any, shape: tuple[int, ...], dtype: torch.dtype, stats: tuple[int | float, ...]
    ) -> Kept:
        if type(sketch) is not dict or sketch.keys() != _SKETCH_FIELDS:
            raise wrong("sketch", sketch, f"an object of {', '.join(sorted(_SKETCH_FIELDS))}")
        by, kind = sketch["by"], _dtype(sketch["dtype"])
        if type(by) is not str or by not in KEYED:
            raise wrong("by", by, "index or samples")
        if by == "samples" and not shape:
            raise Invalid("a tensor without dims has no samples to draw a sketch by")
        if kind not in (torch.float32, torch.float64):
            raise wrong("dtype", sketch["dtype"], "float32 or float64, as a sketch is")
        file, at, size = self._place(sketch, math.prod(SKETCH_SHAPE) * kind.itemsize)
        return Kept("sketch", shape, dtype, file, at, size, by, kind, stats)

    def _place(self, plain: dict[str, Any], size: int) -> tuple[int, int, int]:
        file, at = _whole("file", plain.get("file"), 0, LAST_FILE), _whole("at", plain.get("at"))
        if _whole("bytes", plain.get("bytes")) != size:
            raise Invalid(f'"bytes" is {plain["bytes"]}; its shape and dtype take {size}')
        return self.place(file, at, size)

    def place(self, file: int, at: int, size: int) -> tuple[int, int, int]:
        """File, first byte and bytes; behind whatever was kept before, and wholly there. Raises `Invalid`."""
        start = self._end + -self._end % ALIGNMENT
        if file == self._file and self._end:
            if at != start:
                raise Invalid(f'"at" is {at}; the next tensor starts at {start}')
        elif not (file == self._file or (file == self._file + 1 and self._end)):
            raise Invalid(f'"file" is {file} after file {self._file}')
        elif at < ALIGNMENT or at % ALIGNMENT:
            raise Invalid(f'"at" is {at}; a tensor starts at a multiple of {ALIGNMENT} behind the header')
        held = self._sizes.get(file)
        if held is None:
            held = self._sizes[file] = self._size_of(file)
        if at + size > held:
            raise Invalid(f"its data are not whole: they end at byte {at + size} of data file {file}, which has {held}")
        self._file, self._end = file, at + size
        return file, at, size

    def _text(self, field: str, value: Any) -> str:
        if type(value) is not str:
            raise wrong(field, value, "a text")
        found = self._texts.get(value)
        if found is None:
            if len(value) > LONGEST_NAME:
                raise Invalid(f'"{field}" has {len(value)} characters; {LONGEST_NAME} at most')
            _check_text(value)
            found = self._texts[value] = value
        return found

    def _shape(self, field: str, value: Any) -> tuple[int, ...]:
        key = _spelled(value)
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = _sizes(field, value)
        return found

    def piece(self, plain: Any) -> Piece:
        """Where a tensor lies, from plain data. Raises `Invalid`."""
        key = _spelled(plain)
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self._new_piece(plain)
        return found

    def _new_piece(self, plain: Any) -> Piece:
        if type(plain) is not dict or not plain.keys() <= _PIECE_FIELDS:
            raise wrong("piece", plain, f"an object of {', '.join(sorted(_PIECE_FIELDS))}")
        whole, offset, shape = (_sizes(field, plain.get(field)) for field in ("whole", "offset", "shape"))
        if not inside(whole, offset, shape):
            raise Invalid(f"a piece of shape {list(shape)} at {list(offset)} does not lie in a whole of {list(whole)}")
        stretch = None
        if "stretch" in plain:
            stretch = _sizes("stretch", plain["stretch"])
            if len(stretch) != 2 or not stretch[0] <= stretch[1] <= math.prod(shape):
                raise wrong("stretch", plain["stretch"], "a start and an end in the flattened piece")
        declared = plain.get("declared", True)
        if type(declared) is not bool:
            raise wrong("declared", declared, "true or false")
        return Piece(
            whole=whole,
            offset=offset,
            shape=shape,
            stretch=stretch,  # type: ignore[arg-type]  # two, as was just seen
            pending=self._pending(plain.get("pending", [])),
            declared=declared,
        )

    def _pending(self, plain: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
        if type(plain) is not list or len(plain) > MOST_DIMS:
            raise wrong("pending", plain, "a list of reductions")
        found = []
        for entry in plain:
            if type(entry) is not list or len(entry) != 2 or type(entry[1]) is not list:
                raise wrong("pending", plain, "a list of reductions, each [operation, [ranks]]")
            ranks = tuple(_whole("rank", rank, 0, self._world_size - 1) for rank in entry[1])
            if not ranks or len(set(ranks)) != len(ranks):
                raise wrong("pending", entry, "a reduction over some ranks, each once")
            found.append((self._text("pending", entry[0]), ranks))
        return tuple(found)


_NOTHING = Kept()


def _spelled(value: Any) -> bytes:
    """Plain data as a key, in which 1, 1.0 and true are three things. marshal is the quickest that tells them apart;
    its second version spells equal values equally. Nothing is ever loaded from it."""
    try:
        return marshal.dumps(value, 2)
    except ValueError:
        raise Invalid("it is nested too deep") from None


def wrong(field: str, value: object, wanted: str) -> Invalid:
    """The error about a field that has another value than it may have."""
    return Invalid(f'"{field}" is {shown(value)}, not {wanted}')


def _whole(field: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    # The class itself: true is an int too.
    if value.__class__ is not int or not least <= value <= most:
        raise wrong(field, value, f"a whole number from {least} to {most}")
    number: int = value
    return number


def _number(field: str, value: Any) -> float:
    if type(value) is str and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= LARGEST):
        return float(value)
    raise wrong(field, value, 'a number, "nan", "inf" or "-inf"')


def _sizes(field: str, value: Any) -> tuple[int, ...]:
    if type(value) is not list or len(value) > MOST_DIMS:
        raise wrong(field, value, "a list of sizes")
    sizes = tuple(_whole(field, size) for size in value)
    # An empty dim hides how large the others are, and torch multiplies the rest.
    if math.prod(size for size in sizes if size) > LARGEST:
        raise Invalid(f'"{field}" is {shown(value)}: no tensor is that large')
    return sizes


def _dtype(value: Any) -> torch.dtype:
    found = BY_NAME.get(value) if type(value) is str else None
    if found is None:
        raise wrong("dtype", value, "the name of a dtype that a recording knows")
    return found


def _digests(value: Any) -> tuple[str, ...]:
    if type(value) is not list:
        raise wrong("samples", value, "a list of digests")
    for digest in value:
        if type(digest) is not str or not 0 < len(digest) <= 128 or not digest.isascii():
            raise wrong("samples", digest, "the digest of a sample")
    return tuple(value)


def _stats(value: Any, count: int) -> tuple[int | float, ...]:
    """The numbers of a tensor of `count` elements. Whether they fit together, `Stats.from_dict` asks later."""
    if type(value) is not dict or len(value) != len(STATS_FIELDS):
        raise wrong("stats", value, f"an object of {', '.join(STATS_FIELDS)}")
    found: list[int | float] = []
    for field in STATS_FIELDS:
        number: Any = value.get(field)
        if number.__class__ is int:
            # Sums of whole numbers may be large ones.
            if not (0 if field in _COUNTS else -(2**64)) <= number <= 2**64:
                raise wrong(field, number, "a number that such a tensor can have")
        elif field in _COUNTS:
            raise wrong(field, number, "a count")
        elif number.__class__ is not float or not math.isfinite(number):
            number = _number(field, number)
        found.append(number)
    if value["count"] != count:
        raise Invalid(f'"count" is {value["count"]}, and a tensor of its shape has {count}')
    return tuple(found)


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{shown(value)} is no text: it holds half a character") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Invalid(f"{shown(twice)} stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise Invalid(f'{name} is no JSON; it is written as "{name.lower().replace("infinity", "inf")}"')


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
QUICK = json.JSONDecoder(parse_constant=_no_constant)
"""Reads what `loads` reads, and does not see a key that stands twice."""
