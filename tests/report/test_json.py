from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardproof.errors import UsageError
from shardproof.report import json as views
from shardproof.report.data import Report


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_what_is_read_back_is_what_was_written_under_the_public_names(divergence: Report, tmp_path: Path):
    divergence.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read == views.to_dict(divergence)
    assert read["schema_version"] == 1
    assert read["ok"] is False
    assert [run["strategy"] for run in read["runs"]] == [run.strategy for run in divergence.runs]
    bad = read["runs"][2]
    assert bad["ok"] is False
    assert bad["verdicts"] == {"equal": 1, "rounding": 8, "different": 1, "not-checked": 4}
    found = bad["findings"][0]
    assert {name: found[name] for name in ("cause", "stage", "where", "axis", "factor", "ranks", "step", "fix")} == {
        "cause": "grad-not-summed",
        "stage": "gradient",
        "where": "layers.0.attention_norm.weight",
        "axis": "tp",
        "factor": 0.5,
        "ranks": [0, 1, 2, 3, 7],
        "step": 0,
        "fix": "all-reduce the gradients of the norms over tp after backward",
    }
    assert found["evidence"].startswith("the sum over tp")
    assert read["first"] == found


def test_nan_is_a_text_that_float_reads_and_nothing_to_say_is_null(divergence: Report):
    written = views.to_dict(divergence)
    assert json.dumps(written, allow_nan=False)
    runs: Any = written["runs"]
    error = runs[3]["comparisons"][0]["error"]
    assert error == "nan"
    assert float(error) != float(error)
    assert runs[2]["findings"][1]["factor"] is None


def test_what_ranks_held_is_written_by_rank(held: Report):
    runs: Any = views.to_dict(held)["runs"]
    assert runs[0]["shown"]["2"][0]["values"] == [[0.1134, 0.0], [0.1134, 0.0]]


def test_a_missing_folder_is_wrong_use(parity: Report, tmp_path: Path):
    with pytest.raises(UsageError, match=r"there is no folder .*missing; make it first"):
        parity.to_json(tmp_path / "missing" / "report.json")


def test_a_folder_in_place_of_a_file_is_wrong_use(parity: Report, tmp_path: Path):
    with pytest.raises(UsageError, match="is a folder"):
        parity.to_json(tmp_path)


def test_an_old_report_stays_whole_when_the_new_one_cannot_be_written(
    parity: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="No space left on device"):
        parity.to_json(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_not_replaced(parity: Report, tmp_path: Path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    parity.to_json(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["ok"] is True
