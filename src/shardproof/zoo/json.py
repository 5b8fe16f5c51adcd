"""What came of a run of the zoo as JSON: a contract, to which names may be added."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from shardproof.report import file
from shardproof.report.json import SCHEMA_VERSION
from shardproof.zoo.run import BugResult, ControlResult, ZooReport


def write(report: ZooReport, path: Path) -> None:
    """Write `report` to `path`, in one move. Raises `UsageError` where the folder is missing."""
    file.write(path, json.dumps(to_dict(report), indent=2, allow_nan=False) + "\n")


def to_dict(report: ZooReport) -> dict[str, object]:
    """`report` as dicts, lists, texts, numbers, booleans and None."""
    return {
        "schema_version": SCHEMA_VERSION,
        "setting": asdict(report.setting),
        "bugs": [_bug(bug) for bug in report.bugs],
        "controls": [_control(control) for control in report.controls],
        "false_alarms": report.false_alarms,
    }


def _bug(bug: BugResult) -> dict[str, object]:
    found = bug.finding
    return {
        "name": bug.name,
        "cause": bug.cause,
        "detected": bug.detected,
        "located": bug.located,
        "cause_first": bug.cause_first,
        "found_cause": bug.found_cause,
        "time_s": bug.time_s,
        "stage": None if found is None else found.stage,
        "where": None if found is None else found.where,
        "source": bug.source,
        "error": bug.error,
    }


def _control(control: ControlResult) -> dict[str, object]:
    return {"name": control.name, "ok": control.ok, "time_s": control.time_s}
