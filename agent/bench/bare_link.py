"""A bare TCP connection through a shaped relay: what a link takes without any of our wire."""

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from runtime.testbed.cluster import Relay
from runtime.testbed.rate import LinkShape


class BareLink:
    """Bytes there and bytes back over one TCP connection through a shaped relay, and nothing else.

    Args:
        shape: of both directions.
    """

    def __init__(self, shape: LinkShape) -> None:
        self._shape = shape
        self._stack = ExitStack()
        self._arrived = threading.Event()
        self._arrived_at_s = 0.0

    def __enter__(self) -> "BareLink":
        """Start the relay and the far end behind it."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="offcut-bench-")))
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=self._answer, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        relay = Relay("relay-bare", f"tcp://127.0.0.1:{port - 1}", folder)  # the data port is the next one
        self._stack.callback(relay.stop)
        self._relay = relay
        self.restart()
        host, _, control = relay.address.removeprefix("tcp://").rpartition(":")
        self._socket = self._stack.enter_context(socket.create_connection((host, int(control) + 1)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self._stack.close()

    def _answer(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while header := _read(connection.recv, 16):
                _read(connection.recv, int.from_bytes(header[:8], "big"))
                self._arrived_at_s = time.perf_counter()
                self._arrived.set()
                connection.sendall(bytes(int.from_bytes(header[8:], "big")))

    def restart(self) -> None:
        """Let rates that change begin anew."""
        self._relay.shape(up=self._shape, down=self._shape)

    def round_s(self, up_bytes: int, down_bytes: int) -> float:
        """Seconds for bytes out and, once all are there, bytes back."""
        start_s = time.perf_counter()
        self._socket.sendall(up_bytes.to_bytes(8, "big") + down_bytes.to_bytes(8, "big") + bytes(up_bytes))
        _read(self._socket.recv, down_bytes)
        return time.perf_counter() - start_s

    def one_way_s(self, up_bytes: int) -> float:
        """Seconds until the last byte is at the far end, which is in this process and shares its clock."""
        self._arrived.clear()
        start_s = time.perf_counter()
        self._socket.sendall((up_bytes - 16).to_bytes(8, "big") + bytes(8) + bytes(up_bytes - 16))
        self._arrived.wait(60.0)
        return self._arrived_at_s - start_s


def _read(receive: Callable[[int], bytes], nbytes: int) -> bytes:
    """Read so many bytes, or nothing when the other end is gone."""
    chunks = []
    while nbytes:
        chunk = receive(min(nbytes, 2**18))
        if not chunk:
            return b""
        chunks.append(chunk)
        nbytes -= len(chunk)
    return b"".join(chunks)
