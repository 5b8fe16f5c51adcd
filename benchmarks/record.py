"""What recording and comparing cost: steps that are recorded, steps that are not, traces of gigabytes, many ranks.

    python benchmarks/record.py steps   [--repetitions N] [--width N] [--layers N] [--json PATH]
    python benchmarks/record.py diff    [--gigabytes N] [--json PATH]
    python benchmarks/record.py ranks   [--ranks N] [--json PATH]

`steps`: a decoder of 25 to 100 million parameters with AdamW, on one process with two threads. By default 34 million
parameters and 2048 tokens a step, few for a model of that size: what is recorded of weights, gradients and optimizer
state does not grow with the tokens, and weighs more the fewer there are. A bare step, a step inside `sp.record` that is
not among its `steps`, and one that is, take turns, each depth in its own round; each is divided by the mean of the two
bare steps around it. Ratios are medians, once of wall clock and once of processor time of the whole process, which
others on the machine disturb less; threads that wait for each other count in it, but for `OMP_WAIT_POLICY=passive`.
Above the table stands how many elements a step shows, and how long each may take for a ratio of 1.10.

`diff`: two recordings of the given size, of which the second lies in shards on four ranks, against reading the same
bytes once (a sum over all of them, mapped as the traces are). The files are in the page cache for both. Peak memory is
that of a process of its own that does nothing else, without what it had loaded before, and without pages of the files,
which belong to the cache.

`ranks`: recordings of a 7B decoder on 512 ranks (dp_shard 64 x tp 8) as records and sketches, without values: what a
run of that size leaves behind at depth `sketch`. Their sketches are made up so that shards add up to the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEPTHS = ("stats", "sketch", "full")

TARGETS = {"stats": 1.10, "sketch": 1.10, "unrecorded": 1.01}
"""Ratios to a bare step that we want to stay under; `full` is bounded by the disk."""

THROUGHPUT = 0.5
"""Share of a plain memory read that comparing should reach."""


# Steps.


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of recorded and unrecorded steps to bare ones, and bytes a step."""
    import torch
    import torch.nn.functional as F

    import shardproof as sp

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = _decoder(args.width, args.layers, args.vocabulary, args.length)
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        # Of its own for every step: signs of a sketch follow the samples, and are kept where these come again.
        tokens = torch.randint(0, args.vocabulary, (args.batch, args.length + 1))
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    for _ in range(2):
        step()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("unrecorded", *DEPTHS)}
    bare: list[tuple[float, float]] = []
    sizes: dict[str, int] = {}
    looked_at = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for turn in range(args.repetitions):
            for depth in DEPTHS:
                path = Path(folder) / f"{depth}-{turn}"
                before = _both(step)
                # The first recorded step also writes down the state before it; the second is like all that follow.
                with sp.record(path, model, optimizer, steps=(1, 2), what=depth):
                    unrecorded = _both(step)
                    step()
                    at = _bytes(path)
                    recorded = _both(step)
                    sizes[depth] = _bytes(path) - at
                after = _both(step)
                plain = ((before[0] + after[0]) / 2, (before[1] + after[1]) / 2)
                bare.append(plain)
                found["unrecorded"].append((unrecorded[0] / plain[0], unrecorded[1] / plain[1]))
                found[depth].append((recorded[0] / plain[0], recorded[1] / plain[1]))
                looked_at = _elements(path, 2)
                shutil.rmtree(path)
    print(f"decoder of {count / 1e6:.1f}M parameters, {args.batch} x {args.length} tokens, AdamW, float32")
    walls = [wall for wall, _ in bare]
    typical = statistics.median(walls)
    print(f"bare step {typical:.2f} s (median; {min(walls):.2f} to {max(walls):.2f}), {args.threads} threads")
    print(f"{looked_at / 1e6:.0f}M elements in the records of a step: {typical / looked_at * 1e8:.2f} ns each for 1.10")
    print(f"load average {os.getloadavg()[0]:.1f}\n")
    print(
        f"{'step':<12}{'wall':>7}{'least':>7}{'most':>7}{'processor':>11}{'least':>7}{'most':>7}{'target':>8}{'bytes':>12}"
    )
    for name, ratios in found.items():
        target = f"{TARGETS[name]:.2f}" if name in TARGETS else "-"
        size = f"{sizes[name] / 1e6:.2f} MB" if name in sizes else "-"
        wall, processor = zip(*ratios, strict=True)
        print(
            f"{name:<12}{statistics.median(wall):>7.3f}{min(wall):>7.3f}{max(wall):>7.3f}"
            f"{statistics.median(processor):>11.3f}{min(processor):>7.3f}{max(processor):>7.3f}{target:>8}{size:>12}"
        )
    return {"parameters": count, "elements": looked_at, "bare_s": bare, "ratios": found, "bytes": sizes}


