"""What a test on four ranks costs through the pytest plugin, and with one launch of four processes for each test.

    python benchmarks/pytest_ranks.py [--tests N] [--launches N] [--json PATH]

The same tests are run twice by pytest: with `@pytest.mark.ranks(4)`, and the usual way, where each test calls
`torch.multiprocessing.spawn` and the processes initialise gloo. Each trains a small model under DDP for one step and
holds its gradients against those of the other ranks. Timed is what pytest takes from the end of the first test to the
end of the last, so that imports and the first start of the ranks, which are shown apart, count for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "shardproof.pytest_plugin"
TARGET = 30.0
"""How many times less a test should cost on warm ranks."""

BODY = """
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def body(number):
    torch.manual_seed(number)
    model = DistributedDataParallel(nn.Linear(8, 4))
    model(torch.full((2, 8), float(dist.get_rank()))).square().mean().backward()
    gradient = model.module.weight.grad
    theirs = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, gradient)
    assert all(torch.equal(gradient, other) for other in theirs)

"""

WARM = """
@pytest.mark.ranks(4)
@pytest.mark.parametrize("number", range({tests}))
def test_warm(number):
    body(number)
"""

LAUNCHED = """
def work(rank, port, number):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=4)
    body(number)
    # Without the interpreter's own end, in which gloo aborts one launch in six on a busy machine ("terminate called
    # without an active exception"); it is no part of what is compared, and leaving it out favours the launches.
    os._exit(0)


@pytest.mark.parametrize("number", range({tests}))
def test_launched(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, number), nprocs=4)
"""

CLOCK = """
import time

ENDS = [time.perf_counter()]


def pytest_runtest_logfinish():
    ENDS.append(time.perf_counter())


def pytest_unconfigure():
    with open("ends", "w") as file:
        print(*ENDS, file=file)
"""


def timed(name: str, text: str, tests: int) -> dict[str, float]:
    """Seconds of the first test (from the start of pytest on) and of each test after it. Exits where a test fails."""
    known = any(point.value == PLUGIN for point in entry_points(group="pytest11"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"test_{name}.py").write_text(BODY + text.format(tests=tests))
        Path(folder, "conftest.py").write_text(CLOCK)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *([] if known else ["-p", PLUGIN])],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        ends = [float(end) for end in Path(folder, "ends").read_text().split()]
    return {"first_s": ends[1] - ends[0], "each_s": (ends[-1] - ends[1]) / (len(ends) - 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=50, help="tests through the plugin")
    parser.add_argument("--launches", type=int, default=50, help="tests that each launch four processes: minutes")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if min(asked.tests, asked.launches) < 2:
        parser.error("at least 2 of each: the first does not count")
    warm = timed("warm", WARM, asked.tests)
    launched = timed("launched", LAUNCHED, asked.launches)
    ratio = launched["each_s"] / warm["each_s"]
    print(f"torch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()} CPUs")
    for name, count, seen in (("plugin", asked.tests, warm), ("launches", asked.launches, launched)):
        print(f"{name:9} {count:3} tests   first {seen['first_s']:6.2f} s   each after it {seen['each_s']:7.3f} s")
    print(f"ratio {ratio:.0f} (target: at least {TARGET:g})")
    if asked.json:
        asked.json.write_text(json.dumps({"plugin": warm, "launches": launched, "ratio": ratio}) + "\n")
    raise SystemExit(ratio < TARGET)


if __name__ == "__main__":
    main()
