"""The conversation with one peer, whichever side called: liveness, acknowledgements, queue, measurement.

`call.Call` is the conversation with a node that we connect to, `door.Guest` the one with a client that connected to us.
No sockets and no clock: a conversation hears of messages and of passing time from `channel.py`, tells its owner by events,
and sends through `say` and `transmit`.
"""

import functools
import logging
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import msgspec

from runtime.errors import ProtocolError
from runtime.types import LinkState
from runtime.wire.events import Buffer, Delivered, Event, Limits, Peer, Received, ReceivedData, Traffic
from runtime.wire.link import MAX_PROBE_BYTES, LinkMeter, Outgoing, Uplink, due_probe_bytes
from runtime.wire.messages import (
    ENVELOPE_DECODER,
    Ack,
    ControlMessage,
    Envelope,
    Ping,
    Pong,
    Probe,
    Receipt,
    Result,
    Submit,
    encode,
)

_log = logging.getLogger(__name__)

INTRODUCTION = 0
"""Sequence of the message that only makes a new data connection known; it is not acknowledged."""

_PINGS_KEPT = 8

Message = TypeVar("Message")


class Payload(msgspec.Struct, frozen=True):
    """What a queued data message consists of."""

    body: Submit | Result | Probe
    frames: tuple[Buffer, ...]
    frame_bytes: int


@functools.cache
def _probe_bytes() -> memoryview:
    return memoryview(os.urandom(MAX_PROBE_BYTES))  # random: no compressing path may make a link look fast


def decode(decoder: "msgspec.msgpack.Decoder[Message]", data: Buffer) -> Message:
    """Decode one message.

    Raises:
        ProtocolError: if it is malformed, or of a kind that the decoder does not take.
    """
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's DecodeError is a ValueError; so is bad UTF-8
        raise ProtocolError(f"malformed message of {len(data)} bytes: {error}") from error


def only_frame(parts: Sequence[memoryview]) -> memoryview:
    """Take the one frame of a control message.

    Raises:
        ProtocolError: if there are more, or none.
    """
    if len(parts) != 1:
        raise ProtocolError(f"expected one frame on control, got {len(parts)}")
    return parts[0]


