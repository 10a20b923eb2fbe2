"""Two and three real processes: what happens when one is killed, restarted, or no longer reachable."""

import json
import time

import psutil
import pytest

from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Delivered, Limits, Lost, ReceivedData
from tests.hubs import HELLO, Group, start_node, start_relay, submit

pytestmark = pytest.mark.integration

FRAME = bytes(400_000)


@pytest.fixture(scope="module", autouse=True)
def zero_copy_thread():
    """pyzmq's thread for zero-copy sends stays for the life of the process."""
    with start_node() as child, Hub("device") as device:
        group, peer = Group(device), device.connect("edge", child.ready(), HELLO)
        group.wait(device, Connected)
        device.send_data(peer, submit(0, [bytes(2**21)]), [bytes(2**21)], 0)
        group.wait(device, Delivered)


def echo(group: Group, device: Hub, peer, number: int) -> None:
    """Send a request and wait for its answer and its acknowledgement."""
    delivered, received = len(group.of(device, Delivered)), len(group.of(device, ReceivedData))
    device.send_data(peer, submit(number, [FRAME]), [FRAME], number)
    answer = group.wait(device, ReceivedData, received + 1)
    assert (answer.body.request, len(answer.frames[0])) == (number, len(FRAME))
    assert group.wait(device, Delivered, delivered + 1).tag == number


def test_a_killed_node_is_lost_at_once_and_used_again_after_its_restart():
    with Hub("device") as device:
        group = Group(device)
        with start_node() as child:
            peer = device.connect("edge", child.ready(), HELLO)
            group.wait(device, Connected)
            echo(group, device, peer, 1)
            for number in (2, 3):
                device.send_data(peer, submit(number, [FRAME]), [FRAME], number)
            child.process.kill()
            start_s = time.perf_counter()
            group.wait(device, Lost)
            assert time.perf_counter() - start_s < 1.0  # by the closed connection, not by silence
        group.rest(0.3)  # nobody is there: calling goes on
        with start_node(peer.address) as child:
            assert child.ready() == peer.address
            group.wait(device, Connected, 2)
            group.forget()
            echo(group, device, peer, 4)
            group.rest(0.2)
            assert [event.body.request for event in group.of(device, ReceivedData)] == [4]


def test_measured_transfers_are_plausible_between_processes():
    with Hub("device") as device, start_node() as child:
        group, peer = Group(device), device.connect("edge", child.ready(), HELLO)
        group.wait(device, Connected)
        for number in range(20):
            echo(group, device, peer, number)
        times = [event.transfer_s for event in group.of(device, Delivered)]
        assert all(1e-5 < transfer_s < 1.0 for transfer_s in times)
        state = device.link_state(peer)
        assert len(state.samples) == 8
        assert state.samples[0].bandwidth_bps == pytest.approx(8 * len(FRAME) / times[-1], rel=0.01)
        assert 0 < state.rtt_s < 0.5


def test_a_node_behind_a_black_hole_is_lost_by_its_silence_and_comes_back_with_the_link():
    limits = Limits(ping_every_s=0.1, lost_after_s=0.5)
    with Hub("device", limits=limits) as device, start_node() as child, start_relay(child.ready()) as relay:
        group = Group(device)
        peer = device.connect("edge", relay.ready(), HELLO)
        group.wait(device, Connected)
        echo(group, device, peer, 1)
        assert relay.say(json.dumps({"black_hole": True})).startswith("OK")
        device.send_data(peer, submit(2, [FRAME]), [FRAME], 2)
        start_s = time.perf_counter()
        assert "no word for" in group.wait(device, Lost).reason
        assert time.perf_counter() - start_s > 0.3
        group.rest(0.5)
        assert not peer.is_up
        assert relay.say(json.dumps({"black_hole": False})).startswith("OK")
        group.wait(device, Connected, 2)
        group.forget()
        echo(group, device, peer, 3)
        group.rest(0.2)
        assert [event.body.request for event in group.of(device, ReceivedData)] == [3]


