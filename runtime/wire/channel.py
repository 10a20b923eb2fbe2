"""`Hub`: all conversations of one loop thread, each over a control and a data connection.

    we connect                                   others connect to us
    Dealer control  -------------------------->  Router port      one frame per message
    Dealer data     -------------------------->  Router port + 1  an Envelope, then one frame per tensor

Control never waits behind data. What is said on the connections is decided in `call.py` (we connect) and `door.py` (others
do), what ZeroMQ makes of it is in `sockets.py`; here the two meet.
"""

import logging
import math
import socket as std_socket
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from runtime.address import Endpoint
from runtime.errors import ConfigError, TransportError
from runtime.types import LinkState
from runtime.wire.call import Call
from runtime.wire.door import Door, Guest, Routers
from runtime.wire.endpoint import RoutingId, check_exposure, make_token
from runtime.wire.events import Buffer, Connected, Event, Joined, Limits, Lost, Peer, ReceivedData, Sent, Traffic
from runtime.wire.keys import Keys, check_key, write_keys
from runtime.wire.messages import ControlMessage, Goodbye, Hello, Refused, Result, Submit, Welcome
from runtime.wire.session import Session, check_outgoing, encode_control
from runtime.wire.sockets import Dealer, Gate, Router, Sockets, bind_pair, make_keys

_log = logging.getLogger(__name__)

_MAX_WAIT_S = 60.0
_GOODBYE_MS = 100
_TURNS = (Joined, Connected, Lost)


