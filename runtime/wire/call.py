"""The conversation with a node that we connect to. Never gives up: from any failure it goes back to saying Hello.

calling --Welcome--> welcomed --data port answers--> up
^                     |                           |
+---------------------+--- silence, disconnect, --+
Refused(unknown), Goodbye
"""

import logging
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import msgspec

from runtime.errors import HandshakeError, ProtocolError
from runtime.wire.events import Connected, Event, Fate, Limits, Lost, Rejected
from runtime.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    ControlMessage,
    Described,
    Envelope,
    Failure,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Probe,
    Refused,
    Result,
    Status,
    Welcome,
    encode,
)
from runtime.wire.session import INTRODUCTION, Session, decode, only_frame

_log = logging.getLogger(__name__)

REFUSED_VERSION = "version"
REFUSED_UNKNOWN = "unknown"
REFUSED_FULL = "full"
REFUSED_NAME = "name"

_FIRST_HELLO_AFTER_S = 0.1
_LAST_HELLO_AFTER_S = 1.0
_REDIAL_AFTER_S = 3.0
"""A call that makes no progress for so long gets new sockets: a connection over a path that was cut may hang."""
_CLOSED_EARLY = 10  # in a row, of either connection: half a second of attempts, in which other causes show themselves

_FROM_NODE: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Welcome | Refused | Described | Goodbye | Ping | Pong | Ack | Status | Failure
)