def test_a_node_that_dies_and_returns_behind_a_relay_is_found_again():
    with Hub("device") as device, start_node() as first:
        target = first.ready()
        with start_relay(target) as relay:
            group = Group(device)
            peer = device.connect("edge", relay.ready(), HELLO)
            group.wait(device, Connected)
            first.kill()
            group.wait(device, Lost)
            group.rest(0.3)
            with start_node(target) as second:
                second.ready()
                group.wait(device, Connected, 2)
                group.forget()
                echo(group, device, peer, 1)


def test_an_upload_in_flight_is_withdrawn_and_the_next_one_goes_through():
    limits = Limits(lost_after_s=30.0)
    with Hub("device", limits=limits) as device, start_node() as child, start_relay(child.ready()) as relay:
        group = Group(device)
        peer = device.connect("edge", relay.ready(), HELLO)
        group.wait(device, Connected)
        echo(group, device, peer, 1)
        relay.say(json.dumps({"black_hole": True}))
        device.send_data(peer, submit(2, [FRAME]), [FRAME], 2)
        device.send_data(peer, submit(3, [FRAME]), [FRAME], 3)
        group.rest(0.2)
        relay.say(json.dumps({"black_hole": False}))  # closes what it swallowed
        group.wait(device, Connected, 2)
        group.forget()
        device.send_data(peer, submit(4, [bytes(50_000_000)]), [bytes(50_000_000)], 4)
        device.send_data(peer, submit(5, [FRAME]), [FRAME], 5)
        device.withdraw(peer, 4)
        group.drive(lambda: any(event.body.request == 5 for event in group.of(device, ReceivedData)))
        assert [event.tag for event in group.of(device, Delivered)] == [5]
        assert group.of(device, Lost) == []
        assert device.link_state(peer).backlog_bytes == 0


def test_a_node_that_is_told_to_end_says_goodbye():
    with Hub("device") as device, start_node() as child:
        group = Group(device)
        device.connect("edge", child.ready(), HELLO)
        group.wait(device, Connected)
        assert child.end_input() == 0
        assert group.wait(device, Lost).reason in {
            "the node said goodbye",
            "the connection was closed: the node stopped, or the way to it was cut",
        }


def test_results_that_a_reopened_data_socket_would_have_lost_come_once_and_in_order():
    """Withdrawing reopens the data socket, over which results are on their way: none may be lost or doubled."""
    with Hub("device") as device, start_node(result_bytes=1_000_000) as child:
        group, peer = Group(device), device.connect("edge", child.ready(), HELLO)
        group.wait(device, Connected)
        wanted = []
        for number in range(60):
            device.send_data(peer, submit(number, [b"x" * 300_000]), [b"x" * 300_000], number)
            if number % 3 == 2:
                device.send_data(peer, submit(1000 + number, [bytes(30_000_000)]), [bytes(30_000_000)], 1000 + number)
                group.rest(0.01)
                device.withdraw(peer, 1000 + number)
            wanted.append(number)
        answered: list[int] = []

        def has_all() -> bool:
            answered[:] = [e.body.request for e in group.of(device, ReceivedData) if e.body.request < 1000]
            return len(answered) >= len(wanted)

        group.drive(has_all, 30)
        group.rest(0.2)
        has_all()
        assert answered == wanted
        assert group.of(device, Lost) == []


def test_memory_and_descriptors_stay_flat_over_many_messages():
    with Hub("device") as device, start_node() as child:
        group, peer = Group(device), device.connect("edge", child.ready(), HELLO)
        group.wait(device, Connected)
        far, near = psutil.Process(child.process.pid), psutil.Process()

        def use(count: int) -> tuple[int, int, int, int]:
            for number in range(count):
                echo(group, device, peer, number)
                group.forget()
            return near.num_fds(), far.num_fds(), near.memory_info().rss, far.memory_info().rss

        before = use(300)
        after = use(600)
        assert after[:2] == before[:2]
        assert all(b - a < 20e6 for a, b in zip(before[2:], after[2:], strict=True))
