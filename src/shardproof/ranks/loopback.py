"""The network interface on which the ranks of one machine talk."""

from __future__ import annotations

import socket


def loopback() -> str | None:
    """For GLOO_SOCKET_IFNAME. Without it gloo looks up the machine's own name, which need not resolve to anything."""
    return next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), None)
