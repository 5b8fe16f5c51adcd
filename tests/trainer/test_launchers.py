"""`shardproof train` under torchrun on two hosts: it trains, it loses a host, it goes on."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Host
from safetensors.torch import load_file

import shardproof as sp
from shardproof.spec.loading import load_for_training

STEPS = 20
PROGRAM = Path(__file__).with_name("programs.py")
_END_S = 15.0
"""A host that has lost the other knows it at once, or by the time limit of its collectives, which is longer."""


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def _train(host: Host, folder: Path, *more: str, **options: object) -> subprocess.Popen[str]:
    """Two of the four ranks of a tensor-parallel and sharded run."""
    arguments = ("train", str(PROGRAM), "--strategy", "tp_fsdp", "--save-folder", str(folder), *more)
    return host.torchrun("-m", "shardproof", *arguments, **options)


def test_a_run_that_loses_a_host_says_how_to_go_on_and_ends_like_one_that_never_did(
    hosts: tuple[Host, Host], train: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, weights = tmp_path / "runs", tmp_path / "weights.safetensors"
    one, two = hosts
    monkeypatch.setenv("STEP_S", "0.1")
    with (
        _train(one, folder) as first,
        _train(two, folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as second,
    ):
        assert first.stdout
        while first.stdout.readline() != "step 7\n":
            assert first.poll() is None
        began = time.monotonic()
        two.kill()
        second.wait()
        said, complaints = first.communicate(timeout=60)
    assert time.monotonic() - began < _END_S
    assert "steps" not in said, "no conclusion"
    assert complaints.count("error: ") == 1
    assert "error: rank 0 lost a peer in fit, after step " in complaints
    assert ": Connection closed by peer [10.77.0.2]" in complaints
    assert f"the last complete checkpoint is {folder / 'step-00000005'}; go on from it" in complaints
    assert "with --resume" in complaints
    assert "exitcode  : 3" in complaints

    monkeypatch.setenv("STEP_S", "0")
    shutil.copytree(folder, tmp_path / "lost")
    resumed = ("--resume", "--export", str(weights), "--quiet")
    with _train(one, folder, *resumed) as first, _train(two, folder, *resumed) as second:
        endings = [program.communicate(timeout=60) for program in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    (said, _), (nothing, _) = endings
    assert said.splitlines()[-1].startswith("tp_fsdp: 20 steps, 2 epochs in ")
    assert said.splitlines()[-1].endswith(f"; saved {folder / 'step-00000020'}")
    assert "steps" not in nothing

    # Four forked ranks are the same layout: bit for bit, from the start or from where the host was lost.
    experiment, _ = load_for_training(str(PROGRAM))
    training = sp.Training(max_duration=f"{STEPS}ba", progress_bar=False)
    for start in (None, tmp_path / "lost"):
        with sp.Trainer(experiment, "tp_fsdp", training, ranks=4, load_path=start) as trainer:
            trainer.fit()
            want = trainer.state_dict()
        torch.testing.assert_close(load_file(weights), want, rtol=0, atol=0)
