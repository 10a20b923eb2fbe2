import socket
import threading
import time

import psutil
import pytest

from runtime.errors import ConfigError, ProtocolError, TransportError
from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Delivered, Joined, Left, Limits, Lost, Received, ReceivedData, Rejected
from runtime.wire.messages import PROTOCOL_VERSION, Cancel, Describe, Failure, Hello, Refused, Welcome
from tests.hubs import HELLO, Group, open_pair, result, submit, welcome

BRISK = Limits(ping_every_s=0.05, lost_after_s=0.4, left_after_s=0.5)


@pytest.fixture(scope="module", autouse=True)
def zero_copy_thread():
    """pyzmq starts one thread per process with the first large send, and keeps it: not what leak checks look for."""
    with open_pair() as (group, _, device, _, peer):
        device.send_data(peer, submit(1, [bytes(2**21)]), [bytes(2**21)], 1)
        group.wait(device, Delivered)


def test_both_sides_hear_of_each_other():
    with open_pair() as (group, node, device, client, peer):
        assert (peer.name, peer.is_client, peer.is_up) == ("edge", False, True)
        assert (client.name, client.is_client, client.is_up) == ("device", True, True)
        assert group.of(device, Connected)[0].welcome.node == "edge"
        assert group.of(node, Joined)[0].hello == HELLO


def test_control_messages_arrive_in_both_directions():
    with open_pair() as (group, node, device, client, peer):
        device.send(peer, Describe("model"))
        node.send(client, Failure(3, "busy", "queue is full", "edge"))
        assert group.wait(node, Received).message == Describe("model")
        assert group.wait(device, Received).message == Failure(3, "busy", "queue is full", "edge")


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 70_000, 3_000_000])
def test_data_goes_over_and_back_whole(nbytes):
    with open_pair() as (group, node, device, client, peer):
        frames = [bytes([i % 251]) * nbytes for i in range(3)]
        device.send_data(peer, submit(1, frames), frames, "up")
        received = group.wait(node, ReceivedData)
        assert [bytes(frame) for frame in received.frames] == frames
        node.send_data(client, result(1, received.frames), received.frames, "down")
        assert [bytes(frame) for frame in group.wait(device, ReceivedData).frames] == frames
        assert group.wait(device, Delivered).tag == "up"
        assert group.wait(node, Delivered).tag == "down"


def test_received_frames_are_writable_and_outlive_their_event():
    with open_pair() as (group, node, device, _, peer):
        device.send_data(peer, submit(1, [b"a" * 100_000]), [b"a" * 100_000], 1)
        (frame,) = group.wait(node, ReceivedData).frames
        group.forget()
        device.send_data(peer, submit(2, [b"b" * 100_000]), [b"b" * 100_000], 2)
        group.wait(node, ReceivedData)
        frame[0] = ord("c")
        assert bytes(frame[:3]) == b"caa"


def test_messages_arrive_in_the_order_they_were_queued_and_each_once():
    with open_pair() as (group, node, device, _, peer):
        for number in range(200):
            frames = [bytes(number * 37 % 5000)]
            device.send_data(peer, submit(number, frames), frames, number)
        group.wait(device, Delivered, 200)
        assert [event.body.request for event in group.of(node, ReceivedData)] == list(range(200))
        assert [event.tag for event in group.of(device, Delivered)] == list(range(200))


def test_transfer_and_waiting_times_add_up():
    with open_pair() as (group, _, device, _, peer):
        start_s = time.perf_counter()
        for number in range(5):
            device.send_data(peer, submit(number, [bytes(10**6)]), [bytes(10**6)], number)
        group.wait(device, Delivered, 5)
        elapsed_s = time.perf_counter() - start_s
        events = group.of(device, Delivered)
        waited = [event.waited_s for event in events]
        assert all(0 < event.transfer_s < elapsed_s for event in events)
        assert sum(event.transfer_s for event in events) <= elapsed_s * 1.01
        assert waited[-1] + events[-1].transfer_s <= elapsed_s * 1.01
        assert all(event.nbytes > 10**6 for event in events)


