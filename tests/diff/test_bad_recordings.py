"""`sp.diff` of recordings that are cut off, damaged, of other things, or made up: a clear error or a partial answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from somebodys_loop import OnRanks

import shardproof as sp
from shardproof.ranks import start
from shardproof.report.text import plain

Line = dict[str, Any]

RUNS = (("single", 1), ("ddp", 2), ("fsdp", 2), ("tp-by-hand", 2), ("ddp-accumulated", 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {kind: folder / kind for kind, _ in RUNS}
    with start(2, OnRanks(), timeout_s=60) as ranks:
        for kind, world in RUNS:
            ranks.call("train", found[kind], kind, world, ranks=list(range(world)))
        found["stats"] = folder / "stats"
        ranks.call("train", found["stats"], "ddp", 2, "", "stats", ranks=[0, 1])
    return found


@pytest.fixture
def copied(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a recording, to be damaged."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(runs[kind], tmp_path / f"damaged-{kind}"))

    return copy


def rewritten(folder: Path, change: Callable[[Line], Line | None]) -> Path:
    """Every line but the header under `change`, which leaves one out by None."""
    for path in folder.glob("*.jsonl"):
        header, *lines, closed = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [new for line in lines if (new := change(line)) is not None]
        closed["records"] = sum("event" not in line for line in lines)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in [header, *lines, closed]))
    return folder


def of_records(change: Callable[[Line], None]) -> Callable[[Line], Line]:
    def changed(line: Line) -> Line:
        if "stage" in line:
            change(line)
        return line

    return changed


def told(report: sp.Report) -> str:
    return " ".join(str(report).split())


def test_what_is_no_recording_is_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for path, said in (
        ("nowhere", "does not exist; give the directory that was recorded to"),
        ("empty", "holds no recording: it has no rank-00000.jsonl, and nothing else"),
        ("other", "only notes.txt"),
        ("other/notes.txt", "is a file; a recording is a directory"),
    ):
        with pytest.raises(sp.TraceError, match=said):
            sp.diff(runs["single"], tmp_path / path)
        with pytest.raises(sp.TraceError, match=said):
            sp.diff(tmp_path / path, runs["single"])
        with pytest.raises(sp.TraceError, match=said):
            sp.diff(runs["single"], runs["ddp"], noise=[tmp_path / path])


def test_another_version_is_refused(runs: dict[str, Path], copied: Callable[[str], Path]) -> None:
    folder = copied("ddp")
    path = folder / "rank-00001.jsonl"
    path.write_text(path.read_text().replace('"version":1', '"version":2', 1))
    with pytest.raises(sp.TraceError, match="rank 1 is a trace of version 2; this shardproof reads version 1"):
        sp.diff(runs["single"], folder)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp-by-hand"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named_and_is_no_divergence(
    runs: dict[str, Path], copied: Callable[[str], Path], kind: str, rank: int
) -> None:
    folder = copied(kind)
    (folder / f"rank-0000{rank}.jsonl").unlink()
    for report in (sp.diff(runs["single"], folder), sp.diff(folder, runs["single"]), sp.diff(folder, runs["ddp"])):
        assert report.first is None, str(report)
        assert not report.runs[0].verdicts["different"]
        assert report.warnings == (f"{folder}: nothing can be read of 1 of 2 ranks: {rank}",)
        assert f"what rank {rank} of damaged-{kind} read in this step is not all known" in told(report)
    if kind == "ddp":
        # Replicas: what the other rank holds is whole.
        assert sp.diff(runs["single"], folder).proven
        assert "parity, as far as the recordings can be read: damaged-ddp" in told(sp.diff(runs["single"], folder))


def test_a_rank_that_cannot_be_opened_is_as_good_as_missing(
    runs: dict[str, Path], copied: Callable[[str], Path]
) -> None:
    folder = copied("ddp")
    (folder / "rank-00001.jsonl").unlink()
    (folder / "rank-00001.jsonl").mkdir()
    report = sp.diff(runs["single"], folder)
    assert report.ok
    assert any("rank 1: rank-00001.jsonl cannot be read" in warning for warning in report.warnings)


@pytest.mark.parametrize("suffix", ["jsonl", "safetensors"])
@pytest.mark.parametrize("kind", ["ddp-accumulated", "fsdp"])
def test_a_rank_cut_off_at_any_byte_gives_a_partial_answer(
    runs: dict[str, Path], copied: Callable[[str], Path], kind: str, suffix: str
) -> None:
    folder = copied(kind)
    path = max(folder.glob(f"*.{suffix}"))
    content = path.read_bytes()
    trusted = runs["single"]
    first = content.index(b"\n") + 1 if suffix == "jsonl" else 0
    for share in (0.02, 0.4, 0.98):
        path.write_bytes(content[: max(first, int(len(content) * share))])
        for report in (sp.diff(trusted, folder), sp.diff(folder, trusted)):
            assert report.first is None, f"{share}\n{report}"
            (warning,) = report.warnings
            assert "the run was cut off" in warning or "its data are not whole" in warning or "no last line" in warning


def test_a_sample_that_only_one_run_read_is_found_although_a_rank_is_missing(
    runs: dict[str, Path], copied: Callable[[str], Path]
) -> None:
    def foreign(line: Line) -> None:
        if line["stage"] == "batch" and line["step"] == 1:
            line["samples"] = ["another"] * len(line["samples"])

    folder = rewritten(copied("ddp"), of_records(foreign))
    (folder / "rank-00001.jsonl").unlink()
    report = sp.diff(runs["single"], folder)
    assert report.first is not None
    assert (report.first.cause, report.first.step) == ("data-order", 1), str(report)


def test_runs_without_a_common_step_say_which_steps_they_show(
    runs: dict[str, Path], copied: Callable[[str], Path]
) -> None:
    def later(line: Line) -> None:
        line["step"] += 10

    report = sp.diff(runs["single"], rewritten(copied("ddp"), of_records(later)))
    assert not report.ok
    assert report.first is None
    assert "no step in common: single shows steps 0-2 and damaged-ddp shows steps 9-12" in told(report)


def test_without_records_nothing_is_proven(runs: dict[str, Path], copied: Callable[[str], Path]) -> None:
    folder = rewritten(copied("single"), lambda line: None if "stage" in line else line)
    for a, b in ((runs["ddp"], folder), (folder, runs["ddp"]), (folder, folder)):
        report = sp.diff(a, b)
        assert not report.ok
        assert "damaged-single shows no step" in told(report)


def renamed(line: Line) -> None:
    if line["name"] not in ("(root)", "batch"):
        line["name"] = f"transformer.{line['name'].replace('first', 'fc_in').replace('head', 'out')}"


def test_names_that_do_not_meet_are_listed_with_rules_that_work(
    runs: dict[str, Path], copied: Callable[[str], Path]
) -> None:
    folder = rewritten(copied("ddp"), of_records(renamed))
    report = sp.diff(runs["single"], folder)
    assert not report.proven
    assert "names of damaged-ddp have no partner in single: transformer.fc_in" in told(report)
    (note,) = [note for note in report.runs[0].notes if note.startswith("names would meet with")]
    met = sp.diff(runs["single"], folder, map=[rule.strip(" '") for rule in note.split("--map ")[1:]])
    assert met.proven, str(met)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("nothing", "write NAME=NAME"),
        ("up.*=down.*.*", "the right side has 2 wildcards, the left 1"),
        ("upp.*=x.*", "neither recording has a name that upp.* matches; near names: up"),
        ("up.*=down.*", "up.weight and down.weight of one run would both be read as down.weight"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(runs: dict[str, Path], rule: str, said: str) -> None:
    with pytest.raises(sp.UsageError) as caught:
        sp.diff(runs["single"], runs["ddp"], map=[rule])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp=3", "--layout-b tp=3 is 3 ranks, and"),
        ("single", "--layout-b single is 1 rank, and"),
        ("rows=2", "there is no axis 'rows'"),
        ("dpp", "dpp"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(runs: dict[str, Path], layout: str, said: str) -> None:
    with pytest.raises(sp.UsageError) as caught:
        sp.diff(runs["single"], runs["ddp"], layout_b=layout)
    assert said in str(caught.value)


def test_groups_that_make_no_mesh_ask_for_a_layout(runs: dict[str, Path], copied: Callable[[str], Path]) -> None:
    folder = copied("ddp")
    for path in folder.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"world_size":2', '"world_size":3'))

    def grouped(line: Line) -> Line:
        return line | {"axes": {"tp": [0, 1]}} if line.get("event") == "layout" else line

    with pytest.raises(sp.UsageError, match=r"damaged-ddp: .*tp=2, no mesh of 3 ranks; say .*--layout-b"):
        sp.diff(runs["single"], rewritten(folder, grouped))


def test_statistics_of_one_side_are_compared_as_far_as_they_go(runs: dict[str, Path]) -> None:
    for a, b in (("single", "stats"), ("stats", "single")):
        report = sp.diff(runs[a], runs[b])
        assert report.first is None, str(report)
        assert not report.runs[0].verdicts["different"]


def test_a_world_that_nobody_recorded_is_refused(runs: dict[str, Path], copied: Callable[[str], Path]) -> None:
    folder = copied("single")
    path = folder / "rank-00000.jsonl"
    path.write_text(path.read_text().replace('"world_size":1', f'"world_size":{2**20}', 1))
    with pytest.raises(sp.TraceError, match="only 1 of 1048576 ranks can be read, too few to compare"):
        sp.diff(runs["ddp"], folder)


EVIL = "\x1b[31mup\x07\n[bold]<b>\u202e"
"""Steers a terminal, breaks a line, looks like markup of rich and of HTML, and turns the direction of writing."""


def test_names_do_not_steer_a_terminal_nor_a_page(
    runs: dict[str, Path], copied: Callable[[str], Path], tmp_path: Path
) -> None:
    def evil(line: Line) -> Line:
        if "name" in line:
            line["name"] = line["name"].replace("up", EVIL)
        if line.get("event") == "layout":
            line |= {"wrappers": {EVIL: ["x"]}, "strangers": [EVIL], "left_behind": [EVIL], "ties": [[EVIL, "x"]]}
        return line

    report = sp.diff(runs["single"], rewritten(copied("ddp"), evil))
    text = plain(report, 200, verbose=True)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\\x1b[31mup" in text
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert "\x1b" not in page
    report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text().isascii()
    assert any(EVIL in c["name"] for c in json.loads((tmp_path / "report.json").read_text())["runs"][0]["comparisons"])


ODD: list[Line] = [
    {"axes": 3},
    {"axes": {"tp": "0, 1"}},
    {"axes": {"tp": [-1, 0]}},
    {"axes": {"tp": [0, 99]}},
    {"axes": {"tp": [0, 0]}},
    {"axes": {"tp": []}},
    {"axes": {"rows": [0, 1]}},
    {"ties": 3, "strangers": {}, "left_behind": "x", "wrappers": []},
    {"ties": [3, [4]], "wrappers": {"x": 3}, "declared": 3},
    {"declared": "\x1b[31m", "disturb": [1]},
]


@pytest.mark.parametrize("facts", ODD, ids=str)
def test_facts_of_a_wrong_shape_say_nothing(runs: dict[str, Path], copied: Callable[[str], Path], facts: Line) -> None:
    folder = rewritten(copied("ddp"), lambda line: line | facts if line.get("event") == "layout" else line)
    for report in (sp.diff(runs["single"], folder), sp.diff(folder, runs["single"])):
        assert report.proven, str(report)
        assert report.first is None


JUNK: list[Any] = [None, True, -1, 0, 3, 2**62, 1.5, "", "tp", EVIL, [], [0, 0], [9], ["a"], {}, [[1]], [4, 4]]
FITTING: dict[str, list[Any]] = {
    "name": ["up.weight", "first", "(root)", "head.bias", "batch", EVIL],
    "stage": ["gradient", "forward", "loss", "batch", "update", "initial-state", "buffer", "grad-norm", "input"],
    "step": [-1, 0, 1, 2, 10**12],
    "call": [0, 1, 50, 10**12],
    "dtype": ["int64", "uint64", "float64"],
    "samples": [[], ["x"], ["x", "x"]],
}
"""Values with which a line may still be valid, as far as it goes."""


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_index_gives_an_error_or_a_report(
    runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["single", "ddp", "fsdp", "tp-by-hand", "stats"]))
    folder = Path(shutil.copytree(runs[kind], tmp_path_factory.mktemp("fuzz") / "run"))
    path = folder / "rank-00000.jsonl"
    header, *lines, closed = [json.loads(line) for line in path.read_text().splitlines()]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["value", "value", "value", "leave out", "twice", "turn"]))
        if change == "leave out":
            lines.pop(at)
        elif change == "twice":
            lines.insert(data.draw(st.integers(0, len(lines))), dict(lines[at]))
        elif change == "turn" and isinstance(lines[at].get("shape"), list):
            turned = lines[at]["shape"][::-1]
            lines[at] |= {"shape": turned, "piece": {"whole": turned, "offset": [0] * len(turned), "shape": turned}}
        else:
            field = data.draw(st.sampled_from(sorted(lines[at])))
            lines[at][field] = data.draw(st.sampled_from(FITTING.get(field, JUNK)))
    closed["records"] = sum("event" not in line for line in lines)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [header, *lines, closed]))
    other = runs[data.draw(st.sampled_from(["single", "ddp", "stats"]))]
    for a, b in ((folder, other), (other, folder)):
        with suppress(sp.ShardproofError):
            report = sp.diff(a, b)
            assert all(line.isprintable() for line in str(report).split("\n"))
