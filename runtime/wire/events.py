"""What the wire tells its owner, and the records both share. No sockets here: a pure state machine may import it.

Records of which every message makes one are structs, not dataclasses: those are built by an interpreted `__init__`.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import msgspec

from runtime.errors import HandshakeError
from runtime.wire.messages import ControlMessage, Hello, Result, Submit, Welcome

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Memory of one frame; a memoryview must be one-dimensional, of single bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps on what a peer may send, checked before memory is taken, and how long it may be silent."""

    message_bytes: int = 256 * 2**20
    """Bytes of one data message, and of one decoded tensor."""
    control_bytes: int = 2**20
    """Bytes of one control message, and of the header of a data message."""
    frames: int = 4096
    """Frames of one data message."""
    dims: int = 16
    """Dimensions of one tensor."""
    malformed: int = 100
    """Malformed messages after which a peer is given up."""
    backlog_bytes: int = 2**30
    """Bytes that may wait for one peer; with more it is given up, for it does not take what it asked for."""
    clients: int = 256
    """Clients that one node serves at a time."""
    ping_every_s: float = 0.5
    """Time between two pings, in either direction."""
    lost_after_s: float = 2.0
    """Silence after which a client gives up a node, and calls it anew."""
    left_after_s: float = 5.0
    """Silence after which a node gives up a client."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has gone to and come from one peer so far; the counters never fall."""

    sent_bytes: int
    received_bytes: int
    probe_bytes: int  # of those sent, the ones that only measured the link
    malformed_messages: int


class Sent(Enum):
    """What became of a message that was to leave at once."""

    AWAY = "away"
    FULL = "full"  # the pipe holds as much as it may, or there is no connection yet
    GONE = "gone"  # no such connection


class Fate(Enum):
    """What became of a connection."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    KEY_REFUSED = "key refused"  # the other side does not know our key
    SECURITY_DIFFERS = "security differs"  # keys on one side only
    CLOSED_EARLY = "closed early"  # before the handshake of ZeroMQ ended


class Peer:
    """The other end of a conversation; compared by identity.

    A node that was connected to stays the same peer across restarts and failures. A client that starts over is a new
    peer, after a `Left` for the old one.

    Attributes:
        name: how the peer calls itself (client) or is called here (node).
        address: where it was connected to; empty for a client.
        is_client: True if it connected to us.
        is_up: True from `Connected` to `Lost`, or from `Joined` to `Left`.
    """

    def __init__(self, name: str, address: str, *, is_client: bool) -> None:
        """Make a peer that is not up yet."""
        self.name = name
        self.address = address
        self.is_client = is_client
        self.is_up = False

    def __repr__(self) -> str:
        """Name, role and state, for logs."""
        kind = "client" if self.is_client else "node"
        return f"<{kind} {self.name} {'up' if self.is_up else 'down'}>"


# --- a node that we connected to ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    """A node has accepted us, and both its ports answer. Comes again after each `Lost`, once the node is back."""

    peer: Peer
    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Rejected:
    """A node does not accept us. Told once per reason; calling goes on, and `Connected` follows if it changes."""

    peer: Peer
    error: HandshakeError


@dataclass(frozen=True, slots=True)
class Lost:
    """A node is gone; what was queued for it is forgotten. Calling goes on by itself."""

    peer: Peer
    reason: str


# --- a client that connected to us ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """A client was welcomed."""

    peer: Peer
    hello: Hello


@dataclass(frozen=True, slots=True)
class Left:
    """A client is gone for good; what was queued for it is forgotten."""

    peer: Peer
    reason: str


# --- messages -------------------------------------------------------------------------------------------------------


class Received(msgspec.Struct, frozen=True):
    """A control message for the owner: everything but handshake, pings and acknowledgements."""

    peer: Peer
    message: ControlMessage


class ReceivedData(msgspec.Struct, frozen=True):
    """A data message has arrived whole, and was acknowledged."""

    peer: Peer
    body: Submit | Result
    frames: tuple[Buffer, ...]  # one per tensor header, writable, kept alive by whoever holds it
    nbytes: int


class Delivered(msgspec.Struct, frozen=True):
    """A data message that we sent has arrived whole at the peer."""

    peer: Peer
    tag: Hashable
    nbytes: int  # header and frames
    transfer_s: float  # from its start until it was there whole; half a round trip stands for one way
    waited_s: float  # in our queue, before the start


Event: TypeAlias = Connected | Rejected | Lost | Joined | Left | Received | ReceivedData | Delivered
