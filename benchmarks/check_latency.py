"""Wall clock of a whole check, of the same comparison written by hand, and of the imports that both need.

    python benchmarks/check_latency.py [--repetitions N] [--json PATH]

Three commands, each a fresh process, take turns (and swap places from one repetition to the next), so that a busy
machine is busy for all of them:

    check     shardproof check examples/composer_mlp.py:replicated_batch --strategies ddp,fsdp,tp_fsdp --ranks 4
    by hand   python -m torch.distributed.run --nproc-per-node 4 benchmarks/by_hand.py
    imports   python -c "import ..." of the modules in shardproof.ranks.preload.MODULES, and nothing else

The check does more than the script by hand: a reference on one device, four disturbed runs for the noise floor, and
every activation and its gradient. It must not take longer all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from shardproof.ranks.preload import MODULES

ROOT = Path(__file__).resolve().parents[1]

TARGETS = {("check", "by hand"): 0.6, ("check", "imports"): 1.6}
"""The ratio of medians that we want to stay under."""

IMPORTS = f"""
import contextlib, importlib
for name in {MODULES!r}:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)
"""

COMMANDS = {
    "check": [
        *("-m", "shardproof", "check", "examples/composer_mlp.py:replicated_batch"),
        *("--strategies", "ddp,fsdp,tp_fsdp", "--ranks", "4", "--quiet"),
    ],
    "by hand": ["-m", "torch.distributed.run", "--nproc-per-node", "4", "benchmarks/by_hand.py"],
    "imports": ["-c", IMPORTS],
}
"""What follows the name of the interpreter."""


def timed(name: str) -> float:
    """Seconds that one command takes from start to end. Raises SystemExit with its output where it fails."""
    # torchrun sets it for its own ranks; alike for all three, or the comparison would be about threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *COMMANDS[name]],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    taken = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} ended with exit code {done.returncode}:\n{done.stdout}")
    return taken


def measure(repetitions: int) -> dict[str, list[float]]:
    """Name -> seconds per repetition. One round ahead of them, which warms the disk's cache, does not count."""
    names = list(COMMANDS)
    for name in names:
        timed(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(name))
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, object]:
    """What is printed and written."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "torch": version("torch"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "repetitions": len(seconds["check"]),
        "seconds": seconds,
        "median_s": medians,
        "ratios": {
            f"{over} / {under}": {"ratio": medians[over] / medians[under], "target": target}
            for (over, under), target in TARGETS.items()
        },
    }


def show(found: dict[str, object], seconds: dict[str, list[float]]) -> None:
    """The table."""
    print(
        f"torch {found['torch']}, Python {found['python']}, {found['cpus']} CPUs, OMP_NUM_THREADS=1, "
        f"{found['repetitions']} repetitions"
    )
    print(f"{'':10} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in seconds.items():
        print(f"{name:10} {statistics.median(values):7.2f}s {min(values):7.2f}s {max(values):7.2f}s")
    for pair, said in found["ratios"].items():
        print(f"{pair}: {said['ratio']:.2f} (target: at most {said['target']})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all times there")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: give at least 1")
    seconds = measure(options.repetitions)
    found = summary(seconds)
    show(found, seconds)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
