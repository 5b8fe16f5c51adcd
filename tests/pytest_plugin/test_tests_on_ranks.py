"""What a user writes, and what pytest says of it. One run of pytest serves many tests."""

import re
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

pytest_plugins = "pytester"

GOOD = """
    import os
    import random
    import time
    from pathlib import Path

    import pytest
    import torch
    import torch.distributed as dist

    SEEN = []  # of this process: warm ranks keep it, new ones begin with an empty one

    @pytest.fixture(scope="module")
    def expensive():
        SEEN.append("made")
        group = dist.new_group()
        yield group
        dist.all_reduce(torch.ones(1), group=group)

    @pytest.mark.ranks(4)
    def test_a_collective_sees_all_ranks(mesh):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        assert total == 6
        assert mesh.mesh_dim_names == ("dp_replicate", "dp_shard", "tp")
        assert mesh["dp"].size() == 4
        assert os.environ["RANK"] == str(dist.get_rank()) and os.environ["WORLD_SIZE"] == "4"
        SEEN.append("first")

    @pytest.mark.ranks(4)
    def test_ranks_stay_warm():
        assert SEEN == ["first"]

    @pytest.mark.world_size(2)
    def test_of_another_size_has_ranks_of_its_own():
        assert SEEN == [] and dist.get_world_size() == 2

    @pytest.mark.ranks(4, tp=2)
    @pytest.mark.parametrize("number", [1, 2])
    def test_wide_fixtures_are_made_once_a_rank(expensive, mesh, number, parallelism):
        assert SEEN.count("made") == 1
        assert (mesh["tp"].size(), parallelism.dp_shard) == (2, 2)
        dist.all_reduce(torch.ones(1), group=expensive)

    @pytest.mark.ranks("tp=2,dp_replicate=1")
    def test_degrees_bring_their_number_of_ranks(parallelism):
        assert parallelism.world_size == dist.get_world_size() == 2

    @pytest.mark.ranks([1, 2])
    def test_sizes(parallelism):
        assert parallelism.world_size == dist.get_world_size()

    @pytest.mark.ranks(4, ["ddp", "tp_fsdp"])
    def test_strategies_of_the_mark(parallelism, mesh):
        assert mesh["tp"].size() == parallelism.tp == (2 if parallelism.strategy == "tp_fsdp" else 1)

    @pytest.mark.ranks(4)
    @pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
    def test_strategies_of_a_parameter(strategy, parallelism):
        assert parallelism.strategy == strategy

    @pytest.mark.ranks(2)
    def test_changes_everything():
        torch.manual_seed(dist.get_rank())
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        os.environ["LEFT_BEHIND"] = "1"
        os.chdir("/")
        random.seed(5)
        dist.new_group([0])
        dist.isend(torch.ones(1), 1 - dist.get_rank())  # that nobody receives

    @pytest.mark.ranks(2)
    def test_starts_clean():
        drawn = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(drawn, torch.rand(1))
        assert drawn[0] == drawn[1]
        assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
        assert "LEFT_BEHIND" not in os.environ and os.getcwd() != "/"
        assert len(dist.distributed_c10d._world.pg_map) == 1
        received = torch.zeros(1)
        sent = dist.isend(torch.full((1,), 7.0), 1 - dist.get_rank())
        dist.recv(received, 1 - dist.get_rank())
        sent.wait()
        assert received == 7

    @pytest.mark.ranks(2)
    def test_initializes_a_group_itself():
        dist.destroy_process_group()
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 2

    @pytest.mark.ranks(2)
    def test_folders(tmp_path, ranks_tmp_path, capsys):
        (ranks_tmp_path / str(dist.get_rank())).touch()
        dist.barrier()
        assert {file.name for file in ranks_tmp_path.iterdir()} == {"0", "1"}
        assert (tmp_path == ranks_tmp_path) == (dist.get_rank() == 0)
        print("said")
        assert capsys.readouterr().out == "said\\n"

    @pytest.mark.ranks(2)
    def test_backward(record_property):
        record_property("found", "it")
        torch.ones(3, requires_grad=True).sum().backward()

    @pytest.mark.ranks(2)
    class TestOfAClass:
        def test_runs_on_ranks(self):
            assert dist.get_world_size() == 2

    @pytest.mark.ranks(2)
    @pytest.mark.skip(reason="no time")
    def test_skipped():
        raise AssertionError

    @pytest.mark.ranks(2)
    @pytest.mark.xfail(reason="a bug of rank 1")
    def test_expected_to_fail_on_one_rank():
        assert dist.get_rank() == 0

    def test_like_any_other():
        assert not dist.is_initialized() and "RANK" not in os.environ
"""

BAD = """
    import ctypes
    import os
    import signal
    import sys
    import warnings

    import pytest
    import torch
    import torch.distributed as dist

    PIDS = []

    @pytest.fixture
    def broken_on_one():
        if dist.get_rank() == 1:
            raise OSError("no such device")

    @pytest.mark.ranks(4)
    def test_alike():
        print("same"), print("of", dist.get_rank())
        got = {"loss": 1.0}
        assert got == {"loss": 2.0}

    @pytest.mark.ranks(4)
    def test_one_is_guilty():
        if dist.get_rank() == 2:
            raise ValueError("the guilty one")
        dist.barrier()

    @pytest.mark.ranks(2)
    def test_killed():
        print("last words of", dist.get_rank(), flush=True)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    @pytest.mark.ranks(2)
    def test_segmentation_fault():
        if dist.get_rank() == 0:
            ctypes.string_at(0)

    @pytest.mark.ranks(2)
    def test_exits():
        if dist.get_rank() == 0:
            os._exit(0)

    @pytest.mark.ranks(2)
    def test_sys_exit():
        sys.exit(4)

    @pytest.mark.ranks(2)
    def test_healed_after_that():
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 2

    @pytest.mark.ranks(2)
    @pytest.mark.timeout(3)
    def test_hangs():
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(1))  # alone

    @pytest.mark.ranks(2)
    def test_other_collectives():
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(1))
        else:
            dist.broadcast(torch.ones(1), 1)
            dist.barrier()

    @pytest.mark.ranks(2)
    def test_one_skips():
        if dist.get_rank() == 0:
            pytest.skip("not here")

    @pytest.mark.ranks(2)
    def test_setup(broken_on_one):
        dist.barrier()

    @pytest.mark.ranks(2)
    def test_warns():
        warnings.warn("an error here")

    @pytest.mark.ranks("tp=2,sp=2")
    def test_of_no_layout():
        raise AssertionError

    def test_without_mark(mesh):
        raise AssertionError

    @pytest.mark.ranks(2)
    async def test_async():
        raise AssertionError
"""


