"""Ranks on two hosts: they find the network between them, and the end of one host is an error on the other."""

import subprocess
import time
from pathlib import Path

import pytest
from hosts import Host

_PROGRAM = """
import os, sys
import torch, torch.distributed as dist
from shardproof.ranks import Here
from shardproof.ranks.failure import lost_peer

with Here("cpu", timeout_s=20.0) as here:
    value = torch.tensor([2.0 ** here.place.rank])
    dist.all_reduce(value)
    # In one piece: torchrun's processes write to one pipe, unbuffered.
    os.write(1, f"sum {value.item()} {os.environ['GLOO_SOCKET_IFNAME']}\\n".encode())
    try:
        while True:
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        os.write(1, b"lost\\n")
        sys.exit(3)
"""
_END_S = 15.0
"""A host that has lost the other knows it at once, or by the time limit of its collectives, which is longer."""


def test_two_hosts_compute_together_and_one_that_is_lost_ends_the_other(
    hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    one, two = hosts
    with one.torchrun(str(program)) as first, two.torchrun(str(program), stdout=None, stderr=None) as second:
        assert first.stdout
        assert [first.stdout.readline() for _ in range(2)] == ["sum 15.0 cable\n"] * 2
        began = time.monotonic()
        two.kill()
        second.wait()
        said, complaints = first.communicate(timeout=60)
    assert said.splitlines() == ["lost"] * 2
    assert time.monotonic() - began < _END_S
    assert first.returncode == 1, "torchrun's own"
    assert "exitcode  : 3" in complaints


def test_a_host_is_alone_in_its_network(hosts: tuple[Host, Host]) -> None:
    with hosts[0].start(["ip", "-brief", "address"]) as program:
        said, _ = program.communicate(timeout=10)
    assert "10.77.0.1/24" in said
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert all(host.namespace in listed for host in hosts)
