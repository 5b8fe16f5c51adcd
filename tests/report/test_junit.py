from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from shardproof.compare.verdict import Comparison, Verdict
from shardproof.errors import Failure as RankFailure
from shardproof.errors import RankDied, RankFailed, UsageError
from shardproof.report import junit
from shardproof.report.data import Report, Run
from shardproof.report.stopped import stopped
from shardproof.spec.stages import STAGES

COUNTS = ("tests", "failures", "errors")
ALLOWED = {
    "testsuites": ({"name", "time", *COUNTS}, {"testsuite"}),
    "testsuite": ({"name", "time", "skipped", *COUNTS}, {"properties", "testcase"}),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"classname", "name", "time"}, {"failure", "error", "skipped", "system-out"}),
    "failure": ({"type", "message"}, set()),
    "error": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}
"""Element -> the attributes and children that it has in the schema of Jenkins' xUnit plugin, of those that are used."""

TIME = re.compile(r"\d+\.\d{3}")


def read(report: Report) -> ET.Element:
    """The document, after a look at what every reader of JUnit relies on."""
    root = ET.fromstring(junit.document(report))
    for element in root.iter():
        attributes, children = ALLOWED[element.tag]
        assert set(element.attrib) == attributes
        assert {child.tag for child in element} <= children
        assert "time" not in element.attrib or TIME.fullmatch(element.attrib["time"])
        if element.tag == "testcase":
            # Surefire wants the outcome before the output, and one outcome at most.
            assert [child.tag for child in element if child.tag != "system-out"] == [c.tag for c in element][
                :1
            ] or not [c for c in element if c.tag != "system-out"]
    for suite in root.iter("testsuite"):
        cases = list(suite.iter("testcase"))
        assert int(suite.attrib["tests"]) == len(cases)
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[attribute]) == sum(case.find(tag) is not None for case in cases)
        assert len({(case.attrib["classname"], case.attrib["name"]) for case in cases}) == len(cases)
    for total in COUNTS:
        assert int(root.attrib[total]) == sum(int(suite.attrib[total]) for suite in root.iter("testsuite"))
    return root


def cases(report: Report, strategy: str) -> dict[str, ET.Element]:
    suite = next(s for s in read(report).iter("testsuite") if s.attrib["name"].endswith(f" {strategy}"))
    return {case.attrib["name"]: case for case in suite.iter("testcase")}


def test_a_strategy_is_a_suite_with_its_verdict_and_its_stages_in_causal_order(parity: Report):
    assert [suite.attrib["name"] for suite in read(parity)] == [
        f"examples/decoder.py:experiment {run.strategy}" for run in parity.runs
    ]
    held = cases(parity, "tp_fsdp")
    assert list(held) == ["verdict", "batch", "gradient", "optimizer-state", "update"]
    assert held["verdict"].attrib["classname"] == "examples.decoder.experiment.tp_fsdp"
    assert held["verdict"].attrib["time"] == "1.300"
    assert held["gradient"].findtext("system-out") == "4 rounding"


def test_what_was_not_checked_is_skipped_with_the_reason(parity: Report):
    skipped = cases(parity, "ddp")["optimizer-state"].find("skipped")
    assert skipped is not None
    assert skipped.attrib == {"type": "not-checked", "message": "zero in the reference"}
    assert skipped.text == "not checked, 4 tensors: zero in the reference"


def test_a_failure_has_cause_evidence_and_fix_and_later_stages_name_the_first(divergence: Report):
    held = cases(divergence, "tp_fsdp")
    for name in ("verdict", "gradient"):
        failure = held[name].find("failure")
        assert failure is not None
        assert failure.attrib["type"] == "grad-not-summed"
        assert failure.attrib["message"].startswith(
            "grad-not-summed over tp, factor 0.5: step 0, gradient of layers.0.attention_norm.weight"
        )
        assert "evidence   the sum over tp equals the reference" in (failure.text or "")
        assert "fix        all-reduce the gradients of the norms over tp" in (failure.text or "")
    later = held["grad-norm"].findtext("failure")
    assert later is not None
    assert later.startswith("the run first diverges elsewhere: step 0, gradient of layers.0.attention_norm.weight")
    assert held["update"].find("failure") is None


