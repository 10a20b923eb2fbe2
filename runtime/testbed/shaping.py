"""A link in user space: a relay that passes a node's two ports on, byte for byte, or swallows everything.

    client --- p   (control) ---> relay --- target port     (control) ---> node
    client --- p+1 (data)    ---> relay --- target port + 1 (data)    ---> node

Run as `python -m runtime.testbed.shaping --target tcp://HOST:PORT`: prints `READY tcp://127.0.0.1:p`, takes one JSON
command per line on standard input (`{"black_hole": true}`), answers each with `OK` or `ERROR` and a text, and ends with
standard input or SIGTERM. Imports neither torch nor zmq: it starts at once and knows nothing of what it carries.
"""

import asyncio
import contextlib
import enum
import json
import signal
import sys
from dataclasses import dataclass

import tyro

from runtime.address import Endpoint
from runtime.errors import ConfigError, TransportError

CHUNK_BYTES = 256 * 1024
"""Bytes read at a time; a writer that is slower than its reader holds it back after about this much."""

PORT_ATTEMPTS = 50


class Kind(enum.Enum):
    """What a connection carries."""

    CONTROL = 0
    DATA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Pass a node's control and data ports on."""

    target: str
    """Address of the node, tcp://HOST:PORT; its tensors use the next port."""


class _Connection:
    """One client connection and, unless it is swallowed from its start, the one to the node."""

    def __init__(self, kind: Kind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.kind = kind
        self.reader = reader
        self.writer = writer
        self.far_writer: asyncio.StreamWriter | None = None
        self.is_swallowed = False

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

    def set_black_hole(self, on: bool) -> None:
        """Swallow everything in both directions from now on, without a reset; or pass on again.

        Connections that have swallowed bytes are closed when it is switched off: a stream with a hole in it is of no
        use, and a peer that sees a clean end connects anew.
        """
        self._is_black_hole = on
        for connection in tuple(self._connections):
            if on:
                connection.is_swallowed = True
            elif connection.is_swallowed:
                connection.close()

    async def close(self) -> None:
        """Close every port and connection."""
        for server in self._servers:
            server.close()
        for connection in tuple(self._connections):
            connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(_Connection(Kind.CONTROL, reader, writer))

    async def _accept_data(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(_Connection(Kind.DATA, reader, writer))

    async def _serve(self, connection: _Connection) -> None:
        """Carry one connection from its start to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections.add(connection)
        connection.is_swallowed = self._is_black_hole
        try:
            if connection.is_swallowed:
                await self._pump(connection, connection.reader, None)
            else:
                await self._join(connection)
        except OSError:
            pass  # the node is down, or one side was reset: the other side is closed below
        finally:
            connection.close()
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def _join(self, connection: _Connection) -> None:
        """Connect to the node and carry both directions; the end of one is the end of both."""
        port = self._port + connection.kind.value
        far_reader, connection.far_writer = await asyncio.open_connection(self._host, port)
        outward = asyncio.create_task(self._pump(connection, connection.reader, connection.far_writer))
        inward = asyncio.create_task(self._pump(connection, far_reader, connection.writer))
        done, pending = await asyncio.wait((outward, inward), return_when=asyncio.FIRST_COMPLETED)
        connection.close()
        for task in (*done, *pending):
            with contextlib.suppress(OSError):
                await task

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None
    ) -> None:
        """Carry one direction until it ends; what arrives while the connection is swallowed goes nowhere."""
        while data := await reader.read(CHUNK_BYTES):
            if writer is not None and not connection.is_swallowed:
                writer.write(data)
                await writer.drain()


async def _obey(relay: Relay) -> None:
    """Carry out commands from standard input until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            try:
                command = json.loads(line)
                relay.set_black_hole(bool(command["black_hole"]))
                answer = f"OK {line.decode().strip()}"
            except (ValueError, KeyError, TypeError) as error:
                answer = f'ERROR expected {{"black_hole": true or false}}, got {line!r}: {error}'
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
    obeying = asyncio.create_task(_obey(relay))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, obeying.cancel)
    print(f"READY {address}", flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await obeying
    await relay.close()


if __name__ == "__main__":
    try:
        asyncio.run(run_relay(tyro.cli(RelayConfig)))
    except (ConfigError, TransportError) as error:
        sys.exit(f"relay: {error}")
