"""The report as JSON, in the public names: a contract, so a change of meaning needs a new `SCHEMA_VERSION`.

JSON has no NaN and no infinity. They are written as the texts "nan", "inf" and "-inf", which `float()` reads, and
never as null: null means that there is nothing to say, as in a finding without a factor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path

from shardproof.compare.verdict import Comparison
from shardproof.diagnose.finding import Finding
from shardproof.report import file
from shardproof.report.data import Proof, Report, Run

SCHEMA_VERSION = 1
"""Raised when a name disappears or changes its meaning; new names do not raise it."""


def write(report: Report, path: Path) -> None:
    """Write `report` to `path`, in one move. Raises `UsageError` where the folder is missing."""
    file.write(path, text(report))


def text(report: Report) -> str:
    """`report` as the text of a JSON file."""
    return json.dumps(to_dict(report), indent=2, allow_nan=False) + "\n"


def to_dict(report: Report) -> dict[str, object]:
    """`report` as dicts, lists, texts, numbers, booleans and None: valid JSON as it stands."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ok": report.ok,
        "proven": report.proven,
        "experiment": report.experiment,
        "reference": report.reference,
        "invariants": report.invariants,
        "recorded": report.recorded,
        "estimated": report.estimated,
        "ranks": report.ranks,
        "steps": report.steps,
        "dtype": report.dtype,
        "device": report.device,
        "time_s": _plain(report.time_s),
        "warnings": list(report.warnings),
        "stopped": None if report.stopped is None else _fields(report.stopped),
        "first": None if report.first is None else _finding(report.first),
        "runs": [_run(run) for run in report.runs],
        "proofs": [_proof(proof) for proof in report.proofs],
    }


def _run(run: Run) -> dict[str, object]:
    return {
        "strategy": run.strategy,
        "ok": run.ok,
        "proven": run.proven,
        "degrees": _plain(run.degrees),
        "verdicts": run.verdicts,
        "not_checked": run.not_checked,
        "worst": None if run.worst is None else _comparison(run.worst),
        "findings": [_finding(finding) for finding in run.findings],
        "notes": list(run.notes),
        "sharded": _plain(run.sharded),
        "collectives": _plain(run.collectives),
        "time_s": _plain(run.time_s),
        "comparisons": [_comparison(comparison) for comparison in run.comparisons],
        "shown": _plain(run.shown),
    }


def _proof(proof: Proof) -> dict[str, object]:
    return {
        "strategy": proof.strategy,
        "caught": proof.caught,
        "planted": [_fields(planted) for planted in proof.planted],
        "left_out": _plain(proof.left_out),
    }


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "cause": finding.cause,
        "stage": finding.stage,
        "where": finding.where,
        "axis": finding.axis,
        "factor": _plain(finding.factor),
        "ranks": list(finding.ranks),
        "step": finding.step,
        "evidence": finding.evidence,
        "fix": finding.fix,
        "polluted": finding.polluted,
        "tried": [_fields(hypothesis) for hypothesis in finding.tried],
        "comparison": None if finding.comparison is None else _comparison(finding.comparison),
    }


def _comparison(comparison: Comparison) -> dict[str, object]:
    # Errors of single ranks are for the page: in a report of thousands of tensors they would be most of the file.
    fields = {name: value for name, value in _fields(comparison).items() if name != "errors"}
    return {**fields, "floors": _plain(comparison.floors)}


def _fields(record: object) -> dict[str, object]:
    if not is_dataclass(record):
        raise TypeError(f"{record!r} has no place in a report: {type(record).__name__} is not plain data")
    return {field.name: _plain(getattr(record, field.name)) for field in fields(record)}


def _plain(value: object) -> object:
    """`value` in what JSON knows."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return _fields(value)
