"""How far right code lies from the reference, and how far known faults do, both in noise floors.

    python benchmarks/noise_margins.py [--layers N] [--seeds N] [--json PATH]

A decoder with learned positions and 24 pre-norm blocks (`shardproof.zoo.fixtures`), heads and MLP split by hand
over two tensor-parallel ranks, one step of plain SGD. A tensor is `different` from 6 floors on. The faults are in the
last block only, where nothing that follows can make them larger:

    norm      sequence parallelism, in which the gradient of the last block's second norm is not summed over the slices
    column    a column-parallel layer whose input's gradient is not summed over tp (Megatron's f is missing)
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

DTYPES = ("float64", "float32", "bfloat16")
FAULTS = ("norm", "column")
LAYERS = 24


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Where a fault was found, and how far away."""

    stage: str
    where: str
    step: int
    floors: float
    """Error of the first wrong tensor over its noise floor."""


def experiment(layers: int, seed: int, fault: str | None = None, *, sequence: bool = True) -> Any:
    """The decoder, split by hand, with a fault in its last block."""
    import torch
    from torch import nn

    from shardproof.zoo.fixtures.decoder import Block, Decoder, decoder
    from shardproof.zoo.fixtures.megatron import Column, split, split_sequence, summed_over
    from shardproof.zoo.setting import Setting

    setting = Setting(seed=seed, width=8, dp=2, tp=2, grid=(2, 2), microbatches=2)

    def build() -> nn.Module:
        model = Decoder(setting)
        features = setting.heads * setting.width
        model.blocks = nn.ModuleList(Block(features, setting.width) for _ in range(layers))
        for name, parameter in model.blocks.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            # Small enough for the residual stream to stay near 1 through all layers.
            nn.init.normal_(parameter, mean=float(is_scale), std=0.1)
        return model

    def by_hand(model: Any, mesh: Any, parallelism: Any) -> nn.Module:
        last = model.blocks[-1]
        forgotten = {id(last.norm2.weight), id(last.norm2.bias)} if fault == "norm" else set()

        def sums(parameter: nn.Parameter, group: Any) -> None:
            if id(parameter) not in forgotten:
                summed_over(parameter, group)

        whole = last.up
        laid_out = split_sequence(model, mesh, parallelism, sums=sums) if sequence else split(model, mesh, parallelism)
        if fault == "column":
            last.up = Column(whole, mesh["tp"].get_group(), enter=lambda x, _group: x)
        return laid_out

    torch.set_num_threads(1)
    return decoder(setting, model=build, parallelize=by_hand, steps=1)


def clean(dtype: str, layers: int = LAYERS, seed: int = 0) -> dict[str, float]:
    """Stage -> the largest error of any of its tensors in noise floors, where nothing is wrong."""
    import shardproof as sp

    found: dict[str, float] = {}
    for sequence in (True, False):
        report = sp.check(experiment(layers, seed, sequence=sequence), ("tp",), 2, dtype=dtype)
        if not report.ok:
            raise SystemExit(f"right code got a finding:\n{report}")
        for c in report.runs[0].comparisons:
            if c.verdict is not sp.Verdict.NOT_CHECKED and c.floor > 0:
                found[c.stage] = max(found.get(c.stage, 0.0), c.floors)
    return found


def faulty(dtype: str, fault: str, layers: int = LAYERS, seed: int = 0) -> Margin:
    """Where a fault is found. Raises SystemExit where it is not."""
    import shardproof as sp

    report = sp.check(experiment(layers, seed, fault, sequence=fault == "norm"), ("tp",), 2, dtype=dtype)
    first = report.first
    if first is None or first.comparison is None:
        raise SystemExit(f"the fault {fault!r} was not found in {dtype}:\n{report}")
    return Margin(stage=first.stage, where=first.where, step=first.step, floors=first.comparison.floors)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    options = parser.parse_args(arguments)
    if min(options.layers, options.seeds) < 1:
        parser.error("give at least 1 layer and 1 seed")
    seeds = range(options.seeds)
    right = {dtype: [clean(dtype, options.layers, seed) for seed in seeds] for dtype in DTYPES}
    wrong = {
        (dtype, fault): [faulty(dtype, fault, options.layers, seed) for seed in seeds]
        for dtype in DTYPES
        for fault in FAULTS
    }
    print(
        f"torch {version('torch')}, Python {platform.python_version()}, {options.layers} layers, tp 2, "
        f"{options.seeds} seeds; noise floors"
    )
    print(f"{'':32}" + "".join(f"{dtype:>12}" for dtype in DTYPES))
    for stage in right[DTYPES[0]][0]:
        most = [max(found.get(stage, 0.0) for found in right[dtype]) for dtype in DTYPES]
        print(f"{'right, most, ' + stage:32}" + "".join(f"{value:12.2f}" for value in most))
    for fault in FAULTS:
        least = [min(margin.floors for margin in wrong[dtype, fault]) for dtype in DTYPES]
        print(f"{'fault, least, ' + fault:32}" + "".join(f"{value:12.3g}" for value in least))
        places = sorted({f"{m.stage} {m.where}" for dtype in DTYPES for m in wrong[dtype, fault]})
        print(f"{'':4}found at {', '.join(places)}")
    if options.json is not None:
        shown = {
            "layers": options.layers,
            "right": right,
            "wrong": {f"{dtype} {fault}": [asdict(m) for m in found] for (dtype, fault), found in wrong.items()},
        }
        options.json.write_text(json.dumps(shown, indent=2) + "\n")


if __name__ == "__main__":
    main()
