"""What is written as JSON is what the schemas say, and the schemas are what docs/json.md says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jsonschema import Draft202012Validator
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import shardproof as sp
from shardproof import cli
from shardproof.compare.verdict import Comparison, Sample, Verdict
from shardproof.diagnose.finding import CAUSES, Finding, Hypothesis
from shardproof.errors import RankHung, RankLost
from shardproof.report import json as views
from shardproof.report import schemas
from shardproof.report.data import Planted, Proof, Report, Run, Shown
from shardproof.report.stopped import Stopped, stopped
from shardproof.spec.stages import STAGES

SCHEMA = sp.report_schema()
FROZEN = Path(__file__).with_name("names_of_version_1.json")
PAGE = Path(__file__).parents[2] / "docs" / "json.md"

DATA = TensorDataset(torch.linspace(-1, 1, 128).reshape(16, 8).sin(), torch.arange(16) % 4)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def experiment(*layers: nn.Module, **changed: Any) -> sp.Experiment:
    options: dict[str, Any] = {
        "model": lambda: nn.Sequential(*layers, nn.Linear(8, 4)),
        "data": DATA,
        "loss": loss,
        "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        "batch_size": 8,
        "steps": 1,
    }
    return sp.Experiment(**options | changed)


def doubled(step: sp.Step) -> torch.Tensor:
    """Forgets that every rank's loss is a mean of its own part already."""
    step.optimizer.zero_grad()
    (batch,) = step.microbatches
    value = step.loss(step.model, batch)
    (2 * value).backward()
    step.optimizer.step()
    return value.detach()


def record(path: Path, *, rows: int = 8) -> Path:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sp.record(path, model, optimizer):
        F.cross_entropy(model(DATA.tensors[0][:rows]), DATA.tensors[1][:rows]).backward()
        optimizer.step()
    return path


def crash(model: nn.Module, batch: Any) -> torch.Tensor:
    raise ValueError("a bad batch")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Reports of every kind, of real runs."""
    folder = tmp_path_factory.mktemp("recordings")
    right = record(folder / "right")
    found = {
        "parity, with planted faults and what a rank held": sp.check(
            experiment(), ("ddp",), ranks=2, prove=True, show=(1,)
        ),
        "divergence": sp.check(experiment(train_step=doubled), ("ddp", "fsdp"), ranks=2),
        "not checked, unproven": sp.check(experiment(nn.Dropout(0.5)), ("ddp",), ranks=2),
        "invariants": sp.check(experiment(), ("ddp", "fsdp"), ranks=2, invariants=True),
        "two recordings that agree, estimated floors": sp.diff(right, right),
        "two recordings that differ": sp.diff(right, record(folder / "other", rows=4)),
    }
    try:
        sp.check(experiment(loss=crash), ("ddp",), ranks=2)
    except sp.ShardproofError as error:
        found["stopped"] = replace(found["divergence"], runs=(), stopped=stopped(error))
    return found


def test_reports_of_real_runs_are_what_the_schema_says(reports: dict[str, Report]):
    check = Draft202012Validator(SCHEMA)
    for name, report in reports.items():
        written = json.loads(views.text(report))
        assert [f"{name}: {error.json_path}: {error.message}" for error in check.iter_errors(written)] == []


def test_those_reports_are_of_every_kind(reports: dict[str, Report]):
    (planted, different, unchecked, invariants, alike, other, stopped_one) = map(views.to_dict, reports.values())
    assert planted["proofs"]
    assert planted["runs"][0]["shown"]["1"]  # type: ignore[index]
    assert different["first"]["cause"] == "grad-scale"  # type: ignore[index]
    assert unchecked["runs"][0]["not_checked"]  # type: ignore[index]
    assert (unchecked["ok"], unchecked["proven"]) == (True, False) or not unchecked["ok"]
    assert invariants["invariants"]
    assert (alike["estimated"], alike["recorded"], alike["ok"]) == (True, True, True)
    assert not other["ok"]
    assert stopped_one["stopped"]["kind"] in ("ExperimentError", "RankFailed")  # type: ignore[index]


def test_reports_with_numbers_that_json_lacks_and_with_crashes_are_what_the_schema_says(
    divergence: Report, held: Report
):
    check = Draft202012Validator(SCHEMA)
    hung, lost = RankHung(1.0, {0: "x"}, during="tp"), RankLost(3, "reset")
    for report in (divergence, held, *(replace(divergence, runs=(), stopped=stopped(e)) for e in (hung, lost))):
        check.validate(json.loads(views.text(report)))


def test_what_zoo_writes_is_what_its_schema_says():
    from shardproof.zoo.json import to_dict
    from shardproof.zoo.run import BugResult, ControlResult, ZooReport
    from shardproof.zoo.setting import Setting

    bug = BugResult(
        name="a",
        cause="rng",
        stages=("loss",),
        where=("*",),
        source="https://",
        detected=True,
        located=False,
        cause_first=False,
        found_cause=None,
        time_s=1.0,
    )
    report = ZooReport(setting=Setting(), bugs=(bug,), controls=(ControlResult(name="c", ok=True, time_s=0.5),))
    Draft202012Validator(json.loads(schemas.text("zoo"))).validate(json.loads(json.dumps(to_dict(report))))


def objects(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object with names of its own in a schema, by where it stands."""
    if "properties" in schema:
        yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from objects(inner, f"{path}.{name}")
    for name, inner in schema.get("$defs", {}).items():
        yield from objects(inner, name)


