"""The one file that knows ZeroMQ: sockets that never make their owner wait, what became of their connections, keys.

    Dealer   connects, and reports the fate of its connection
    Router   is bound; every message carries the routing id of the Dealer it came from or goes to
    Gate     decides by public key who may connect to the Routers of a context

Large frames are sent without copying, for which pyzmq keeps one thread of its own per process, from the first one on.
"""

import errno
import logging
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import zmq
from zmq.utils import z85

from runtime.address import Endpoint
from runtime.errors import TransportError
from runtime.wire.endpoint import RoutingId
from runtime.wire.events import Buffer, Fate, Limits, Sent
from runtime.wire.keys import Keys, load_authorised

_log = logging.getLogger(__name__)

_DATA_HWM = 8
"""Data messages that may wait to be read: an honest peer has one in flight, and an introduction or a repeat beside it.

Those to be sent, of which our queue gives one at a time, need no low mark: ZeroMQ wakes their sender whenever half as many
have left.
"""
_COPIED_BYTES = 2**19
"""Smaller frames are copied: up to here that takes less than pyzmq's bookkeeping for memory it must not free (measured)."""

_RECONNECT_MS = (100, 1000)  # first and longest time between two attempts
_PAIR_ATTEMPTS = 64

_FATES = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: Fate.CONNECTED,
    zmq.EVENT_DISCONNECTED: Fate.DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Fate.KEY_REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Fate.CLOSED_EARLY,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Fate.CLOSED_EARLY,
}
_MONITOR_HEADER = struct.Struct("=Hi")  # event, value

_ADVICE = {
    errno.EADDRINUSE: "the port is in use; stop the program that holds it, or choose another (tcp://HOST:* takes any)",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address; bind one that exists, or 0.0.0.0",
    errno.ENODEV: "no interface of this machine has this name or address; bind one that exists, or 0.0.0.0",
    errno.EACCES: "ports below 1024 need privileges; choose a higher one",
    errno.EMFILE: "too many open sockets; close some, or raise `ulimit -n`",
}

# As plain numbers: the flags of pyzmq are enums, and combining those costs more than a system call.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

Socket = zmq.Socket[bytes]


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Turn ZeroMQ's errors into ours: the one place where that happens."""
    try:
        yield
    except zmq.ZMQError as error:
        number = error.errno or 0
        raise TransportError(number, f"cannot {doing}: {_ADVICE.get(number, error.strerror)}") from error


def make_keys() -> Keys:
    """Draw a CURVE key pair."""
    public, secret = zmq.curve_keypair()
    return Keys(public=public, secret=secret)


class Sockets:
    """What all sockets of one owner share: context, poller, handlers."""

    def __init__(self, limits: Limits) -> None:
        """Open a context.

        Args:
            limits: caps on what comes in.
        """
        self.limits = limits
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._handlers: dict[Socket | int, Callable[[], None]] = {}
        self._num_monitors = 0

    def open(self, kind: int, *, is_control: bool) -> Socket:
        """Open a socket."""
        limits = self.limits
        with _translated("open a socket"):
            socket: Socket = self._context.socket(kind)
            socket.linger = 0
            socket.setsockopt(zmq.MAXMSGSIZE, limits.control_bytes if is_control else limits.message_bytes)
            if not is_control:
                socket.setsockopt(zmq.RCVHWM, _DATA_HWM)
            # A client that vanished without a word keeps its connection here until TCP itself finds out.
            for option, seconds in ((zmq.TCP_KEEPALIVE_IDLE, 30), (zmq.TCP_KEEPALIVE_INTVL, 10)):
                socket.setsockopt(option, seconds)
            socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
            socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        return socket

    def open_monitor(self, socket: Socket) -> Socket:
        """Open the socket that tells what becomes of another one's connection."""
        self._num_monitors += 1
        address = f"inproc://offcut-monitor-{self._num_monitors}"
        with _translated("watch a socket"):
            socket.monitor(address, sum(_FATES))
            monitor: Socket = self._context.socket(zmq.PAIR)
            monitor.linger = 0
            monitor.connect(address)
        return monitor

    def open_gate(self, authorised: Path) -> "Gate":
        """Open the gate for all bound sockets."""
        with _translated("open the gate for keys"):
            return Gate(self._context.socket(zmq.REP), authorised, self)

    def watch(self, source: Socket | int, handle: Callable[[], None]) -> None:
        """Call `handle` whenever there is something to read."""
        self._handlers[source] = handle
        self._poller.register(source, zmq.POLLIN)

    def unwatch(self, source: Socket | int) -> None:
        """Stop calling, if it was watched."""
        if self._handlers.pop(source, None) is not None:
            self._poller.unregister(source)

    def serve(self, wait_s: float) -> None:
        """Wait until something can be read, at most so long, and have it read: one message of every source.

        One, so that nobody's flood keeps others waiting, and because to ask a socket for a second one in vain costs more
        than to come back for it.
        """
        for source, _ in self._poller.poll(math.ceil(wait_s * 1000)):
            handle = self._handlers.get(source)
            if handle is None:  # another handler has closed the source
                continue
            try:
                handle()
            except zmq.Again:  # the message has gone with its connection
                continue

    def close(self, socket: Socket, linger_ms: int = 0) -> None:
        """Close a socket; what it still holds has so long to leave."""
        self.unwatch(socket)
        socket.close(linger_ms)

    def close_all(self) -> None:
        """Close the context, once all sockets have said their last. One that was forgotten is closed with it."""
        self._context.destroy(linger=0)


