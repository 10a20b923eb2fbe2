"""Broken and hostile peers at a bound hub, while an honest one is served."""

import contextlib
import random

import msgspec
import psutil
import pytest
import zmq

from runtime.types import NodeState, Tier
from runtime.wire.channel import Hub
from runtime.wire.endpoint import RoutingId, make_token
from runtime.wire.events import Connected, Delivered, Limits, ReceivedData
from runtime.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    Describe,
    Envelope,
    Hello,
    Ping,
    Pong,
    Probe,
    Status,
    encode,
)
from tests.hubs import HELLO, Group, submit, welcome

NUM_MESSAGES = 3000


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


def seeds(chance: random.Random) -> tuple[bool, list[bytes]]:
    """A message that a client may or may not send: whether it goes to control, and its frames."""
    frames = [bytes(chance.randrange(200)) for _ in range(chance.randrange(4))]
    choices = [
        (True, [encode(message)])
        for message in (
            HELLO,
            Ping(1),
            Pong(1),
            Ack(1),
            Cancel(2),
            Describe("m"),
            Status(NodeState("x", Tier.EDGE, True), ()),
        )
    ]
    choices += [(False, [encode(Envelope(chance.randrange(-5, 1000), submit(1, frames))), *frames])] * 4
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


@pytest.fixture
def context():
    """A context of its own for raw sockets, closed with them whatever happens."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_three_thousand_mutated_messages_do_not_keep_an_honest_client_from_being_served(context):
    chance = random.Random(11)
    with Hub("edge", limits=Limits(malformed=40)) as node, Hub("device") as device:
        group = Group(node, device)
        address = node.bind("tcp://127.0.0.1:*", welcome)
        peer = device.connect("edge", address, HELLO)
        group.wait(device, Connected)
        attacker = Attacker(context, address)
        sent = 0
        memory = []
        while sent < NUM_MESSAGES:
            if sent % 150 == 149:  # by now it is out, most likely: another one comes
                attacker.close()
                attacker = Attacker(context, address)
            is_control, parts = seeds(chance)
            attacker.send(attacker.control if is_control else attacker.data, mutate(chance, parts))
            sent += 1
            if sent % 25 == 0:
                number = sent // 25
                device.send_data(peer, submit(number, [b"honest"]), [b"honest"], number)
                group.drive(lambda: group.of(device, Delivered))
                group.forget()
            if sent in (NUM_MESSAGES // 3, NUM_MESSAGES - 1):
                memory.append(psutil.Process().memory_info().rss)
        attacker.close()
        assert node.num_malformed > 100
        assert peer.is_up
        assert device.num_malformed == 0
        assert memory[1] - memory[0] < 30e6
        device.send_data(peer, submit(1, [b"last"]), [b"last"], "last")
        group.drive(
            lambda: any(bytes(event.frames[0]) == b"last" for event in group.of(node, ReceivedData) if event.frames)
        )


def test_a_message_of_too_many_frames_or_bytes_is_dropped_and_counted(context):
    limits = Limits(frames=10, message_bytes=100_000, control_bytes=10_000)
    with Hub("edge", limits=limits) as node:
        group = Group(node)
        attacker = Attacker(context, node.bind("tcp://127.0.0.1:*", welcome))
        group.rest(0.1)
        for parts in ([b""] * 50, [bytes(60_000)] * 3, [bytes(20_000)]):
            attacker.data.send_multipart(parts)
        group.drive(lambda: node.num_malformed == 3)
        attacker.control.send_multipart([b"a", b"b"])
        group.drive(lambda: node.num_malformed == 4)
        frames = [bytes(1000)] * 10
        attacker.data.send_multipart([encode(Envelope(1, submit(1, frames))), *frames])
        group.wait(node, ReceivedData)
        attacker.close()


def test_a_frame_above_the_cap_costs_the_connection_and_no_memory(context):
    limits = Limits(message_bytes=10_000)
    with Hub("edge", limits=limits) as node, Hub("device", limits=limits) as device:
        group = Group(node, device)
        address = node.bind("tcp://127.0.0.1:*", welcome)
        attacker = Attacker(context, address)
        group.rest(0.1)
        attacker.data.send_multipart([encode(Envelope(1, Probe())), bytes(50_000_000)])
        group.rest(0.2)
        assert group.of(node, ReceivedData) == []
        peer = device.connect("edge", address, HELLO)
        group.wait(device, Connected)
        device.send_data(peer, submit(1, [bytes(9000)]), [bytes(9000)], 1)
        group.wait(device, Delivered)
        attacker.close()


def test_a_flood_of_control_messages_delays_nobody_for_long(context):
    with Hub("edge") as node, Hub("device") as device:
        group = Group(node, device)
        address = node.bind("tcp://127.0.0.1:*", welcome)
        peer = device.connect("edge", address, HELLO)
        group.wait(device, Connected)
        attacker = Attacker(context, address)
        for number in range(5000):
            with contextlib.suppress(zmq.Again):
                attacker.control.send(encode(Ping(number)), zmq.NOBLOCK)
        device.send_data(peer, submit(1, [b"honest"]), [b"honest"], 1)
        group.wait(device, Delivered, timeout_s=5)
        attacker.close()