class Session(Peer, ABC):
    """What is kept of one peer."""

    incoming: tuple[type[Submit | Result], ...] = ()
    """Data messages that may come from this side, besides probes."""

    def __init__(
        self, name: str, address: str, *, is_client: bool, limits: Limits, emit: Callable[[Event], None], now_s: float
    ) -> None:
        """Start a conversation.

        Args:
            name: name of the peer.
            address: where it was connected to; empty for a client.
            is_client: True if it connected to us.
            limits: caps and times.
            emit: takes an event for the owner.
            now_s: this instant.
        """
        super().__init__(name, address, is_client=is_client)
        self.limits = limits
        self.emit = emit
        self.meter = LinkMeter()
        self.uplink: Uplink[Payload] = Uplink()
        self.is_data_open = False
        self._sent_bytes = self._received_bytes = self._probe_bytes = self._num_malformed = 0
        self._heard_s = now_s
        self._ping_s = now_s
        self._num_pings = 0
        self._pings_s: OrderedDict[int, float] = OrderedDict()
        self._last_received = 0
        self._receipt: Receipt | None = None  # of the newest data message, while its acknowledgement may still ride

    @abstractmethod
    def say(self, message: ControlMessage) -> bool:
        """Send a control message at once; False if it could not leave and was dropped."""

    @abstractmethod
    def transmit(self, parts: Sequence[Buffer]) -> bool:
        """Send a data message at once; False if it could not leave."""

    @abstractmethod
    def withdraw(self, tag: Hashable, now_s: float) -> None:
        """Forget the data messages with a tag, whether they wait or are in flight."""

    @abstractmethod
    def end(self, reason: str, now_s: float) -> None:
        """Give the peer up."""

    @abstractmethod
    def tick(self, now_s: float) -> None:
        """Do what is due."""

    @abstractmethod
    def next_due_s(self) -> float:
        """Instant at which `tick` has something to do, if nothing happens before."""

    @property
    def traffic(self) -> Traffic:
        """The counters so far."""
        return Traffic(self._sent_bytes, self._received_bytes, self._probe_bytes, self._num_malformed)

    def link_state(self, source: str, now_s: float) -> LinkState:
        """What was measured of the link to this peer."""
        return self.meter.state(source, self.name, now_s, self.uplink.backlog_bytes, self.uplink.in_flight)

    # --- in

    def take(self, message: ControlMessage, now_s: float) -> None:
        """Handle a control message that either side may send; what is not the wire's own goes to the owner."""
        self._heard_s = now_s
        match message:
            case Ping():
                self.say(Pong(message.number, now_s))
            case Pong():
                sent_s = self._pings_s.pop(message.number, math.nan)
                if not math.isnan(sent_s):
                    self.meter.add_ping(sent_s, now_s, message.clock_s)
            case _:
                self.emit(Received(self, message))

    def take_data(self, parts: Sequence[memoryview], nbytes: int, now_s: float) -> None:
        """Handle a data message: acknowledge it, and hand it to the owner unless it came before.

        What the owner sends back may carry the acknowledgement, until `settle`.

        Raises:
            ProtocolError: if it is malformed, or not a message that this peer may send.
        """
        self._heard_s = now_s
        if not parts or len(parts[0]) > self.limits.control_bytes:
            raise ProtocolError(f"expected a header of at most {self.limits.control_bytes} bytes first")
        envelope = decode(ENVELOPE_DECODER, parts[0])
        if envelope.sequence <= INTRODUCTION:
            return
        if envelope.receipt is not None:
            self._take_receipt(envelope.receipt, now_s)
        body: Any = envelope.body
        frames = tuple(parts[1:])
        is_new = envelope.sequence > self._last_received  # if not, our word was on its way when it was sent again
        is_expected = isinstance(body, self.incoming) and len(frames) == len(body.tensors)
        receipt = Receipt(envelope.sequence, now_s, self.meter.rtt_s, self.meter.ahead_s)
        if is_new and is_expected and envelope.takes_receipt:
            self.settle(now_s)
            self._receipt = receipt
        else:
            # Whatever is wrong with it, it has arrived: without a word the sender's queue would stand still.
            self.say(Ack(receipt))
        if not is_new:
            return
        self._last_received = envelope.sequence
        if type(body) is Probe or not self.is_up:  # not up: the acknowledgement found the peer gone
            return
        if not is_expected:
            raise ProtocolError(
                f"expected one of {[kind.__name__ for kind in self.incoming]} with a frame per tensor, got a "
                f"{type(body).__name__} with {len(frames)} frames"
            )
        self.emit(ReceivedData(self, body, frames, nbytes))

    def settle(self, now_s: float) -> None:
        """Acknowledge what was handed over, if no data went back that carried it; to be called once the owner had its turn."""
        receipt = self._receipt
        if receipt is not None:
            self._receipt = None
            self.say(Ack(receipt, now_s - receipt.received_s))

    def count_received(self, nbytes: int) -> None:
        """Count bytes that came."""
        self._received_bytes += nbytes

    def count_malformed(self, error: ProtocolError) -> None:
        """Count and log a message that was dropped."""
        self._num_malformed += 1
        _log.debug("%r: %s", self, error)

    def take_ack(self, ack: Ack, now_s: float) -> None:
        """Complete the message in flight, and start the next one."""
        self._heard_s = now_s
        item = self.uplink.ack(ack.receipt.sequence)
        if item is None:
            return
        transfer_s = self.meter.add_receipt(item.nbytes, item.started_s, ack.receipt, now_s)
        if transfer_s is None and not item.is_repeated:
            held_s = ack.held_s if 0.0 <= ack.held_s <= now_s - item.started_s else 0.0
            transfer_s = self.meter.add_transfer(item.nbytes, item.started_s, now_s - held_s)
        self._complete(item, transfer_s, now_s)

    def _take_receipt(self, receipt: Receipt, now_s: float) -> None:
        item = self.uplink.ack(receipt.sequence)
        if item is not None:
            transfer_s = self.meter.add_receipt(item.nbytes, item.started_s, receipt, now_s)
            self._complete(item, transfer_s, now_s)

    def _complete(self, item: Outgoing[Payload], transfer_s: float | None, now_s: float) -> None:
        if transfer_s is None:  # nothing tells it: all that has passed
            transfer_s = max(now_s - item.started_s, 0.0)
        if not item.is_withdrawn and type(item.payload.body) is not Probe:
            self.emit(Delivered(self, item.tag, item.nbytes, transfer_s, item.waited_s))
        if self.uplink.waiting:
            self.pump(now_s)

    # --- out

    def push(
        self, body: Submit | Result | Probe, frames: Sequence[Buffer], nbytes: int, tag: Hashable, now_s: float
    ) -> None:
        """Queue a data message, of `nbytes` in its frames."""
        self.uplink.push(tag, nbytes, Payload(body, tuple(frames), nbytes), now_s)
        self.pump(now_s)
        if self.uplink.backlog_bytes > self.limits.backlog_bytes:
            self.end(f"it leaves more than {self.limits.backlog_bytes} bytes waiting", now_s)

    def pump(self, now_s: float) -> None:
        """Start the first queued message, if the data socket is open and none is in flight."""
        if not self.is_data_open:
            return
        item = self.uplink.start(now_s)
        if item is not None and not self._launch(item):
            self.uplink.postpone()

    def _launch(self, item: Outgoing[Payload]) -> bool:
        payload = item.payload
        body = payload.body
        if type(body) is Submit and item.started_s != item.pushed_s:
            # The deadline went on while the request stood in our queue.
            body = msgspec.structs.replace(body, remaining_s=body.remaining_s - item.waited_s)
        takes_receipt = self.meter.reads_receipts and type(body) is not Probe and not self.uplink.waiting
        header = encode(Envelope(item.sequence, body, takes_receipt, self._receipt))
        item.nbytes = len(header) + payload.frame_bytes
        if not self.transmit([header, *payload.frames]):
            return False
        self._receipt = None
        self._sent_bytes += item.nbytes
        if type(body) is Probe:
            self._probe_bytes += item.nbytes
        return True

    def count_sent(self, nbytes: int) -> None:
        """Count bytes of control messages that left."""
        self._sent_bytes += nbytes

    # --- passing time

    def _ping_if_due(self, now_s: float) -> None:
        if now_s < self._ping_s:
            return
        self._ping_s = now_s + self.limits.ping_every_s
        self._num_pings += 1
        if self.say(Ping(self._num_pings)):
            self._pings_s[self._num_pings] = now_s
            if len(self._pings_s) > _PINGS_KEPT:
                self._pings_s.popitem(last=False)

    def _probe_if_due(self, now_s: float) -> None:
        probe_bytes = min(due_probe_bytes(self.meter, self.uplink.is_idle, now_s), self.limits.message_bytes)
        if self.is_data_open and probe_bytes:
            self.push(Probe(), (_probe_bytes()[:probe_bytes],), probe_bytes, None, now_s)

    def _forget(self) -> None:
        """Drop all that belongs to a connection that is gone."""
        self.is_up = False
        self.is_data_open = False
        self.uplink.clear()
        self.meter.forget_rtt()
        self._pings_s.clear()
        self._last_received = 0
        self._receipt = None


