"""The first line of an index: what kind of file it is, of which version, and whose."""

from __future__ import annotations

from typing import Any, BinaryIO

from shardproof.trace.folder.index import LONGEST_LINE
from shardproof.trace.folder.line import Invalid, checked, loads, shown

VERSION = 1
"""Of the format. A reader refuses any other."""

MOST_RANKS = 2**20


def read_header(file: BinaryIO, rank: int) -> tuple[dict[str, Any], int]:
    """(header, world size) from the first line of the index of `rank`.

    Raises `Invalid`, and `WrongVersion` for a format that this version does not read.
    """
    line = file.readline(LONGEST_LINE + 1)
    if not line:
        raise Invalid("the file is empty")
    if not line.endswith(b"\n"):
        raise Invalid("its header is not whole: the run was cut off before it recorded anything")
    try:
        header = loads(line)
        checked(header)
    except Invalid as error:
        raise Invalid(f"its header is not valid: {error}") from None
    if header.get("shardproof") != "trace":
        raise Invalid(f'it does not begin with {{"shardproof":"trace", ...}} but with {shown(line[:60])}')
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise Invalid(f'its "version" is {shown(version)}')
    if version != VERSION:
        raise WrongVersion(version)
    size = header.get("world_size")
    if type(size) is not int or not 0 < size <= MOST_RANKS:
        raise Invalid(f'its "world_size" is {shown(size)}, not a number of ranks up to {MOST_RANKS}')
    if type(header.get("rank")) is not int or header["rank"] != rank:
        raise Invalid(f'its "rank" is {shown(header.get("rank"))}, and its name says {rank}')
    if rank >= size:
        raise Invalid(f"there is no rank {rank} among {size}")
    return header, size


class WrongVersion(Exception):
    """A trace of another version of the format."""

    def __init__(self, version: int) -> None:
        self.version = version
        super().__init__(version)
