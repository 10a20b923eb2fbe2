"""Broken and hostile peers at a bound hub, while an honest one is served."""

import contextlib
import random

import psutil
import pytest
import zmq

from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Delivered, Limits, ReceivedData
from runtime.wire.messages import Envelope, Ping, Probe, encode
from tests.hostile import Attacker, client_messages, mutate
from tests.hubs import HELLO, Group, submit, welcome

NUM_MESSAGES = 900


@pytest.fixture
def context():
    """A context of its own for raw sockets, closed with them whatever happens."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_mutated_messages_do_not_keep_an_honest_client_from_being_served(context):
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
            is_control, parts = client_messages(chance)
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
        assert node.num_malformed > NUM_MESSAGES // 30
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
