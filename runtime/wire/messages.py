"""Every message on the wire: one tagged msgspec struct each, never pickle.

Control messages travel as one frame. Data messages travel as a header frame (`Envelope`) and one raw frame per tensor,
zero copy. Times are ages or durations, for no two machines share a clock: only pongs and receipts tell their sender's, so that
two peers can learn how theirs differ.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from runtime.presets import NodeEmulation
from runtime.types import CODECS, GraphSpec, NodeProfile, NodeState, Plan, Tier

PROTOCOL_VERSION = 5
"""Raised whenever a message changes its meaning; peers of different versions refuse each other by name."""

CAPABILITIES = CODECS[1:]
"""What this version can do beyond the messages themselves, told in the handshake: the codecs it decodes."""


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """What is needed to rebuild one tensor from its frame."""

    name: str  # value name in the graph
    shape: tuple[int, ...]
    dtype: str
    dim_order: tuple[int, ...]  # dimensions from outermost to innermost in memory: strides survive the wire
    codec: str  # raw, lossless, fp16, int8
    frame_bytes: int
    scale: float = 1.0  # int8: value of one step
    zero: float = 0.0  # int8: value of code 0


class Hop(msgspec.Struct, frozen=True, array_like=True):
    """What one node spent on one request, and what its own uplink took."""

    node: str
    compute_s: float
    queue_s: float
    codec_s: float
    residence_s: float  # data in to result out, everything further up included
    state: NodeState  # the node's load when it answered
    upload_s: float = 0.0  # to the next node, measured by receipt
    next_node: str = ""
    predicted_s: float = 0.0  # idle seconds predicted for the same segment
    tiles_s: float = 0.0  # beyond its own computing: cutting, sending, awaiting and joining tiles of other nodes
    reason: str = ""  # why tiles did not run where the plan says; empty when they did


# --- control: handshake ---------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a client: who it is and which model it wants, empty for any."""

    version: int
    client: str
    model_id: str
    capabilities: tuple[str, ...]


class Offer(msgspec.Struct, frozen=True):
    """One model that a node runs."""

    model_id: str
    spec: str  # as its command line named it
    graph_id: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """A node accepts a client."""

    version: int
    node: str
    tier: Tier
    offers: tuple[Offer, ...]
    capabilities: tuple[str, ...]
    threads: int = 1  # torch threads: outputs are bit-equal only between processes with the same number


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A node does not accept a client: expected, got, what to do."""

    reason: str  # version, model, unknown (say Hello again)
    text: str


class Describe(msgspec.Struct, frozen=True, tag=True):
    """A client asks for a model's graph and the node's profile of it."""

    model_id: str


class Described(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Describe`."""

    model_id: str
    graph: GraphSpec
    profile: NodeProfile  # of the idle node; of the machine it pretends to be where it is emulated
    emulation: NodeEmulation | None = None


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The sender is leaving on purpose: nothing more will come."""


# --- control: liveness, measurement ---------------------------------------------------------------------------------


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """A data message has arrived whole: travels in an `Ack`, or rides on a data message."""

    sequence: int
    received_s: float  # in its sender's clock
    rtt_s: float  # how well its sender knows the other clock, NaN: not at all
    ahead_s: float  # what that clock shows more than its own


class Ack(msgspec.Struct, frozen=True, tag=True):
    """A receipt on control."""

    receipt: Receipt
    held_s: float = 0.0  # how long ago, for whoever cannot read the other clock


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a `Pong`: gives the round-trip time and shows that the peer lives."""

    number: int


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Answer to a `Ping`."""

    number: int
    clock_s: float  # of whoever answers: says nothing by itself, but dates its receipts for whoever pinged


class LinkReport(msgspec.Struct, frozen=True):
    """What a node measured of one of its outgoing links."""

    target: str
    samples: tuple[tuple[float, float], ...]  # (age_s, bandwidth_bps), newest first
    mean_bandwidth_bps: float
    rtt_s: float
    backlog_bytes: int


class Status(msgspec.Struct, frozen=True, tag=True):
    """A node's load and links, twice a second; `peers` forwards what it last heard of nodes behind it, aged.

    The first of `links` is the way back to whoever is told, whatever its target is called here; then those onward.
    """

    state: NodeState
    links: tuple[LinkReport, ...]
    peers: tuple["Status", ...] = ()


# --- control: requests ----------------------------------------------------------------------------------------------


class Failure(msgspec.Struct, frozen=True, tag=True):
    """A request ended without a result."""

    request: int
    kind: str  # busy, late, error, lost
    text: str
    node: str
    is_plan_fault: bool = False


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The client no longer wants a request."""

    request: int


ControlMessage = (
    Hello | Welcome | Refused | Describe | Described | Goodbye | Ping | Pong | Ack | Status | Failure | Cancel
)

# --- data -----------------------------------------------------------------------------------------------------------


class TileRef(msgspec.Struct, frozen=True, array_like=True):
    """One tile of a plan."""

    span: int  # index in `Plan.tiles`
    tile: int  # row-major in its grid
    run: int  # number of the `Submit` that began its chain: what the node keeps from span to span goes by it


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run your share of `plan` on these tensors, send the rest on, answer with a `Result`.

    With `tile` the share is that tile alone, the tensors are what it does not have yet, and the result is what others need
    of it. Between spans of a chain the node keeps the rest (`runtime.planning.chains`).
    """

    request: int
    model_id: str
    plan: Plan
    input_kind: str
    remaining_s: float  # time left when this was sent; inf: no deadline
    tensors: tuple[TensorHeader, ...]
    tile: TileRef | None = None


class Result(msgspec.Struct, frozen=True, tag=True):
    """The outputs of a request that were made on this node or behind it, or of a tile."""

    request: int
    hops: tuple[Hop, ...]  # this node first
    tensors: tuple[TensorHeader, ...]


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Bytes sent to measure a link; its one frame is thrown away."""


DataMessage = Submit | Result | Probe


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Header frame of a data message. `sequence` is what the receiver acknowledges."""

    sequence: int
    body: DataMessage
    takes_receipt: bool = False  # an acknowledgement may ride: nothing waits behind it, and the last one could be read
    receipt: Receipt | None = None


encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
"""Encodes a control message or an `Envelope` as msgpack."""

CONTROL_DECODER: msgspec.msgpack.Decoder[ControlMessage] = msgspec.msgpack.Decoder(ControlMessage)
ENVELOPE_DECODER: msgspec.msgpack.Decoder[Envelope] = msgspec.msgpack.Decoder(Envelope)
