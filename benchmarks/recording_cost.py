"""What recording costs: a training step that is watched over the same step that is not, in one process group.

    python benchmarks/recording_cost.py [--repetitions N] [--json PATH]

Trains examples/gpt.py's experiment on one rank, and under ddp on four, in float64 as a check does. Each layout is
built twice: once with a recorder's hooks and once without. Watched and bare steps take turns, in the order
watched-bare, bare-watched, and each pair gives one ratio. Both are shardproof's own step. Writing the trace to disk is
timed on its own, as it happens once, after the last step.
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
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from shardproof.ranks import Place, start
from shardproof.spec.experiment import Experiment
from shardproof.spec.loading import load
from shardproof.spec.parallelism import Parallelism

ROOT = Path(__file__).resolve().parents[1]

LAYOUTS = (Parallelism(strategy="single"), Parallelism(dp_replicate=4, strategy="ddp"))

WARM_UP = 3
"""Pairs ahead of those that count: the first steps make optimizer state and DDP's buckets."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Trains one experiment on a rank, watched and bare."""

    experiment: Experiment
    repetitions: int

    def take_turns(self, place: Place, layout: Parallelism) -> tuple[list[float], list[float], float]:
        """Seconds of watched steps, of bare steps, and of writing a trace of `experiment.steps` steps."""
        import torch
        import torch.distributed as dist

        from shardproof.parallel.initial import default_dtype
        from shardproof.train.run import Settings, TracedRun, Variant

        settings = Settings(device=place.device(), dtype=torch.float64, steps=WARM_UP + self.repetitions)
        with place.world(layout.strategy, layout.world_size), default_dtype(torch.float64):
            run = TracedRun(self.experiment, layout, place.rank, settings, Variant())
            batches = [[part.batch for part in parts] for parts in run.read()]
            watched, bare = _watched(run), _bare(self.experiment, run)
            seconds: dict[Callable, list[float]] = {watched: [], bare: []}
            for index, parts in enumerate(batches):
                if index % self.experiment.steps == 0:
                    run.recorder.entries.clear()
                for step in (watched, bare) if index % 2 else (bare, watched):
                    dist.barrier()
                    began = time.perf_counter()
                    step(index, parts)
                    seconds[step].append(time.perf_counter() - began)
            run.recorder.entries.clear()
            for index, parts in enumerate(batches[: self.experiment.steps]):
                watched(index, parts)
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                run.save(Path(folder) / "trace.safetensors")
                save_s = time.perf_counter() - began
        return seconds[watched][WARM_UP:], seconds[bare][WARM_UP:], save_s


def _watched(run) -> Callable[[int, list], None]:
    """A step as `TracedRun.train` takes it, without the digests of the batch."""
    from shardproof.parallel.held import held_parameters
    from shardproof.train.step import train_step

    def step(index: int, batches: list) -> None:
        run.recorder.begin(index, [(batch, 1.0) for batch in batches])
        logged = train_step(replace(run.template, index=index, microbatches=batches), run.parameters, run.recorder)
        now = list(held_parameters(run.root, run.shapes))
        run.recorder.end(run.root, now, run.optimizer, logged)

    return step


def _bare(experiment: Experiment, run) -> Callable[[int, list], None]:
    """The same step of a model of its own, that nobody watches."""
    from shardproof.parallel import initial
    from shardproof.parallel.held import held_parameters
    from shardproof.parallel.layout import lay_out
    from shardproof.train.optimizer import build_optimizer
    from shardproof.train.step import train_step

    model = initial.build(experiment, run.settings.dtype, run.settings.device)
    laid_out = lay_out(model, experiment, run.mesh, run.parallelism)
    optimizer = build_optimizer(experiment, laid_out)
    parameters = list(held_parameters(laid_out, run.shapes))
    template = replace(run.template, model=laid_out, optimizer=optimizer, loss=experiment.loss)

    def step(index: int, batches: list) -> None:
        train_step(replace(template, index=index, microbatches=batches), parameters)

    return step


def measure(layout: Parallelism, repetitions: int) -> dict[str, object]:
    """What rank 0 measured under one layout."""
    worker = Steps(experiment=load(f"{ROOT / 'examples' / 'gpt.py'}"), repetitions=repetitions)
    ranks: AbstractContextManager = start(layout.world_size, worker)
    with ranks as pool:
        watched, bare, save_s = pool.call("take_turns", layout)[0]
    ratios = sorted(w / b for w, b in zip(watched, bare, strict=True))
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "watched_s": statistics.median(watched),
        "bare_s": statistics.median(bare),
        "ratio": statistics.median(ratios),
        "quartiles": [quarters[0], quarters[2]],
        "save_s": save_s,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    # Before torch is loaded: ranks share the cores, as they do in a check.
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=40, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all times there")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error(f"--repetitions {options.repetitions}: give at least 1")
    found = {layout.strategy: measure(layout, options.repetitions) for layout in LAYOUTS}
    print(
        f"torch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()} CPUs, OMP_NUM_THREADS=1, "
        f"{options.repetitions} pairs of steps"
    )
    print(f"{'':8} {'ranks':>5} {'watched':>9} {'bare':>9} {'ratio':>6} {'middle half':>13} {'writing':>9}")
    for layout in LAYOUTS:
        row = found[layout.strategy]
        low, high = row["quartiles"]
        print(
            f"{layout.strategy:8} {layout.world_size:5} {row['watched_s'] * 1e3:7.1f}ms {row['bare_s'] * 1e3:7.1f}ms "
            f"{row['ratio']:6.2f} {low:6.2f}-{high:.2f} {row['save_s'] * 1e3:7.1f}ms"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
