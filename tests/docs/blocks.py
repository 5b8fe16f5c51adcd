"""Every fenced block of README and docs, with what its page says about running it.

A comment right above a block says so, where the language alone does not:

    <!-- not run: WHY -->        it is not run here
    <!-- slow: WHY -->           it is run with SHARDPROOF_FULL=1
    <!-- file: NAME -->          it is saved as NAME, for the commands below it
    <!-- cause: NAME LAYOUT -->  code of a page in docs/causes, which is checked under LAYOUT; `parity` is a NAME too
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FILES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"), key=lambda path: path.parts)]
PAGES = tuple(str(path.relative_to(ROOT)) for path in _FILES)

MARK = re.compile(r"<!-- (not run|slow|file|cause): (.+?) -->", re.DOTALL)

OUTPUT = "text"
"""The language of what the block above it prints."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    """The first word or two of the comment above it."""
    said: str = ""
    """The rest of that comment."""
    output: str | None = None
    """What the page shows of what it prints."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order; an output belongs to the last block before it that is run."""
    found: list[Block] = []
    for block in _fences(page):
        last = found[-1] if found else None
        shows = block.language == OUTPUT and not block.mark and last is not None and last.output is None
        if shows and last is not None and last.language in ("sh", "python"):
            found[-1] = replace(last, output=block.text)
        else:
            found.append(block)
    return found


def _fences(page: str) -> Iterator[Block]:
    comment = ""
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type == "fence":
            mark = MARK.search(comment)
            yield Block(
                page=page,
                line=(token.map or [0])[0] + 1,
                language=token.info.strip(),
                text=token.content,
                mark=mark[1] if mark else "",
                said=" ".join(mark[2].split()) if mark else "",
            )
        comment = token.content if token.type == "html_block" else ""


EXIT_CODE = re.compile(r"#.*\bexit code (\d+)")


def commands(block: Block) -> list[tuple[str, int]]:
    """The commands of a shell block, each with the exit code that its comment gives."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        code = EXIT_CODE.search(line)
        if line.strip() and not line.lstrip().startswith("#"):
            found.append((line.strip(), int(code[1]) if code else 0))
    return found
