"""How fast tensors are judged, as a share of a plain read of the same memory.

    python benchmarks/judge_speed.py [--mb N] [--threads N] [--repeats N] [--json PATH]

Two tensors of N million bytes each, held against each other by `compare.measure.judge`: equal, different by rounding
(one unit in the last place here and there), and wrong (a factor everywhere; noise). Beside it, in turn with it, the
same bytes are read once: the sum of both sides as whole numbers of 8 bytes. The best of the repeats of each counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from shardproof.compare.measure import Pair, judge, ulp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
KINDS = ("equal", "rounding", "factor", "noise")


def sides(dtype: torch.dtype, kind: str, side_bytes: int) -> tuple[Tensor, Tensor]:
    """(got, want), of `side_bytes` each."""
    generator = torch.Generator().manual_seed(0)
    numbers = side_bytes // dtype.itemsize
    want = torch.empty(numbers, dtype=dtype)
    # Repeated: drawing takes longer than everything else.
    block = torch.randn(min(numbers, 2**20), generator=generator, dtype=torch.float64)
    for start in range(0, numbers, len(block)):
        want[start : start + len(block)] = block[: numbers - start]
    got = want.clone()
    if kind == "rounding":
        eps = torch.finfo(dtype).eps
        for start in range(0, numbers, len(block)):
            part = got[start : start + len(block)]
            signs = torch.randint(-1, 2, part.shape, generator=generator)
            part.copy_(part.double() * (1 + eps * signs))
    elif kind == "factor":
        got *= 2
    elif kind == "noise":
        got[1:] = want[:-1]
    return got, want


def seconds(work: Callable[[], object]) -> float:
    """Wall clock of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measured(dtype: torch.dtype, kind: str, side_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes of both sides a second, in 1e9: of `judge`, of a read, and the one over the other."""
    got, want = sides(dtype, kind, side_bytes)
    floor = ulp(want)
    words = got.view(torch.int64), want.view(torch.int64)
    judged, read = [], []
    for _ in range(repeats):
        read.append(seconds(lambda: [side.sum() for side in words]))
        judged.append(seconds(lambda: judge([Pair(rank=0, got=got, want=want)], floor)))
    size = got.nbytes + want.nbytes
    return {"judge": size / min(judged) / 1e9, "read": size / min(read) / 1e9, "share": min(read) / min(judged)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mb", type=int, default=512, metavar="N", help="million bytes of each side")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch; a rank of a check has one")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    options = parser.parse_args(arguments)
    if min(options.mb, options.threads, options.repeats) < 1:
        parser.error("give at least 1 million bytes, 1 thread and 1 repeat")
    torch.set_num_threads(options.threads)
    print(f"torch {version('torch')}, Python {platform.python_version()}")
    print(f"{options.mb} MB a side, {options.threads} thread{'s' if options.threads > 1 else ''}")
    print(f"{'':22}{'judge GB/s':>12}{'read GB/s':>12}{'share':>8}")
    found = {}
    for name, dtype in DTYPES.items():
        for kind in KINDS:
            figures = measured(dtype, kind, options.mb * 10**6, options.repeats)
            found[f"{name} {kind}"] = figures
            print(f"{name:10}{kind:12}{figures['judge']:12.1f}{figures['read']:12.1f}{figures['share']:8.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"mb": options.mb, "threads": options.threads, "found": found}, indent=2))


if __name__ == "__main__":
    main()