class Call(Session):
    """A node that we connect to."""

    incoming = (Result,)

    def __init__(
        self,
        name: str,
        address: str,
        hello: Hello,
        *,
        has_keys: bool,
        limits: Limits,
        emit: Callable[[Event], None],
        now_s: float,
    ) -> None:
        """Start calling.

        Args:
            name: name of the node.
            address: its control address.
            hello: what to say.
            has_keys: whether the connection uses CURVE.
            limits: caps and times.
            emit: takes an event for the owner.
            now_s: this instant.
        """
        super().__init__(name, address, is_client=False, limits=limits, emit=emit, now_s=now_s)
        self._hello = hello
        self._has_keys = has_keys
        self._welcome: Welcome | None = None
        self._is_control_connected = False
        self._is_data_connected = False
        self._data_due_s = math.inf  # by then the data port must have answered
        self._hello_s = math.inf
        self._hello_after_s = _FIRST_HELLO_AFTER_S
        self._redial_s = now_s + _REDIAL_AFTER_S
        self._rejection = ""
        self._num_strikes = 0
        self._num_closed_early = 0
        self._was_reached = False
        self._is_turned_away = False

    @abstractmethod
    def redial(self) -> None:
        """Close both sockets and open new ones; whatever the old ones held is gone."""

    @abstractmethod
    def reopen_data(self) -> None:
        """Close the data socket, with what is in flight, and open a new one."""

    @property
    def is_welcomed(self) -> bool:
        """Tell whether the node takes us for a client of its own."""
        return self._welcome is not None

    # --- what the sockets report

    def learn(self, fate: Fate, now_s: float, *, is_control: bool) -> None:
        """Take in what became of the control or the data connection."""
        match fate:
            case Fate.CONNECTED:
                self._connected(now_s, is_control=is_control)
            case Fate.DISCONNECTED:
                self._disconnected(now_s, is_control=is_control)
            case Fate.KEY_REFUSED:
                self._turned_away(
                    "it does not know our key; copy our *.key file into the folder of keys it reads", now_s
                )
            case Fate.SECURITY_DIFFERS:
                here, there = ("keys", "none") if self._has_keys else ("no keys", "CURVE keys")
                self._turned_away(
                    f"expected the same security on both sides, got {here} here and {there} there; give this side a key "
                    "pair and the node's public key, or start the node without keys",
                    now_s,
                )
            case Fate.CLOSED_EARLY:
                self._closed_early(now_s)

    def _connected(self, now_s: float, *, is_control: bool) -> None:
        self._num_closed_early = 0
        self._was_reached = True
        if is_control:
            self._is_control_connected = True
            self._hello_s = now_s  # at once
            self._hello_after_s = _FIRST_HELLO_AFTER_S
            self._redial_s = now_s + _REDIAL_AFTER_S
            self.tick(now_s)
        else:
            self._is_data_connected = True
            self._come_up(now_s)

    def _disconnected(self, now_s: float, *, is_control: bool) -> None:
        if is_control:
            self._is_control_connected = False
        else:
            self._is_data_connected = False
        if self._welcome is not None:  # both connections serve one conversation: it starts over
            self.end("the connection was closed: the node stopped, or the way to it was cut", now_s)

    def _turned_away(self, text: str, now_s: float) -> None:
        """Say why, and come back later with new sockets: ZeroMQ does not try again on a connection refused so."""
        if self.is_up:
            self.end(text, now_s)
        self.reject(text, now_s)
        self._welcome = None
        self._is_turned_away = True
        self._redial_s = now_s + _LAST_HELLO_AFTER_S

    def _closed_early(self, now_s: float) -> None:
        """A node that cannot read our key exchange closes it; a relay closes what its node, being down, cannot take.

        In the clear it is the relay. With keys the first is suspected, until the node was reached once.
        """
        self._num_closed_early += 1
        if self._has_keys and not self._was_reached and self._num_closed_early == _CLOSED_EARLY:
            self.reject(
                "it closes the connection during the key exchange: the public key we have is not the node's own (compare "
                "it with the node's *.key file), or the node has no keys, or a relay in front of it finds it down",
                now_s,
            )

    def reject(self, text: str, now_s: float) -> None:
        """Tell the owner, once per reason, why the node does not accept us; calling goes on, slowly."""
        self._hello_after_s = _LAST_HELLO_AFTER_S
        self._hello_s = now_s + self._hello_after_s
        if text != self._rejection:
            self._rejection = text
            self.emit(Rejected(self, HandshakeError(f"node {self.name!r} at {self.address}: {text}")))

    # --- in

    def hear(self, parts: Sequence[memoryview], nbytes: int, now_s: float) -> None:
        """Take what came on the control socket."""
        self.count_received(nbytes)
        try:
            message = decode(_FROM_NODE, only_frame(parts))
            if type(message) is Ack and self._welcome is not None:
                self.take_ack(message, now_s)  # by far the most frequent
            else:
                self.take(message, now_s)
        except ProtocolError as error:
            self.strike(error, now_s)

    def hear_data(self, parts: Sequence[memoryview], nbytes: int, now_s: float, *, is_spoilt: bool) -> None:
        """Take what came on the data socket; `is_spoilt` says that it broke a cap and was not kept."""
        self.count_received(nbytes)
        if self._welcome is None:
            return
        try:
            if is_spoilt:
                raise ProtocolError("a data message breaks a cap")
            self.take_data(parts, nbytes, now_s)
        except ProtocolError as error:
            self.strike(error, now_s)

    def strike(self, error: ProtocolError, now_s: float) -> None:
        """Count a malformed message; too many of them end the conversation."""
        self.count_malformed(error)
        self._num_strikes += 1
        if self._num_strikes >= self.limits.malformed:
            self.end(f"it sent {self._num_strikes} malformed messages, the last one: {error}", now_s)

    def take(self, message: ControlMessage, now_s: float) -> None:
        """Handle a control message from the node."""
        match message:
            case Welcome():
                self._take_welcome(message, now_s)
            case Refused(reason=reason) if reason == REFUSED_UNKNOWN:
                if self._welcome is not None:
                    self.end("the node does not know us any more: it was restarted, or gave us up", now_s)
            case Refused(text=text) if self._welcome is None:
                self.reject(text, now_s)
            case Goodbye():
                self.end("the node said goodbye", now_s)
            case _ if self._welcome is not None:
                super().take(message, now_s)

    def _take_welcome(self, welcome: Welcome, now_s: float) -> None:
        if self._welcome is not None or self._is_turned_away:
            return  # answer to a Hello that was repeated; or the other connection was refused
        if welcome.version != PROTOCOL_VERSION:
            self.say(Goodbye())
            self.reject(version_text(PROTOCOL_VERSION, welcome.version), now_s)
            return
        self._welcome = welcome
        self._heard_s = self._ping_s = now_s
        self._data_due_s = now_s + self.limits.lost_after_s
        self.tick(now_s)

    def _come_up(self, now_s: float) -> None:
        """Open the data path once both halves stand, and report the node the first time."""
        if self._welcome is None or not self._is_data_connected or self.is_data_open:
            return
        # A node can only send on a data connection that has spoken.
        if not self.transmit([encode(Envelope(sequence=INTRODUCTION, body=Probe()))]):
            return
        self.is_data_open = True
        if not self.is_up:
            self.is_up = True
            self._rejection = ""
            self.emit(Connected(self, self._welcome))
        self.pump(now_s)

    # --- out

    def withdraw(self, tag: Hashable, now_s: float) -> None:
        """Forget the messages with a tag; one in flight is cut off with its connection."""
        if self.uplink.drop(tag):
            self.uplink.postpone()  # it is withdrawn: this drops it
            self.is_data_open = self._is_data_connected = False
            self._data_due_s = now_s + self.limits.lost_after_s
            self.reopen_data()
        self.pump(now_s)

    # --- passing time

    def tick(self, now_s: float) -> None:
        """Do what is due: Hello, ping, probe, or giving up a silent node."""
        if self._welcome is None:
            self._tick_calling(now_s)
        elif now_s - self._heard_s >= self.limits.lost_after_s:
            self.end(f"no word for {now_s - self._heard_s:.1f} s", now_s)
        elif not self._is_data_connected and now_s >= self._data_due_s:
            self._miss_data_port(now_s)
        else:
            self._ping_if_due(now_s)
            self._come_up(now_s)
            self._probe_if_due(now_s)
            self.pump(now_s)

    def next_due_s(self) -> float:
        """Instant at which `tick` has something to do, if nothing happens before."""
        if self._welcome is None:
            return min(self._redial_s, self._hello_s if self._is_control_connected else math.inf)
        return min(self._ping_s, self._heard_s + self.limits.lost_after_s)

    def _tick_calling(self, now_s: float) -> None:
        if now_s >= self._redial_s:
            self._start_over(now_s)
        elif self._is_control_connected and now_s >= self._hello_s:
            self.say(self._hello)
            # Jitter: a hundred clients of a restarted node must not call in step.
            self._hello_s = now_s + self._hello_after_s * random.uniform(0.5, 1.0)
            self._hello_after_s = min(2 * self._hello_after_s, _LAST_HELLO_AFTER_S)

    def _miss_data_port(self, now_s: float) -> None:
        if not self.is_up:
            self.reject(
                "its control port answers but its data port, the next one, does not; let both through the firewall",
                now_s,
            )
        self.end("its data port does not answer", now_s)

    def end(self, reason: str, now_s: float) -> None:
        """Give the node up, and call it anew."""
        _log.debug("%r: %s", self, reason)
        was_up = self.is_up
        self._start_over(now_s)
        if was_up:
            self.emit(Lost(self, reason))

    def _start_over(self, now_s: float) -> None:
        self._forget()
        self._welcome = None
        self._is_control_connected = self._is_data_connected = False
        self._hello_s = math.inf
        self._redial_s = now_s + _REDIAL_AFTER_S
        self._num_strikes = 0
        self._is_turned_away = False
        self.redial()


def version_text(expected: int, got: int) -> str:
    """Say that two protocol versions differ, and what to do."""
    return f"expected protocol version {expected}, got {got}; install the same version of offcut on both machines"