def test_a_tensor_that_differs_without_an_explanation_fails_its_stage_too(divergence: Report):
    held = cases(divergence, "dp_replicate=2,dp_shard=2,tp=2")
    failure = held["initial-state"].find("failure")
    assert failure is not None
    assert failure.attrib == {"type": "different", "message": "1 of 1 tensor different"}
    assert (failure.text or "").endswith("lora_A.default.weight: NaN")


def test_a_run_of_which_nothing_was_compared_is_no_pass(parity: Report):
    nothing = Comparison(step=0, stage="forward", name="fc", verdict=Verdict.NOT_CHECKED, reason="draws")
    forward = replace(nothing, verdict=Verdict.EQUAL)
    failed = cases(replace(parity, runs=(replace(parity.runs[0], comparisons=(nothing,)),)), "ddp")["verdict"]
    unproven = cases(replace(parity, runs=(replace(parity.runs[0], comparisons=(forward,)),)), "ddp")["verdict"]
    replicas = Run(strategy="fsdp", degrees={"dp_shard": 8}, comparisons=(nothing,), findings=(), invariants=True)
    alone = cases(replace(parity, runs=(replicas,)), "fsdp")["verdict"]
    assert [case[0].attrib["type"] for case in (failed, unproven, alone)] == [
        "nothing-compared",
        "unproven",
        "no-replicas",
    ]
    assert [case[0].tag for case in (failed, unproven, alone)] == ["failure", "skipped", "skipped"]


def test_a_crash_is_an_error_that_names_the_line(parity: Report):
    crash = RankFailed(
        RankFailure(rank=1, type_name="ValueError", message="bad", file="/w/a.py", line=7, traceback="Traceback\n x"),
        during="tp",
    )
    for error, kind, name in ((crash, "RankFailed", "tp"), (RankDied(2, "killed by SIGKILL"), "RankDied", "check")):
        (suite,) = read(replace(parity, runs=(), stopped=stopped(error)))
        case = suite.find("testcase")
        assert case is not None
        assert case.attrib["name"] == name
        assert case[0].tag == "error"
        assert case[0].attrib["type"] == kind
        assert case[0].text == str(error)
    assert "rank 1 failed in tp at /w/a.py:7: ValueError: bad" in junit.document(
        replace(parity, runs=(), stopped=stopped(crash))
    )


def test_a_widely_used_reader_reads_it(divergence: Report, tmp_path: Path):
    divergence.to_junit(tmp_path / "junit.xml")
    read_back = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    outcomes = [type(result) for suite in read_back for case in suite for result in case.result]
    assert (outcomes.count(Failure), outcomes.count(Skipped), outcomes.count(Error)) == (5, 4, 0)
    assert read_back.tests == sum(1 for suite in read_back for _ in suite)


def test_characters_that_xml_lacks_are_escaped_wherever_they_stand(divergence: Report):
    evil = "\x00\x1b[31m\ud800\ufffe\x0b]]><a b='&\"\r\n"
    run = divergence.runs[2]
    found = replace(run.findings[0], where=evil, evidence=evil, fix=evil, cause=evil, stage="gradient")
    bad = replace(run, strategy=evil, findings=(found,), notes=(evil,))
    text = junit.document(replace(divergence, experiment=evil, runs=(bad,), warnings=(evil,)))
    text.encode("utf-8")
    root = ET.fromstring(text)
    assert all(c.isprintable() or c in "\n\t" for c in text)
    said = next(p.attrib["value"] for p in root.iter("property") if p.attrib["name"] == "experiment")
    assert said == r"\x00\x1b[31m\ud800\ufffe\x0b]]><a b='&" + '"' + r"\r\n"


def test_there_are_few_cases_however_many_tensors_and_steps(parity: Report):
    many = tuple(
        Comparison(step=step, stage=stage, name=f"w{i}", verdict=Verdict.DIFFERENT, error=1.0)
        for step in range(20)
        for stage in STAGES
        for i in range(50)
    )
    report = replace(parity, runs=(replace(parity.runs[0], comparisons=many),))
    assert len(cases(report, "ddp")) == len(STAGES) + 1
    assert len(junit.document(report)) < 40_000


def test_what_cannot_be_written_is_one_clear_error(parity: Report, tmp_path: Path):
    with pytest.raises(UsageError, match="there is no folder"):
        parity.to_junit(tmp_path / "missing" / "junit.xml")
    with pytest.raises(UsageError, match="/dev/full: cannot be written: No space left"):
        parity.to_junit("/dev/full")
