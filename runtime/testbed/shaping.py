"""A link in user space: a relay that passes a node's two ports on, shaped in each direction, or swallows everything.

    client --- p   (control) ---> relay --- target port     (control) ---> node
    client --- p+1 (data)    ---> relay --- target port + 1 (data)    ---> node

Each direction of the link has one rate for all its connections, control first, then a delay with jitter. Run as
`python -m runtime.testbed.shaping --target tcp://HOST:PORT`: prints `READY tcp://127.0.0.1:p`, takes one JSON command
per line on standard input (`{"black_hole": true}`, `{"up": {"rates_bps": [8e6], "delay_s": 0.02}}`), answers each with
`OK` or `ERROR` and a text, and ends with standard input or SIGTERM. Imports neither torch nor zmq: it starts at once and
knows nothing of what it carries.
"""

import asyncio
import contextlib
import enum
import signal
import sys
from dataclasses import dataclass

import msgspec
import tyro

from runtime.address import Endpoint
from runtime.errors import ConfigError, TransportError
from runtime.testbed.pacer import Pacer
from runtime.testbed.rate import LinkShape

PORT_ATTEMPTS = 50

CHUNKS_ON_THE_WAY = 4096
"""Chunks of one connection that have left and not arrived; more only with delays of many seconds."""


class Kind(enum.IntEnum):
    """What a connection carries; the lower number goes first."""

    CONTROL = 0
    DATA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Pass a node's control and data ports on."""

    target: str
    """Address of the node, tcp://HOST:PORT; its tensors use the next port."""


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of standard input; what is left out stays as it is."""

    black_hole: bool | None = None
    up: LinkShape | None = None  # client to node
    down: LinkShape | None = None


class _Connection:
    """One client connection and, unless it is swallowed from its start, the one to the node."""

    def __init__(self, kind: Kind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.kind = kind
        self.reader = reader
        self.writer = writer
        self.far_writer: asyncio.StreamWriter | None = None
        self.is_swallowed = False
        self.task: asyncio.Task[None] | None = None

    def end(self) -> None:
        """End the connection from outside: whatever carries it stops, and both sides are closed."""
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """Close both sides at once; bytes that were not passed on are dropped."""
        for writer in (self.writer, self.far_writer):
            if writer is not None and writer.transport is not None:
                writer.transport.abort()


class Relay:
    """Listens on two consecutive loopback ports and passes them on to a node's.

    Args:
        target: the node.

    Raises:
        ConfigError: when the target has no port.
    """

    def __init__(self, target: Endpoint) -> None:
        if target.port is None:
            raise ConfigError(f"expected the address of a node, got {target.control}; name its port")
        self._host, self._port = target.host.strip("[]"), target.port
        self._up = Pacer()
        self._down = Pacer()
        self._is_black_hole = False
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def listen(self) -> str:
        """Take two consecutive free ports and give the address of the first.

        Raises:
            TransportError: when no free pair was found.
        """
        for _ in range(PORT_ATTEMPTS):
            control = await asyncio.start_server(self._accept_control, "127.0.0.1", 0)
            port: int = control.sockets[0].getsockname()[1]
            try:
                data = await asyncio.start_server(self._accept_data, "127.0.0.1", port + 1)
            except (OSError, OverflowError):
                control.close()
                continue
            self._servers = [control, data]
            return f"tcp://127.0.0.1:{port}"
        raise TransportError(f"found no two consecutive free ports in {PORT_ATTEMPTS} attempts; close some programs")

    def obey(self, command: Command) -> None:
        """Carry out a command."""
        if command.up is not None:
            self._up.shape(command.up)
        if command.down is not None:
            self._down.shape(command.down)
        if command.black_hole is not None:
            self._set_black_hole(command.black_hole)

    def _set_black_hole(self, on: bool) -> None:
        """Swallow everything in both directions from now on, without a reset; or pass on again.

        Connections that have swallowed bytes are closed when it is switched off: a stream with a hole in it is of no
        use, and a peer that sees a clean end connects anew.
        """
        self._is_black_hole = on
        for connection in tuple(self._connections):
            if on:
                connection.is_swallowed = True
            elif connection.is_swallowed:
                connection.end()

    async def close(self) -> None:
        """Close every port and connection."""
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(_Connection(Kind.CONTROL, reader, writer))

    async def _accept_data(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(_Connection(Kind.DATA, reader, writer))

    async def _serve(self, connection: _Connection) -> None:
        """Carry one connection from its start to its end."""
        task = asyncio.current_task()
        assert task is not None
        connection.task = task
        self._tasks.add(task)
        self._connections.add(connection)
        connection.is_swallowed = self._is_black_hole
        # The node may be down, or a side be reset: the other side is closed below. Cancelled: the relay ends.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if connection.is_swallowed:
                while await connection.reader.read(2**16):
                    pass
            else:
                await self._join(connection)
        connection.close()
        self._connections.discard(connection)
        self._tasks.discard(task)

    async def _join(self, connection: _Connection) -> None:
        """Connect to the node and carry both directions; the end of one is the end of both."""
        port = self._port + connection.kind
        far_reader, connection.far_writer = await asyncio.open_connection(self._host, port)
        directions = [
            asyncio.create_task(self._carry(connection, connection.reader, connection.far_writer, self._up)),
            asyncio.create_task(self._carry(connection, far_reader, connection.writer, self._down)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    async def _carry(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pacer: Pacer
    ) -> None:
        """Carry one direction of one connection until it ends: read, send, arrive, each at its own pace."""
        waiting: asyncio.Queue[_Chunk] = asyncio.Queue(1)  # the next chunk stands ready while one is sent
        on_the_way: asyncio.Queue[_Chunk] = asyncio.Queue(CHUNKS_ON_THE_WAY)
        tasks = [
            asyncio.create_task(_read(reader, pacer, waiting)),
            asyncio.create_task(_send(connection, pacer, waiting, on_the_way)),
            asyncio.create_task(_arrive(connection, on_the_way, writer)),
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some bytes and an instant of the loop: when they were there, then when they are due. No bytes: the end."""

    at_s: float
    data: bytes


