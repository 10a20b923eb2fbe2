"""A relay in front of one node, in a process of its own: a link that a test or an experiment can spoil.

    client  --UP-->    relay port p      --UP-->    node port q        control
            <--DOWN--                    <--DOWN--
    client  --UP-->    relay port p + 1  --UP-->    node port q + 1    data
            <--DOWN--                    <--DOWN--

`python -m runtime.testbed.shaping --target tcp://127.0.0.1:7001` prints `READY tcp://127.0.0.1:<p>`, then takes one JSON
object per line on standard input and answers `OK ...` or `ERROR ...`. It ends when its input does, or on SIGTERM.

    {"black_hole": true}    swallow everything, in both directions, without a reset; connections are still accepted
    {"black_hole": false}   pass on again; connections from before are closed, so that both ends see a clean start

Bytes pass untouched and in order. Who reads slowly slows down who writes; the bytes that wait in here for a connection
that is closed are dropped with it.
"""

import asyncio
import errno
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import tyro

from runtime.address import Endpoint
from runtime.errors import ConfigError, TransportError

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_PAIR_ATTEMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Pass a node's control and data ports on."""

    target: str
    """Address of the node, tcp://HOST:PORT; its tensors use the next port."""


class Kind(Enum):
    """What a connection carries: which of the two ports it was made to."""

    CONTROL = 0
    DATA = 1


class Direction(Enum):
    """Where bytes go."""

    UP = "up"  # to the node
    DOWN = "down"  # to the client


class _End(asyncio.Protocol):
    """One end of a connection. What is read here goes `direction`, out of the other end."""

    def __init__(self, connection: "_Connection", direction: Direction) -> None:
        self.direction = direction
        self.transport: asyncio.Transport | None = None
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._connection.opened(self)

    def data_received(self, data: bytes) -> None:
        self._connection.carry(self, data)

    def eof_received(self) -> bool:
        # True keeps the transport: a black hole swallows the end of a connection too.
        return self._connection.is_swallowed

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._connection.lost(self)

    def pause_writing(self) -> None:
        self._connection.set_flow(self, is_on=False)

    def resume_writing(self) -> None:
        self._connection.set_flow(self, is_on=True)

    def set_reading(self, *, is_on: bool) -> None:
        if self.transport is not None and not self.transport.is_closing():
            if is_on:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Connection:
    """A client's connection and the one made to the node for it."""

    def __init__(self, relay: "Relay", kind: Kind) -> None:
        self.kind = kind
        self.client = _End(self, Direction.UP)
        self.node = _End(self, Direction.DOWN)
        self._relay = relay

    @property
    def is_swallowed(self) -> bool:
        """Whether bytes and closings get lost in here."""
        return self._relay.is_black_hole

    def opened(self, end: _End) -> None:
        """Take in a new end; the client's waits until the node's is there."""
        if end is self.client:
            self._relay.add(self)
            if not self.is_swallowed:
                end.set_reading(is_on=False)
                self._relay.reach_node(self)
        else:
            self.client.set_reading(is_on=True)
            if self.client.transport is None:  # gone in the meantime
                end.abort()

    def carry(self, end: _End, data: bytes) -> None:
        """Pass on what was read at one end: every byte of every direction and kind comes through here."""
        sink = self._other(end).transport
        if self.is_swallowed or sink is None:
            return
        sink.write(data)

    def set_flow(self, sink: _End, *, is_on: bool) -> None:
        """Stop or start reading at the end whose bytes leave by `sink`; a black hole never fills up."""
        self._other(sink).set_reading(is_on=is_on or self.is_swallowed)

    def swallow(self) -> None:
        """Go on reading at both ends, whatever held them up."""
        for end in (self.client, self.node):
            end.set_reading(is_on=True)

    def lost(self, end: _End) -> None:
        """Close the other end too, unless nobody may hear of it."""
        if not self.is_swallowed:
            self._other(end).abort()
        if self.client.transport is None and self.node.transport is None:
            self._relay.discard(self)

    def close(self) -> None:
        """Close both ends; what waits in here is gone."""
        for end in (self.client, self.node):
            end.abort()

    def _other(self, end: _End) -> _End:
        return self.node if end is self.client else self.client


