"""The relay as processes see it: bytes over real sockets."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.address import Endpoint
from runtime.testbed.cluster import Relay
from runtime.testbed.process import ManagedProcess
from runtime.testbed.rate import LinkShape
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB


class Sink(socketserver.BaseRequestHandler):
    """Reads to the end of the first 8 + n bytes, n told first, then answers with what it read."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while header := read_exactly(self.request, 8):
                count = int.from_bytes(header, "big")
                self.request.sendall(read_exactly(self.request, count)[-16:])


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def read_exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 2**16))
        if not part:
            break
        parts += part
    return bytes(parts)


@pytest.fixture
def node() -> Iterator[str]:
    """A node's two ports, each a sink."""
    for port in range(21000, 29000, 2):
        with contextlib.ExitStack() as stack:
            try:
                servers = [Server(("127.0.0.1", port + i), Sink) for i in range(2)]
            except OSError:
                continue
            for server in servers:
                stack.callback(server.server_close)
                thread = threading.Thread(target=server.serve_forever, args=(0.02,))
                thread.start()
                stack.callback(thread.join)
                stack.callback(server.shutdown)
            yield f"tcp://127.0.0.1:{port}"
        return


@pytest.fixture
def relay(node: str, tmp_path: Path) -> Iterator[Relay]:
    relay = Relay("relay", node, tmp_path)
    yield relay
    relay.stop()


def connect(relay: Relay, *, is_data: bool = True) -> socket.socket:
    endpoint = Endpoint.parse(relay.address)
    assert endpoint.port is not None
    return socket.create_connection((endpoint.host, endpoint.port + is_data), timeout=20.0)


def exchange(connection: socket.socket, payload: bytes) -> float:
    """Send, wait for the answer, and give the seconds."""
    start_s = time.perf_counter()
    connection.sendall(len(payload).to_bytes(8, "big") + payload)
    assert read_exactly(connection, 16) == payload[-16:]
    return time.perf_counter() - start_s


@pytest.mark.parametrize("is_data", [False, True], ids=["control", "data"])
def test_both_ports_are_passed_on_byte_for_byte(relay: Relay, is_data: bool) -> None:
    with connect(relay, is_data=is_data) as connection:
        for _ in range(3):
            exchange(connection, PAYLOAD)


def test_a_black_hole_swallows_without_a_reset_and_ends_cleanly(relay: Relay) -> None:
    with connect(relay) as old:
        exchange(old, PAYLOAD)
        relay.set_black_hole(True)
        with connect(relay) as new:
            for connection in (old, new):
                connection.sendall(PAYLOAD)
                connection.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            relay.set_black_hole(False)
            for connection in (old, new):
                connection.settimeout(20.0)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
    with connect(relay) as connection:
        exchange(connection, PAYLOAD)


def test_a_black_hole_swallows_the_end_of_a_connection_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay("relay", f"tcp://127.0.0.1:{server.getsockname()[1]}", tmp_path)
        try:
            with connect(relay, is_data=False) as connection:
                far, _ = server.accept()
                relay.set_black_hole(True)
                far.close()  # as the kernel does for a node that is killed
                connection.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                relay.set_black_hole(False)
                connection.settimeout(20.0)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
        finally:
            relay.stop()


@pytest.mark.parametrize(
    ("shape", "expected_s"),
    [
        (LinkShape(rates_bps=(8e6,), delay_s=0.02), 1.0 + 0.02),
        # 3.2 Mbit each 0.4 s: two whole rounds, and 1.6 Mbit at 12 Mbps
        (LinkShape(rates_bps=(12e6, 4e6), starts_s=(0.0, 0.2), period_s=0.4, delay_s=0.02), 0.8 + 1.6 / 12 + 0.02),
        (LinkShape(rates_bps=(80e6,)), 0.1),
    ],
    ids=["constant", "changing", "fast"],
)
def test_a_transfer_takes_what_arithmetic_says(relay: Relay, shape: LinkShape, expected_s: float) -> None:
    # 3 % is what the benchmark shows; here the least of three, since a shared machine only ever adds.
    payload = PAYLOAD[:-8][:1_000_000]
    with connect(relay) as connection:
        seconds = []
        for _ in range(3):
            relay.shape(up=shape)
            seconds.append(exchange(connection, payload))
    assert expected_s * 0.97 <= min(seconds) <= expected_s * 1.1 + 0.05


def test_two_connections_share_one_rate_and_control_goes_first(relay: Relay) -> None:
    relay.shape(up=LinkShape(rates_bps=(8e6,)))
    with connect(relay) as first, connect(relay) as second, connect(relay, is_data=False) as control:
        seconds: dict[str, float] = {}

        def send(name: str, connection: socket.socket) -> None:
            seconds[name] = exchange(connection, PAYLOAD[:500_000])

        threads = [threading.Thread(target=send, args=pair) for pair in (("first", first), ("second", second))]
        for thread in threads:
            thread.start()
        small_s = min(exchange(control, PAYLOAD[:100]) for _ in range(5))
        for thread in threads:
            thread.join()
    assert max(seconds.values()) >= 0.97  # a megabyte at 8 Mbps, whoever sends it
    assert small_s < 0.25  # while half a megabyte of data waits


def test_the_way_back_has_a_shape_of_its_own(relay: Relay) -> None:
    relay.shape(down=LinkShape(delay_s=0.2))
    with connect(relay) as connection:
        assert exchange(connection, PAYLOAD[:1000]) >= 0.2
        relay.shape(down=LinkShape())
        assert min(exchange(connection, PAYLOAD[:1000]) for _ in range(5)) < 0.2


def test_a_node_that_is_down_closes_the_connection_and_is_found_once_it_is_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    relay = Relay("relay", f"tcp://127.0.0.1:{port}", tmp_path)
    try:
        with connect(relay, is_data=False) as connection:
            assert connection.recv(1) == b""
        with Server(("127.0.0.1", port), Sink) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            with connect(relay, is_data=False) as connection:
                exchange(connection, PAYLOAD)
            server.shutdown()
            thread.join()
    finally:
        relay.stop()


def test_a_command_that_makes_no_sense_is_answered_and_changes_nothing(node: str, tmp_path: Path) -> None:
    process = ManagedProcess("relay", "runtime.testbed.shaping", ("--target", node), tmp_path)
    try:
        process.wait_line("READY", 20.0)
        for line in ("nonsense", '{"blackhole": true}', '{"up": {"rates_bps": [-1.0]}}', '{"up": {"delay_s": -1}}'):
            process.send_line(line)
            assert process.wait_line("ERROR", 20.0)
        process.send_line("{}")
        process.wait_line("OK", 20.0)
        process.close_input()
        wait_for(lambda: not process.is_alive)
    finally:
        process.wait()