class _Port:
    """A socket that carries messages: what both kinds have in common."""

    def __init__(self, sockets: Sockets, kind: int, *, is_control: bool) -> None:
        self.sockets = sockets
        self.socket = sockets.open(kind, is_control=is_control)
        self.is_open = True
        self._max_frames = sockets.limits.frames + 1  # header
        self._max_bytes = sockets.limits.message_bytes + sockets.limits.control_bytes
        self._recv = self.socket.recv
        # Past pyzmq's own layer in Python, which is for what we never send. (Its overloads want copy as a literal.)
        self._send: Callable[[Buffer, int, bool], object] = super(zmq.Socket, self.socket).send  # type: ignore[assignment]

    def receive(self) -> tuple[list[memoryview], int, bool]:
        """Receive a message; to be called when it is known to be there.

        Returns:
            Its frames where they lie, writable; the bytes of all of them; whether it breaks a cap: then of its frames only
            the first was kept.
        """
        frame = self._recv(_NOBLOCK, False)
        frames, nbytes = [frame.buffer], len(frame)
        is_spoilt = nbytes > self._max_bytes
        while frame.more:
            frame = self._recv(_NOBLOCK, False)
            nbytes += len(frame)
            is_spoilt = is_spoilt or len(frames) >= self._max_frames or nbytes > self._max_bytes
            if not is_spoilt:
                frames.append(frame.buffer)
        return frames[:1] if is_spoilt else frames, nbytes, is_spoilt

    def send(self, parts: Sequence[Buffer]) -> Sent:
        """Send a message now or not at all; large frames are not copied."""
        *first, last = parts
        send = self._send
        try:
            for part in first:
                send(part, _NOBLOCK_MORE, len(part) < _COPIED_BYTES)
            send(last, _NOBLOCK, len(last) < _COPIED_BYTES)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            _log.debug("not sent: %s", error)
            return Sent.GONE
        return Sent.AWAY

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what it still holds has so long to leave."""
        self.is_open = False
        self.sockets.close(self.socket, linger_ms)


class Dealer(_Port):
    """A connecting socket, with what watches its connection."""

    def __init__(
        self, sockets: Sockets, address: str, routing_id: RoutingId, keys: Keys | None, server_key: bytes | None
    ) -> None:
        """Start connecting; goes on by itself until it succeeds.

        Args:
            sockets: what it belongs to.
            address: where to.
            routing_id: who this socket is.
            keys: our key pair.
            server_key: public key of the other side; None connects in the clear.
        """
        super().__init__(sockets, zmq.DEALER, is_control=routing_id.is_control)
        self._monitor = sockets.open_monitor(self.socket)
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        with _translated(f"connect to {address}"):
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id.to_bytes())
            self.socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS[0])
            self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1])
            self.socket.setsockopt(zmq.IPV6, int("[" in address))
            # Control is for now or never: what cannot leave at once must not reach a node that was restarted since.
            self.socket.setsockopt(zmq.IMMEDIATE, int(routing_id.is_control))
            if keys is not None and server_key is not None:
                self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
                self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
                self.socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
            self.socket.connect(address)

    def watch(self, on_message: Callable[[], None], on_fate: Callable[[], None]) -> None:
        """Call these when a message, or word of the connection, can be received.

        The monitor is watched by its file descriptor: ZeroMQ then asks the system about it, not the socket, which would
        cost more at each wait than all else. The price is that `on_fate` must receive until there is nothing.
        """
        self.sockets.watch(self.socket, on_message)
        self.sockets.watch(self._monitor_fd, on_fate)
        on_fate()

    def receive_fate(self) -> Fate | None:
        """Receive what became of the connection; None if nothing new."""
        try:
            header, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.ZMQError:
            return None
        event, value = _MONITOR_HEADER.unpack(header)
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH and event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return Fate.SECURITY_DIFFERS
        return _FATES[event]

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket and what watches it."""
        with suppress(zmq.ZMQError):
            self.socket.disable_monitor()
        self.sockets.unwatch(self._monitor_fd)
        self._monitor.close(0)
        super().close(linger_ms)


