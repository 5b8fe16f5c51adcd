from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from shardproof.compare.verdict import Verdict
from shardproof.diagnose.finding import CAUSES
from shardproof.errors import Failure, RankFailed, UsageError
from shardproof.report import github, markdown
from shardproof.report.blame import BLAMED
from shardproof.report.data import Report
from shardproof.report.places import WHOLE, Place, places
from shardproof.report.stopped import stopped
from shardproof.spec.loading import load

ROOT = Path("/repo")
PLACES = {WHOLE: Place("/repo/train.py", 40), "parallelize": Place("/repo/a,b:c.py", 7), "loss": Place("/else/l.py", 3)}


def test_a_divergence_points_at_the_code_that_its_cause_concerns(divergence: Report):
    first, second = github.commands(divergence, PLACES, ROOT)
    # grad-not-summed: there is no train_step, so parallelize is next.
    assert first == (
        "::error file=a%2Cb%3Ac.py,line=7,title=shardproof%3A tp_fsdp%3A grad-not-summed over tp%2C factor 0.5::"
        "step 0, gradient of layers.0.attention_norm.weight, ranks 0-3,7%0A"
        "the sum over tp equals the reference (residual 2.1e-16), what any one rank holds does not%0A"
        "fix: all-reduce the gradients of the norms over tp after backward"
    )
    assert second.startswith("::error file=a%2Cb%3Ac.py,line=7,title=shardproof%3A dp_replicate=2%2Cdp_shard=2%2Ctp=2")


def test_without_a_better_place_it_points_at_the_experiment_and_without_that_at_nothing(divergence: Report):
    (at_experiment, *_) = github.commands(divergence, {WHOLE: PLACES[WHOLE]}, ROOT)
    (at_nothing, *_) = github.commands(divergence, {}, ROOT)
    assert at_experiment.startswith("::error file=train.py,line=40,title=")
    assert at_nothing.startswith("::error title=")


def test_a_file_outside_the_checkout_keeps_its_whole_path(divergence: Report):
    run = divergence.runs[2]
    found = replace(run.findings[0], cause="sharded-loss")
    (command,) = github.commands(replace(divergence, runs=(replace(run, findings=(found,)),)), PLACES, ROOT)
    assert command.startswith("::error file=/else/l.py,line=3,")


def test_strategies_that_diverge_alike_share_an_annotation(divergence: Report):
    run = divergence.runs[2]
    alike = replace(divergence, runs=(run, replace(run, strategy="tp")))
    (command,) = github.commands(alike, PLACES, ROOT)
    assert "title=shardproof%3A tp_fsdp%2C tp%3A grad-not-summed" in command


def test_parity_says_nothing_and_what_is_not_proven_is_a_warning(parity: Report):
    assert list(github.commands(parity, PLACES, ROOT)) == []
    unchecked = tuple(replace(c, verdict=Verdict.NOT_CHECKED) for c in parity.runs[0].comparisons)
    unproven = replace(parity, runs=(replace(parity.runs[0], comparisons=unchecked),))
    assert list(github.commands(unproven, PLACES, ROOT)) == [
        "::warning file=train.py,line=40,title=shardproof%3A UNPROVEN::"
        "no gradient or updated weight of ddp could be compared"
    ]


def test_a_crash_points_at_the_users_line(parity: Report):
    failure = Failure(
        rank=1, type_name="ValueError", message="x", file="/repo/model.py", line=12, traceback="Traceback:\n  x"
    )
    (command,) = github.commands(
        replace(parity, runs=(), stopped=stopped(RankFailed(failure, during="ddp"))), PLACES, ROOT
    )
    assert command == (
        "::error file=model.py,line=12,title=shardproof%3A rank 1%3A RankFailed in ddp::"
        "rank 1 failed in ddp at /repo/model.py:12: ValueError: x%0A%0ATraceback:%0A  x"
    )


def test_no_name_can_end_a_command_or_begin_another(divergence: Report):
    evil = "w\r\n::set-env name=A::b,file=/etc/passwd:1%0A\x1b]0;x\x07::add-mask::e"
    run = divergence.runs[2]
    found = replace(run.findings[0], where=evil, evidence=evil, fix=evil, axis=evil)
    bad = replace(run, strategy=evil, findings=(found,))
    (command,) = github.commands(replace(divergence, runs=(bad,)), {WHOLE: Place(f"/repo/{evil}", 1)}, ROOT)
    assert command.isprintable()
    properties, _, message = command.removeprefix("::error ").partition("::")
    assert [pair.split("=")[0] for pair in properties.split(",")] == ["file", "line", "title"]
    assert ":" not in properties
    assert "%250A" in message


