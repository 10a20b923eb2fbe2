"""Addresses that a node can come back to: not among the ports that the system lends to outgoing connections."""

import contextlib
import random
import socket
from pathlib import Path

from runtime.errors import ClusterError

LOWEST = 15000
ATTEMPTS = 200
_BORROWED = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_START = 32768
"""Where Linux starts to lend ports, unless told otherwise."""


_PICKED: set[int] = set()
"""A node takes its ports some time after they were picked: until then nothing but this keeps others off them."""


def pick_address() -> str:
    """A loopback address whose port and the next one are free now, and which was not picked before in this process.

    A port that the system chose would be lent to somebody's outgoing connection while its node is dead, and the node
    could not come back.

    Raises:
        ClusterError: when none was found.
    """
    for _ in range(ATTEMPTS):
        port = random.randrange(LOWEST, _first_borrowed() - 1, 2)
        if port not in _PICKED and _is_free(port) and _is_free(port + 1):
            _PICKED.add(port)
            return f"tcp://127.0.0.1:{port}"
    raise ClusterError(f"no two free ports from {LOWEST} on in {ATTEMPTS} attempts; end some programs")


def _first_borrowed() -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(int(_BORROWED.read_text().split()[0]), LOWEST + 1000)
    return _USUAL_START


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
