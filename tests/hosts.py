"""Two hosts on one machine: two network namespaces, joined by a cable. Linux only, and as root."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERFACE = "cable"
_NAME = r"shardproof-(\d+)-[01]"
"""The process that has made a host, and which of the two it is."""
PORT = 29400
"""The same in every test: the hosts of each have their network to themselves."""


class Program(subprocess.Popen[str]):
    """Does not wait at the end of a `with` statement for what a test that has failed will never end."""

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *error)


@dataclass(frozen=True)
class Host:
    """A host with an address of its own and a name that, as on many real ones, resolves to 127.0.0.1."""

    namespace: str
    address: str
    first: str
    """The address of the first host, where processes find each other."""

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Starts `command` on this host, with text pipes for its stdout and stderr."""
        return Program(
            ["ip", "netns", "exec", self.namespace, *command],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )

    def torchrun(self, *program: str, nproc: int = 2, **options: object) -> subprocess.Popen[str]:
        """Starts `nproc` processes of this host's part of a launch over both hosts."""
        return self.start(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(nproc)),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.first}:{PORT}", "--local-addr", self.address),
                # Torchrun knows the host of the store by the machine's name, which both hosts share here.
                *("--rdzv-conf", f"is_host={'true' if self.address == self.first else 'false'}"),
                *program,
            ],
            **options,
        )

    def unplug(self) -> None:
        """Takes the cable out of this host: nothing reaches it any more, and nothing says so."""
        _ip("-n", self.namespace, "link", "set", _INTERFACE, "down")

    def kill(self) -> None:
        """Ends every process on this host at once, as a power cut does."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


class NoHosts(Exception):
    """This machine, or this user, makes no network namespaces; the text says why."""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Makes the hosts, and removes them with all their processes. Raises `NoHosts`."""
    if shutil.which("ip") is None or not Path("/proc/self/ns/net").exists():
        raise NoHosts("two hosts need Linux and the command ip (package iproute2)")
    _sweep()
    addresses = ("10.77.0.1", "10.77.0.2")
    hosts = [Host(f"shardproof-{os.getpid()}-{i}", address, addresses[0]) for i, address in enumerate(addresses)]
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        one, two = hosts
        cable = ("link", "add", _INTERFACE, "netns", one.namespace, "type", "veth")
        _ip(*cable, "peer", "name", _INTERFACE, "netns", two.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", _INTERFACE)
            for interface in ("lo", _INTERFACE):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield one, two
    finally:
        for host in hosts:
            _remove(host)


def _sweep() -> None:
    """Removes the hosts of tests that were killed before they could."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        match = re.fullmatch(_NAME, name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove(Host(name, "", ""))


def _remove(host: Host) -> None:
    host.kill()
    # Of the second host nothing is there where already the first could not be made.
    subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHosts(f"two hosts need root: ip {' '.join(arguments)}: {done.stderr.strip()}")