def test_what_is_printed_inside_is_not_taken_for_commands():
    stream = io.StringIO()

    def say() -> None:
        with github.silenced(stream):
            print("::error::from a name", file=stream)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        say()
    begin, said, end = stream.getvalue().splitlines()
    assert begin.startswith("::stop-commands::")
    assert len(begin.removeprefix("::stop-commands::")) == 32
    assert end == f"::{begin.removeprefix('::stop-commands::')}::"
    assert said == "::error::from a name"


def test_the_summary_is_added_to_what_is_there(parity: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv(github.SUMMARY, str(path))
    github.append_summary(markdown.summary(parity))
    text = path.read_text()
    assert text.startswith("before\n### shardproof: examples/decoder\\.py\\:experiment\n")
    assert "| tp\\_fsdp | ✅ parity | 1 | 8 | \\- | 4 | 1\\.3 s |" in text
    monkeypatch.setenv(github.SUMMARY, str(tmp_path))
    with pytest.raises(UsageError, match=r"the summary of \$GITHUB_STEP_SUMMARY cannot be written"):
        github.append_summary("x")


def test_the_summary_names_cause_evidence_and_fix_and_takes_no_markup(divergence: Report):
    assert "- cause: grad\\-not\\-summed over tp, factor 0\\.5" in markdown.summary(divergence)
    evil = "a|b`<img src=x>`\n# @someone [x](http://x) \x1b[2J"
    run = replace(divergence.runs[2], strategy=evil, notes=(evil,))
    text = markdown.summary(replace(divergence, experiment=evil, runs=(run,), warnings=(evil,)))
    shown = r"a\|b\`\<img src\=x\>\` \# \@someone \[x\]\(http\:/"
    assert text.count(shown) >= 4
    assert all(c.isprintable() or c == "\n" for c in text)


def test_the_summary_stays_small(divergence: Report):
    run = replace(divergence.runs[2], notes=tuple(f"{i}" * 5000 for i in range(100)))
    assert len(markdown.summary(replace(divergence, runs=(run,) * 60))) < 200_000


def test_every_cause_is_blamed_on_parts_of_an_experiment():
    assert tuple(BLAMED) == CAUSES
    assert {part for parts in BLAMED.values() for part in parts} <= {
        *("model", "data", "loss", "optimizer", "batches", "train_step", "parallelize", "tp_plan", "max_grad_norm")
    }


EXPERIMENT = """\
import functools
import torch.nn.functional as F
import shardproof as sp

def model():
    return None

def step(step, *, scale):
    return None

class Reads:
    def __call__(self, data, mesh, parallelism):
        return []

def lost():
    return sp.Experiment(model=model, data=[1], loss=F.mse_loss, optimizer=list, batch_size=2)

PLAN = {"a": "colwise"}
experiment = sp.Experiment(
    model=model,
    data=[1],
    loss=F.mse_loss,
    optimizer=lambda model: None,
    train_step=functools.partial(step, scale=2),
    batches=Reads(),
    batch_size=8,
    tp_plan=PLAN,
)
hidden = lost()
"""


def test_parts_are_found_where_they_were_written(tmp_path: Path):
    path = tmp_path / "some_experiment.py"
    path.write_text(EXPERIMENT)
    found = places(load(f"{path}:experiment"))
    assert {place.file for place in found.values()} == {str(path)}
    lines = EXPERIMENT.splitlines()
    assert {part: lines[place.line - 1].strip().split("(")[0].split(",")[0] for part, place in found.items()} == {
        WHOLE: "experiment = sp.Experiment",
        "model": "def model",
        "data": "data=[1]",
        # A function of a library says nothing; where it is handed over does.
        "loss": "loss=F.mse_loss",
        "optimizer": "optimizer=lambda model: None",
        "train_step": "def step",
        "batches": "class Reads:",
        "batch_size": "batch_size=8",
        "tp_plan": "tp_plan=PLAN",
    }
    other = places(load(f"{path}:hidden"))
    assert {part: lines[place.line - 1] for part, place in other.items()} == {
        WHOLE: "hidden = lost()",
        "model": "def model():",
    }
