"""What a sketch and statistics of a tensor cost, beside a plain sum of it, and how well sketches tell norms.

    python benchmarks/sketch_cost.py [--repetitions N] [--draws N] [--json PATH]

One process, one thread. Sketch, statistics and sum of the same tensor take turns; each row shows the fastest turn of
each in nanoseconds an element, as whoever else runs on the machine only adds to it. The tensors are larger than the
caches but for the small ones, which show what a call costs. Then the error of estimated norms, for differences of
several kinds: rms and extremes of estimate / norm - 1 over `--draws` draws.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

WARM_UP = 2

SHAPES = ((768,), (256, 256), (768, 3072), (50257, 768), (4096, 4096), (4096, 11008), (8, 1024, 2048))

DTYPES = ("float32", "bfloat16", "float64")


def costs(shape: Sequence[int], dtype: str, repetitions: int) -> dict[str, float]:
    """Nanoseconds an element of each way to read a tensor."""
    import torch

    from shardproof.parallel.piece import Piece
    from shardproof.trace.sketch import sketch
    from shardproof.trace.stats import stats_of

    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    samples = [f"{number:024x}" for number in range(shape[0])]
    ways: dict[str, Callable[[], object]] = {
        "sketch": lambda: sketch(tensor),
        "stats": lambda: stats_of(tensor),
        "sum": tensor.sum,
    }
    if len(shape) == 2 and shape[1] % 8 == 0:
        part = tensor[:, : shape[1] // 8].contiguous()
        piece = Piece(whole=tuple(shape), offset=(0, shape[1] // 2), shape=tuple(part.shape))
        ways["piece"] = lambda: sketch(part, piece)
    if len(shape) == 3:
        ways["samples"] = lambda: sketch(tensor, samples=samples)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(WARM_UP + repetitions):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - began)
    size = {name: tensor.numel() // (8 if name == "piece" else 1) for name in ways}
    return {name: min(times[WARM_UP:]) / size[name] * 1e9 for name, times in taken.items()}


def errors(draws: int) -> dict[str, tuple[float, float, float]]:
    """Kind of difference -> rms, least and largest of estimate / norm - 1."""
    import torch

    from shardproof.trace.sketch import norm, sketch

    size = 1024
    index = torch.arange(size)
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "everywhere": lambda: torch.randn(size, size),
        "one element in 10000": lambda: torch.randn(size, size) * (torch.rand(size, size) < 1e-4),
        "one column": lambda: torch.randn(size, 1) * (index == torch.randint(size, ())),
        "one row": lambda: torch.randn(1, size) * (index == torch.randint(size, ()))[:, None],
        "rank one": lambda: torch.randn(size, 1) * torch.randn(1, size),
        "one vector in all rows": lambda: torch.randn(1, size).expand(size, size),
        "rank one, 64 columns": lambda: torch.randn(size, 1) * torch.randn(1, 64),
        "a vector of 4096": lambda: torch.randn(4096),
        "a vector of 128": lambda: torch.randn(128),
    }
    torch.manual_seed(0)
    found = {}
    for kind, make in kinds.items():
        off = []
        for _ in range(draws):
            tensor = make()
            off.append(norm(sketch(tensor)) / float(tensor.double().norm()) - 1)
        found[kind] = (statistics.fmean(error * error for error in off) ** 0.5, min(off), max(off))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    # Before torch is loaded.
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15, metavar="N")
    parser.add_argument("--draws", type=int, default=200, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers there")
    options = parser.parse_args(arguments)
    if min(options.repetitions, options.draws) < 1:
        parser.error("--repetitions and --draws: give at least 1")
    print(f"torch {version('torch')}, Python {platform.python_version()}, one thread of {os.cpu_count()} CPUs")
    print("\nnanoseconds an element; piece: an eighth of the columns; samples: signs by sample")
    columns = ("sketch", "stats", "sum", "piece", "samples")
    print(f"{'shape':18} {'dtype':9}" + "".join(f"{name:>9}" for name in columns))
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            found = costs(shape, dtype, options.repetitions)
            rows.append({"shape": shape, "dtype": dtype, **found})
            cells = "".join(f"{found[name]:9.2f}" if name in found else f"{'-':>9}" for name in columns)
            print(f"{'x'.join(map(str, shape)):18} {dtype:9}{cells}", flush=True)
    print(f"\nestimated norm / norm - 1, {options.draws} draws")
    print(f"{'what differs':24} {'rms':>7} {'least':>7} {'most':>7}")
    estimates = errors(options.draws)
    for kind, (rms, least, most) in estimates.items():
        print(f"{kind:24} {rms:7.1%} {least:7.1%} {most:7.1%}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"costs": rows, "errors": estimates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
