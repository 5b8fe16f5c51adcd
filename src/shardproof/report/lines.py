"""The building blocks of a report: labelled paragraphs and aligned columns, as lines of styled text.

Lines are laid out here and not by rich, because a report is also the text of a failed test and of a log:
no padding at the ends of lines, no name cut off, the same text with and without colours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.text import Text

INDENT = "  "
GAP = "  "
"""Between two columns."""

NARROWEST = 20
"""Characters that a wrapped paragraph gets however little room there is."""

BREAKS = "./,_"
"""Behind these a name may be broken."""

LABEL_WIDTH = 11
"""Of the labels of a finding, their gap included."""


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width`; its own line breaks and indents are kept.

    A word that is too long, such as the name of a deep module, is broken behind a dot, not anywhere as textwrap does.
    """
    width = max(width, NARROWEST)
    return [line for paragraph in text.splitlines() or [""] for line in _filled(paragraph, width)]


def _filled(paragraph: str, width: int) -> Iterator[str]:
    line = paragraph[: len(paragraph) - len(paragraph.lstrip())]
    bare = True
    for word in paragraph.split():
        space = "" if bare else " "
        if len(line) + len(space) + len(word) <= width:
            line += space + word
        else:
            if not bare:
                yield line
                line = ""
            *whole, line = _broken(line + word, width)
            yield from whole
        bare = False
    yield line


def _broken(word: str, width: int) -> list[str]:
    pieces = [""]
    for part in re.findall(rf"[^{BREAKS}]*[{BREAKS}]|[^{BREAKS}]+", word):
        if len(pieces[-1] + part) > width and pieces[-1]:
            pieces.append("")
        pieces[-1] += part
        while len(pieces[-1]) > width:
            pieces[-1:] = [pieces[-1][:width], pieces[-1][width:]]
    return pieces


def labelled(label: str, text: str, width: int, *, style: str = "", indent: str = INDENT) -> Iterator[Text]:
    """`label` in a column of its own, and `text` wrapped beside it."""
    hanging = indent + " " * LABEL_WIDTH
    for position, line in enumerate(wrapped(text, width - len(hanging))):
        lead = f"{indent}{label:<{LABEL_WIDTH}}" if position == 0 else hanging
        yield Text.assemble((lead, "dim"), (line, style)) if line else Text()


def item(text: str, width: int, *, style: str = "", mark: str = "- ", indent: str = INDENT) -> Iterator[Text]:
    """One entry of a list: a mark, and `text` wrapped beside it."""
    hanging = indent + " " * len(mark)
    for position, line in enumerate(wrapped(text, width - len(hanging))):
        yield Text(f"{hanging if position else indent + mark}{line}", style)


def heading(text: str, *, style: str = "bold") -> Iterator[Text]:
    """An empty line and `text`."""
    yield Text()
    yield Text(text, style)


def columns(rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> list[str]:
    """`rows` with every column as wide as its widest cell; those of the columns `right` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        GAP.join(
            cell.rjust(width) if position in right else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
