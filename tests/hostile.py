"""Hostile peers on raw sockets: a client that says Hello and then anything, a node that answers with anything."""

import contextlib
import math
import random
import threading
from collections.abc import Sequence

import msgspec
import zmq

from runtime.types import NodeState, Tier
from runtime.wire.endpoint import RoutingId, make_token
from runtime.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    Describe,
    Described,
    Envelope,
    Failure,
    Goodbye,
    Hello,
    Hop,
    LinkReport,
    Ping,
    Pong,
    Probe,
    Receipt,
    Refused,
    Result,
    Status,
    Welcome,
    encode,
)
from tests.hubs import HELLO, headers, submit

Message = tuple[bool, list[bytes]]
"""Whether it goes to control, and its frames."""


class Attacker:
    """Raw sockets with one token: says Hello as it should, then sends whatever it likes."""

    def __init__(self, context: zmq.Context, address: str) -> None:
        host, _, port = address.rpartition(":")
        token = make_token()
        self.control = self._open(context, f"{host}:{port}", RoutingId(token, True, 0))
        self.data = self._open(context, f"{host}:{int(port) + 1}", RoutingId(token, False, 0))
        self.control.send(encode(Hello(PROTOCOL_VERSION, "attacker", "", ())))
        self.data.send(encode(Envelope(0, Probe())))

    def _open(self, context: zmq.Context, address: str, routing_id: RoutingId) -> zmq.Socket:
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.setsockopt(zmq.ROUTING_ID, routing_id.to_bytes())
        socket.connect(address)
        return socket

    def send(self, socket: zmq.Socket, parts: list[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            socket.send_multipart(parts, zmq.NOBLOCK)
        with contextlib.suppress(zmq.Again):
            while True:
                self.control.recv(zmq.NOBLOCK)

    def close(self) -> None:
        self.control.close()
        self.data.close()


def riders(chance: random.Random) -> tuple[bool, Receipt | None]:
    """What may ride on a data message, true or not."""
    return chance.random() < 0.5, chance.choice((None, receipt(chance, chance.randrange(-1, 50))))


def receipt(chance: random.Random, sequence: int) -> Receipt:
    """A receipt with whatever clocks."""
    return Receipt(sequence, *(chance.choice((0.0, -1.0, 1e-3, 1e300, math.nan, math.inf)) for _ in range(3)))


def reading(chance: random.Random) -> float:
    """A number that may or may not be a reading."""
    return chance.choice((0.0, 1.5, -1.0, 1e300, 5e-324, math.nan, math.inf, -math.inf))


def node_state(chance: random.Random) -> NodeState:
    """Whatever a node may tell of itself."""
    told = [reading(chance) for _ in range(4)]
    number = chance.choice((0, 3, -5, 2**60))
    return NodeState(chance.choice(("x", "cloud", "edge0")), Tier.CLOUD, True, *told[:2], number, *told[2:])


def link_report(chance: random.Random) -> LinkReport:
    """Whatever a node may tell of a link."""
    samples = tuple((reading(chance), reading(chance)) for _ in range(chance.randrange(4)))
    target = chance.choice(("device", "edge0", "elsewhere"))
    return LinkReport(target, samples, reading(chance), reading(chance), chance.choice((0, -7, 2**62)))


def client_messages(chance: random.Random) -> Message:
    """A message that a client may or may not send: whether it goes to control, and its frames."""
    frames = [bytes(chance.randrange(200)) for _ in range(chance.randrange(4))]
    choices = [
        (True, [encode(message)])
        for message in (
            HELLO,
            Ping(1),
            Pong(1, chance.choice((0.0, math.nan, -math.inf))),
            Ack(receipt(chance, 1), chance.choice((0.0, -1.0, math.inf))),
            Cancel(2),
            Describe("m"),
            Status(NodeState("x", Tier.EDGE, True), ()),
        )
    ]
    choices += [
        (False, [encode(Envelope(chance.randrange(-5, 1000), submit(1, frames), *riders(chance))), *frames])
    ] * 4
    choices += [(False, [encode(Envelope(chance.randrange(1000), Probe())), bytes(50)])]
    choices += [(True, [msgspec.msgpack.encode(nested(chance.choice((10, 100, 5000))))])]
    choices += [(False, [b""] * chance.randrange(1, 5000))]
    return chance.choice(choices)


def nested(depth: int) -> object:
    value: object = 0
    for _ in range(min(depth, 900)):  # the encoder's own limit is near a thousand
        value = [value]
    return value


def mutate(chance: random.Random, parts: list[bytes]) -> list[bytes]:
    """Change some bytes, cut, double, swap or invent frames."""
    parts = list(parts)
    for _ in range(chance.randint(0, 3)):
        index = chance.randrange(len(parts))
        frame = bytearray(parts[index])
        action = chance.randrange(5)
        if action == 0 and frame:
            for _ in range(chance.randint(1, 6)):
                frame[chance.randrange(len(frame))] = chance.randrange(256)
        elif action == 1:
            del frame[chance.randrange(len(frame) + 1) :]
        elif action == 2:
            frame += chance.randbytes(chance.randrange(40))
        elif action == 3:
            parts.insert(index, chance.randbytes(chance.randrange(60)))
        elif len(parts) > 1:
            del parts[index - 1]
            continue
        parts[index] = bytes(frame)
    return parts


def node_messages(chance: random.Random, described: Described) -> Message:
    """A message that a node may or may not send."""
    frames = [bytes(chance.randrange(200)) for _ in range(chance.randrange(4))]
    state = node_state(chance)
    hop = Hop("x", *(reading(chance) for _ in range(4)), state)
    numbers = chance.randrange(-2, 50)
    choices: list[Message] = [
        (True, [encode(message)])
        for message in (
            described,
            Ping(1),
            Pong(numbers, chance.choice((0.0, math.nan, -math.inf))),
            Ack(receipt(chance, numbers), chance.choice((0.0, -1.0, math.inf))),
            Failure(numbers, "busy", "no", "x"),
            Refused("unknown", "say it again"),
            Status(state, (link_report(chance),) * chance.randrange(3), (Status(state, (link_report(chance),)),)),
            Goodbye(),
        )
    ]
    result = Result(numbers, (hop,) * chance.randrange(3), headers(frames))
    choices += [(False, [encode(Envelope(chance.randrange(1000), result, *riders(chance))), *frames])] * 4
    choices += [(False, [encode(Envelope(chance.randrange(1000), submit(1, frames))), *frames])]
    choices += [(True, [msgspec.msgpack.encode(nested(chance.choice((10, 100, 5000))))])]
    return chance.choice(choices)


class HostileNode:
    """A node that welcomes whoever comes, describes its model as it should once, and from then on sends anything.

    Args:
        welcome: its answer to Hello.
        described: its first answer to Describe.
        chance: what it draws from.
    """

    def __init__(self, welcome: Welcome, described: Described, chance: random.Random) -> None:
        self.sent = 0
        self._welcome, self._described, self._chance = welcome, described, chance
        self._context = zmq.Context()
        self._control, self._data, self.address = self._bind()
        self._stop = threading.Event()
        self._clients: list[tuple[bytes, bool]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "HostileNode":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _bind(self) -> tuple[zmq.Socket, zmq.Socket, str]:
        while True:
            control, data = self._context.socket(zmq.ROUTER), self._context.socket(zmq.ROUTER)
            port = control.bind_to_random_port("tcp://127.0.0.1")
            try:
                data.bind(f"tcp://127.0.0.1:{port + 1}")
            except zmq.ZMQError:
                control.close(0)
                data.close(0)
            else:
                return control, data, f"tcp://127.0.0.1:{port}"

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._data, zmq.POLLIN)
        while not self._stop.is_set():
            for socket, _ in poller.poll(0 if self._clients else 50):
                self._hear(socket)
            for client, is_control in self._clients[-2:]:
                to_control, parts = node_messages(self._chance, self._described)
                if to_control is is_control:
                    self._send(self._control if is_control else self._data, client, mutate(self._chance, parts))
                    self.sent += 1
            self._stop.wait(0.0005)  # the cores are shared with those that are to be served meanwhile

    def _hear(self, socket: zmq.Socket) -> None:
        client, *parts = socket.recv_multipart()
        if socket is self._data:
            self._meet(client, is_control=False)
            return
        with contextlib.suppress(msgspec.MsgspecError):
            match msgspec.msgpack.decode(parts[0], type=Hello | Describe | Ping | Pong | Ack | Cancel | Goodbye):
                case Hello():
                    self._send(socket, client, [encode(self._welcome)])
                case Describe():
                    self._send(socket, client, [encode(self._described)])
                    self._meet(client, is_control=True)
                case Ping(number=number):
                    self._send(socket, client, [encode(Pong(number, 0.0))])

    def _meet(self, client: bytes, *, is_control: bool) -> None:
        if (client, is_control) not in self._clients:
            self._clients.append((client, is_control))

    def _send(self, socket: zmq.Socket, client: bytes, parts: Sequence[bytes]) -> None:
        with contextlib.suppress(zmq.ZMQError):
            socket.send_multipart([client, *parts], zmq.NOBLOCK)
