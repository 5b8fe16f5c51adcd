"""Records every layout of some scripts, and every mistake that can be made there, in one process that imports once.

    python examples/frameworks/record_all.py runs fabric

makes `runs/fabric/tp_fsdp`, `runs/fabric/tp_fsdp-accumulate-2`, `runs/fabric/tp_fsdp-data-over-world` and so on, and
prints the seconds that each took. Every run has ranks of its own, forked from this process.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch._dynamo  # noqa: F401  (every optimizer loads it at its first step: 0.3 s in each rank)
from task import launch, options

import shardproof.record.watch  # noqa: F401  (as `sp.record` does, in each rank)

DEFAULTS = {"transformers_minilm": ("--what", "sketch")}
"""Script -> options of all its runs: 22.7 million parameters are 1.2 GB a run with values, 60 MB with sketches."""


def runs(script: ModuleType, *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """(folder, options) of each run. Quick: each layout once, those of several ranks with two micro-batches."""
    for layout in script.LAYOUTS:
        if layout == "single" or not quick:
            yield layout, ["--layout", layout]
        if layout != "single" or not quick:
            yield f"{layout}-accumulate-2", ["--layout", layout, "--accumulate", "2"]
    for mistake, layouts in script.MISTAKES.items():
        # The last one is the most involved.
        for layout in layouts[-1:] if quick else layouts:
            yield f"{layout}-{mistake}", ["--layout", layout, "--mistake", mistake]


def record_all(script: ModuleType, into: Path, *, quick: bool) -> None:
    """Every run of one script, one after another. Exits at one that fails."""
    for name, chosen in runs(script, quick=quick):
        run = [*chosen, *DEFAULTS.get(script.__name__, ()), "--record", str(into / name)]
        began = time.monotonic()
        # Also of one rank: what trains may not fork ranks afterwards.
        process = multiprocessing.get_context("fork").Process(
            target=launch, args=(script.train, options(script.__doc__, script.LAYOUTS, script.MISTAKES, run))
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{script.__name__} {' '.join(run)}: exit code {process.exitcode}; what it said is above")
        print(f"{script.__name__} {name}: {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    """Record, and stop at the first run that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("into", type=Path, metavar="DIR")
    parser.add_argument("scripts", nargs="+", metavar="SCRIPT", help="as fabric, without .py")
    parser.add_argument("--quick", action="store_true", help="each layout once, each mistake under one layout")
    given = parser.parse_args()
    for name in given.scripts:
        record_all(importlib.import_module(name), given.into / name, quick=given.quick)


if __name__ == "__main__":
    main()
