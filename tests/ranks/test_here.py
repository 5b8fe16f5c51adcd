"""The process group of a library: the one that is there, the launcher's, or one of its own."""

import os
import socket
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardproof.errors import RankLost, UsageError
from shardproof.ranks import Here, Place, Ranks, here, start
from shardproof.ranks.failure import lost_peer, only_waited
from shardproof.ranks.interface import choose_interface, interface_to
from shardproof.ranks.launch import Launch

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _sum_of_ranks() -> float:
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return value.item()


class UnderALauncher:
    """Forked ranks that a launcher's variables are set for, as if it had started them."""

    def joins(self, place: Place, port: int, threads: str | None) -> tuple[object, ...]:
        self._launch(place, port)
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        torch.set_num_threads(2)
        with Here("cpu", timeout_s=30.0) as joined:
            found = joined.place.rank, joined.place.size, _sum_of_ranks(), torch.get_num_threads()
        return *found, dist.is_initialized()

    def waits_for_one_who_stays_away(self, place: Place, port: int) -> tuple[str, bool]:
        self._launch(place, port)
        here.START_S = 1.0
        try:
            Here("cpu", timeout_s=1.0)
        except RankLost as error:
            return str(error), dist.is_initialized()
        finally:
            here.START_S = 300.0
        raise ValueError("nobody was missed")

    def waits_for_one_who_is_stuck(self, place: Place, port: int) -> bool:
        self._launch(place, port)
        with Here("cpu", timeout_s=1.0) as joined:
            mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
            group = mesh["tp"].get_group()
            joined.limit_groups()
            dist.all_reduce(torch.ones(1), group=group)
            if place.rank == 1:
                time.sleep(2.5)
                # Who counts collectives would say that this rank owes one, which here is the point.
                place.tallies()
                return True
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                place.tallies()
                return lost_peer(error)
        raise ValueError("nobody was missed")

    def _launch(self, place: Place, port: int) -> None:
        values = (place.rank, place.size, place.rank, place.size, "127.0.0.1", port)
        os.environ.update(zip(_LAUNCHER, map(str, values), strict=True))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, UnderALauncher(), timeout_s=60.0) as ranks:
        yield ranks


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_process_that_nobody_launched_is_a_world_of_one() -> None:
    with Here("cpu", timeout_s=5.0) as joined:
        assert joined.place == Place(rank=0, size=1, local_rank=0, device_type="cpu")
        assert (_sum_of_ranks(), dist.get_world_size()) == (0.0, 1)
    assert not dist.is_initialized()
    joined.close()


def test_a_group_that_is_there_is_used_and_left_as_it_is() -> None:
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Here("cpu", timeout_s=5.0) as joined:
            assert (joined.place.rank, joined.place.size) == (0, 1)
        assert dist.is_initialized()
        with pytest.raises(UsageError, match=r"device='cuda', but .*backend 'cpu:gloo'.* serves cpu;"):
            Here("cuda", timeout_s=5.0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("threads", "want"), [(None, 1), ("2", 2)])
def test_processes_of_a_launch_join_each_other_and_share_the_cores(
    ranks: Ranks, port: int, threads: str | None, want: int
) -> None:
    assert ranks.call("joins", port, threads) == {rank: (rank, 2, 1.0, want, False) for rank in range(2)}


def test_a_peer_that_stays_away_or_hangs_is_an_error_in_time(ranks: Ranks, port: int) -> None:
    began = time.monotonic()
    assert ranks.call("waits_for_one_who_is_stuck", port) == {0: True, 1: True}
    for stayed, away in ((0, 1), (1, 0)):
        said, joined = ranks.call("waits_for_one_who_stays_away", port + 1 + stayed, ranks=[stayed])[stayed]
        assert said.startswith(f"rank {stayed} lost a peer in the start: rank {away} has not come within 1 s: ")
        assert not joined
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(("device", "timeout_s", "message"), [("tpu", 1.0, "device='tpu'"), ("cpu", 0.0, "timeout=0")])
def test_wrong_use_is_refused_with_the_value(device: str, timeout_s: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Here(device, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("error", "lost", "waited"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.2]:1"), True, True),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), True, True),
        (dist.DistStoreError("wait timeout after 1000ms"), True, True),
        (dist.DistBackendError("NCCL error: Duplicate GPU detected"), False, True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True, True),
        (ConnectionResetError("Connection reset by peer"), False, True),  # of the user's own data base
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
    ],
)
def test_a_lost_peer_is_told_from_other_errors(error: Exception, lost: bool, waited: bool) -> None:
    outer = ValueError("in the middle of a step")
    outer.__cause__ = error
    assert [lost_peer(error), lost_peer(outer)] == [lost] * 2
    assert [only_waited(error), only_waited(outer)] == [waited] * 2


def _launch(*, local: int, host: str) -> Launch:
    return Launch(
        rank=0,
        world_size=4,
        local_rank=0,
        local_world_size=local,
        host=host,
        port=1,
        agent_store=True,
        attempt="0",
    )


def test_ranks_of_one_machine_talk_over_its_loopback_unless_told_otherwise() -> None:
    environment: dict[str, str] = {}
    choose_interface(_launch(local=4, host="10.77.0.1"), environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo"}
    for local in (2, 4):
        theirs = {"GLOO_SOCKET_IFNAME": "eth7"}
        choose_interface(_launch(local=local, host="10.77.0.1"), theirs)
        assert theirs == {"GLOO_SOCKET_IFNAME": "eth7"}


def test_ranks_of_several_machines_talk_over_the_way_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"10.77.0.1": "ib0", "192.0.2.1": "eth0"}
    monkeypatch.setattr("shardproof.ranks.interface.interface_to", ways.get)
    environment = {"TP_SOCKET_IFNAME": "eth7"}
    choose_interface(_launch(local=2, host="10.77.0.1"), environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0", "TP_SOCKET_IFNAME": "eth7"}
    by_default: dict[str, str] = {}
    choose_interface(_launch(local=2, host="localhost"), by_default)
    assert by_default["GLOO_SOCKET_IFNAME"] == "eth0", "the first machine calls itself localhost, the others do not"
    ways.clear()
    nowhere: dict[str, str] = {}
    choose_interface(_launch(local=2, host="localhost"), nowhere)
    assert nowhere == {}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "no-such-host.invalid"])
def test_the_loopback_leads_to_no_other_machine(host: str) -> None:
    assert interface_to(host) is None
