"""Which addresses may be used in the clear, and the names of client sockets."""

import secrets
import struct
from typing import NamedTuple

from runtime.address import Endpoint
from runtime.errors import ConfigError

_ROUTING_ID = struct.Struct(">16scI")


def check_exposure(endpoint: Endpoint, *, has_keys: bool, is_insecure: bool) -> None:
    """Refuse to talk in the clear beyond this machine.

    Raises:
        ConfigError: if the address is not loopback, there are no keys, and `is_insecure` does not allow it.
    """
    if not (endpoint.is_loopback or has_keys or is_insecure):
        raise ConfigError(
            f"expected a loopback address (127.0.0.0/8, ::1, localhost) or CURVE keys, got {endpoint.control} without "
            "keys; make keys with `offcut keys` and pass them, or allow plain traffic with --insecure (insecure=True)"
        )


class RoutingId(NamedTuple):
    """Which socket of which client a message came from, as ZeroMQ carries it.

        token (16 bytes)   "c" or "d"   generation (4 bytes, big endian)

    The token is random and names the client; a socket that replaces another one has a higher generation.
    """

    token: bytes
    is_control: bool
    generation: int

    def to_bytes(self) -> bytes:
        """Give the id as it travels."""
        return _ROUTING_ID.pack(self.token, b"c" if self.is_control else b"d", self.generation)

    @classmethod
    def from_bytes(cls, data: bytes) -> "RoutingId | None":
        """Read an id; None if it is not one of ours."""
        if len(data) != _ROUTING_ID.size:
            return None
        token, kind, generation = _ROUTING_ID.unpack(data)
        return cls(token, kind == b"c", generation) if kind in (b"c", b"d") else None


def make_token() -> bytes:
    """Draw a token. Never starts with a zero byte: such routing ids are ZeroMQ's own."""
    return secrets.token_bytes(1).replace(b"\0", b"o") + secrets.token_bytes(15)