def test_tensors_that_go_back_and_forth_acknowledge_each_other():
    with open_pair() as (group, node, device, client, peer):
        group.drive(lambda: device.link_state(peer).samples and node.link_state(client).samples)
        group.drive(lambda: device.link_state(peer).rtt_s < 1 and node.link_state(client).rtt_s < 1)
        for number in range(20):
            device.send_data(peer, submit(number, [bytes(20_000)]), [bytes(20_000)], number)
            group.wait(node, ReceivedData, number + 1)
            node.send_data(client, result(number, [bytes(20_000)]), [bytes(20_000)], number)
            group.wait(device, ReceivedData, number + 1)
        group.wait(node, Delivered, 20)
        for hub, other in ((device, peer), (node, client)):
            assert [event.tag for event in group.of(hub, Delivered)] == list(range(20))
            assert all(event.transfer_s > 0 for event in group.of(hub, Delivered))
            assert len(hub.link_state(other).samples) == 8


def test_a_request_that_stood_in_the_queue_has_less_time_left():
    with open_pair() as (group, node, device, _, peer):
        for number in range(4):
            device.send_data(peer, submit(number, [bytes(10**7)], 9.0), [bytes(10**7)], number)
        group.wait(node, ReceivedData, 4)
        group.wait(device, Delivered, 4)
        left_s = [event.body.remaining_s for event in group.of(node, ReceivedData)]
        waited_s = [event.waited_s for event in group.of(device, Delivered)]
        assert left_s == pytest.approx([9.0 - seconds for seconds in waited_s])
        assert left_s[-1] < 9.0


def test_every_link_is_measured_by_its_sender_without_any_traffic():
    with open_pair() as (group, node, device, client, peer):
        group.drive(lambda: device.link_state(peer).samples and node.link_state(client).samples)
        for state in (device.link_state(peer), node.link_state(client)):
            assert {state.source, state.target} == {"device", "edge"}
            assert state.samples[0].bandwidth_bps > 1e6
            assert 0 <= state.samples[0].age_s < 10
            assert state.mean_bandwidth_bps > 1e6
        group.drive(lambda: device.link_state(peer).rtt_s < 1 and node.link_state(client).rtt_s < 1)


def test_the_backlog_is_what_is_queued():
    with open_pair() as (group, _, device, _, peer):
        group.drive(lambda: device.link_state(peer).samples and not device.link_state(peer).backlog_bytes)
        for number in range(3):
            device.send_data(peer, submit(number, [bytes(1000)]), [bytes(1000)], number)
        assert 3000 <= device.link_state(peer).backlog_bytes < 4000
        group.wait(device, Delivered, 3)
        assert device.link_state(peer).backlog_bytes == 0


def test_counters_count_every_byte_and_never_fall():
    with open_pair() as (group, node, device, client, peer):
        group.drive(lambda: node.traffic(client).probe_bytes and device.traffic(peer).probe_bytes)
        before = device.traffic(peer)
        assert 65536 < before.probe_bytes < 70_000
        device.send_data(peer, submit(1, [bytes(500_000)]), [bytes(500_000)], 1)
        group.wait(device, Delivered)
        group.rest(0.1)
        after = device.traffic(peer)
        assert after.sent_bytes - before.sent_bytes > 500_000
        assert after.received_bytes > before.received_bytes
        assert after.probe_bytes == before.probe_bytes
        assert node.traffic(client).received_bytes == pytest.approx(after.sent_bytes, abs=500)
        assert after.malformed_messages == 0


def test_poll_waits_no_longer_than_it_is_told_and_wake_ends_it():
    with Hub("alone") as hub:
        start_s = time.perf_counter()
        assert hub.poll(0.05) == []
        assert time.perf_counter() - start_s > 0.04
        thread = threading.Timer(0.05, hub.wake)
        thread.start()
        start_s = time.perf_counter()
        assert hub.poll(30.0) == []
        assert time.perf_counter() - start_s < 5
        thread.join()
        hub.wake()  # before the wait: it is not forgotten
        assert hub.poll(30.0) == []


