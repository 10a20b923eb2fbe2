import pytest

from runtime.types import NodeState, Tier
from runtime.wire.door import Door, Routers, Strikes
from runtime.wire.endpoint import RoutingId, make_token
from runtime.wire.events import Delivered, Event, Joined, Left, Limits, Received, ReceivedData, Sent
from runtime.wire.messages import (
    ENVELOPE_DECODER,
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    Describe,
    Envelope,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Probe,
    Refused,
    Result,
    Status,
    Welcome,
    encode,
)
from tests.hubs import HELLO, ack, result, submit, welcome


class Client:
    """A client's routing ids, and what a door sent there."""

    def __init__(self, door: "OpenDoor", token: bytes | None = None, generation: int = 0) -> None:
        self.door = door
        self.token = make_token() if token is None else token
        self.control_id = RoutingId(self.token, True, generation).to_bytes()
        self.data_generation = generation

    @property
    def data_id(self) -> bytes:
        return RoutingId(self.token, False, self.data_generation).to_bytes()

    def tell(self, message, now_s: float = 0.0) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        self.door.hear(self.control_id, [memoryview(data)], len(data), now_s)

    def tell_data(self, envelope, frames=(), now_s: float = 0.0) -> None:
        header = envelope if isinstance(envelope, bytes) else encode(envelope)
        parts = [memoryview(part) for part in (header, *frames)]
        self.door.hear_data(self.data_id, parts, sum(map(len, parts)), now_s)

    def join(self, now_s: float = 0.0) -> "Client":
        self.tell(HELLO, now_s)
        self.tell_data(Envelope(0, Probe()), now_s=now_s)
        return self

    @property
    def heard(self) -> list:
        return self.door.control.get(self.control_id, [])

    @property
    def got(self) -> list[Envelope]:
        return self.door.data.get(self.data_id, [])


class OpenDoor(Door):
    """A door whose routers are lists."""

    def __init__(self, answer=welcome, limits: Limits | None = None) -> None:
        self.events: list[Event] = []
        self.control: dict[bytes, list] = {}
        self.data: dict[bytes, list[Envelope]] = {}
        self.outcome = Sent.AWAY
        routers = Routers(send_control=self._send_control, send_data=self._send_data)
        super().__init__(answer, routers, limits=limits or Limits(), emit=self.events.append)

    def _send_control(self, address, parts):
        if self.outcome is Sent.AWAY:
            self.control.setdefault(address, []).append(DECODE(parts[0]))
        return self.outcome

    def _send_data(self, address, parts):
        if self.outcome is Sent.AWAY:
            self.data.setdefault(address, []).append(ENVELOPE_DECODER.decode(parts[0]))
        return self.outcome

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


def DECODE(data):  # noqa: N802
    from runtime.wire.messages import CONTROL_DECODER

    return CONTROL_DECODER.decode(data)


def test_a_hello_is_answered_and_a_repeated_one_again_without_a_second_client():
    door = OpenDoor()
    client = Client(door).join()
    client.tell(HELLO)
    assert [type(message) for message in client.heard if not isinstance(message, Ping)] == [Welcome, Welcome]
    assert len(door.of(Joined)) == 1


def test_a_stranger_is_told_to_say_hello_and_its_data_is_not_read():
    door = OpenDoor()
    client = Client(door)
    client.tell(Ping(1))
    assert client.heard == [Refused("unknown", "this node does not know you; say Hello")]
    client.tell_data(b"\xc1 not even msgpack")
    assert (door.num_strange, door.num_malformed) == (1, 0)
    client.tell(Goodbye())
    assert len(client.heard) == 1


def test_a_hello_of_another_version_is_refused_before_the_owner_is_asked():
    door = OpenDoor(answer=lambda hello: pytest.fail("was asked"))
    client = Client(door)
    client.tell(Hello(PROTOCOL_VERSION + 1, "device", "", ()))
    (refused,) = client.heard
    assert refused.reason == "version"
    assert f"expected protocol version {PROTOCOL_VERSION}, got {PROTOCOL_VERSION + 1}" in refused.text


