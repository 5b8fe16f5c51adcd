"""Which network interface the processes of a launch are to use."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, MutableMapping
from contextlib import closing
from pathlib import Path

from shardproof.ranks.launch import Launch
from shardproof.ranks.loopback import loopback

_VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "TP_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""What each library reads. For NCCL "eth1" is how a name begins, "=eth1" the whole name."""
_ELSEWHERE = "192.0.2.1"
"""An address of no machine (RFC 5737). The way there is the way to everywhere."""
_SIOCGIFADDR = 0x8915
"""From Linux's sockios.h: asks for the IPv4 address of an interface."""
_ADDRESS_AT = slice(20, 24)
"""Where the answer has it: after the name (16 bytes), the address family and the port (2 bytes each)."""
_IPV6_TABLE = Path("/proc/net/if_inet6")


def choose_interface(launch: Launch, environment: MutableMapping[str, str]) -> None:
    """Sets the variables that name the interface, those that the user has not set.

    By itself gloo takes the interface that the machine's own name resolves to: none where the name is unknown, and
    the loopback, where no other machine is, on those that call themselves 127.0.0.1.
    """
    if launch.local_world_size == launch.world_size:
        if (interface := loopback()) is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        return
    if "GLOO_SOCKET_IFNAME" in environment:
        return
    interface = interface_to(launch.host) or interface_to(_ELSEWHERE)
    if interface is not None:
        for name, form in _VARIABLES.items():
            environment.setdefault(name, form.format(interface))


def interface_to(host: str) -> str | None:
    """The interface whose address this machine uses to talk to `host`; None where there is no way, or the loopback."""
    for family, _, _, _, address in _addresses(host):
        try:
            with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
                probe.connect(address)  # sends nothing: it looks up the way
                ours = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
        except OSError:
            continue
        if ours.is_loopback:
            continue
        found = next((name for name, of_name in _interfaces() if of_name == ours), None)
        if found is not None:
            return found
    return None


def _addresses(host: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        return socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)  # type: ignore[return-value]  # IPv6 has 4 fields
    except OSError:
        return []


def _interfaces() -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """The interfaces of this machine with their addresses."""
    try:
        import fcntl  # noqa: PLC0415  (not there on Windows, where nothing else of this works either)
    except ImportError:
        return
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as any_socket:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            try:
                yield name, ipaddress.IPv4Address(fcntl.ioctl(any_socket, _SIOCGIFADDR, asked)[_ADDRESS_AT])
            except OSError:
                continue  # it has none
    if _IPV6_TABLE.exists():
        for line in _IPV6_TABLE.read_text().splitlines():
            address, *_, name = line.split()
            yield name, ipaddress.IPv6Address(bytes.fromhex(address))