def test_wake_from_many_threads_neither_blocks_nor_fails_even_after_close():
    with Hub("alone") as hub:
        threads = [threading.Thread(target=lambda: [hub.wake() for _ in range(20_000)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hub.poll(0.0)
    hub.wake()


# --- who comes and goes ---------------------------------------------------------------------------------------------


def test_a_client_that_disconnects_leaves_at_once():
    with open_pair() as (group, node, device, client, peer):
        device.disconnect(peer)
        assert group.wait(node, Left, timeout_s=3).reason in {"it said goodbye", "the connection was closed"}
        assert not client.is_up
        assert not peer.is_up
        device.disconnect(peer)


def test_a_node_that_closes_is_lost_at_once():
    with open_pair() as (group, node, device, _, peer):
        node.close()
        group.hubs.remove(node)
        start_s = time.perf_counter()
        group.wait(device, Lost)
        assert time.perf_counter() - start_s < 1.0  # by the goodbye, not by silence
        assert not peer.is_up


def test_a_node_can_send_a_client_away():
    with open_pair() as (group, node, device, client, _):
        node.disconnect(client)
        group.wait(device, Lost)
        assert group.of(node, Left) == []
        group.wait(node, Joined, 2)


def test_a_device_that_falls_silent_leaves_and_joins_anew_when_it_wakes():
    with open_pair(BRISK) as (group, node, device, client, peer):
        group.hubs.remove(device)
        group.wait(node, Left)
        assert "no word for" in group.of(node, Left)[0].reason
        assert not client.is_up
        group.hubs.append(device)
        group.wait(device, Connected, 2)
        assert group.wait(node, Joined, 2).peer is not client
        assert group.of(device, Connected)[1].peer is peer


def test_a_node_that_falls_silent_is_lost_after_the_time_given():
    with open_pair(BRISK) as (group, node, device, _, peer):
        group.hubs.remove(node)
        start_s = time.perf_counter()
        assert "no word for 0.4 s" in group.wait(device, Lost).reason
        assert time.perf_counter() - start_s > 0.3
        group.hubs.append(node)
        group.wait(device, Connected, 2)
        assert peer.is_up


def test_a_pause_of_our_own_is_not_taken_for_the_peers():
    with open_pair(BRISK) as (group, node, device, client, _):
        stop = threading.Event()
        thread = threading.Thread(target=lambda: [node.poll(0.01) for _ in iter(stop.is_set, True)])
        thread.start()
        stop.wait(
            0.45
        )  # the device is busy elsewhere for longer than it grants the node, which sends pings all the while
        device.poll(0.0)
        stop.set()
        thread.join()
        assert group.of(device, Lost) == []
        assert client.is_up


def test_what_is_sent_to_a_peer_that_is_gone_is_dropped_without_an_error():
    with open_pair() as (group, node, device, _, peer):
        node.close()
        group.hubs.remove(node)
        group.wait(device, Lost)
        device.send(peer, Cancel(1))
        device.send_data(peer, submit(1, [b"abc"]), [b"abc"], 1)
        device.withdraw(peer, 1)
        assert device.link_state(peer).backlog_bytes == 0
        group.rest(0.05)


def test_a_restarted_node_gets_nothing_that_was_meant_for_the_one_before():
    with open_pair() as (group, node, device, _, peer):
        address = peer.address
        group.hubs.remove(node)
        for number in range(3):
            device.send_data(peer, submit(number, [bytes(10**6)]), [bytes(10**6)], number)
        device.poll(0.01)
        node.close()
        group.wait(device, Lost)
        with Hub("edge") as second:
            second.bind(address, welcome)
            group.hubs.append(second)
            group.events[second] = []
            group.wait(device, Connected, 2)
            device.send_data(peer, submit(7, [b"new"]), [b"new"], 7)
            group.wait(device, Delivered)
            group.rest(0.1)
            assert [event.body.request for event in group.of(second, ReceivedData)] == [7]
            group.hubs.remove(second)


def test_several_clients_are_served_apart():
    with Hub("edge") as node, Hub("a") as first, Hub("b") as second:
        group = Group(node, first, second)
        address = node.bind("tcp://127.0.0.1:*", welcome)
        peers = {
            hub: hub.connect("edge", address, Hello(PROTOCOL_VERSION, hub.name, "", ())) for hub in (first, second)
        }
        group.wait(node, Joined, 2)
        group.drive(lambda: all(peer.is_up for peer in peers.values()))
        for hub, peer in peers.items():
            hub.send_data(peer, submit(1, [hub.name.encode()]), [hub.name.encode()], 1)
        group.wait(node, ReceivedData, 2)
        for event in group.of(node, ReceivedData):
            assert bytes(event.frames[0]).decode() == event.peer.name
            node.send_data(event.peer, result(1, event.frames), event.frames, 1)
        for hub in peers:
            assert bytes(group.wait(hub, ReceivedData).frames[0]).decode() == hub.name


def test_one_hub_is_client_and_node_at_once():
    with Hub("device") as device, Hub("edge") as edge, Hub("cloud") as cloud:
        group = Group(device, edge, cloud)
        onward = edge.connect("cloud", cloud.bind("tcp://127.0.0.1:*", welcome), HELLO)
        peer = device.connect("edge", edge.bind("tcp://127.0.0.1:*", welcome), HELLO)
        group.wait(edge, Connected)
        group.wait(device, Connected)
        device.send_data(peer, submit(1, [b"abc"]), [b"abc"], 1)
        received = group.wait(edge, ReceivedData)
        edge.send_data(onward, received.body, received.frames, 2)
        assert [bytes(frame) for frame in group.wait(cloud, ReceivedData).frames] == [b"abc"]


def test_a_node_takes_so_many_clients_and_no_more():
    with Hub("edge", limits=Limits(clients=1)) as node, Hub("a") as first, Hub("b") as second:
        group = Group(node, first, second)
        address = node.bind("tcp://127.0.0.1:*", welcome)
        peer = first.connect("edge", address, HELLO)
        group.wait(first, Connected)
        second.connect("edge", address, HELLO)
        assert "expected at most 1 clients" in str(group.wait(second, Rejected).error)
        first.disconnect(peer)
        group.wait(second, Connected)


# --- handshakes that fail -------------------------------------------------------------------------------------------


def test_a_client_of_another_version_is_refused_with_what_to_do():
    with Hub("edge") as node, Hub("device") as device:
        group = Group(node, device)
        hello = Hello(PROTOCOL_VERSION + 1, "device", "", ())
        device.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), hello)
        error = group.wait(device, Rejected).error
        assert f"expected protocol version {PROTOCOL_VERSION}, got {PROTOCOL_VERSION + 1}" in str(error)
        assert "install the same version" in str(error)
        assert group.of(node, Joined) == []
        group.rest(0.3)
        assert len(group.of(device, Rejected)) == 1


def test_the_owner_decides_who_is_welcome_and_may_change_its_mind():
    answers = [Refused("model", "expected model a, got b; start a worker for b")]
    with Hub("edge") as node, Hub("device") as device:
        group = Group(node, device)
        peer = device.connect(
            "edge", node.bind("tcp://127.0.0.1:*", lambda hello: answers.pop() if answers else welcome(hello)), HELLO
        )
        assert "expected model a, got b; start a worker for b" in str(group.wait(device, Rejected).error)
        group.wait(device, Connected)
        assert peer.is_up


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_in_use_is_named_with_what_to_do(taken):
    with socket.socket() as other, Hub("edge") as node:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1] - taken
        with pytest.raises(
            TransportError, match=rf"tcp://127.0.0.1:{port + taken}.*the port is in use; stop the"
        ) as found:
            node.bind(f"tcp://127.0.0.1:{port}", welcome)
        assert found.value.errno == 98
        node.bind("tcp://127.0.0.1:*", welcome)  # the failure left nothing behind


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://192.0.2.7:7001", "tcp://example.org:7001"])
def test_an_address_beyond_this_machine_needs_keys(address):
    with Hub("edge") as hub:
        with pytest.raises(ConfigError, match=r"expected a loopback address .* or CURVE keys"):
            hub.bind(address, welcome)
        with pytest.raises(ConfigError, match=r"expected a loopback address .* or CURVE keys"):
            hub.connect("edge", address, HELLO)


