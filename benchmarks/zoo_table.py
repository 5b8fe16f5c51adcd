"""The tables of docs/zoo.md, made of what `shardproof zoo --json` has written.

    python benchmarks/zoo_table.py [--folder FOLDER] [--fresh]

Runs the whole zoo in each of `SETTINGS`, unless FOLDER holds the results already, and replaces what stands between
the two marks of the page. Takes ten minutes or more on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"
BEGIN = "<!-- made by benchmarks/zoo_table.py -->\n"
END = "<!-- end of what it made -->\n"

SETTINGS = {
    "A": "",
    "B": "--seed 5 --width 6 --dp 3 --tp 2 --grid 3x2 --microbatches 2",
    "C": "--seed 11 --width 2 --dp 2 --tp 4 --grid 2x2 --microbatches 4",
    "D": "--seed 2 --width 4 --dp 4 --tp 3 --grid 2x3 --microbatches 3",
}
"""Letter -> options of `shardproof zoo`; A is its default."""


def run(options: str, path: Path) -> None:
    """Run the zoo into `path`. Its exit code says what it found; that it has written is all that is asked here."""
    print(f"shardproof zoo {options}", file=sys.stderr)
    command = [sys.executable, "-m", "shardproof", "zoo", "--json", path, *options.split()]
    # Progress goes to stderr, the report would to stdout.
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if not path.exists():
        raise SystemExit(f"shardproof zoo {options}: has written nothing")


def page(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines between the marks, of the results in the order of `SETTINGS`."""
    yield from _totals(results)
    yield ""
    yield from _misses(results)
    yield ""
    yield from _bugs(results)
    yield ""
    yield from _controls(results)


def _totals(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| | setting | detected | located | named | false alarms |"
    yield "|---|---|---|---|---|---|"
    for (letter, options), result in zip(SETTINGS.items(), results, strict=True):
        bugs, controls = result["bugs"], result["controls"]
        sums = (sum(bug[word] for bug in bugs) for word in ("detected", "located", "cause_first"))
        counted = " | ".join(f"{n} of {len(bugs)}" for n in sums)
        shown = f"`{options}`" if options else "the default"
        yield f"| {letter} | {shown} | {counted} | {result['false_alarms']} of {len(controls)} |"


def _misses(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    missed: dict[tuple[str, str, str], list[str]] = {}
    for letter, result in zip(SETTINGS, results, strict=True):
        for bug in result["bugs"]:
            if not _complete(bug):
                # Names without backticks: the rows of the next tables are told by theirs.
                missed.setdefault((bug["name"], bug["cause"], _instead(bug)), []).append(letter)
        for control in result["controls"]:
            if not control["ok"]:
                missed.setdefault((control["name"], "none: right code", "a false alarm"), []).append(letter)
    if not missed:
        yield "Nothing was missed."
        return
    yield "| missed | true cause | in | instead |"
    yield "|---|---|---|---|"
    for (name, cause, instead), letters in missed.items():
        yield f"| {name} | {cause} | {', '.join(letters)} | {instead} |"


def _bugs(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"| bug | cause | {' | '.join(SETTINGS)} | time | seen in |"
    yield f"|---|---|{'---|' * len(SETTINGS)}---|---|"
    for row in zip(*(result["bugs"] for result in results), strict=True):
        first = row[0]
        cells = " | ".join("named" if _complete(bug) else "**missed**" for bug in row)
        yield f"| `{first['name']}` | {first['cause']} | {cells} | {first['time_s']:.1f} s | {first['source']} |"


def _controls(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"| right code | {' | '.join(SETTINGS)} | time |"
    yield f"|---|{'---|' * len(SETTINGS)}---|"
    for row in zip(*(result["controls"] for result in results), strict=True):
        cells = " | ".join("passed" if control["ok"] else "**false alarm**" for control in row)
        yield f"| `{row[0]['name']}` | {cells} | {row[0]['time_s']:.1f} s |"


def _complete(bug: dict[str, Any]) -> bool:
    return bool(bug["detected"] and bug["located"] and bug["cause_first"])


def _instead(bug: dict[str, Any]) -> str:
    if not bug["detected"]:
        return f"an error: {bug['error'].splitlines()[0]}" if bug["error"] else "nothing"
    place = "" if bug["located"] else ", in a wrong place"
    return f"{bug['found_cause']}, {bug['stage']} of {bug['where']}{place}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tables of docs/zoo.md.")
    parser.add_argument("--folder", type=Path, help="where results are kept, or were: A.json, B.json ...")
    parser.add_argument("--fresh", action="store_true", help="run again what the folder holds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for letter, setting in SETTINGS.items():
            path = folder / f"{letter}.json"
            if options.fresh or not path.exists():
                path.unlink(missing_ok=True)
                run(setting, path)
        results = [json.loads((folder / f"{letter}.json").read_text()) for letter in SETTINGS]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(page(results)) + "\n\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