def test_even_a_hello_that_cannot_be_read_is_refused_by_its_version():
    door = OpenDoor()
    client = Client(door)
    client.tell(b"\x82\xa4type\xa5Hello\xa7version\x63")  # {"type": "Hello", "version": 99} and none of today's fields
    assert [message.reason for message in client.heard] == ["version"]
    assert "got 99" in client.heard[0].text


@pytest.mark.parametrize("name", ["", "x" * 101])
def test_a_client_needs_a_name_that_fits_into_a_table(name):
    door = OpenDoor()
    client = Client(door)
    client.tell(Hello(PROTOCOL_VERSION, name, "", ()))
    assert [message.text for message in client.heard] == [
        f"expected a client name of 1 to 100 characters, got {len(name)}"
    ]


def test_a_client_that_starts_over_is_a_new_one():
    door = OpenDoor()
    first = Client(door).join()
    second = Client(door, first.token, generation=1).join()
    assert [type(event) for event in door.events] == [Joined, Left, Joined]
    assert door.events[0].peer is door.events[1].peer is not door.events[2].peer
    first.tell(Ping(1))
    assert Pong(1, 0.0) not in first.heard
    second.tell(Ping(2))
    assert Pong(2, 0.0) in second.heard
    first.tell(HELLO)
    assert len(door.events) == 3


def test_silence_is_a_departure_after_five_seconds_and_a_disconnect_at_once():
    door = OpenDoor()
    client = Client(door).join()
    door.tick(4.9)
    assert door.of(Left) == []
    door.tick(5.0)
    assert [event.reason for event in door.of(Left)] == ["no word for 5.0 s"]
    client.tell(Ping(1), 5.1)
    assert client.heard[-1].reason == "unknown"
    Client(door).join(6.0)
    door.outcome = Sent.GONE
    door.tick(6.5)
    assert [event.reason for event in door.of(Left)][1:] == ["the connection was closed"]


def test_results_wait_for_the_data_connection_to_speak():
    door = OpenDoor()
    client = Client(door)
    client.tell(HELLO)
    (guest,) = door
    guest.push(result(1, [b"abc"]), [b"abc"], 3, "r", 0.1)
    assert client.got == []
    client.tell_data(Envelope(0, Probe()))
    assert [type(envelope.body) for envelope in client.got] == [Result]
    client.tell(ack(client.got[0].sequence), 0.5)
    assert [(event.tag, event.waited_s) for event in door.of(Delivered)] == [("r", -0.1)]


def test_what_was_in_flight_goes_out_again_on_a_new_data_connection_with_its_old_number():
    door = OpenDoor()
    client = Client(door).join()
    (guest,) = door
    guest.push(result(1, [b"abc"]), [b"abc"], 3, "r", 0.1)
    number = client.got[-1].sequence
    client.data_generation = 4
    client.tell_data(Envelope(0, Probe()), now_s=0.2)
    assert [envelope.sequence for envelope in client.got] == [number]
    client.tell(ack(number), 0.3)
    client.tell(ack(number), 0.3)
    assert len(door.of(Delivered)) == 1


def test_old_bytes_of_a_replaced_data_connection_are_not_read():
    door = OpenDoor()
    client = Client(door).join()
    client.data_generation = 4
    client.tell_data(Envelope(0, Probe()))
    client.data_generation = 3
    client.tell_data(Envelope(1, submit(1, [b"abc"])), [b"abc"])
    assert door.of(ReceivedData) == []
    assert door.num_strange == 1


def test_a_result_withdrawn_in_flight_goes_on_unheeded():
    door = OpenDoor()
    client = Client(door).join()
    (guest,) = door
    for tag in "ab":
        guest.push(result(1, [b"abc"]), [b"abc"], 3, tag, 0.1)
    guest.withdraw("a", 0.2)
    assert len(client.got) == 1
    client.tell(ack(client.got[0].sequence), 0.3)
    client.tell(ack(client.got[1].sequence), 0.4)
    assert [event.tag for event in door.of(Delivered)] == ["b"]


