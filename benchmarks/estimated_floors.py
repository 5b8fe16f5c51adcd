"""How far right code lies from the reference, and how far known bugs do, both in noise floors that nobody measured.

    python benchmarks/estimated_floors.py [--draws N] [--seed N] [--bugs PATTERN] [--json PATH]

`shardproof diff` holds two finished recordings against each other, and floors are estimated from the reference's own
tensors (`shardproof.compare.estimated`). Here the runs are those of `shardproof check`, whose measured floors are
known: the examples under four layouts with SGD and AdamW, in float64, float32, bfloat16, and float32 with autocast to
bfloat16 (`auto`); the random experiments of tests/test_no_false_alarm.py; the 24 layers of noise_margins.py; the zoo's
controls; and its bugs, and those of noise_margins.py, in each dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import hypothesis
import torch
from torch import nn

import shardproof as sp
from shardproof.compare.estimated import Estimate
from shardproof.compare.run import compare_run
from shardproof.compare.verdict import Comparison
from shardproof.compare.view import Reference
from shardproof.parity import DTYPES
from shardproof.ranks import Place, start
from shardproof.report.progress import Silent
from shardproof.session import Session
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.strategies import parse
from shardproof.trace.file import TraceFile
from shardproof.worker import Pair, Worker
from shardproof.zoo.setting import Setting
from shardproof.zoo.table import BUGS, CONTROLS

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float64", "float32", "bfloat16", "auto")
SETTING = Setting(dp=2, tp=2, grid=(2, 2))
COMPARED = (sp.Verdict.EQUAL, sp.Verdict.ROUNDING, sp.Verdict.DIFFERENT)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of a run, judged by both floors."""

    step: int
    stage: str
    name: str
    part: str
    error: float
    estimated: float
    """Noise floor, in the tensor's own unit."""
    measured: float
    verdict: str
    """By the estimated floor."""
    verdict_measured: str

    @property
    def floors(self) -> float:
        """The error in estimated noise floors."""
        return 0.0 if self.error == 0 else self.error / self.estimated if self.estimated > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One run."""

    name: str
    precision: str
    rows: tuple[Row, ...]

    def first(self, *, measured: bool) -> Row | None:
        """The first tensor that is different, in causal order."""
        verdict = "verdict_measured" if measured else "verdict"
        return next((row for row in self.rows if getattr(row, verdict) == "different"), None)


@dataclass(frozen=True, kw_only=True)
class Twice(Worker):
    """A worker that compares twice: with the floors it was given, and with estimated ones."""

    rows: Path

    def compare(self, place: Place, pair: Pair, ranks: Sequence[int]) -> list[Comparison]:
        """As `Worker.compare`; the rows of all steps are left in a file."""
        if ranks.index(place.rank) == 0:
            both = []
            for floors in (pair.floors, None):
                found = self._judged(pair, pair.name, floors)
                if pair.unclipped is not None:
                    again = self._judged(pair, pair.unclipped, floors)
                    before = {c.key: c for c in again if c.stage == "gradient" and c.step == 0}
                    found = [before.get(c.key, c) for c in found]
                both.append({c.key: c for c in found})
            rows = [asdict(_row(by_measure, both[1][key])) for key, by_measure in both[0].items()]
            self.rows.write_text(json.dumps(rows))
        return super().compare(place, pair, ranks)

    def _judged(self, pair: Pair, name: str, floors: Mapping[int, float] | None) -> list[Comparison]:
        trace = TraceFile(self.trace(pair.trusted, 0))
        estimate = Estimate(trace)
        run = replace(pair.observed, ranks=self._traces(name, pair.observed), found={})
        trusted = Reference(trace=trace, floors=estimate if floors is None else floors, parts=pair.parts)
        return compare_run(run, trusted, exact=not self.low_precision, told=estimate.saw)


def _row(measured: Comparison, estimated: Comparison) -> Row:
    return Row(
        step=measured.step,
        stage=measured.stage,
        name=measured.name,
        part=measured.part,
        error=estimated.error,
        estimated=estimated.floor,
        measured=measured.floor,
        verdict=estimated.verdict.value,
        verdict_measured=measured.verdict.value,
    )


def judged(
    name: str, experiment: sp.Experiment, layout: Parallelism, precision: str, trusted: sp.Experiment | None = None
) -> Judged:
    """One experiment under one layout. Raises `ShardproofError` where it does not run."""
    if precision == "auto":
        experiment = replace(experiment, loss=autocast(experiment.loss))
    with tempfile.TemporaryDirectory() as folder:
        worker = Twice(
            experiment=experiment,
            trusted=experiment if trusted is None else trusted,
            folder=Path(folder),
            dtype=DTYPES["float32" if precision == "auto" else precision],
            steps=experiment.steps,
            shuffle=False,
            rows=Path(folder) / "rows.json",
        )
        session = Session(worker=worker, show=(), progress=Silent())
        with start(layout.world_size, worker, timeout_s=600, device="cpu") as pool:
            session.use(pool)
            try:
                session.check(layout)
            except sp.ShardproofError:
                # A run that cannot be repeated to look for its cause was compared all the same.
                if not worker.rows.exists():
                    raise
        rows = [Row(**row) for row in json.loads(worker.rows.read_text())]
    return Judged(name=name, precision=precision, rows=tuple(rows))


def autocast(loss: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """The same loss, with products in bfloat16."""

    def inside(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return loss(model, batch)

    return inside


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """One that is linear in the gradient and one that divides by its size."""
    return {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    }


def examples(precisions: Sequence[str] = PRECISIONS) -> Iterator[Callable[[], Judged]]:
    """The repository's examples under the layouts that all of them know."""
    sys.path.insert(0, str(ROOT / "examples"))
    import composer_mlp
    import digits
    import gpt

    found = {
        "digits": digits.experiment,
        "gpt": gpt.experiment,
        "gpt:sequence_parallel": gpt.sequence_parallel,
        "gpt:ragged": gpt.ragged,
        "composer_mlp": composer_mlp.experiment,
    }
    for name, experiment in found.items():
        for kind, optimizer in optimizers().items():
            changed = replace(experiment, optimizer=optimizer, steps=min(experiment.steps, 3))
            for strategy in ("ddp", "fsdp", "tp", "tp_fsdp"):
                # composer_mlp's layers are two features wide.
                layout = parse(strategy, 2 if name == "composer_mlp" and strategy != "tp_fsdp" else 4)
                for precision in precisions:
                    yield lambda n=f"{name} {kind} {strategy}", e=changed, at=layout, p=precision: judged(n, e, at, p)