def create_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a CURVE key pair: NAME.key to hand out, NAME.key_secret to keep.

    Returns:
        The public and the secret file.

    Raises:
        ConfigError: if either file exists or cannot be written.
    """
    return write_keys(folder, name, make_keys())


class _Line(Call):
    """A call, and the sockets it is made on."""

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        hello: Hello,
        sockets: Sockets,
        *,
        keys: Keys | None,
        server_key: bytes | None,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        super().__init__(
            name,
            endpoint.control,
            hello,
            has_keys=server_key is not None,
            limits=sockets.limits,
            emit=emit,
            now_s=clock(),
        )
        self._endpoint = endpoint
        self._sockets = sockets
        self._keys = keys
        self._server_key = server_key
        self._clock = clock
        self._token = make_token()
        self._generation = 0
        self._open_control()
        self._open_data()

    def say(self, message: ControlMessage) -> bool:
        data = encode_control(message, self.limits)
        is_away = self._control.send([data]) is Sent.AWAY
        if is_away:
            self.count_sent(len(data))
        return is_away

    def transmit(self, parts: Sequence[Buffer]) -> bool:
        return self._data.send(parts) is Sent.AWAY

    def redial(self) -> None:
        self._control.close()
        self.reopen_data()
        self._open_control()

    def reopen_data(self) -> None:
        self._data.close()
        self._generation += 1
        self._open_data()

    def close(self) -> None:
        """Say goodbye and close; whatever is queued is gone."""
        if self.is_welcomed:
            self.say(Goodbye())
        self._forget()
        self._data.close()
        self._control.close(_GOODBYE_MS)

    def _open_control(self) -> None:
        self._control = self._open(is_control=True)
        self._watch(self._control, is_control=True)  # may answer at once, so the socket must be known by now

    def _open_data(self) -> None:
        self._data = self._open(is_control=False)
        self._watch(self._data, is_control=False)

    def _open(self, *, is_control: bool) -> Dealer:
        return Dealer(
            self._sockets,
            self._endpoint.control if is_control else self._endpoint.data,
            RoutingId(self._token, is_control, self._generation),
            self._keys,
            self._server_key,
        )

    def _watch(self, dealer: Dealer, *, is_control: bool) -> None:
        def read() -> None:
            parts, nbytes, is_spoilt = dealer.receive()
            if is_control:
                self.hear(parts, nbytes, self._clock())
            else:
                self.hear_data(parts, nbytes, self._clock(), is_spoilt=is_spoilt)

        def read_fate() -> None:
            while dealer.is_open and (fate := dealer.receive_fate()) is not None:
                self.learn(fate, self._clock(), is_control=is_control)

        dealer.watch(read, read_fate)


class Hub:
    """All conversations of one loop thread, with nodes that we connect to and clients that connect to us.

    Owns its sockets. Everything but `wake` is called from one thread, which should poll at least once a second: pings are
    answered there. Nothing but `poll` waits, and no peer's doing raises from it. Close it before the process ends: its
    memory must not go while ZeroMQ's thread still sends from it.
    """

    def __init__(
        self,
        name: str,
        *,
        keys: Keys | None = None,
        authorised: Path | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Open a hub that knows nobody yet.

        Args:
            name: our name, source of the links we measure.
            keys: our CURVE key pair; with it, whoever connects to us needs one too.
            authorised: folder with the *.key files of the clients that may connect, read at each connection.
            insecure: allow addresses beyond this machine without keys.
            limits: caps and times.
            clock: gives seconds that never go back.
        """
        self.name = name
        self._keys = keys
        self._authorised = authorised
        self._is_insecure = insecure
        self._limits = Limits() if limits is None else limits
        self._clock = clock
        self._events: list[Event] = []
        self._unsettled: list[Peer] = []  # have handed data over
        self._lines: list[_Line] = []
        self._door: Door | None = None
        self._gate: Gate | None = None
        self._routers: tuple[Router, ...] = ()
        self._tick_s = 0.0
        self._is_calling = self._is_woken = self._is_closed = False
        self._sockets = Sockets(self._limits)
        self._wake_out, self._wake_in = std_socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._sockets.watch(self._wake_out.fileno(), self._read_wake)

    def __enter__(self) -> "Hub":
        """Give the hub itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @property
    def num_malformed(self) -> int:
        """Messages that were dropped because they are malformed or break a cap."""
        at_door = 0 if self._door is None else self._door.num_malformed
        return at_door + sum(line.traffic.malformed_messages for line in self._lines)

    @property
    def num_strange(self) -> int:
        """Data messages dropped unread: their sender has not said Hello, or has replaced its socket since."""
        return 0 if self._door is None else self._door.num_strange

    # --- opening and closing

    def bind(self, address: str, welcome: Callable[[Hello], Welcome | Refused]) -> str:
        """Listen: control on the address's port, data on the next.

        Args:
            address: `tcp://host:port`, or `tcp://host:*` for any two free ports.
            welcome: asked for an answer to each Hello of our protocol version.

        Returns:
            The control address, with the real port.

        Raises:
            ConfigError: if the address cannot be understood or needs keys, or the hub is bound already.
            TransportError: if a port is in use or cannot be had.
        """
        endpoint = Endpoint.parse(address)
        check_exposure(endpoint, has_keys=self._keys is not None, is_insecure=self._is_insecure)
        if self._keys is not None and self._authorised is None:
            raise ConfigError("expected a folder of client keys beside our own keys, got none; pass authorised=FOLDER")
        if self._door is not None:
            raise ConfigError(f"expected one bind per hub, got a second one to {address}; open another Hub")
        # The gate stands before anybody can knock, for without one ZeroMQ lets every key in; and stays if we bind in vain.
        if self._gate is None and self._keys is not None and self._authorised is not None:
            self._gate = self._sockets.open_gate(self._authorised)
        control = Router(self._sockets, endpoint, self._keys, is_control=True)
        data = Router(self._sockets, endpoint, self._keys, is_control=False)
        self._routers = (control, data)
        try:
            bound = bind_pair(control, data, endpoint)
        except TransportError:
            self._close_routers()
            raise
        routers = Routers(send_control=control.send_to, send_data=data.send_to)
        self._door = Door(welcome, routers, limits=self._limits, emit=self._tell)
        self._watch_door(self._door, control, data)
        return bound.control

    def connect(self, name: str, address: str, hello: Hello, *, server_key: bytes | None = None) -> Peer:
        """Start calling a node, for ever: `Connected` or `Rejected` tells how it went.

        Args:
            name: what we call the node.
            address: its control address.
            hello: who we are and what we want.
            server_key: the node's public key; needs a key pair of our own. None talks in the clear.

        Raises:
            ConfigError: if the address cannot be understood or needs keys, or a key is missing or none.
        """
        endpoint = Endpoint.parse(address)
        check_exposure(endpoint, has_keys=server_key is not None, is_insecure=self._is_insecure)
        if endpoint.port is None:
            raise ConfigError(f"expected a port to connect to, got {address!r}; use the address that the node printed")
        if server_key is not None:
            check_key(server_key, f"public key of node {name!r}")
            if self._keys is None:
                raise ConfigError(f"node {name!r} has a public key but we have no key pair; pass keys=load_keys(FILE)")
        line = _Line(
            name,
            endpoint,
            hello,
            self._sockets,
            keys=self._keys,
            server_key=server_key,
            emit=self._tell,
            clock=self._clock,
        )
        self._lines.append(line)
        self._tick_s = 0.0
        return line

    def disconnect(self, peer: Peer) -> None:
        """Say goodbye to a peer and forget it, without an event."""
        if isinstance(peer, _Line) and peer in self._lines:
            self._lines.remove(peer)
            peer.close()
        elif isinstance(peer, Guest) and peer.is_up:
            peer.dismiss()

    def close(self) -> None:
        """Say goodbye to everybody and close all; takes 0.1 s at most, should somebody not read."""
        if self._is_closed:
            return
        self._is_closed = True
        for line in self._lines:
            line.close()
        for guest in self._door or ():
            guest.dismiss()
        self._close_routers()
        if self._gate is not None:
            self._gate.close()
        self._sockets.unwatch(self._wake_out.fileno())
        self._sockets.close_all()
        self._wake_in.close()
        self._wake_out.close()

    # --- working

    def poll(self, timeout_s: float) -> list[Event]:
        """Serve all peers until there is something to tell, `wake` is called, or the time is up.

        Raises:
            TransportError: if the hub is closed.
        """
        if self._is_closed:
            raise TransportError(f"hub {self.name!r} is closed; open a new one")
        now_s = self._clock()
        for peer in self._unsettled:
            _session(peer).settle(now_s)
        self._unsettled.clear()
        deadline_s = now_s + timeout_s
        while True:
            wait_s = 0.0 if self._events else min(deadline_s, self._tick_s) - now_s
            self._sockets.serve(min(max(wait_s, 0.0), _MAX_WAIT_S))
            # After reading: whoever wrote while we were busy elsewhere has not been silent.
            now_s = self._clock()
            if now_s >= self._tick_s or self._is_calling:
                self._tick(now_s)
            if self._events or self._is_woken or now_s >= deadline_s:
                break
        self._is_woken = False
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """Make `poll` return at once, now or when it is called next. From any thread."""
        with suppress(OSError):  # full: a wake-up waits already; closed: there is nobody to wake
            self._wake_in.send(b"w")

    def send(self, peer: Peer, message: ControlMessage) -> None:
        """Send a control message now or never: to a peer that is not up, or takes no more, it is dropped.

        Raises:
            ProtocolError: if it is larger than the peer would take.
        """
        session = _session(peer)
        if not session.is_up or not session.say(message):
            _log.debug("%r: a %s was dropped", peer, type(message).__name__)

    def send_data(self, peer: Peer, body: Submit | Result, frames: Sequence[Buffer], tag: Hashable) -> None:
        """Queue a data message; the memory of its frames must not change until `Delivered` names the tag.

        To a peer that is not up it is dropped: `Lost` or `Left` has told so, or is about to.

        Raises:
            ProtocolError: if it is larger than the peer would take.
        """
        session = _session(peer)
        nbytes = check_outgoing(frames, self._limits)
        if session.is_up:
            session.push(body, frames, nbytes, tag, self._clock())
        else:
            _log.debug("%r: a %s was dropped", peer, type(body).__name__)

    def withdraw(self, peer: Peer, tag: Hashable) -> None:
        """Forget the data messages with a tag. One in flight to a node is cut off, one to a client goes unheeded."""
        session = _session(peer)
        if session.is_up:
            session.withdraw(tag, self._clock())

    def link_state(self, peer: Peer) -> LinkState:
        """Give what was measured of the link from us to a peer."""
        return _session(peer).link_state(self.name, self._clock())

    def traffic(self, peer: Peer) -> Traffic:
        """Give the counters of a peer."""
        return _session(peer).traffic

    # --- inside

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        if type(event) is ReceivedData:
            self._unsettled.append(event.peer)
        elif type(event) in _TURNS:
            self._tick_s = 0.0  # other things are due now: a first ping, a Hello

    def _close_routers(self) -> None:
        for router in self._routers:
            router.close(_GOODBYE_MS)
        self._routers = ()

    def _tick(self, now_s: float) -> None:
        sessions: list[Session] = [*self._lines]
        for line in self._lines:
            line.tick(now_s)
        if self._door is not None:
            self._door.tick(now_s)
            sessions += self._door
        self._tick_s = min((session.next_due_s() for session in sessions), default=math.inf)
        self._is_calling = not all(line.is_up for line in self._lines)  # then any word may change what is due

    def _watch_door(self, door: Door, control: Router, data: Router) -> None:
        def read_control() -> None:
            sender, parts, nbytes, _ = control.receive_from()
            door.hear(sender, parts, nbytes, self._clock())

        def read_data() -> None:
            sender, parts, nbytes, is_spoilt = data.receive_from()
            door.hear_data(sender, parts, nbytes, self._clock(), is_spoilt=is_spoilt)

        self._sockets.watch(control.socket, read_control)
        self._sockets.watch(data.socket, read_data)

    def _read_wake(self) -> None:
        self._is_woken = True
        with suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass


def _session(peer: Peer) -> Session:
    if type(peer) is _Line or type(peer) is Guest:
        return peer
    raise TypeError(f"expected a peer of this hub, got {peer!r}")
