"""The whole check on ranks that torchrun has started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def under_torchrun(target: str, report: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
            *(
                "-m",
                "shardproof",
                "check",
                target,
                "--strategies",
                "ddp,tp_fsdp",
                "--json",
                str(report),
            ),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("target", "ok", "closing"),
    [
        ("examples/gpt.py", True, "parity: 2 strategies compute the same training as single"),
        ("examples/composer_mlp.py:mixed_inputs", False, "DIVERGES: tp_fsdp, first at step 0, batch of batch[0]"),
    ],
)
def test_torchruns_ranks_give_one_report_and_leave_nothing(target: str, ok: bool, closing: str, tmp_path: Path) -> None:
    report, scratch = tmp_path / "report.json", tmp_path / "scratch"
    scratch.mkdir()
    ended = under_torchrun(target, report, scratch)
    assert json.loads(report.read_text())["ok"] is ok
    assert ended.stdout.splitlines()[-1] == closing
    assert ended.stdout.count("against single") == 1
    assert "4 ranks" in ended.stdout, "as many as were launched"
    assert "reducer.cpp" not in ended.stderr, "what DDP's native code warns of says nothing about the user's"
    assert (ended.returncode == 0) is ok
    assert not list(scratch.glob("shardproof-*"))


def test_what_all_processes_would_say_is_said_once(tmp_path: Path) -> None:
    ended = under_torchrun("examples/absent.py", tmp_path / "report.json", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.count("examples/absent.py") == ended.stderr.count("error: ") == 1