def encode_control(message: ControlMessage, limits: Limits) -> bytes:
    """Encode a control message.

    Raises:
        ProtocolError: if the peer would refuse it for its size.
    """
    data = encode(message)
    if len(data) > limits.control_bytes:
        raise ProtocolError(
            f"expected a control message of at most {limits.control_bytes} bytes, got a {type(message).__name__} of "
            f"{len(data)}; raise Limits.control_bytes on both sides"
        )
    return data


def check_outgoing(frames: Sequence[Buffer], limits: Limits) -> int:
    """Check a data message before any of it is sent: against the caps that the peer will apply, and for its form.

    Returns:
        Bytes of all frames.

    Raises:
        ProtocolError: if the peer would refuse it.
        TypeError: if a frame is no flat run of bytes; half a message cannot be taken back.
    """
    nbytes = 0
    for frame in frames:
        view = memoryview(frame)
        if view.ndim != 1 or view.itemsize != 1 or not view.contiguous:
            raise TypeError(
                f"expected a frame of single bytes in one run, got {view.ndim} dimensions of {view.format!r}"
            )
        nbytes += view.nbytes
    if len(frames) > limits.frames or nbytes > limits.message_bytes:
        raise ProtocolError(
            f"expected at most {limits.frames} frames of {limits.message_bytes} bytes together, got {len(frames)} of "
            f"{nbytes}; send less at once, or raise Limits on both sides"
        )
    return nbytes