class Relay:
    """Two listening ports, and the connections through them."""

    def __init__(self, target: Endpoint) -> None:
        """Make a relay; `listen` opens it.

        Args:
            target: the node.

        Raises:
            ConfigError: if the target has no port.
        """
        if target.port is None:
            raise ConfigError(f"expected the address of a node, got {target.control}; name its port")
        self.is_black_hole = False
        self._host, self._port = target.host.strip("[]"), target.port
        self._servers: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()
        self._reaching: set[asyncio.Task[None]] = set()

    async def listen(self) -> str:
        """Take two consecutive free ports of the loopback interface.

        Returns:
            The control address; data is on the next port.

        Raises:
            TransportError: if no such pair can be had.
        """
        for _ in range(_PAIR_ATTEMPTS):
            control = await self._listen(Kind.CONTROL, 0)
            port: int = control.sockets[0].getsockname()[1]
            try:
                data = await self._listen(Kind.DATA, port + 1)
            except (OSError, OverflowError) as error:
                control.close()
                await control.wait_closed()
                if isinstance(error, OSError) and error.errno != errno.EADDRINUSE:
                    raise TransportError(f"cannot listen on {_HOST}:{port + 1}: {error.strerror}") from error
            else:
                self._servers = [control, data]
                return f"tcp://{_HOST}:{port}"
        raise TransportError(f"found no two free ports in a row in {_PAIR_ATTEMPTS} attempts; close some programs")

    def set_black_hole(self, is_on: bool) -> None:
        """Start to swallow everything, or pass on again what comes over new connections."""
        if is_on == self.is_black_hole:
            return
        self.is_black_hole = is_on
        for connection in list(self._connections):
            if is_on:
                connection.swallow()
            else:
                connection.close()

    async def close(self) -> None:
        """Close both ports and all connections."""
        self.is_black_hole = False  # closings are to be seen again
        for server in self._servers:
            server.close()
        for task in self._reaching:
            task.cancel()
        for connection in list(self._connections):
            connection.close()
        await asyncio.gather(*self._reaching, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()

    def add(self, connection: _Connection) -> None:
        """Take in a connection that a client made."""
        self._connections.add(connection)

    def discard(self, connection: _Connection) -> None:
        """Forget a connection that is closed at both ends."""
        self._connections.discard(connection)

    def reach_node(self, connection: _Connection) -> None:
        """Make the other half of a connection; if the node is down the client's half is closed."""
        task = asyncio.get_running_loop().create_task(self._reach_node(connection))
        self._reaching.add(task)
        task.add_done_callback(self._reaching.discard)

    async def _reach_node(self, connection: _Connection) -> None:
        port = self._port + connection.kind.value
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection.node, self._host, port)
        except OSError as error:
            _log.debug("%s:%s does not answer: %s", self._host, port, error)
            connection.client.abort()

    async def _listen(self, kind: Kind, port: int) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: _Connection(self, kind).client, _HOST, port)


class _Commands(asyncio.Protocol):
    """Standard input, line by line."""

    def __init__(self, take: Callable[[str], None], stop: Callable[[], None]) -> None:
        self._take = take
        self._stop = stop
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                self._take(line.decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()


def _say(line: str) -> None:
    print(line, flush=True)


def _obey(relay: Relay, line: str) -> str:
    """Carry out one command and give the answer."""
    try:
        command = json.loads(line)
    except ValueError:
        command = None
    if isinstance(command, dict) and command.keys() == {"black_hole"} and isinstance(command["black_hole"], bool):
        relay.set_black_hole(command["black_hole"])
        return f"OK {json.dumps(command)}"
    return f'ERROR expected {{"black_hole": true}} or {{"black_hole": false}}, got {line[:200]}'


async def run_relay(config: RelayConfig) -> None:
    """Run a relay until standard input ends or SIGTERM comes.

    Raises:
        ConfigError: if the target is no address of a node.
        TransportError: if no ports are free.
    """
    relay = Relay(Endpoint.parse(config.target))
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    address = await relay.listen()
    commands, _ = await loop.connect_read_pipe(
        lambda: _Commands(lambda line: _say(_obey(relay, line)), stop.set), sys.stdin
    )
    try:
        _say(f"READY {address}")
        await stop.wait()
    finally:
        commands.close()
        await relay.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a relay as a program.

    Args:
        argv: command line without the program's name; None takes the process's own.

    Returns:
        Exit code: 0 ok, 1 failure; a usage error exits with 2.
    """
    config = tyro.cli(RelayConfig, prog="python -m runtime.testbed.shaping", args=argv)
    try:
        asyncio.run(run_relay(config))
    except (ConfigError, TransportError) as error:
        sys.stderr.write(f"relay: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
