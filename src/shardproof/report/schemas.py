"""The JSON Schemas of what is written as JSON: files of this package, so that other programs can check against them."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from shardproof.errors import UsageError

NAMES = ("report", "zoo")
"""What there are schemas of: reports of checks and of comparisons of recordings; results of the zoo."""


def text(name: str = "report") -> str:
    """A schema as the text of its file. Raises `UsageError` for a name that is not one of `NAMES`."""
    if name not in NAMES:
        raise UsageError(f"schema {name!r}: there are {' and '.join(NAMES)}")
    return files("shardproof.report").joinpath("schema", f"{name}.json").read_text(encoding="utf-8")


def report_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `Report.to_json`, `shardproof check --json` and `shardproof diff --json`."""
    schema: dict[str, Any] = json.loads(text())
    return schema
