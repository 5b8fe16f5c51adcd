"""Selecting, distributing, interrupting and debugging tests on ranks, and runs without any."""

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest_plugins = "pytester"

SOME = """
    import pytest
    import torch.distributed as dist

    @pytest.fixture(scope="session")
    def wide():
        yield
        raise OSError("the end of the wide fixture")

    @pytest.mark.ranks(2)
    def test_passes():
        print("printed by", dist.get_world_size())

    @pytest.mark.ranks(2)
    def test_is_wide(wide):
        dist.barrier()

    @pytest.mark.ranks(2)
    def test_fails():
        assert dist.get_rank() == 0

    @pytest.mark.ranks(2)
    def test_comes_last(wide):
        pass
"""

ENDLESS = """
    import os
    import time
    from pathlib import Path

    import pytest
    import torch.distributed as dist

    @pytest.mark.ranks(2)
    def test_endless():
        Path(f"rank{dist.get_rank()}").write_text(f"{os.getpid()} {os.getppid()}")
        dist.barrier()
        Path("ready").touch()
        time.sleep(1000)
"""

DEBUGGED = """
    import pytest
    import torch.distributed as dist

    @pytest.mark.ranks(2)
    @pytest.mark.timeout(1)
    def test_stops():
        secret = 40 + dist.get_rank()
        breakpoint()
        dist.barrier()
        assert secret == 40
"""


def test_after_x_fixtures_are_torn_down_and_lf_runs_what_failed(run, pytester) -> None:
    first = run("-x", "-s", "-p", "cacheprovider", test_some=SOME)
    first.assert_outcomes(passed=2, failed=1)
    first.stdout.fnmatch_lines(["*ranks 0-1* printed by 2", "*[[]rank 1[]]*assert 1 == 0"])
    # Its last test never came.
    first.stdout.fnmatch_lines(["*fixtures of rank 0 failed at the end*", "*OSError: the end of the wide fixture"])
    again = run("--lf", "--setup-show", "-v", "-k", "not last")
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["*ranks 0-1*test_some.py::test_fails*"])


def test_workers_of_xdist_have_ranks_of_their_own(run) -> None:
    result = run("-n", "2", "--timeout=60", "--timeout-method=thread", test_some=SOME, test_too=SOME)
    result.assert_outcomes(passed=6, failed=2, errors=result.parseoutcomes()["errors"])
    result.stdout.fnmatch_lines(["*[[]rank 1[]]*assert 1 == 0"])


def test_a_run_without_such_tests_loads_nothing_for_them(run) -> None:
    plain = """
        import sys
        def test_plain():
            loaded = {name.partition(".")[0] for name in sys.modules}
            assert not {"torch", "numpy", "multiprocessing", "rich"} & loaded
            assert "shardproof.pytest_plugin.running" not in sys.modules and "shardproof.ranks" not in sys.modules
    """
    run("-p", "no:xdist", test_plain=plain).assert_outcomes(passed=1)


def test_ctrl_c_leaves_no_process(start, pytester) -> None:
    with start(files={"test_endless": ENDLESS}, stdout=subprocess.PIPE) as process:
        wait_for(pytester.path / "ready")
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    pids = {int(pid) for rank in (0, 1) for pid in (pytester.path / f"rank{rank}").read_text().split()}
    assert len(pids) == 3  # two ranks and what has forked them
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_prompt_on_one_rank(start) -> None:
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first that a session opens is its own

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with start("--ranks-pdb=1", files={"test_debugged": DEBUGGED}, preexec_fn=take_terminal, **streams):
        os.close(theirs)
        read_until(ours, "(Pdb)")
        time.sleep(1.2)  # longer than the test may take without a debugger
        os.write(ours, b"p 'secret', secret\n")
        read_until(ours, "('secret', 41)")
        os.write(ours, b"c\n")
        read_until(ours, "PDB post_mortem", "(Pdb)")
        os.write(ours, b"c\n")
        read_until(ours, "[rank 1] assert 41 == 40", "1 failed")
    os.close(ours)


def read_until(terminal: int, *wanted: str) -> None:
    """Reads until all texts have come, one after the other."""
    seen, left = "", list(wanted)
    while left:
        assert select.select([terminal], [], [], 60)[0], f"{left[0]!r} does not come after:\n{seen}"
        seen += os.read(terminal, 4096).decode(errors="replace")
        while left and left[0] in seen:
            seen = seen.partition(left.pop(0))[2]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
