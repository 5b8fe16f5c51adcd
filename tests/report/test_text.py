from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from shardproof.report import text
from shardproof.report.data import Planted, Proof, Report


def in_colour(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard", no_color=False)
    text.render(report, console)
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("outcome", ["parity", "divergence"])
def test_no_line_is_wider_than_asked_for(outcome: str, width: int, verbose: bool, request: pytest.FixtureRequest):
    report = request.getfixturevalue(outcome)
    lines = text.plain(report, width, verbose=verbose).splitlines()
    assert max(map(len, lines)) <= width


def test_plain_text_has_no_colour_no_trailing_blanks_and_no_character_that_a_log_cannot_show(divergence: Report):
    lines = text.plain(divergence).splitlines()
    assert "\n".join(lines).isascii()
    assert "\x1b" not in "\n".join(lines)
    assert lines == [line.rstrip() for line in lines]


def test_str_of_a_report_is_its_plain_text(divergence: Report):
    assert str(divergence) == text.plain(divergence)


def test_parity_ends_in_one_line_that_says_so(parity: Report):
    assert text.plain(parity).splitlines()[-1] == "parity: 4 strategies compute the same training as single"


def test_parity_of_one_strategy_names_it(parity: Report):
    alone = replace(parity, runs=parity.runs[:1])
    assert text.plain(alone).splitlines()[-1] == "parity: ddp computes the same training as single"


def test_divergence_ends_in_one_line_that_says_where(divergence: Report):
    last = text.plain(divergence).splitlines()[-1]
    assert last.startswith("DIVERGES: tp_fsdp")
    assert "first at step 0, gradient of layers.0." in last


def test_a_divergence_before_the_first_step_does_not_speak_of_step_minus_one(divergence: Report):
    last = text.plain(replace(divergence, runs=divergence.runs[3:]), 200).splitlines()[-1]
    assert "first before step 0, initial-state of" in last


def test_the_header_says_what_was_held_against_what(parity: Report):
    head = " ".join(text.plain(parity).splitlines()[:2])
    for fact in ("examples/decoder.py:experiment", "against single", "float64", "8 ranks", "3 steps", "cpu"):
        assert fact in head


def test_a_row_gives_the_degrees_the_tensors_by_verdict_and_the_worst_tensor(parity: Report):
    shown = text.plain(parity)
    # equal, rounding, different, not-checked
    assert "ddp       parity       1         8          -            4  1.3 s" in shown
    assert "dp_shard 4 x tp 2" in shown
    assert "1.2 floors, gradient of tok_embeddings.weight" in shown


def test_everything_about_a_strategy_stands_in_one_row_where_there_is_room(parity: Report):
    rows = [line for line in text.plain(parity, 200).splitlines() if line.startswith("tp_fsdp")]
    assert rows
    assert all("dp_shard 4 x tp 2" in row and "1.2 floors" in row for row in rows)


def test_a_divergence_names_stage_where_step_ranks_cause_axis_factor_sizes_evidence_and_fix(divergence: Report):
    shown = text.plain(divergence)
    for fact in (
        "cause      grad-not-summed",
        "stage      gradient, step 0",
        "where      layers.0.attention_norm.weight, shape [64]",
        "ranks      0-3,7 of 8 (dp_shard 4 x tp 2)",
        "axis       tp",
        "factor     0.5",
        "difference 0.0123, where rounding moves 3.1e-17: 4e+14 floors",
        "evidence   the sum over tp",
        "fix        all-reduce the gradients",
    ):
        assert fact in shown


def test_values_stand_side_by_side(divergence: Report):
    shown = text.plain(divergence)
    assert "rank  index        got  want (single)" in shown
    assert "   0  [3]    0.0113427      0.0226854" in shown


def test_the_first_diverging_run_is_explained_in_full_and_the_others_in_a_line(divergence: Report):
    assert text.plain(divergence).count("\n  evidence ") == 1
    assert "- dp_replicate=2,dp_shard=2,tp=2: before step 0, initial-state of" in text.plain(divergence)
    assert text.plain(divergence, verbose=True).count("\n  evidence ") == 2


def test_a_tensor_that_differs_without_a_finding_is_not_passed_over(divergence: Report):
    shown = text.plain(replace(divergence, runs=divergence.runs[3:]))
    assert "cause      unexplained" in shown
    assert "difference NaN" in shown
    assert "nan" in shown


def test_a_long_name_is_broken_behind_a_dot_and_never_cut(divergence: Report):
    shown = text.plain(replace(divergence, runs=divergence.runs[3:]))
    place = shown[shown.index("  where") : shown.index("  ranks")]
    assert "".join(place.split()[1:]) == (
        "model.language_model.encoder.layers.11.self_attention.query_key_value_projection.lora_A.default.weight"
    )


def test_what_was_not_checked_is_counted_by_reason_and_warnings_are_shown(parity: Report):
    shown = text.plain(parity)
    assert "- 4 tensors of every run: zero in the reference" in shown
    assert "- the optimizer is Adam" in shown


def test_a_note_on_two_runs_is_said_once(parity: Report):
    ddp, fsdp, *_ = (replace(run, notes=("the last batch was short",)) for run in parity.runs)
    assert "- ddp, fsdp: the last batch was short" in text.plain(replace(parity, runs=(ddp, fsdp)))


def test_a_run_in_which_nothing_was_compared_is_no_parity(parity: Report):
    empty = replace(parity, runs=(replace(parity.runs[0], comparisons=()),))
    assert "parity" not in text.plain(empty)
    assert text.plain(empty).splitlines()[-1] == "UNPROVEN: no gradient or updated weight of ddp could be compared"


def test_a_report_without_runs_is_no_parity(parity: Report):
    assert text.plain(replace(parity, runs=())).splitlines()[-1].startswith("UNPROVEN")


def test_verbose_lists_every_tensor_with_its_verdict(parity: Report):
    shown = text.plain(replace(parity, runs=parity.runs[:1]), verbose=True)
    assert shown.count("rounding  ") >= 8
    assert "not-checked" in shown
    assert "tok_embeddings.weight: zero in the reference" in shown


def test_a_terminal_gets_the_same_words_in_colour(divergence: Report):
    coloured = in_colour(divergence, 80)
    assert "\x1b[1;31mDIVERGES\x1b[0m" in coloured
    assert "\x1b[32mparity\x1b[0m" in coloured


def test_brackets_in_names_are_not_read_as_markup(divergence: Report):
    odd = replace(divergence, experiment="models/[bold]x[/bold].py")
    assert "models/[bold]x[/bold].py" in in_colour(odd, 80)


def test_planted_faults_are_counted_and_the_missed_ones_told_with_what_hides_them(parity: Report):
    caught = Planted(
        fault="grad-scale", place="all gradients", caught=True, cause="grad-scale", stage="gradient", where="w", step=0
    )
    missed = Planted(fault="mean-of-means", place="the parts", caught=False, reason="all parts count equally many")
    proof = Proof(strategy="ddp", planted=(caught, missed), left_out={"buffer-garbled": "the model has no buffer"})
    report = replace(parity, proofs=(proof,))
    lines = text.plain(report, 120).splitlines()
    assert "  - ddp: caught 1 of 2 planted faults" in lines
    assert "    - missed: mean-of-means (the parts): all parts count equally many" in lines
    assert "buffer-garbled" not in text.plain(report)
    told = text.plain(report, 120, verbose=True).splitlines()
    assert "    - caught: grad-scale (all gradients): step 0, gradient of w: grad-scale" in told
    assert "    - does not apply: buffer-garbled: the model has no buffer" in told
    assert lines[-1] == text.plain(parity, 120).splitlines()[-1]
