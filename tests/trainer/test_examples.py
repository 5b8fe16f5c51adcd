"""The examples train for real, each with one command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import shardproof as sp

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}


def train(*options: str) -> str:
    """The last line that `shardproof train` prints, which must end well."""
    command = [sys.executable, "-m", "shardproof", "train", *options, "--ranks", "4", "--strategy", "tp_fsdp"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip().splitlines()[-1]


def test_digits_are_recognised_after_one_command_under_tp_fsdp() -> None:
    last = train(str(EXAMPLES / "digits.py"), "--quiet")
    found = re.search(r"460 steps, 20 epochs .* accuracy ([0-9.]+)", last)
    assert found, last
    assert float(found[1]) >= 0.97


def test_the_language_model_learns_resumes_exports_and_samples(tmp_path: Path) -> None:
    file, log, weights = str(EXAMPLES / "gpt.py"), tmp_path / "log.jsonl", tmp_path / "gpt.safetensors"
    saving = ["--save-folder", str(tmp_path / "saved"), "--json", str(log)]
    train(file, *saving, "--max-duration", "40ba")
    last = train(file, *saving, "--max-duration", "60ba", "--resume", "--export", str(weights))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {row["step"]: row["values"]["train/loss"] for row in rows if "train/loss" in row.get("values", {})}
    assert sorted(losses) == list(range(1, 61))
    early, late = sum(losses[step] for step in range(1, 6)) / 5, sum(losses[step] for step in range(56, 61)) / 5
    assert late < 0.75 * early
    sys.path.insert(0, str(EXAMPLES))
    import gpt

    model = gpt.Gpt()
    model.load_state_dict(load_file(weights))
    with torch.no_grad():
        batches = list(DataLoader(gpt.test_data, batch_size=256))
        total = sum(float(gpt.mean_loss(model, batch)) * len(batch[0]) for batch in batches)
    told = float(re.search(r"eval loss ([0-9.]+)", last)[1])
    assert abs(total / len(gpt.test_data) - told) < 1e-4 * told
    # Under another layout the saved run goes on as well, and here ends at once.
    with sp.Trainer(gpt.experiment, "fsdp", gpt.training, max_duration="60ba", load_path=tmp_path / "saved") as trainer:
        fit = trainer.fit()
        assert (fit.step, fit.losses) == (60, ())
        assert abs(fit.results["loss"] - told) < 1e-4 * told
    text = gpt.sample(model, "The ", length=40)
    assert text.startswith("The ")
    assert len(text.encode()) >= 40
