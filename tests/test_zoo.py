"""The zoo's own order, one run of every family of bugs, and the command line; `make zoo` runs all of it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import shardproof.zoo.run
from shardproof import cli
from shardproof.diagnose.finding import CAUSES, Finding
from shardproof.errors import UsageError
from shardproof.spec.stages import STAGES
from shardproof.zoo import bugs as files_of_bugs
from shardproof.zoo import json as as_json
from shardproof.zoo import text
from shardproof.zoo.entry import Bug, Control
from shardproof.zoo.fixtures.decoder import IGNORED, Sentences
from shardproof.zoo.run import BugResult, ControlResult, ZooReport, run_bug, run_control
from shardproof.zoo.setting import Setting, grid
from shardproof.zoo.table import BUGS, CONTROLS, FAMILIES, chosen

ROOT = Path(__file__).resolve().parents[1]
ZOO = Path(shardproof.zoo.run.__file__).parent

ENTRIES: dict[str, Bug | Control] = {entry.name: entry for entry in (*BUGS, *CONTROLS)}

LEAST_BUGS, LEAST_CONTROLS = 60, 15

SETTINGS = (
    Setting(),
    Setting(seed=5, width=6, dp=3, tp=2, grid=(3, 2), microbatches=2),
    Setting(seed=11, width=2, dp=2, tp=4, grid=(2, 2), microbatches=4),
    Setting(seed=2, width=4, dp=4, tp=3, grid=(2, 3), microbatches=3),
)
"""Those of docs/zoo.md."""

WITHOUT_A_BUG = {"unexplained": "what is said where no cause fits"}
"""Causes that no entry has -> why."""

FAST = {
    "data_parallel": ("ddp_unused_param", "ddp_sync_first_mb"),
    "microbatches": ("ga_tail_dropped",),
    "factors": ("ga_not_divided",),
    "subset": ("moe_aux_div_dp",),
    "means": ("dp_mean_of_means",),
    "partial": ("moe_router_unsynced",),
    "forward": ("skip_forward_reduce_in_plan", "ce_on_gathered_logits"),
    "layout": ("fused_gate_up_plain_shard",),
    "sequence": ("cp_learned_local_positions",),
    "tied": ("tied_split_by_plan",),
    "initial": ("shared_adapter_init_differs",),
    "norms": ("clip_local_shard",),
    "precision": ("bf16_token_counts", "inf_first_tensor_only"),
    "randomness": ("dp_same_dropout",),
    "optimizers": ("stale_optimizer_params",),
    "checkpoints": ("swiglu_tp_dp_order",),
    "samples": ("fsdp_config_ignored", "set_epoch_missing"),
    "buffers": ("fsdp_stale_unsharded_ema",),
    "races": ("overlap_race",),
}
"""File of bugs -> those of its entries that are run here: quick ones, of different causes."""

FAST_CONTROLS = ("auxiliary_hung_on", "router_summed", "uneven_parts_weighted", "vocabulary_gathered")

SMALL = ("--width", "2", "--dp", "2", "--tp", "2", "--microbatches", "2")

FOUND = Finding(
    cause="unexplained",
    stage="gradient",
    where="fc3.bias",
    axis=None,
    factor=None,
    ranks=(0, 1),
    step=0,
    evidence="no factor fits",
    fix="look at it",
)
GOOD = BugResult(
    name="ddp_module_bypass",
    cause="grad-not-reduced",
    stages=("gradient",),
    where=("fc3.*",),
    source="somebody/something #1",
    detected=True,
    located=True,
    cause_first=True,
    found_cause="grad-not-reduced",
    time_s=0.5,
    finding=replace(FOUND, cause="grad-not-reduced", axis="dp"),
)
UNNAMED = replace(GOOD, name="overlap_race", cause_first=False, found_cause="unexplained", finding=FOUND)
UNSEEN = replace(
    UNNAMED, detected=False, located=False, found_cause=None, finding=None, error="rank 1 failed\n\nTraceback"
)
PASSED = ControlResult(name="static_graph", ok=True, time_s=0.5)
ALARM = replace(PASSED, name="clipping", ok=False, error="rank 0 died")


def report(bugs: Iterable[BugResult] = (), controls: Iterable[ControlResult] = ()) -> ZooReport:
    return ZooReport(setting=Setting(), bugs=tuple(bugs), controls=tuple(controls))


def lines(shown: ZooReport, width: int = 80, *, verbose: bool = False) -> list[str]:
    return [line.plain for line in text.view(shown, width, verbose=verbose)]


def zoo(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["zoo", *arguments], env={"COLUMNS": "120"})


# Its order.


def test_every_file_of_bugs_is_a_family_and_every_family_is_a_file() -> None:
    files = {path.stem for path in Path(files_of_bugs.__path__[0]).glob("*.py")} - {"__init__"}
    assert {family.__name__.rpartition(".")[2] for family in FAMILIES} == files
    assert len(FAMILIES) == len(files)


def test_every_family_holds_a_bug_and_every_file_of_controls_is_read() -> None:
    for family in FAMILIES:
        assert any(isinstance(entry, Bug) for entry in vars(family).values()), family.__name__
    modules = [importlib.import_module(f"shardproof.zoo.{path.stem}") for path in ZOO.glob("controls*.py")]
    written = {e.name for module in modules for e in vars(module).values() if isinstance(e, Control)}
    assert {entry.name for entry in CONTROLS} == written


def test_names_are_unique_and_there_are_enough_of_them() -> None:
    assert len(ENTRIES) == len(BUGS) + len(CONTROLS)
    assert len(BUGS) >= LEAST_BUGS
    assert len(CONTROLS) >= LEAST_CONTROLS


def test_every_cause_has_a_bug_or_there_is_a_reason_why_not() -> None:
    assert set(CAUSES) - {entry.cause for entry in BUGS} == set(WITHOUT_A_BUG)


@pytest.mark.parametrize("entry", BUGS, ids=lambda entry: entry.name)
def test_a_bug_says_what_it_is_and_where_it_was_seen(entry: Bug) -> None:
    assert entry.cause in CAUSES
    assert set(entry.stages) <= set(STAGES)
    assert entry.stages
    assert entry.where
    assert entry.summary.endswith(".")
    assert re.search(r"#\d+|mutation", entry.source)
    assert Setting().layout(entry.layout).world_size > 1


@pytest.mark.parametrize("entry", CONTROLS, ids=lambda entry: entry.name)
def test_a_control_says_what_it_is(entry: Control) -> None:
    assert entry.summary.endswith(".")
    assert Setting().layout(entry.layout).world_size > 1


def test_the_page_lists_every_entry_once() -> None:
    tables = (ROOT / "docs" / "zoo.md").read_text().partition("<!-- made by")[2]
    assert sorted(re.findall(r"^\| `(\w+)` \|", tables, re.MULTILINE)) == sorted(ENTRIES)


def test_the_pages_of_causes_name_their_own_bugs() -> None:
    for cause in CAUSES:
        listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "causes" / f"{cause}.md").read_text(), re.MULTILINE)
        assert listed == [entry.name for entry in BUGS if entry.cause == cause], cause


# What is chosen.


def test_entries_are_chosen_by_name_wildcard_or_cause() -> None:
    assert [entry.name for entry in chosen(("overlap-race",))[0]] == ["overlap_race"]
    assert {entry.cause for entry in chosen(("mean-of-means",))[0]} == {"mean-of-means"}
    bugs, controls = chosen(("grad-scale*", "clip*"))
    assert {entry.cause for entry in bugs} == {"grad-scale", "grad-scale-subset", "grad-norm"}
    assert [entry.name for entry in controls] == ["clipping_by_hand", "clipping"]
    assert chosen() == (BUGS, CONTROLS)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seed": -1}, "at least 0"),
        ({"dp": 1}, "at least 2"),
        ({"width": 5}, "must be even"),
        ({"grid": (1, 2)}, "grid=1x2"),
    ],
)
def test_sizes_that_fit_no_model_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Setting(**sizes)  # type: ignore[arg-type]


def test_a_grid_is_two_numbers() -> None:
    assert grid("2x3") == (2, 3)
    for wrong in ("", "4", "2x", "2x3x4", "ax2", "-2x2"):
        with pytest.raises(UsageError, match="as in 2x3"):
            grid(wrong)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_parts_of_a_ragged_batch_count_differently_many_tokens(setting: Setting) -> None:
    sentences = Sentences(setting, ragged=True)
    counts = torch.tensor([int((sentences[index][1] != IGNORED).sum()) for index in range(setting.batch)])
    for ranks in (setting.dp, setting.grid[0], setting.grid[0] * setting.grid[1]):
        assert len(counts.view(ranks, -1).sum(1).unique()) > 1
        assert len(counts.view(ranks, setting.microbatches, -1).sum(2)[0].unique()) > 1


# What the checker says of them.


def test_a_bug_of_every_family_is_run_here() -> None:
    assert [family.__name__.rpartition(".")[2] for family in FAMILIES] == list(FAST)
    for family in FAMILIES:
        for name in FAST[family.__name__.rpartition(".")[2]]:
            assert ENTRIES[name] in vars(family).values()


@pytest.mark.parametrize("name", [name for names in FAST.values() for name in names])
def test_a_bug_is_detected_located_and_named(name: str) -> None:
    entry = ENTRIES[name]
    assert isinstance(entry, Bug)
    result = run_bug(entry, Setting())
    assert result.detected, result.error
    assert result.located, result.finding
    assert result.cause_first, result.finding


@pytest.mark.parametrize("name", FAST_CONTROLS)
def test_right_code_raises_no_alarm(name: str) -> None:
    entry = ENTRIES[name]
    assert isinstance(entry, Control)
    result = run_control(entry, Setting())
    assert result.ok, f"{result.error}{result.report}"


# What is shown of it.


def test_the_last_line_counts_and_never_rounds_up_to_all() -> None:
    everything = report([GOOD] * 299 + [UNNAMED], [PASSED] * 20)
    assert lines(everything)[-1] == (
        "300 bugs: detected 300 (100%), located 300 (100%), named 299 (99.6%); 20 controls: 0 false alarms"
    )
    assert lines(report([UNSEEN], [ALARM]))[-1] == (
        "1 bug: detected 0 (0%), located 0 (0%), named 0 (0%); 1 control: 1 false alarm"
    )


def test_what_was_found_instead_of_a_miss_is_shown() -> None:
    shown = "\n".join(lines(report([GOOD, UNNAMED, UNSEEN], [ALARM])))
    assert "overlap_race: not named" in shown
    assert "true       grad-not-reduced, gradient of fc3.*" in shown
    assert "found      unexplained, step 0, gradient of fc3.bias" in shown
    assert "evidence   no factor fits" in shown
    assert "overlap_race: not detected" in shown
    assert "evidence   rank 1 failed" in shown
    assert "error      rank 0 died" in shown
    assert "ddp_module_bypass: not" not in shown


def test_a_narrow_terminal_gets_the_place_on_a_line_of_its_own() -> None:
    beside = [line for line in lines(report([GOOD]), 120) if "gradient of" in line]
    assert len(beside) == 1
    assert beside[0].startswith("  ddp_module_bypass  yes")
    below = [line for line in lines(report([GOOD]), 70) if "gradient of" in line]
    assert below == ["    step 0, gradient of fc3.bias"]


def test_verbose_adds_every_finding_in_full() -> None:
    assert "look at it" not in "\n".join(lines(report([GOOD])))
    shown = "\n".join(lines(report([GOOD, UNSEEN]), verbose=True))
    assert "grad-not-reduced over dp, step 0, gradient of fc3.bias, ranks 0-1" in shown
    assert "fix        look at it" in shown
    assert "source     somebody/something #1" in shown


def test_json_has_the_names_that_others_read() -> None:
    written = json.loads(json.dumps(as_json.to_dict(report([GOOD, UNSEEN], [PASSED, ALARM])), allow_nan=False))
    assert set(written) == {"schema_version", "setting", "bugs", "controls", "false_alarms"}
    assert written["setting"] == {"seed": 0, "width": 4, "dp": 4, "tp": 4, "grid": [2, 2], "microbatches": 3}
    assert written["bugs"][0] == {
        "name": "ddp_module_bypass",
        "cause": "grad-not-reduced",
        "detected": True,
        "located": True,
        "cause_first": True,
        "found_cause": "grad-not-reduced",
        "time_s": 0.5,
        "stage": "gradient",
        "where": "fc3.bias",
        "source": "somebody/something #1",
        "error": "",
    }
    assert (written["bugs"][1]["found_cause"], written["bugs"][1]["stage"]) == (None, None)
    assert written["controls"][0] == {"name": "static_graph", "ok": True, "time_s": 0.5}
    assert written["false_alarms"] == 1


# The command line.


def test_a_part_of_the_zoo_is_run_in_another_setting(tmp_path: Path) -> None:
    path = tmp_path / "zoo.json"
    result = zoo("ddp-early-only-param", "uneven_parts*", *SMALL, "--seed", "3", "--grid", "2x3", "--json", str(path))
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert written["setting"] == {"seed": 3, "width": 2, "dp": 2, "tp": 2, "grid": [2, 3], "microbatches": 2}
    assert [entry["name"] for entry in written["bugs"]] == ["ddp_early_only_param"]
    assert written["bugs"][0]["found_cause"] == "grad-not-reduced"
    assert [entry["name"] for entry in written["controls"]] == ["uneven_parts_weighted"]
    assert re.search(
        r"^1 of 2: ddp_early_only_param: step 0, gradient of fc2\.\w+, [\d.]+ s$", result.stderr, re.MULTILINE
    )
    assert "2 of 2: uneven_parts_weighted: passed" in result.stderr
    assert result.stdout.splitlines()[-1] == (
        "1 bug: detected 1 (100%), located 1 (100%), named 1 (100%); 1 control: 0 false alarms"
    )


@pytest.mark.parametrize(
    ("bugs", "controls", "code"),
    [
        ([GOOD, UNNAMED], [PASSED], 0),
        ([GOOD, UNSEEN], [PASSED], 1),
        ([GOOD], [PASSED, ALARM], 1),
    ],
)
def test_the_exit_code_says_whether_all_was_detected_without_a_false_alarm(
    monkeypatch: pytest.MonkeyPatch, bugs: list[BugResult], controls: list[ControlResult], code: int
) -> None:
    monkeypatch.setattr("shardproof.zoo.run.run_zoo", lambda *_args, **_options: report(bugs, controls))
    assert zoo().exit_code == code
    quiet = zoo("--quiet")
    assert quiet.exit_code == code
    assert len(quiet.output.splitlines()) == 1


def test_list_shows_causes_and_sources_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("shardproof.parity.check")
    result = zoo("--list")
    assert result.exit_code == 0
    shown = result.stdout.splitlines()
    assert len(shown) == 1 + len(ENTRIES)
    assert any(re.fullmatch(r"overlap_race +nondeterminism +deepspeedai/.*", line) for line in shown)
    assert any(line.startswith("static_graph ") and "(control)" in line for line in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddp_module_bypas",), "did you mean ddp_module_bypass"),
        (("mean-of-mean",), "did you mean mean-of-means"),
        (("zzz*",), "'zzz*' is no entry and no cause; --list shows all of them"),
        (("--dp", "1"), "dp=1; it must be at least 2"),
        (("--grid", "4"), "as in 2x3"),
        (("--json", "missing/zoo.json"), "there is no folder missing"),
        (("--quiet", "--verbose"), "exclude each other"),
    ],
)
def test_wrong_use_is_one_line_on_stderr(arguments: tuple[str, ...], message: str) -> None:
    result = zoo(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    result = zoo("overlap_race")
    assert result.exit_code == 2
    assert "without torchrun" in result.stderr