def drawn(draws: int, seed: int) -> Iterator[Callable[[], Judged]]:
    """The random experiments of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_no_false_alarm as tests

    found: list[tests.Drawn] = []
    settings = hypothesis.settings(
        max_examples=draws,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def one(draw: tests.Drawn) -> None:
        found.append(draw)

    # hypothesis runs functions of Python alone.
    hypothesis.seed(seed)(settings(hypothesis.given(tests.draws())(one)))()
    for number, draw in enumerate(found):
        plain = draw.dtype == "float32" and draw.model in ("mlp", "decoder")
        for precision in (draw.dtype, "auto") if plain else (draw.dtype,):
            experiment, layout = tests.experiment_of(draw), parse(draw.strategy, None)
            yield lambda n=f"draw {number}", e=experiment, at=layout, p=precision: judged(n, e, at, p)


def deep(faults: Sequence[str | None]) -> Iterator[Callable[[], Judged]]:
    """The decoder of 24 layers, split by hand, with a fault in its last block or none."""
    import noise_margins

    for fault in faults:
        for sequence in (True, False) if fault is None else (fault == "norm",):
            for precision in PRECISIONS[:3] if fault is not None else PRECISIONS:
                experiment = noise_margins.experiment(noise_margins.LAYERS, 0, fault, sequence=sequence)
                name = f"24 layers, {fault or 'right'}{', sequence slices' if sequence else ''}"
                yield lambda n=name, e=experiment, p=precision: judged(n, e, parse("tp", 2), p)


def zoo(entries: Sequence[Any], pattern: str = "*") -> Iterator[Callable[[], Judged]]:
    """Entries of the zoo in each dtype, or in the one that they ask for."""
    for entry in entries:
        if not fnmatch(entry.name, pattern):
            continue
        for precision in (entry.options["dtype"],) if "dtype" in entry.options else PRECISIONS[:3]:
            trusted = None if entry.trusted is None else entry.trusted(SETTING)
            layout = SETTING.layout(entry.layout)
            yield lambda e=entry, at=layout, p=precision, t=trusted: judged(e.name, e.build(SETTING), at, p, t)


def all_of(runs: Iterator[Callable[[], Judged]]) -> list[Judged]:
    """Run them; those that do not run are told and left out."""
    found = []
    for run in runs:
        try:
            found.append(run())
        except sp.ShardproofError as error:
            print(f"left out: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    return found


def table_of_right(runs: Sequence[Judged]) -> str:
    """By precision and stage: tensors, the worst error in estimated floors, and how large those are against measured
    ones (median, and the tensor that nine in ten are below)."""
    lines = [f"{'':10}{'stage':18}{'tensors':>8}{'worst':>8}{'estimated / measured: median':>30}{'90%':>10}"]
    by: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for run in runs:
        for row in run.rows:
            if row.verdict in COMPARED and row.stage not in ("batch", "initial-state"):
                by[run.precision, row.stage].append(row)
    for (precision, stage), rows in by.items():
        shares = sorted(row.estimated / row.measured for row in rows if row.measured > 0) or [0.0]
        worst = max(row.floors for row in rows)
        lines.append(
            f"{precision:10}{stage:18}{len(rows):8}{worst:8.2f}{shares[len(shares) // 2]:30.2g}"
            f"{shares[9 * len(shares) // 10]:10.2g}"
        )
    alarms = [run for run in runs if run.first(measured=False) is not None]
    lines.append(f"{len(runs)} right runs, {len(alarms)} false alarms")
    lines += [f"    {run.precision} {run.name}: {run.first(measured=False)}" for run in alarms]
    return "\n".join(lines)


def table_of_bugs(runs: Sequence[Judged]) -> str:
    """By precision: bugs found by measured floors, by estimated ones, at the same tensor; and the least margin."""
    lines = [f"{'':10}{'measured':>10}{'estimated':>10}{'same place':>12}{'least error of a first wrong tensor':>38}"]
    for precision in PRECISIONS:
        known = [run for run in runs if run.precision == precision and run.first(measured=True) is not None]
        found = [run for run in known if run.first(measured=False) is not None]
        if not known:
            continue
        same = sum(_place(run, measured=True) == _place(run, measured=False) for run in found)
        margins = sorted(
            (row.floors, run.name) for run in found if (row := run.first(measured=False)) and row.floors == row.floors
        )
        least = f"{margins[0][0]:.3g} floors: {margins[0][1]}" if margins else ""
        lines.append(f"{precision:10}{len(known):10}{len(found):10}{same:12}{least:>38}")
        lines += [f"    missed: {run.name}" for run in known if run not in found]
        lines += [
            f"    later: {run.name}: {_place(run, measured=False)} for {_place(run, measured=True)}"
            for run in found
            if _place(run, measured=True) != _place(run, measured=False)
        ]
    return "\n".join(lines)


def _place(run: Judged, *, measured: bool) -> tuple[int, str, str] | None:
    row = run.first(measured=measured)
    return None if row is None else (row.step, row.stage, row.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=100, metavar="N", help="random right experiments")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the draws")
    parser.add_argument("--bugs", default="*", metavar="PATTERN", help="of the zoo; '' for none")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    right = all_of(examples()) + all_of(drawn(options.draws, options.seed))
    right += all_of(deep((None,))) + all_of(zoo(CONTROLS))
    print(table_of_right(right))
    wrong = all_of(zoo(BUGS, options.bugs)) + all_of(deep(("norm", "column")))
    print(table_of_bugs(wrong))
    if options.json is not None:
        shown = {"right": [asdict(run) for run in right], "bugs": [asdict(run) for run in wrong]}
        options.json.write_text(json.dumps(shown) + "\n")


if __name__ == "__main__":
    main()