def test_messages_for_the_owner_reach_it():
    door = OpenDoor()
    client = Client(door).join()
    client.tell(Cancel(3))
    client.tell(Describe("m"))
    assert [event.message for event in door.of(Received)] == [Cancel(3), Describe("m")]


NODE_ONLY = [
    Welcome(PROTOCOL_VERSION, "x", Tier.EDGE, (), ()),
    Refused("unknown", ""),
    Status(NodeState("x", Tier.EDGE, True), ()),
]


@pytest.mark.parametrize("message", NODE_ONLY)
def test_what_only_a_node_says_counts_as_malformed_from_a_client(message):
    door = OpenDoor()
    client = Client(door).join()
    client.tell(message)
    assert door.num_malformed == 1
    assert next(iter(door)).traffic.malformed_messages == 1


def test_data_that_a_client_may_not_send_is_acknowledged_and_dropped():
    door = OpenDoor()
    client = Client(door).join()
    client.tell_data(Envelope(1, result(1, [b"abc"])), [b"abc"])
    client.tell_data(Envelope(2, submit(1, [b"abc"])), [])
    client.tell_data(Envelope(3, submit(1, [])), [b"abc"])
    assert door.num_malformed == 3
    assert [(message.receipt.sequence, message.held_s) for message in client.heard if isinstance(message, Ack)] == [
        (1, 0.0),
        (2, 0.0),
        (3, 0.0),
    ]
    assert door.of(ReceivedData) == []


def test_a_header_above_the_cap_is_not_decoded():
    door = OpenDoor(limits=Limits(control_bytes=1000))
    client = Client(door).join()
    client.tell_data(bytes(1001))
    assert door.num_malformed == 1


def test_a_hundred_malformed_messages_end_it_for_a_minute():
    door = OpenDoor(limits=Limits(malformed=100, left_after_s=1e9))
    client = Client(door).join()
    for _ in range(99):
        client.tell(b"\xc1", 1.0)
    assert door.of(Left) == []
    client.tell(b"\xc1", 1.0)
    assert "it sent 100 malformed messages" in door.of(Left)[0].reason
    assert isinstance(client.heard[-1], Goodbye)
    num_heard = len(client.heard)
    again = Client(door, client.token, generation=1)
    again.tell(HELLO, 30.0)
    assert (len(client.heard), again.heard) == (num_heard, [])
    again.tell(HELLO, 62.0)
    assert [type(message) for message in again.heard] == [Welcome]


def test_ids_that_are_none_of_ours_are_malformed():
    door = OpenDoor()
    for sender in (b"", b"x", b"x" * 21, bytes(255)):
        door.hear(sender, [memoryview(encode(HELLO))], 10, 0.0)
    door.hear(Client(door).data_id, [memoryview(encode(HELLO))], 10, 0.0)
    assert door.num_malformed == 5
    assert door.events == []


def test_strikes_are_counted_in_bounded_memory():
    strikes = Strikes(2, capacity=3)
    assert not strikes.add(b"a", 0.0)
    assert strikes.add(b"a", 1.0)
    for token in (b"b", b"c", b"d"):
        strikes.add(token, 2.0)
    assert not strikes.is_out(b"a", 2.0)
    assert strikes.add(b"d", 3.0)
    assert not strikes.is_out(b"d", 100.0)
    assert not strikes.add(b"d", 100.0)


def test_tokens_are_random_and_never_start_with_zero():
    tokens = {make_token() for _ in range(2000)}
    assert len(tokens) == 2000
    assert {len(token) for token in tokens} == {16}
    assert not any(token.startswith(b"\0") for token in tokens)


def test_a_routing_id_comes_back_from_its_bytes():
    for generation in (0, 1, 2**32 - 1):
        for is_control in (True, False):
            routing_id = RoutingId(make_token(), is_control, generation)
            assert RoutingId.from_bytes(routing_id.to_bytes()) == routing_id
    assert RoutingId.from_bytes(b"x" * 16 + b"e" + bytes(4)) is None
