"""Every tensor of every run for the page's map, in columns: tens of bytes for each tensor and strategy."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence

from shardproof.compare.measure import MULTIPLE
from shardproof.compare.picture import KEPT, Picture
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key
from shardproof.diagnose.finding import Finding
from shardproof.report import finding as findings
from shardproof.report import spelling
from shardproof.report.data import Report, Run
from shardproof.report.table import worst
from shardproof.spec.parallelism import AXES
from shardproof.spec.stages import STAGES

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
"""Levels of a scale, one letter each."""

PER_DECADE, LOWEST = 2.5, -4.0
"""Of the scale of floors: letters for a power of ten, and the power of ten of the first letter."""

NONE, EQUAL, NAN, MOST = ".", "=", "!", "*"
"""For a rank that holds no piece, one that does not differ, NaN or infinity, and the tensor's own error."""

MARKS = {Verdict.EQUAL: "e", Verdict.ROUNDING: "r", Verdict.DIFFERENT: "d", Verdict.NOT_CHECKED: "n"}
ABSENT = " "
"""For a tensor that a run does not show at all."""

DEPTH = 6.0
"""Powers of ten of a heat map where the floor is zero."""


class Words(dict[object, int]):
    """Each word once: those of a model repeat in every step and stage."""

    def __missing__(self, word: object) -> int:
        self[word] = len(self)
        return self[word]


def grid(report: Report) -> Mapping[str, object]:
    """What the page's script reads, as JSON knows it."""
    keys = _rows(report.runs)
    names, parts, texts, shapes = Words(), Words(), Words(), Words()
    rows = {key: number for number, key in enumerate(keys)}
    runs = [_run(run, rows, texts, shapes) for run in report.runs]
    return {
        "stages": STAGES,
        "steps": [key[0] for key in keys],
        "stage": [STAGES.index(key[1]) for key in keys],
        "name": [names[spelling.printable(key[2])] for key in keys],
        "part": [parts[spelling.printable(key[3])] for key in keys],
        "names": list(names),
        "parts": list(parts),
        "texts": list(texts),
        "shapes": list(shapes),
        "scale": {"letters": LETTERS, "per_decade": PER_DECADE, "lowest": LOWEST, "multiple": MULTIPLE},
        "kept": KEPT,
        "reference": spelling.printable(report.trusted),
        "recorded": report.recorded,
        "invariants": report.invariants,
        "runs": runs,
    }


def _rows(runs: Sequence[Run]) -> list[Key]:
    """The tensors of all runs in causal order: by step and stage, within those as the first run that has them."""
    keys = dict.fromkeys(comparison.key for run in runs for comparison in run.comparisons)
    return sorted(keys, key=lambda key: (key[0], STAGES.index(key[1])))


def _run(run: Run, rows: Mapping[Key, int], texts: Words, shapes: Words) -> Mapping[str, object]:
    marks = [ABSENT] * len(rows)
    layouts, sizes, reasons = [-1] * len(rows), [-1] * len(rows), {}
    errors: dict[int, list[object]] = {}
    ranks: dict[int, str] = {}
    wrong: dict[int, list[int]] = {}
    samples: dict[int, list[object]] = {}
    for c in run.comparisons:
        row = rows[c.key]
        marks[row] = MARKS[c.verdict]
        layouts[row], sizes[row] = texts[spelling.printable(c.layout)], shapes[c.shape]
        if c.reason:
            reasons[row] = texts[spelling.printable(c.reason)]
        if c.error != 0 or c.floor:
            errors[row] = [_short(c.error), _short(c.floor)]
        if c.errors:
            ranks[row] = "".join(_level(error, c) for error in c.errors)
        if c.ranks:
            wrong[row] = list(c.ranks)
        if c.samples:
            samples[row] = [[s.rank, list(s.index), _exact(s.got), _exact(s.want)] for s in c.samples]
    floors = {c.key: c.floor for c in run.comparisons}
    return {
        "strategy": spelling.printable(run.strategy),
        "world": math.prod(run.degrees.values()),
        "axes": [[axis, run.degrees[axis]] for axis in (*AXES, *(set(run.degrees) - set(AXES))) if axis in run.degrees],
        "worst": spelling.printable(worst(run)),
        "marks": "".join(marks),
        "layout": layouts,
        "shape": sizes,
        "reason": reasons,
        "error": errors,
        "by_rank": ranks,
        "wrong": wrong,
        "samples": samples,
        "findings": [_finding(found, rows) for found in _findings(run)],
        "pictures": {rows[p.key]: _picture(p, floors[p.key], texts) for p in run.pictures if p.key in floors},
    }


def _findings(run: Run) -> Sequence[Finding]:
    first = findings.first(run)
    return run.findings or ((first,) if first is not None else ())


def _finding(found: Finding, rows: Mapping[Key, int]) -> Mapping[str, object]:
    key = None if found.comparison is None else found.comparison.key
    return {
        "row": -1 if key is None else rows.get(key, -1),
        "why": spelling.printable(findings.why(found)),
        "evidence": spelling.printable(found.evidence),
        "fix": spelling.printable(found.fix),
        "tried": [[spelling.printable(one.name), one.holds, _short(one.residual)] for one in found.tried],
    }


def _level(error: float | None, c: Comparison) -> str:
    """A letter for the error of one rank."""
    if error is None:
        return NONE
    if error == 0:
        return EQUAL
    if error == c.error or not math.isfinite(error) or not c.floor > 0:
        return MOST if error == c.error else NAN
    floors = error / c.floor
    return LETTERS[min(max(round((math.log10(floors) - LOWEST) * PER_DECADE), 0), len(LETTERS) - 1)]


def _picture(picture: Picture, floor: float, texts: Words) -> Mapping[str, object]:
    heat, low, high = _heat(picture, floor)
    return {
        "shape": picture.shape,
        "split": picture.split,
        "rows": picture.rows,
        "columns": picture.columns,
        "cells": picture.cells,
        "owners": picture.owners,
        "held": texts[base64.b64encode(picture.held).decode()],
        "heat": heat,
        "low": _short(low),
        "high": _short(high),
        "first": picture.first,
        "window": picture.window,
        "want": [_exact(value) for value in picture.want],
        "got": [[rank, [None if value is None else _exact(value) for value in values]] for rank, values in picture.got],
    }


def _heat(picture: Picture, floor: float) -> tuple[str, float, float]:
    """A letter for each cell, on a scale of powers of ten between two ends."""
    finite = [value for value in picture.heat if math.isfinite(value) and value > 0]
    if not picture.heat or (not finite and all(value == 0 for value in picture.heat)):
        return "", 0.0, 0.0
    high = max(finite, default=1.0)
    low = min(floor, high / 10) if floor > 0 else high * 10.0**-DEPTH
    span = math.log10(high / low)
    levels = len(LETTERS) - 1

    def letter(value: float) -> str:
        if value == 0:
            return EQUAL
        if not math.isfinite(value):
            return NAN
        return LETTERS[min(max(round(math.log10(value / low) / span * levels), 0), levels)]

    return "".join(map(letter, picture.heat)), low, high


def _short(value: float) -> float | str:
    """Three digits: all that a size is read by."""
    return float(f"{value:.2e}") if math.isfinite(value) else str(value)


def _exact(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
