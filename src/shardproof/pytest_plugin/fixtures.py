"""Fixtures of tests that run on ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shardproof.errors import UsageError
from shardproof.pytest_plugin.limits import limit_s
from shardproof.pytest_plugin.marks import WANTED, Wanted

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from shardproof.spec.experiment import Experiment
    from shardproof.spec.parallelism import Parallelism

_CHECK_S = 600.0
"""Time limit of `check`."""
_EARLIER = 0.9
"""The ranks of a check are given up before the test is: it is then known where each of them stood."""


@pytest.fixture
def ranks_layout(request: pytest.FixtureRequest) -> Any:
    """The number of ranks and the strategy of a test whose mark has a list of them."""
    return getattr(request, "param", None)


@pytest.fixture
def parallelism(request: pytest.FixtureRequest) -> Parallelism:
    """How the ranks of this test are laid out: ranks for each mesh axis, as its mark says."""
    return _wanted(request, "parallelism").layout


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> DeviceMesh:
    """This rank's device mesh, with the axes `dp_replicate`, `dp_shard`, `tp`, and `mesh["dp"]` for both data axes."""
    wanted = _wanted(request, "mesh")
    from shardproof.parallel.mesh import build  # noqa: PLC0415  (needs torch, which pytest's process must not load)
    from shardproof.pytest_plugin.rank import ON_A_RANK  # noqa: PLC0415  (likewise)

    return build(wanted.layout, request.config.stash[ON_A_RANK].place.device_type)[0]


@pytest.fixture
def ranks_tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One folder for all ranks of the test, as a checkpoint needs it; `tmp_path` is another one on each rank."""
    _wanted(request, "ranks_tmp_path")
    import torch.distributed as dist  # noqa: PLC0415  (pytest's process must not load it)

    shared: list[Any] = [tmp_path]
    dist.broadcast_object_list(shared, src=0)
    folder: Path = shared[0]
    return folder


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`shardproof.assert_parity`, with the strategies and ranks of the test's mark unless it is given others."""
    wanted = request.node.stash.get(WANTED, None)
    limit = limit_s(request.node)

    def parity(experiment: Experiment, *args: Any, **options: Any) -> None:
        __tracebackhide__ = True
        from shardproof.parity import assert_parity  # noqa: PLC0415  (needs torch)

        if isinstance(wanted, Wanted) and not args:
            if wanted.chosen:
                options.setdefault("strategies", (wanted.layout,))
            options.setdefault("ranks", wanted.layout.world_size)
        options.setdefault("timeout_s", min(_CHECK_S, _EARLIER * limit) if limit else _CHECK_S)
        assert_parity(experiment, *args, **options)

    return parity


def _wanted(request: pytest.FixtureRequest, fixture: str) -> Wanted:
    __tracebackhide__ = True
    wanted = request.node.stash.get(WANTED, None)
    if isinstance(wanted, Wanted) and wanted.crew.alone:
        raise UsageError(f"the fixture {fixture} cannot be used beside parity, which lays ranks out itself")
    if not isinstance(wanted, Wanted):
        raise UsageError(f"the fixture {fixture} needs a test that runs on ranks: mark it with @pytest.mark.ranks(4)")
    return wanted
