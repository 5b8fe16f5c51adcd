"""Tries every fault and prints the table of docs/when-ranks-break.md: `python tests/ranks/fault_table.py`."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from fault_matrix import FAULTS, FAULTY, run
from warm_commands import Commands


def _first_words(said: str) -> str:
    """The first line of the message, without the folders of this machine."""
    message = said.partition("error: ")[2] or (said.strip().splitlines() or ["(nothing)"])[-1]
    first = message.splitlines()[0].replace(str(FAULTY), FAULTY.name)
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
        took = f"{max(0, seen.seconds):.1f}"
        print(f"| {fault.name} | {fault.way} | {first} | {seen.exit_code} | {took} | {left} |", flush=True)
    commands.close()


if __name__ == "__main__":
    main()
