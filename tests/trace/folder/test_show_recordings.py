"""`shardproof show`: a summary of a recording, and its records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from shardproof import cli
from shardproof.report.recorded import size
from shardproof.report.spelling import printable
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record


def shown(folder: Path, *options: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["show", str(folder), *options])
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def folder(recorded: Callable[..., Path]) -> Path:
    return recorded()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[1:] if line]


def test_without_options_the_recording_is_summed_up(folder: Path) -> None:
    text = shown(folder)
    assert "2 ranks: 0-1, complete\nsteps: before the first, 0-1\nwhat: full\n" in text
    assert ["gradient", "4", "2", "-", "-", "2", "16", "B"] in rows(text)
    counts = [row[:6] for row in rows(text)]
    assert ["forward", "2", "-", "2", "-", "-"] in counts
    assert ["all", "16", "8", "2", "2", "4"] in counts
    assert "problems" not in text


def test_options_choose_records(folder: Path) -> None:
    text = shown(folder, "--rank", "1", "--name", "fc2*", "--step", "0", "--stage", "gradient")
    (row,) = text.splitlines()[1:]
    assert row.split()[:4] == ["1", "0", "gradient", "fc2.weight"]
    assert row.endswith("partial sum, elements 1:3 of [2:4, 0:2] of (4, 2)  1.5 nan")
    assert len(rows(shown(folder, "--name", "fc2*"))) == 4
    assert len(rows(shown(folder, "--step", "-1"))) == 2


def test_what_is_not_kept_whole_shows_its_range(folder: Path) -> None:
    assert "(stats) from -2 to 0, mean -1\n" in shown(folder, "--name", "fc2.bias")
    assert "(sketch) from " in shown(folder, "--stage", "forward")
    assert shown(folder, "--rank", "0", "--stage", "buffer").endswith("(unknown)\n")
    assert shown(folder, "--rank", "0", "--name", "fc1.weight", "--step", "0").endswith("(none)\n")


def test_stats_sum_up_each_tensor_whatever_was_kept_of_it(folder: Path) -> None:
    text = shown(folder, "--rank", "0", "--stats")
    assert text.split("\n")[0].split()[-7:] == ["min", "max", "mean", "rms", "zeros", "NaN", "inf"]
    assert len(rows(text)) == 8
    assert ["-2", "0", "-1", "1.414", "1", "-", "1"] in [row[-7:] for row in rows(text)]
    assert ["1.5", "1.5", "1.5", "1.5", "-", "1", "-"] in [row[-7:] for row in rows(text)]


def test_what_a_killed_run_left_is_shown_with_what_is_missing(folder: Path) -> None:
    (folder / "rank-00001.jsonl").unlink()
    index = folder / "rank-00000.jsonl"
    index.write_bytes(index.read_bytes()[:-5])
    text = shown(folder)
    assert "2 ranks: 0, not complete" in text
    assert "  - nothing can be read of 1 of 2 ranks: 1\n" in text
    assert "  - rank 0: line 12 is not whole: the run was cut off; 8 records are read\n" in text
    assert "the run was cut off" in shown(folder, "--stage", "loss")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--name", "fc2.weigth"), "--name 'fc2.weigth': no record has such a name; near names: fc2.weight"),
        (("--rank", "7"), "has ranks 0-1"),
        (("--stage", "gradients"), "--stage gradients: there is no such stage; the stages are initial-state, batch"),
        (("--step", "9"), "no record is of such a rank, step, stage and name; steps: before the first, 0-1"),
    ],
)
def test_options_that_choose_nothing_are_wrong_use(folder: Path, options: tuple[str, str], said: str) -> None:
    assert said in shown(folder, *options, exit_code=2)


def test_what_is_no_recording_is_wrong_use(tmp_path: Path) -> None:
    assert "error: " in shown(tmp_path, exit_code=2)
    assert "does not exist" in shown(tmp_path / "nowhere", exit_code=2)


def test_a_hostile_name_does_not_steer_the_terminal(tmp_path: Path) -> None:
    writer = Writer(tmp_path, 0, 1, {"\x1b[2J": "\x07"})
    writer.write(Record(step=0, stage="loss", name="\x1b[31mred[bold]\u202e"), torch.ones(1), depth="full")
    writer.close()
    for text in (shown(tmp_path), shown(tmp_path, "--rank", "0")):
        assert text.replace("\n", "").isprintable()
    assert "\\x1b[31mred[bold]\\u202e" in shown(tmp_path, "--rank", "0")


def test_sizes_are_spelled_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 2**40)] == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 TiB"]
    assert printable("fc1.weight ü") == "fc1.weight ü"