@pytest.mark.parametrize("name", schemas.NAMES)
def test_every_name_is_described_and_always_there_and_no_other_is(name: str):
    schema = json.loads(schemas.text(name))
    Draft202012Validator.check_schema(schema)
    for where, found in objects(schema):
        assert found["additionalProperties"] is False, where
        assert found["required"] == list(found["properties"]), where
        for field, inner in found["properties"].items():
            assert inner["description"].endswith("."), f"{where}.{field}"


DATACLASSES: dict[str, tuple[type, set[str]]] = {
    "sample": (Sample, set()),
    "comparison": (Comparison, {"floors"}),
    "hypothesis": (Hypothesis, set()),
    "finding": (Finding, set()),
    "shown": (Shown, set()),
    "planted": (Planted, set()),
    "stopped": (Stopped, set()),
    "proof": (Proof, {"caught"}),
    "run": (Run, {"ok", "proven", "verdicts", "not_checked", "worst"}),
    "": (Report, {"schema_version", "ok", "proven", "invariants", "first"}),
}
"""Object of the schema -> the class that it is written from, and what is computed beside its fields."""

LEFT_OUT: dict[type, set[str]] = {Run: {"invariants", "pictures"}, Comparison: {"errors"}}
"""Whether a run is one of invariants is told once, of the whole report; the page alone shows errors rank by rank, and
pictures."""


@pytest.mark.parametrize("name", DATACLASSES)
def test_every_field_of_a_report_is_in_the_schema(name: str):
    of, computed = DATACLASSES[name]
    described = set((SCHEMA["$defs"][name] if name else SCHEMA)["properties"])
    assert described == {field.name for field in fields(of)} - LEFT_OUT.get(of, set()) | computed


def test_closed_lists_are_those_of_the_code():
    assert SCHEMA["$defs"]["cause"]["enum"] == list(CAUSES)
    assert SCHEMA["$defs"]["verdict"]["enum"] == [str(verdict) for verdict in Verdict]
    assert SCHEMA["$defs"]["stage"]["enum"][: len(STAGES)] == list(STAGES)


def types(schema: Mapping[str, Any]) -> str:
    """What a value may be, without its description: `text`, `list of numbers` and so on, as JSON."""
    said = {key: value for key, value in schema.items() if key not in ("description", "properties", "required")}
    return json.dumps(said, sort_keys=True)


def names(schema: Mapping[str, Any]) -> dict[str, str]:
    """Every name of a schema with what its value may be."""
    return {
        f"{where}.{name}": types(inner)
        for where, found in objects(schema)
        for name, inner in found["properties"].items()
    }


def test_a_name_of_version_1_keeps_its_place_and_type_as_long_as_that_is_the_version():
    frozen, now = json.loads(FROZEN.read_text()), names(SCHEMA)
    assert views.SCHEMA_VERSION == SCHEMA["properties"]["schema_version"]["const"] == 1
    changed = {name: (was, now.get(name)) for name, was in frozen.items() if now.get(name) != was}
    assert changed == {}, "a reader of version 1 relies on these: raise SCHEMA_VERSION, and freeze its names"


def test_a_reader_of_an_older_report_of_the_same_version_ignores_names_that_it_does_not_know(divergence: Report):
    newer: Any = views.to_dict(divergence) | {"added_later": {"a": 1}}
    (unknown,) = Draft202012Validator(SCHEMA).iter_errors(newer)
    assert unknown.validator == "additionalProperties"
    tolerant = json.loads(schemas.text().replace('"additionalProperties": false', '"additionalProperties": true'))
    Draft202012Validator(tolerant).validate(json.loads(json.dumps(newer)))


def test_the_command_prints_the_packaged_file():
    for arguments, name in (([], "report"), (["zoo"], "zoo")):
        printed = CliRunner().invoke(cli.app, ["schema", *arguments])
        assert printed.exit_code == 0
        assert json.loads(printed.stdout) == json.loads(schemas.text(name))
    wrong = CliRunner().invoke(cli.app, ["schema", "reports"])
    assert (wrong.exit_code, wrong.stderr) == (2, "error: schema 'reports': there are report and zoo\n")


def kind(schema: Mapping[str, Any]) -> str:
    """What a value may be, for a person."""
    if "anyOf" in schema:
        return " or ".join(kind(each) for each in schema["anyOf"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "const" in schema or "enum" in schema:
        return f"`{schema['const']}`" if "const" in schema else "one of a list"
    of = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if of == ["array"]:
        return f"list of {kind(schema['items'])}"
    if of == ["object"] and isinstance(schema["additionalProperties"], dict):
        return f"object of {kind(schema['additionalProperties'])}"
    return " or ".join(of)


def tables(name: str) -> str:
    """The tables of docs/json.md, made of a schema."""
    schema = json.loads(schemas.text(name))
    lines = []
    for where, found in objects(schema):
        title = where.lstrip(".") or name
        lines += [f"### {title}", "", found["description"], "", "| name | value | meaning |", "|---|---|---|"]
        lines += [
            f"| `{field}` | {kind(inner)} | {inner['description'].replace('|', chr(92) + '|')} |"
            for field, inner in found["properties"].items()
        ]
        lines += [""]
    for word, found in schema["$defs"].items():
        if "properties" not in found:
            listed = ", ".join(f"`{each}`" for each in found.get("enum", ()))
            lines += [f"### {word}", "", found["description"] + (f" One of {listed}." if listed else ""), ""]
    return "\n".join(lines)


@pytest.mark.parametrize("name", schemas.NAMES)
def test_the_page_lists_every_name_as_the_schema_has_it(name: str):
    assert tables(name) in PAGE.read_text()
