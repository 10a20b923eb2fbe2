"""The bound side: who may come in, and the clients that have. No sockets and no clock.

A client is known by the token in its routing ids. A stranger, whose token has not said Hello, is answered
`Refused(unknown)` on control and not read on data. A token that sends too many malformed messages is not read at all.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from runtime.errors import ProtocolError
from runtime.wire.call import REFUSED_FULL, REFUSED_NAME, REFUSED_UNKNOWN, REFUSED_VERSION, version_text
from runtime.wire.endpoint import RoutingId
from runtime.wire.events import Buffer, Event, Joined, Left, Limits, Sent
from runtime.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    ControlMessage,
    Describe,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Refused,
    Submit,
    Welcome,
    encode,
)
from runtime.wire.session import Session, decode, encode_control, only_frame

_log = logging.getLogger(__name__)

_FROM_CLIENT: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Hello | Describe | Goodbye | Ping | Pong | Ack | Cancel
)


_MAX_NAME = 100
_FORGIVEN_AFTER_S = 60.0  # without a strike; guess: a peer that is broken breaks more often


class _AnyHello(msgspec.Struct, tag="Hello"):
    """What a Hello of any version has: enough to name the difference to a client that speaks another one."""

    version: int


_ANY_HELLO = msgspec.msgpack.Decoder(_AnyHello)


@dataclass(frozen=True, slots=True)
class Routers:
    """How messages get out to clients: each takes a routing id first."""

    send_control: Callable[[bytes, Sequence[Buffer]], Sent]
    send_data: Callable[[bytes, Sequence[Buffer]], Sent]


class Guest(Session):
    """A client that connected to us and was welcomed: up until its Goodbye, silence or disconnect, then gone for good."""

    incoming = (Submit,)

    def __init__(
        self,
        control_id: RoutingId,
        hello: Hello,
        welcome: Welcome,
        routers: Routers,
        *,
        limits: Limits,
        emit: Callable[[Event], None],
        now_s: float,
    ) -> None:
        """Take in a client; `join` reports and answers it.

        Args:
            control_id: routing id of its control socket.
            hello: what the client said.
            welcome: what it is answered.
            routers: the way to it.
            limits: caps and times.
            emit: takes an event for the owner.
            now_s: this instant.
        """
        super().__init__(hello.client, "", is_client=True, limits=limits, emit=emit, now_s=now_s)
        self.control_id = control_id
        self.data_id: RoutingId | None = None
        self._control_address = control_id.to_bytes()
        self._data_address = b""
        self._hello = hello
        self._welcome = welcome
        self._routers = routers

    def join(self) -> None:
        """Report the client and answer it."""
        self.is_up = True
        self.emit(Joined(self, self._hello))
        self.say(self._welcome)

    def end(self, reason: str, now_s: float = 0.0) -> None:
        """Give the client up, for good."""
        if self.is_up:
            self._forget()
            self.emit(Left(self, reason))

    def dismiss(self) -> None:
        """Say goodbye and forget the client, without an event."""
        self._forget()
        self.say(Goodbye())

    def say(self, message: ControlMessage) -> bool:
        """Send a control message at once; False if it could not leave and was dropped."""
        data = encode_control(message, self.limits)
        sent = self._routers.send_control(self._control_address, [data])
        if sent is Sent.AWAY:
            self.count_sent(len(data))
        elif sent is Sent.GONE:
            self.end("the connection was closed")
        return sent is Sent.AWAY

    def transmit(self, parts: Sequence[Buffer]) -> bool:
        """Send a data message at once; False if it could not leave."""
        sent = self._routers.send_data(self._data_address, parts)
        if sent is Sent.GONE:
            self.is_data_open = False  # until its next data connection speaks
        return sent is Sent.AWAY

    def take(self, message: ControlMessage, now_s: float) -> None:
        """Handle a control message from the client."""
        match message:
            case Hello():
                self.say(self._welcome)  # repeated before our answer arrived
            case Goodbye():
                self.end("it said goodbye")
            case _:
                super().take(message, now_s)

    def move(self, data_id: RoutingId, now_s: float) -> None:
        """Take a new data connection of the client for its own.

        What was in flight on the connection before goes out again; the client drops what it already has.
        """
        self.data_id = data_id
        self._data_address = data_id.to_bytes()
        self.is_data_open = True
        self.uplink.postpone()
        self.pump(now_s)

    def withdraw(self, tag: Hashable, now_s: float) -> None:
        """Forget the messages with a tag. One in flight goes on, unheeded: all clients share the data port."""
        self.uplink.drop(tag)
        self.pump(now_s)

    def tick(self, now_s: float) -> None:
        """Do what is due: ping, probe, or giving up a silent client."""
        if now_s - self._heard_s >= self.limits.left_after_s:
            self.end(f"no word for {now_s - self._heard_s:.1f} s")
            return
        self._ping_if_due(now_s)
        self._probe_if_due(now_s)
        self.pump(now_s)

    def next_due_s(self) -> float:
        """Instant at which `tick` has something to do, if nothing happens before."""
        return min(self._ping_s, self._heard_s + self.limits.left_after_s)


class Door:
    """Lets clients in and finds the conversation that a message belongs to."""

    def __init__(
        self,
        welcome: Callable[[Hello], Welcome | Refused],
        routers: Routers,
        *,
        limits: Limits,
        emit: Callable[[Event], None],
    ) -> None:
        """Open the door.

        Args:
            welcome: the owner's answer to a Hello of our version.
            routers: the way to clients.
            limits: caps and times.
            emit: takes an event for the owner.
        """
        self._ask_owner = welcome
        self._routers = routers
        self._limits = limits
        self._emit = emit
        self._by_token: dict[bytes, Guest] = {}
        self._by_address: dict[bytes, Guest] = {}  # routing ids of the sockets in use, control and data
        self._strikes = Strikes(limits.malformed)
        self.num_malformed = 0
        self.num_strange = 0

    def __iter__(self) -> Iterator[Guest]:
        """All clients that are in."""
        return iter([guest for guest in self._by_token.values() if guest.is_up])

    def tick(self, now_s: float) -> None:
        """Let every client do what is due, and forget those that left."""
        for guest in self:
            guest.tick(now_s)
        for guests in (self._by_token, self._by_address):
            for key in [key for key, guest in guests.items() if not guest.is_up]:
                del guests[key]

    # --- control

    def hear(self, sender: bytes, parts: Sequence[memoryview], nbytes: int, now_s: float) -> None:
        """Take what came on the control port.

        Args:
            sender: routing id.
            parts: the other frames.
            nbytes: bytes of all of them.
            now_s: this instant.
        """
        guest = self._by_address.get(sender)
        if guest is None or not guest.is_up:
            self._hear_stranger(sender, parts, now_s)
            return
        guest.count_received(nbytes)
        try:
            message = self._read(sender, parts)
            if type(message) is Ack:
                guest.take_ack(message, now_s)  # by far the most frequent
            else:
                guest.take(message, now_s)
        except ProtocolError as error:
            self._strike(guest.control_id.token, error, now_s)

    def _hear_stranger(self, sender: bytes, parts: Sequence[memoryview], now_s: float) -> None:
        control_id = RoutingId.from_bytes(sender)
        token = sender if control_id is None else control_id.token
        if self._strikes.is_out(token, now_s):
            return
        try:
            if control_id is None or not control_id.is_control:
                raise ProtocolError("not a routing id of a control socket")
            message = self._read(sender, parts)
        except ProtocolError as error:
            self._strike(token, error, now_s)
            return
        before = self._find(token)
        if before is not None and before.control_id.generation >= control_id.generation:
            return  # of a socket that the client has replaced
        if isinstance(message, Hello):
            self._take_hello(control_id, sender, message, now_s)
        elif not isinstance(message, Goodbye):
            self._refuse(sender, REFUSED_UNKNOWN, "this node does not know you; say Hello")

    def _read(self, sender: bytes, parts: Sequence[memoryview]) -> ControlMessage:
        data = only_frame(parts)
        try:
            message: ControlMessage = decode(_FROM_CLIENT, data)
        except ProtocolError:
            self._refuse_other_version(sender, data)
            raise
        return message

    def _take_hello(self, control_id: RoutingId, sender: bytes, hello: Hello, now_s: float) -> None:
        if hello.version != PROTOCOL_VERSION:
            self._refuse(sender, REFUSED_VERSION, version_text(PROTOCOL_VERSION, hello.version))
            return
        if not 0 < len(hello.client) <= _MAX_NAME:  # it is repeated in every status
            text = f"expected a client name of 1 to {_MAX_NAME} characters, got {len(hello.client)}"
            self._refuse(sender, REFUSED_NAME, text)
            return
        before = self._find(control_id.token)
        if before is not None:
            before.end("it started over")
        if sum(1 for _ in self) >= self._limits.clients:
            text = f"expected at most {self._limits.clients} clients, got one more; try another node, or later"
            self._refuse(sender, REFUSED_FULL, text)
            return
        answer = self._ask_owner(hello)
        if isinstance(answer, Refused):
            self._refuse(sender, answer.reason, answer.text)
            return
        guest = Guest(control_id, hello, answer, self._routers, limits=self._limits, emit=self._emit, now_s=now_s)
        self._by_token[control_id.token] = self._by_address[sender] = guest
        guest.join()

    def _refuse_other_version(self, sender: bytes, data: Buffer) -> None:
        """Answer a Hello that only another version can read."""
        try:
            version = decode(_ANY_HELLO, data).version
        except ProtocolError:
            return
        if version != PROTOCOL_VERSION:
            self._refuse(sender, REFUSED_VERSION, version_text(PROTOCOL_VERSION, version))

    def _refuse(self, sender: bytes, reason: str, text: str) -> None:
        self._routers.send_control(sender, [encode(Refused(reason, text))])

    # --- data

    def hear_data(
        self, sender: bytes, parts: Sequence[memoryview], nbytes: int, now_s: float, *, is_spoilt: bool = False
    ) -> None:
        """Take what came on the data port; from strangers nothing is read.

        Args:
            sender: routing id.
            parts: the other frames.
            nbytes: bytes of all of them.
            now_s: this instant.
            is_spoilt: whether the message broke a cap, so that its frames were not kept.
        """
        guest = self._by_address.get(sender)
        if guest is None or not guest.is_up:
            guest = self._meet(sender, now_s)
        if guest is None:
            self.num_strange += 1
            return
        guest.count_received(nbytes)
        try:
            if is_spoilt:
                raise ProtocolError("a data message breaks a cap")
            guest.take_data(parts, nbytes, now_s)
        except ProtocolError as error:
            self._strike(guest.control_id.token, error, now_s)

    def _meet(self, sender: bytes, now_s: float) -> Guest | None:
        """Find the client that a data connection not heard before belongs to, if it is the newest one of a client."""
        data_id = RoutingId.from_bytes(sender)
        guest = None if data_id is None or data_id.is_control else self._find(data_id.token)
        if data_id is None or guest is None:
            return None
        newest = guest.control_id if guest.data_id is None else guest.data_id
        if data_id.generation < newest.generation:
            return None
        if guest.data_id is not None:
            self._by_address.pop(guest.data_id.to_bytes(), None)
        self._by_address[sender] = guest
        guest.move(data_id, now_s)
        return guest

    def _find(self, token: bytes) -> Guest | None:
        guest = self._by_token.get(token)
        return guest if guest is not None and guest.is_up else None

    def _strike(self, token: bytes, error: ProtocolError, now_s: float) -> None:
        self.num_malformed += 1
        is_out = self._strikes.add(token, now_s)
        guest = self._find(token)
        if guest is None:
            _log.debug("a stranger: %s", error)
            return
        guest.count_malformed(error)
        if is_out:
            guest.say(Goodbye())
            guest.end(f"it sent {self._limits.malformed} malformed messages, the last one: {error}")


class Strikes:
    """Counts malformed messages by token, those of strangers too, in bounded memory."""

    def __init__(self, limit: int, *, capacity: int = 4096) -> None:
        """Start with no strikes.

        Args:
            limit: strikes after which a token is out.
            capacity: tokens remembered; the one struck longest ago is forgotten first.
        """
        self._limit = limit
        self._capacity = capacity
        self._strikes: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # count, instant of the last one

    def add(self, token: bytes, now_s: float) -> bool:
        """Count a strike; True if the token is out by now."""
        count, last_s = self._strikes.pop(token, (0, now_s))
        self._strikes[token] = (1 if now_s - last_s > _FORGIVEN_AFTER_S else count + 1, now_s)
        if len(self._strikes) > self._capacity:
            self._strikes.popitem(last=False)
        return self.is_out(token, now_s)

    def is_out(self, token: bytes, now_s: float) -> bool:
        """Tell whether nothing from this token is read for now."""
        count, last_s = self._strikes.get(token, (0, now_s))
        return count >= self._limit and now_s - last_s <= _FORGIVEN_AFTER_S