def block(text: str, name: str) -> str:
    """What pytest prints under the heading of one test."""
    found = re.search(
        rf"\n_+ (ERROR at setup of )?{name} _+\n(.*?)(?=\n(_{(2,)} .* _{(2,)}|=+ .* =+)\n)", text, re.DOTALL
    )
    assert found, f"{name} has no block in:\n{text}"
    return found.group(2)


def test_what_users_write_works(run, pytester) -> None:
    result = run("--junitxml=out.xml", "-o", "junit_family=xunit1", "--durations=3", test_good=GOOD)
    result.assert_outcomes(passed=19, skipped=1, xfailed=1)
    cases = {case.get("name"): case for case in ET.parse(pytester.path / "out.xml").iter("testcase")}
    assert len(cases) == 21  # one a test, not one a rank
    assert [one.attrib for one in cases["test_backward"].iter("property")] == [{"name": "found", "value": "it"}]


def test_failures_are_shown_once_with_their_ranks(run, pytester) -> None:
    result = run("--junitxml=out.xml", "-o", "junit_logging=all", test_bad=BAD)
    text = result.stdout.str()
    result.assert_outcomes(passed=1, failed=11, errors=3)

    alike = block(text, "test_alike")
    assert alike.count("[ranks 0-3]") == 2  # of the failure, and of what all of them printed
    assert alike.count("E       AssertionError") == 1
    assert "[rank 3] of 3" in alike
    assert "assert {'loss': 1.0} == {'loss': 2.0}" in alike  # as pytest explains it

    guilty = block(text, "test_one_is_guilty")
    assert "[rank 2]" in guilty
    assert "ValueError: the guilty one" in guilty
    assert "Connection" not in guilty
    assert "[ranks 0-1, 3] failed after that, as a peer was lost" in guilty

    killed = block(text, "test_killed")
    assert "[rank 1]\ndied: killed by signal 9 (SIGKILL)" in killed
    assert "[rank 1] last words of 1" in killed
    assert "Connection" not in killed

    assert "(SIGSEGV): a crash in native code" in block(text, "test_segmentation_fault")
    assert "in test_segmentation_fault" in block(text, "test_segmentation_fault")
    assert "died: its process exited with code 0" in block(text, "test_exits")
    assert "SystemExit: 4" in block(text, "test_sys_exit")

    hangs = block(text, "test_hangs")
    assert re.search(
        r"no answer within 3 s: rank 0 in all_reduce \(test_bad.py:\d+\); rank 1 had ended the test", hangs
    )
    assert "in test_hangs" in hangs
    assert "_pytest" not in hangs

    other = block(text, "test_other_collectives")
    assert "ranks 0-1 called different collectives" in other
    assert re.search(r"rank 0: all_reduce SUM of float32 \[1\], .*test_bad.py:\d+ in test_other_collectives", other)
    assert "rank 1: broadcast" in other

    assert "the ranks disagree: skipped on rank 0, not on rank 1" in block(text, "test_one_skips")
    assert "OSError: no such device" in block(text, "test_setup")
    assert "UserWarning: an error here" in block(text, "test_warns")
    assert "there is no axis 'sp'" in block(text, "test_of_no_layout")
    assert "mark it with @pytest.mark.ranks(4)" in block(text, "test_without_mark")
    assert "async def" in block(text, "test_async")

    cases = {case.get("name"): case for case in ET.parse(pytester.path / "out.xml").iter("testcase")}
    assert cases["test_one_is_guilty"].find("failure").get("message") == "[rank 2] ValueError: the guilty one"
    assert "[ranks 0-3] same" in cases["test_alike"].find("system-out").text


def test_a_rank_that_is_killed_beside_its_data_loaders_leaves_nothing(run, monkeypatch):
    # Not `tmp_path`: the path of a socket of Python's multiprocessing has a hundred characters at most.
    with tempfile.TemporaryDirectory(prefix="f-", ignore_cleanup_errors=True) as scratch:
        _kills_beside_data_loaders(run, monkeypatch, Path(scratch))


def _kills_beside_data_loaders(run, monkeypatch, scratch):
    monkeypatch.setenv("TMPDIR", str(scratch))
    done = run(
        "--basetemp=base",
        test_loaders="""
        import os, signal
        import pytest, torch
        from torch.utils.data import DataLoader, TensorDataset

        @pytest.mark.ranks(2)
        @pytest.mark.parametrize("killed", (False, True))
        def test_loads(killed):
            for batch, in DataLoader(TensorDataset(torch.ones(1000, 2)), 4, num_workers=2):
                if killed:
                    os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert done.parseoutcomes() == {"passed": 1, "failed": 1}
    assert [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor_")] == []
