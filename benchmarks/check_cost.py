"""What proving costs: a whole check over the training runs of its strategies alone.

    python benchmarks/check_cost.py [--repetitions N] [--steps N] [--json PATH]

`check` on examples/gpt.py in float64, with every strategy that fits four ranks and all being well, against the same
strategies' runs and nothing else: ranks started, each layout built, trained and its trace written, but no reference, no
noise floor, no comparison, no report. The two take turns in one process that has loaded torch, and swap places from one
repetition to the next; each pair gives one ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from shardproof.ranks import start
from shardproof.spec.experiment import Experiment
from shardproof.spec.loading import load
from shardproof.spec.strategies import fitting, parse

ROOT = Path(__file__).resolve().parents[1]

RANKS = 4

TARGET = 1.5
"""The ratio that we want to stay under."""


def runs_alone(experiment: Experiment, steps: int) -> None:
    """Every strategy's run as a check makes it, one after the other on the same ranks."""
    import torch

    from shardproof.train.run import Variant
    from shardproof.worker import Worker

    layouts = [parse(name, RANKS) for name in fitting(RANKS, tp=True)]
    with tempfile.TemporaryDirectory(prefix="shardproof-") as folder:
        worker = Worker(
            experiment=experiment,
            trusted=experiment,
            folder=Path(folder),
            dtype=torch.float64,
            steps=steps,
            shuffle=False,
        )
        with start(RANKS, worker) as pool:
            for layout in layouts:
                ranks = range(layout.world_size)
                pool.call("run", layout.strategy, layout, Variant(), ranks=ranks, during=layout.strategy)


def whole_check(experiment: Experiment, steps: int) -> None:
    """The check. Raises SystemExit where it finds anything."""
    import shardproof as sp

    report = sp.check(experiment, ranks=RANKS, steps=steps)
    if not report.ok:
        raise SystemExit(f"a check of right code found something:\n{report}")


def timed(work: Callable[[Experiment, int], None], experiment: Experiment, steps: int) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work(experiment, steps)
    return time.perf_counter() - began


def measure(experiment: Experiment, steps: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each, per repetition. One round ahead of them does not count."""
    both = {"check": whole_check, "runs": runs_alone}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for repetition in range(-1, repetitions):
        for name in ("check", "runs") if repetition % 2 else ("runs", "check"):
            taken = timed(both[name], experiment, steps)
            if repetition >= 0:
                seconds[name].append(taken)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    # Before torch is loaded: ranks share the cores, as they do in a check.
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=7, metavar="N")
    parser.add_argument("--steps", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all times there")
    options = parser.parse_args(arguments)
    if min(options.repetitions, options.steps) < 1:
        parser.error("give at least 1 repetition and 1 step")
    seconds = measure(load(f"{ROOT / 'examples' / 'gpt.py'}"), options.steps, options.repetitions)
    ratios = sorted(check / runs for check, runs in zip(seconds["check"], seconds["runs"], strict=True))
    print(
        f"torch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()} CPUs, OMP_NUM_THREADS=1, "
        f"{options.repetitions} repetitions, {options.steps} steps"
    )
    print(f"{'':8} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in seconds.items():
        print(f"{name:8} {statistics.median(values):7.2f}s {min(values):7.2f}s {max(values):7.2f}s")
    print(
        f"check / runs: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f} "
        f"(target: at most {TARGET})"
    )
    if options.json is not None:
        found = {
            "torch": version("torch"),
            "steps": options.steps,
            "seconds": seconds,
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "target": TARGET,
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
