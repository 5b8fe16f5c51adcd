"""Tries every fault and prints the table of docs/when-ranks-break.md: `python tests/ranks/fault_table.py`."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from fault_matrix import run
from fault_rows import FAULTS, FAULTY, LOOP
from warm_commands import Commands

_TELLING = (
    r"^error: (.*)",
    r"^shardproof\.errors\.(.*)",
    r"(failed \(exitcode: -.*?) \(pid",
    r"^((?!.*ChildFailed)[\w.]*Error: .*)",
)
"""Lines that say most, the best kind first."""


def _first_words(said: str) -> str:
    """The line that says most: our own, else the error that Python or pytest shows, else the last one."""
    lines = said.strip().splitlines() or ["(nothing)"]
    found = (match for kind in _TELLING for line in lines if (match := re.search(kind, line)))
    match = next(found, None)
    first = match[1] if match else lines[-1]
    for file in (FAULTY, LOOP):
        first = first.replace(str(file), file.name)
    first = re.sub(r"/[^\s:]*/small\b", "small", first)
    line = re.sub(r"\S*/shardproof-\w+", "/tmp/shardproof-...", first)
    return re.sub(r"\|", r"\\|", line if len(line) < 260 else f"{line[:250]} ...")


def main() -> None:
    """Prints a row as soon as it is known."""
    commands = Commands()
    print("| fault | command | what you read first | exit code | seconds | left behind |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            seen = run(fault, commands, Path(folder))
        left = ", ".join(seen.left) or "nothing"
        first = "(ended by the signal)" if fault.sent else _first_words(seen.said)
        way = f"torchrun {fault.way}" if fault.torchrun else fault.way
        cells = fault.name, way, first, str(seen.exit_code), f"{max(0, seen.seconds):.1f}", left
        print(f"| {' | '.join(cells)} |", flush=True)
    commands.close()


if __name__ == "__main__":
    main()