def test_an_address_beyond_this_machine_is_allowed_when_insecure():
    with Hub("edge", insecure=True) as hub:
        assert hub.bind("tcp://0.0.0.0:*", welcome).startswith("tcp://0.0.0.0:")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.9", "[::1]"])
def test_every_loopback_address_will_do(host):
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with Hub("edge") as node, Hub("device") as device:
        group = Group(node, device)
        device.connect("edge", node.bind(f"tcp://{host}:*", welcome), HELLO)
        group.wait(device, Connected)


@pytest.mark.parametrize("address", ["127.0.0.1:7001", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:65535"])
def test_what_is_no_address_is_refused(address):
    with Hub("edge") as hub, pytest.raises(ConfigError, match="expected an address like"):
        hub.bind(address, welcome)


def test_a_hub_is_bound_once_and_connects_to_real_ports_only():
    with Hub("edge") as hub:
        hub.bind("tcp://127.0.0.1:*", welcome)
        with pytest.raises(ConfigError, match="expected one bind per hub"):
            hub.bind("tcp://127.0.0.1:*", welcome)
        with pytest.raises(ConfigError, match="expected a port to connect to"):
            hub.connect("edge", "tcp://127.0.0.1:*", HELLO)


def test_control_and_data_have_consecutive_ports():
    with Hub("edge") as hub:
        port = int(hub.bind("tcp://127.0.0.1:*", welcome).rpartition(":")[2])
        listening = {c.laddr.port for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
        assert {port, port + 1} <= listening


# --- caps -----------------------------------------------------------------------------------------------------------


def test_what_the_peer_would_not_take_is_refused_before_it_leaves():
    limits = Limits(message_bytes=10_000, control_bytes=2000, frames=4)
    with open_pair(limits) as (group, _, device, client, peer):
        with pytest.raises(ProtocolError, match="expected at most 4 frames of 10000 bytes together, got 1 of 10001"):
            device.send_data(peer, submit(1, [bytes(10_001)]), [bytes(10_001)], 1)
        with pytest.raises(ProtocolError, match="expected at most 4 frames"):
            device.send_data(peer, submit(1, [b""] * 5), [b""] * 5, 1)
        with pytest.raises(ProtocolError, match="expected a control message of at most 2000 bytes, got a Describe"):
            device.send(peer, Describe("x" * 2000))
        group.rest(0.05)
        assert peer.is_up
        assert client.is_up


@pytest.mark.parametrize("frame", ["text", memoryview(bytes(8)).cast("I"), memoryview(bytes(8))[::2]])
def test_a_frame_that_is_no_run_of_bytes_is_refused_before_half_a_message_is_out(frame):
    with open_pair() as (group, node, device, _, peer):
        with pytest.raises(TypeError):
            device.send_data(peer, submit(1, [b"good", b"bad"]), [b"good", frame], 1)
        device.send_data(peer, submit(2, [b"good"]), [b"good"], 2)
        assert group.wait(node, ReceivedData).body.request == 2


def test_a_peer_that_leaves_too_much_waiting_is_given_up():
    with open_pair(Limits(backlog_bytes=5_000_000, message_bytes=2_000_000)) as (group, node, device, client, _):
        group.hubs.remove(device)
        for number in range(6):
            node.send_data(client, result(number, [bytes(10**6)]), [bytes(10**6)], number)
        assert "leaves more than 5000000 bytes waiting" in group.wait(node, Left).reason
        assert node.link_state(client).backlog_bytes == 0
        group.hubs.append(device)
        group.wait(device, Connected, 2)


def test_a_closed_hub_says_so():
    hub = Hub("edge")
    hub.close()
    hub.close()
    with pytest.raises(TransportError, match="hub 'edge' is closed; open a new one"):
        hub.poll(0.0)


def test_fifty_hubs_leave_no_descriptor_thread_or_port():
    process = psutil.Process()
    with open_pair():
        pass
    before = process.num_fds(), threading.active_count()
    for _ in range(50):
        with open_pair() as (group, node, device, client, peer):
            device.send_data(peer, submit(1, [bytes(100_000)]), [bytes(100_000)], 1)
            group.wait(node, ReceivedData)
            node.send_data(client, result(1, [bytes(100_000)]), [bytes(100_000)], 1)
            device.withdraw(peer, 1)
    assert (process.num_fds(), threading.active_count()) == before


def test_closing_takes_no_time_even_with_data_on_the_way():
    with open_pair() as (_, _, device, _, peer):
        for number in range(20):
            device.send_data(peer, submit(number, [bytes(10**7)]), [bytes(10**7)], number)
        device.poll(0.0)
        start_s = time.perf_counter()
        device.close()
        assert time.perf_counter() - start_s < 2.0


def test_the_owner_is_asked_once_per_client():
    seen = []

    def remember(hello: Hello) -> Welcome | Refused:
        seen.append(hello)
        return welcome(hello)

    with open_pair(welcome=remember):
        assert seen == [HELLO]
