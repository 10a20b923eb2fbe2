"""Hubs that talk to each other: driven side by side in one thread, or an echoing node in a process of its own.

`python -m tests.hubs ADDRESS [RESULT_BYTES]` is that node: prints `READY <address>`, answers every `Submit` with a
`Result` (the same frames, or RESULT_BYTES of zeros), and ends with its standard input.
"""

import contextlib
import math
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from runtime.types import Plan, Tier
from runtime.wire.channel import Hub
from runtime.wire.events import Buffer, Connected, Event, Joined, Limits, Peer, ReceivedData
from runtime.wire.messages import PROTOCOL_VERSION, Ack, Hello, Receipt, Refused, Result, Submit, TensorHeader, Welcome

ROOT = Path(__file__).parent.parent
PLAN = Plan.split(3, 1, 2)
HELLO = Hello(PROTOCOL_VERSION, "device", "", ())
Kind = TypeVar("Kind", bound=Event)


def welcome(hello: Hello) -> Welcome | Refused:
    """Let everybody in."""
    return Welcome(PROTOCOL_VERSION, "edge", Tier.EDGE, (), ())


def headers(frames: Sequence[Buffer]) -> tuple[TensorHeader, ...]:
    """Describe frames as flat tensors of bytes."""
    return tuple(TensorHeader(f"v{i}", (len(f),), "uint8", (0,), "raw", len(f)) for i, f in enumerate(frames))


def submit(request: int, frames: Sequence[Buffer], remaining_s: float = 10.0) -> Submit:
    """Make a request that carries these frames."""
    return Submit(request, "model", PLAN, "tensor", remaining_s, headers(frames))


def result(request: int, frames: Sequence[Buffer]) -> Result:
    """Make an answer that carries these frames."""
    return Result(request, (), headers(frames))


def ack(sequence: int, held_s: float = 0.0) -> Ack:
    """Make an acknowledgement by somebody whose clock nobody knows."""
    return Ack(Receipt(sequence, math.nan, math.nan, math.nan), held_s)


class Group:
    """Some hubs polled in turn, and every event they told, by hub."""

    def __init__(self, *hubs: Hub) -> None:
        self.hubs = list(hubs)
        self.events: dict[Hub, list[Event]] = {hub: [] for hub in hubs}

    def drive(self, until: Callable[[], object], timeout_s: float = 10.0) -> None:
        """Poll all hubs until a condition holds."""
        deadline_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline_s, f"did not happen in {timeout_s} s; events: {self.events}"
            for hub in self.hubs:
                self.events[hub] += hub.poll(0.002)

    def rest(self, seconds: float) -> None:
        """Poll all hubs for a while."""
        until_s = time.monotonic() + seconds
        self.drive(lambda: time.monotonic() > until_s, seconds + 10)

    def of(self, hub: Hub, kind: type[Kind]) -> list[Kind]:
        """All events of a kind that a hub has told so far."""
        return [event for event in self.events[hub] if isinstance(event, kind)]

    def wait(self, hub: Hub, kind: type[Kind], count: int = 1, timeout_s: float = 10.0) -> Kind:
        """Poll until a hub has told that many events of a kind, and give the newest."""
        self.drive(lambda: len(self.of(hub, kind)) >= count, timeout_s)
        return self.of(hub, kind)[count - 1]

    def forget(self) -> None:
        """Drop all events told so far."""
        for events in self.events.values():
            events.clear()


@contextlib.contextmanager
def open_pair(
    limits: Limits | None = None, welcome: Callable[[Hello], Welcome | Refused] = welcome
) -> Iterator[tuple[Group, Hub, Hub, Peer, Peer]]:
    """Give a node and a device that are connected: group, node, device, the node's peer of it and its of the node."""
    with Hub("edge", limits=limits) as node, Hub("device", limits=limits) as device:
        group = Group(node, device)
        peer = device.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), HELLO)
        group.wait(device, Connected)
        client = group.wait(node, Joined).peer
        yield group, node, device, client, peer


class Child:
    """A process that prints lines: started, read under a deadline, never left behind."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._rest = b""

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def line(self, timeout_s: float = 30.0) -> str:
        """Read its next line of output."""
        stdout = self.process.stdout
        assert stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                assert selector.select(deadline_s - time.monotonic()), f"no line within {timeout_s} s"
                data = os.read(stdout.fileno(), 65536)
                assert data, f"ended with {self.process.wait()} after {self._rest!r}"
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def ready(self) -> str:
        """Wait for READY and give what follows."""
        word, _, text = self.line().partition(" ")
        assert word == "READY"
        return text

    def say(self, line: str) -> str:
        """Write a line and give the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self.line()

    def end_input(self) -> int:
        """Close its standard input and wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(10)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def start_node(address: str = "tcp://127.0.0.1:*", result_bytes: int = -1) -> Child:
    """Start an echoing node; `ready` gives its address."""
    return Child("-m", "tests.hubs", address, str(result_bytes))


def start_relay(target: str) -> Child:
    """Start a relay in front of a node; `ready` gives its address."""
    return Child("-m", "runtime.testbed.shaping", "--target", target)


def _serve(address: str, result_bytes: int) -> None:
    with Hub("edge") as hub:
        ended = threading.Event()

        def wait_for_end() -> None:
            sys.stdin.read()
            ended.set()
            hub.wake()

        print(f"READY {hub.bind(address, welcome)}", flush=True)
        threading.Thread(target=wait_for_end, daemon=True).start()
        while not ended.is_set():
            for event in hub.poll(1.0):
                if isinstance(event, ReceivedData) and isinstance(event.body, Submit):
                    frames: Sequence[Buffer] = event.frames if result_bytes < 0 else [bytes(result_bytes)]
                    hub.send_data(event.peer, result(event.body.request, frames), frames, event.body.request)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