async def _read(reader: asyncio.StreamReader, pacer: Pacer, waiting: asyncio.Queue[_Chunk]) -> None:
    """Read chunk after chunk until the end; a reset is an end like any other."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await reader.read(pacer.chunk_bytes())
        except OSError:
            data = b""
        await waiting.put(_Chunk(loop.time(), data))
        if not data:
            return


async def _send(
    connection: _Connection, pacer: Pacer, waiting: asyncio.Queue[_Chunk], on_the_way: asyncio.Queue[_Chunk]
) -> None:
    """Send chunk after chunk; what comes while the connection is swallowed goes nowhere."""
    while True:
        chunk = await waiting.get()
        if not chunk.data:
            if connection.is_swallowed:
                await asyncio.Event().wait()  # the end is swallowed too, until the connection is closed
            await on_the_way.put(chunk)
            return
        if not connection.is_swallowed:
            due_s = await pacer.send(connection.kind, len(chunk.data), chunk.at_s)
            await on_the_way.put(_Chunk(due_s, chunk.data))


async def _arrive(connection: _Connection, on_the_way: asyncio.Queue[_Chunk], writer: asyncio.StreamWriter) -> None:
    """Hand on what was sent when it is due."""
    loop = asyncio.get_running_loop()
    while True:
        chunk = await on_the_way.get()
        if not chunk.data:
            return
        if chunk.at_s > loop.time():
            await asyncio.sleep(chunk.at_s - loop.time())
        if not connection.is_swallowed:
            writer.write(chunk.data)
            await writer.drain()


async def _listen_to_input(relay: Relay) -> None:
    """Carry out commands from standard input until it ends."""
    reader = asyncio.StreamReader(limit=2**24)  # a trace is one line
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            try:
                relay.obey(msgspec.json.decode(line, type=Command))
                answer = "OK"
            except (msgspec.MsgspecError, ConfigError) as error:
                answer = f"ERROR {error}"
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()
    finally:
        transport.close()


async def run_relay(config: RelayConfig) -> None:
    """Run a relay until standard input ends or SIGTERM comes.

    Raises:
        ConfigError: when the target is no address.
        TransportError: when no ports are free.
    """
    relay = Relay(Endpoint.parse(config.target))
    address = await relay.listen()
    listening = asyncio.create_task(_listen_to_input(relay))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, listening.cancel)
    print(f"READY {address}", flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    await relay.close()


if __name__ == "__main__":
    try:
        asyncio.run(run_relay(tyro.cli(RelayConfig)))
    except (ConfigError, TransportError) as error:
        sys.exit(f"relay: {error}")