class Router(_Port):
    """A bound socket."""

    def __init__(self, sockets: Sockets, endpoint: Endpoint, keys: Keys | None, *, is_control: bool) -> None:
        """Open the socket; `bind_pair` binds it.

        Args:
            sockets: what it belongs to.
            endpoint: where it will be bound.
            keys: our key pair; None takes connections in the clear.
            is_control: control, or data.
        """
        super().__init__(sockets, zmq.ROUTER, is_control=is_control)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # tells of connections that are gone
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a client may be back before its old connection is known dead
        self.socket.setsockopt(zmq.IPV6, int(endpoint.is_ipv6))
        if keys is not None:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self.socket.setsockopt(zmq.ZAP_DOMAIN, b"offcut")

    def receive_from(self) -> tuple[bytes, list[memoryview], int, bool]:
        """Receive a message as `receive` does, after the routing id of the connection that it came over."""
        sender: bytes = self._recv(_NOBLOCK)
        return sender, *self.receive()

    def send_to(self, routing_id: bytes, parts: Sequence[Buffer]) -> Sent:
        """Send a message to one connection, now or not at all."""
        return self.send([routing_id, *parts])


def bind_pair(control: Router, data: Router, endpoint: Endpoint) -> Endpoint:
    """Bind two routers to a port and the next one, any free pair if the endpoint names no port.

    Raises:
        TransportError: if they cannot be had; its `errno` is the system's.
    """
    attempts = 1 if endpoint.port is not None else _PAIR_ATTEMPTS
    for attempt in range(1, attempts + 1):
        with _translated(f"listen on {endpoint.control}"):
            control.socket.bind(endpoint.control)
        real = str(control.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        bound = replace(endpoint, port=int(real.rpartition(":")[2]))
        try:
            with _translated(f"listen on {bound.data} (data goes to the port after the control port)"):
                data.socket.bind(bound.data)
        except TransportError as error:
            if attempt == attempts or error.errno != errno.EADDRINUSE:
                raise
            control.socket.unbind(real)
        else:
            return bound
    raise AssertionError("the last attempt returns or raises")


class Gate:
    """Answers ZeroMQ's question whether a public key may connect (ZAP, RFC 27), in its owner's thread."""

    def __init__(self, socket: Socket, authorised: Path, sockets: Sockets) -> None:
        """Start answering.

        Args:
            socket: a REP socket of the context to guard.
            authorised: folder with the *.key files of those that may connect, read at each question.
            sockets: what it belongs to.
        """
        self._socket = socket
        self._authorised = authorised
        self._sockets = sockets
        socket.linger = 0
        socket.bind("inproc://zeromq.zap.01")
        sockets.watch(socket, self._answer)

    def close(self) -> None:
        """Stop answering; to be closed after what it guards."""
        self._sockets.close(self._socket)

    def _answer(self) -> None:
        with suppress(zmq.ZMQError):
            version, number, _, address, _, mechanism, *credentials = self._socket.recv_multipart(zmq.NOBLOCK)
            is_known = mechanism == b"CURVE" and z85.encode(credentials[0]) in load_authorised(self._authorised)
            if not is_known:
                _log.warning("refused a connection from %s: its key is not in %s", address.decode(), self._authorised)
            status, text = (b"200", b"OK") if is_known else (b"400", b"unknown key")
            self._socket.send_multipart([version, number, status, text, b"", b""], zmq.NOBLOCK)