def _both(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall clock, and of the processors."""
    began = time.process_time()
    wall = _timed(work)
    return wall, time.process_time() - began


def _elements(path: Path, step: int) -> int:
    """Elements of all tensors that were recorded of this step."""
    from math import prod

    lines = map(json.loads, (path / "rank-00000.jsonl").read_text().splitlines())
    return sum(prod(line["shape"]) for line in lines if line.get("step") == step and "shape" in line)


def _decoder(width: int, layers: int, vocabulary: int, length: int) -> Any:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = width // 64
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
            return self.head(self.norm(self.blocks(x)))

    return Decoder()


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# Traces of gigabytes.

TENSOR_BYTES = 128 * 2**20


def diff(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second of `diff` over those of reading, for equal recordings and for such that differ by rounding."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tensors = max(int(args.gigabytes * 2**30) // TENSOR_BYTES, 1)
        paths = {name: Path(folder) / name for name in ("whole", "equal", "rounding")}
        for name, path in paths.items():
            _write(path, tensors, shards=1 if name == "whole" else 4, moved=name == "rounding")
        print(f"{tensors} tensors of {TENSOR_BYTES >> 20} MiB, {tensors * TENSOR_BYTES / 1e9:.2f} GB a side, float32\n")
        print(f"{'recordings':<12}{'read':>12}{'diff':>12}{'share':>8}{'peak memory':>16}{'in tensors':>12}")
        for name in ("equal", "rounding"):
            rounds = [_child(paths["whole"], paths[name]) for _ in range(args.repetitions)]
            shares = [one["read_s"] / one["diff_s"] for one in rounds]
            best = rounds[shares.index(statistics.median_high(shares))]
            size = 2 * tensors * TENSOR_BYTES / 1e9
            print(
                f"{name:<12}{size / best['read_s']:>7.2f} GB/s{size / best['diff_s']:>7.2f} GB/s"
                f"{statistics.median(shares):>8.2f}{best['peak_bytes'] / 2**20:>12.0f} MiB"
                f"{best['peak_bytes'] / TENSOR_BYTES:>12.2f}"
            )
            found[name] = rounds
    print(f"\ntarget: share of at least {THROUGHPUT}, memory under 2 tensors and a constant")
    return found


def _write(path: Path, tensors: int, *, shards: int, moved: bool) -> None:
    import torch

    from shardproof.parallel.piece import Piece
    from shardproof.trace.folder.writer import Writer
    from shardproof.trace.record import Record

    rows, columns = 8192, TENSOR_BYTES // 4 // 8192
    each = rows // shards
    axes = {"dp_shard": list(range(shards))} if shards > 1 else {}
    writers = [Writer(path, rank, shards, {"device": "cpu"}) for rank in range(shards)]
    for writer in writers:
        writer.event("layout", axes=axes)
    for number in range(tensors):
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
        if moved:
            whole *= 1 + 2**-23
        for rank, writer in enumerate(writers):
            piece = Piece(whole=(rows, columns), offset=(rank * each, 0), shape=(each, columns))
            record = Record(step=0, stage="gradient", name=f"layers.{number}.weight", piece=piece)
            writer.write(record, whole[rank * each : (rank + 1) * each], depth="full")
    for writer in writers:
        writer.close()


def _child(a: Path, b: Path) -> dict[str, float]:
    """Read both, then compare them, in a process of its own."""
    made = subprocess.run(
        [sys.executable, __file__, "_compare", str(a), str(b)], check=True, capture_output=True, text=True
    )
    return json.loads(made.stdout.splitlines()[-1])


def _compare(args: argparse.Namespace) -> None:
    import threading

    import torch

    import shardproof as sp
    from shardproof.trace.folder.reader import open_recording

    def read() -> None:
        for path in (args.a, args.b):
            for trace in open_recording(path).ranks.values():
                for number in range(len(trace.records)):
                    trace.tensor(number).view(torch.int64).sum()

    read()
    read_s = min(_timed(read) for _ in range(3))
    before, peak, ended = _own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    diff_s = _timed(lambda: sp.diff(args.a, args.b))
    ended.set()
    watcher.join()
    # Once more without anybody watching.
    diff_s = min(diff_s, _timed(lambda: sp.diff(args.a, args.b)))
    print(json.dumps({"read_s": read_s, "diff_s": diff_s, "peak_bytes": peak[0] - before}))


def _own_bytes() -> int:
    """Memory of this process that is not a page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


# Many ranks.

LAYERS, WIDTH, HIDDEN, VOCABULARY, LENGTH = 32, 4096, 11008, 32000, 2048
"""Of Llama 2 7B (arXiv:2307.09288)."""

TP = 8


def ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to compare two recordings of a 7B run, from sketches."""
    import shardproof as sp

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = {name: Path(folder) / name for name in ("before", "after", "wrong")}
        for name, path in paths.items():
            started = time.perf_counter()
            records = _simulate(path, args.ranks, moved=name == "after", wrong=name == "wrong")
            print(
                f"{name}: {records} records of {args.ranks} ranks, {_bytes(path) / 1e6:.0f} MB, "
                f"written in {time.perf_counter() - started:.0f} s"
            )
        for name in ("after", "wrong"):
            started = time.perf_counter()
            report = sp.diff(paths["before"], paths[name])
            found[name] = time.perf_counter() - started
            print(f"\nbefore against {name}: {found[name]:.1f} s (target 60)")
            print(str(report).splitlines()[-1], report.runs[0].verdicts)
    return found


def _tensors() -> Iterator[tuple[str, str, str, tuple[int, ...], int | None]]:
    """(stage, name, part, shape of the whole, dim that tp cuts) of one step."""
    matrices = {
        "attention.wq": ((WIDTH, WIDTH), 0),
        "attention.wk": ((WIDTH, WIDTH), 0),
        "attention.wv": ((WIDTH, WIDTH), 0),
        "attention.wo": ((WIDTH, WIDTH), 1),
        "mlp.gate": ((HIDDEN, WIDTH), 0),
        "mlp.up": ((HIDDEN, WIDTH), 0),
        "mlp.down": ((WIDTH, HIDDEN), 1),
        "norm1": ((WIDTH,), None),
        "norm2": ((WIDTH,), None),
    }
    parameters: list[tuple[str, tuple[int, ...], int | None]] = [("embed.weight", (VOCABULARY, WIDTH), 0)]
    outputs: list[tuple[str, tuple[int, ...], int | None]] = []
    for layer in range(LAYERS):
        for name, (shape, dim) in matrices.items():
            parameters.append((f"blocks.{layer}.{name}.weight", shape, dim))
            outputs.append((f"blocks.{layer}.{name}", (LENGTH, shape[0]), 1 if dim == 0 else None))
        outputs.append((f"blocks.{layer}", (LENGTH, WIDTH), None))
    parameters += [("norm.weight", (WIDTH,), None), ("head.weight", (VOCABULARY, WIDTH), 0)]
    for name, shape, dim in outputs:
        yield "forward", name, "", shape, dim
    for name, shape, dim in reversed(outputs):
        yield "backward", name, "", shape, dim
    for stage, part in (
        ("gradient", ""),
        ("optimizer-state", "exp_avg"),
        ("optimizer-state", "exp_avg_sq"),
        ("update", ""),
    ):
        for name, shape, dim in parameters:
            yield stage, name, part, shape, dim


def _simulate(path: Path, size: int, *, moved: bool, wrong: bool) -> int:
    """A recording whose sketches are drawn at random, so that shards, replicas and parts of the batch add up."""
    import torch

    from shardproof.trace.folder import writer as module
    from shardproof.trace.record import Record

    data = size // TP
    writers = [module.Writer(path, rank, size, {"device": "cpu"}) for rank in range(size)]
    samples = [tuple(f"{rank // TP:024d}" for _ in range(1)) for rank in range(size)]
    for rank, one in enumerate(writers):
        first = rank - rank % TP
        one.event("layout", axes={"dp_shard": list(range(rank % TP, size, TP)), "tp": list(range(first, first + TP))})
        record = Record(step=0, stage="batch", name="batch", samples=samples[rank])
        one.write(record, torch.zeros(1, 1), depth="stats")
    drawn = torch.Generator().manual_seed(0)
    records = 0
    for stage, name, part, shape, dim in _tensors():
        state = stage not in ("forward", "backward")
        cuts = data * TP if state and dim is not None else data
        shares = torch.randn(cuts, 16, 16, generator=drawn)
        if moved:
            shares *= 1 + 2**-23
        if wrong and stage == "gradient" and name == "blocks.17.mlp.up.weight":
            shares *= 2
        for rank, one in enumerate(writers):
            at, peer = divmod(rank, TP)
            piece = _piece(shape, dim, at, peer, data) if state else None
            local = piece.local_shape if piece is not None else (1, *_cut(shape, dim))
            made = shares[rank] if cuts == size else shares[at]
            if 0 in local:
                # Of a chunk that is left over some ranks have nothing.
                made = torch.zeros(16, 16)
            # The numbers are made up: a run of this size would have made them from its own tensors.
            module.sketch_and_stats = lambda local, *_, made=made: (made, _statistics(local, made))
            record = Record(step=0, stage=stage, name=name, part=part, piece=piece)
            one.write(record, torch.zeros(()).expand(local), depth="sketch", samples=None if state else samples[rank])
            records += 1
    for one in writers:
        one.close()
    return records


def _statistics(local: Any, made: Any) -> Any:
    """Of a tensor as large as `local` whose sketch is `made`: only its norm says anything."""
    from shardproof.trace.stats import Stats

    square = float((made.double() ** 2).mean())
    each = (square / max(local.numel(), 1)) ** 0.5
    return Stats(
        count=local.numel(), zeros=0, nans=0, infs=0, min=-each, max=each, sum=0.0, square_sum=square, absmax=each
    )


def _cut(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """What one tp peer holds."""
    return tuple(n // TP if at == dim else n for at, n in enumerate(shape))


def _piece(shape: tuple[int, ...], dim: int | None, at: int, peer: int, data: int) -> Any:
    """The piece of a rank: cut over tp along `dim`, then over the data ranks along the first dim, in chunks."""
    from shardproof.parallel.piece import Piece

    offset, extent = [0] * len(shape), list(_cut(shape, dim))
    if dim is not None:
        offset[dim] = peer * extent[dim]
    chunk = -(-extent[0] // data)
    start = min(at * chunk, extent[0])
    offset[0] += start
    extent[0] = min(chunk, extent[0] - start)
    return Piece(whole=shape, offset=tuple(offset), shape=tuple(extent))


def main() -> None:
    """Read the options and run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for name, work in (("steps", steps), ("diff", diff), ("ranks", ranks)):
        own = parts.add_parser(name)
        own.set_defaults(work=work, name=name)
        own.add_argument("--repetitions", type=int, default=5)
        own.add_argument("--json", type=Path)
        own.add_argument("--folder", type=Path, help="where recordings are written; the system's by default")
    own = parts.choices["steps"]
    for option, value in (("width", 512), ("layers", 8), ("vocabulary", 8192), ("length", 256), ("batch", 8)):
        own.add_argument(f"--{option}", type=int, default=value)
    own.add_argument("--threads", type=int, default=2)
    parts.choices["diff"].add_argument("--gigabytes", type=float, default=4.0)
    parts.choices["ranks"].add_argument("--ranks", type=int, default=512)
    own = parts.add_parser("_compare")
    own.add_argument("a", type=Path)
    own.add_argument("b", type=Path)
    own.set_defaults(work=None, json=None)
    args = parser.parse_args()
    if args.work is None:
        _compare(args)
        return
    print(f"torch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()} cores\n")
    found = args.work(args)
    if args.json is not None:
        args.json.write_text(json.dumps({args.name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
