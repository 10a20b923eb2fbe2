import pytest

from runtime.types import Tier
from runtime.wire.call import Call
from runtime.wire.events import Connected, Delivered, Event, Fate, Limits, Lost, Received, ReceivedData, Rejected
from runtime.wire.messages import (
    ENVELOPE_DECODER,
    PROTOCOL_VERSION,
    Ack,
    Cancel,
    ControlMessage,
    Envelope,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Probe,
    Refused,
    Submit,
    Welcome,
    encode,
)
from tests.hubs import HELLO, ack, result, submit

WELCOME = Welcome(PROTOCOL_VERSION, "edge", Tier.EDGE, (), ())


class FakeCall(Call):
    """A call whose sockets are lists."""

    def __init__(self, has_keys: bool = False, limits: Limits | None = None) -> None:
        self.events: list[Event] = []
        self.said: list[ControlMessage] = []
        self.sent: list[Envelope] = []
        self.num_redials = self.num_reopenings = 0
        self.can_say = self.can_transmit = True
        super().__init__(
            "edge",
            "tcp://edge:1",
            HELLO,
            has_keys=has_keys,
            limits=limits or Limits(),
            emit=self.events.append,
            now_s=0.0,
        )

    def say(self, message: ControlMessage) -> bool:
        if self.can_say:
            self.said.append(message)
        return self.can_say

    def transmit(self, parts) -> bool:
        if self.can_transmit:
            self.sent.append(ENVELOPE_DECODER.decode(parts[0]))
        return self.can_transmit

    def redial(self) -> None:
        self.num_redials += 1

    def reopen_data(self) -> None:
        self.num_reopenings += 1

    def come_up(self, now_s: float = 0.0) -> "FakeCall":
        self.learn(Fate.CONNECTED, now_s, is_control=True)
        self.learn(Fate.CONNECTED, now_s, is_control=False)
        self.tell(WELCOME, now_s)
        assert self.is_up
        return self

    def tell(self, message, now_s: float) -> None:
        data = encode(message)
        self.hear([memoryview(data)], len(data), now_s)

    def tell_data(self, envelope: Envelope, frames: list[bytes], now_s: float) -> None:
        parts = [memoryview(part) for part in (encode(envelope), *frames)]
        self.hear_data(parts, sum(map(len, parts)), now_s, is_spoilt=False)

    @property
    def acks(self) -> list[tuple[int, float]]:
        """Sequence and held_s of the acknowledgements that were said, if nothing else was."""
        assert all(isinstance(message, Ack) for message in self.said)
        return [(message.receipt.sequence, message.held_s) for message in self.said]

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.said)

    def finish_probe(self, now_s: float) -> None:
        self.tell(ack(self.sent[-1].sequence), now_s)


def test_hello_is_said_as_soon_as_the_control_connection_stands():
    call = FakeCall()
    call.tick(0.5)
    assert call.said == []
    call.learn(Fate.CONNECTED, 0.6, is_control=True)
    assert call.said == [HELLO]


def test_hello_is_repeated_ever_more_slowly_but_at_least_once_a_second():
    call = FakeCall()
    call.learn(Fate.CONNECTED, 0.0, is_control=True)
    at_s = []
    now_s = 0.0
    while len(at_s) < 8 and now_s < 2.9:
        now_s = call.next_due_s()
        before = call.count(Hello)
        call.tick(now_s)
        if call.count(Hello) > before:
            at_s.append(now_s)
    gaps = [b - a for a, b in zip([0.0, *at_s], at_s, strict=False)]
    assert 0.05 <= gaps[0] <= 0.1
    assert max(gaps) <= 1.0
    assert gaps[-1] > gaps[0]


def test_a_call_without_progress_gets_new_sockets_every_three_seconds():
    call = FakeCall()
    for now_s, num_redials in ((2.9, 0), (3.0, 1), (5.9, 1), (6.0, 2)):
        call.tick(now_s)
        assert call.num_redials == num_redials


def test_a_node_is_up_only_when_welcome_and_data_port_are_both_there():
    call = FakeCall()
    call.learn(Fate.CONNECTED, 0.0, is_control=True)
    call.tell(WELCOME, 0.1)
    assert not call.is_up
    call.learn(Fate.CONNECTED, 0.2, is_control=False)
    assert call.is_up
    assert call.events == [Connected(call, WELCOME)]
    assert (call.sent[0].sequence, type(call.sent[0].body)) == (0, Probe)


def test_a_data_port_that_does_not_answer_is_named():
    call = FakeCall()
    call.learn(Fate.CONNECTED, 0.0, is_control=True)
    call.tell(WELCOME, 0.0)
    for tenth in range(1, 25):
        call.tell(Ping(tenth), tenth / 10)
        call.tick(tenth / 10)
    assert [type(event) for event in call.events] == [Rejected]
    assert "let both through the firewall" in str(call.events[0].error)
    assert call.num_redials == 1


def test_a_second_welcome_changes_nothing():
    call = FakeCall().come_up()
    call.tell(WELCOME, 0.1)
    assert call.events == [Connected(call, WELCOME)]


def test_pings_go_twice_a_second_and_pongs_measure_the_round_trip():
    call = FakeCall().come_up()
    assert call.count(Ping) == 1
    call.tick(0.49)
    assert call.count(Ping) == 1
    call.tick(0.5)
    assert call.count(Ping) == 2
    call.tell(Pong(2, 0.0), 0.53)
    assert call.link_state("device", 1.0).rtt_s == pytest.approx(0.03)
    call.tell(Pong(2, 0.0), 0.9)
    call.tell(Pong(77, 0.0), 0.9)
    assert call.link_state("device", 1.0).rtt_s == pytest.approx(0.03)


def test_a_ping_is_answered():
    call = FakeCall().come_up()
    call.tell(Ping(5), 0.1)
    assert call.said[-1] == Pong(5, 0.1)


def test_any_word_keeps_a_node_up_and_two_seconds_of_silence_lose_it():
    call = FakeCall().come_up()
    call.tick(1.9)
    call.tell(Ping(1), 1.9)
    call.tick(3.8)
    assert call.is_up
    call.tick(3.9)
    assert not call.is_up
    assert isinstance(call.events[-1], Lost)
    assert call.events[-1].reason == "no word for 2.0 s"
    assert call.num_redials == 1


def test_a_lost_node_is_called_again_and_comes_back():
    call = FakeCall().come_up()
    call.learn(Fate.DISCONNECTED, 1.0, is_control=True)
    assert [type(event) for event in call.events] == [Connected, Lost]
    call.said.clear()
    call.come_up(2.0)
    assert call.said[0] == HELLO
    assert [type(event) for event in call.events] == [Connected, Lost, Connected]


@pytest.mark.parametrize("is_control", [True, False])
def test_either_connection_lost_is_the_node_lost(is_control):
    call = FakeCall().come_up()
    call.learn(Fate.DISCONNECTED, 1.0, is_control=is_control)
    assert isinstance(call.events[-1], Lost)


@pytest.mark.parametrize("message", [Refused("unknown", ""), Goodbye()])
def test_a_node_that_forgot_us_or_leaves_is_lost(message):
    call = FakeCall().come_up()
    call.tell(message, 0.5)
    assert isinstance(call.events[-1], Lost)
    call.tell(message, 0.5)  # heard late: nothing more to lose
    assert [type(event) for event in call.events] == [Connected, Lost]


def test_what_was_queued_for_a_lost_node_is_forgotten():
    call = FakeCall().come_up()
    call.finish_probe(0.0)
    call.push(submit(1, [b"abc"]), [b"abc"], 3, "one", 0.1)
    call.push(submit(2, [b"abc"]), [b"abc"], 3, "two", 0.1)
    call.learn(Fate.DISCONNECTED, 0.2, is_control=True)
    assert call.link_state("device", 0.3).backlog_bytes == 0
    call.sent.clear()
    call.come_up(0.4)
    assert not any(isinstance(envelope.body, Submit) for envelope in call.sent)


def test_a_refusal_is_told_once_and_calling_goes_on_slowly():
    call = FakeCall()
    call.learn(Fate.CONNECTED, 0.0, is_control=True)
    for now_s in (0.0, 0.1):
        call.tell(Refused("model", "expected resnet18, got vgg16; start a worker for it"), now_s)
    assert [str(event.error) for event in call.events] == [
        "node 'edge' at tcp://edge:1: expected resnet18, got vgg16; start a worker for it"
    ]
    assert call.next_due_s() == pytest.approx(1.1)
    call.learn(Fate.CONNECTED, 0.2, is_control=False)
    call.tell(WELCOME, 1.2)
    assert call.is_up


def test_a_welcome_of_another_version_is_a_handshake_error_that_says_what_to_do():
    call = FakeCall()
    call.learn(Fate.CONNECTED, 0.0, is_control=True)
    call.tell(Welcome(PROTOCOL_VERSION + 1, "edge", Tier.EDGE, (), ()), 0.0)
    (event,) = call.events
    assert f"expected protocol version {PROTOCOL_VERSION}, got {PROTOCOL_VERSION + 1}; install" in str(event.error)
    assert not call.is_welcomed


@pytest.mark.parametrize(
    ("fate", "has_keys", "times", "text"),
    [
        (Fate.KEY_REFUSED, True, 1, "it does not know our key; copy our"),
        (Fate.SECURITY_DIFFERS, True, 1, "got keys here and none there"),
        (Fate.SECURITY_DIFFERS, False, 1, "got no keys here and CURVE keys there"),
        (Fate.CLOSED_EARLY, True, 10, "the public key we have is not the node's own"),
    ],
)
def test_a_failed_key_exchange_is_told_by_its_cause(fate, has_keys, times, text):
    call = FakeCall(has_keys=has_keys)
    for _ in range(times + 5):
        call.learn(fate, 0.1, is_control=True)
    assert [text in str(event.error) for event in call.events] == [True]


def test_a_relay_that_finds_its_node_down_is_no_wrong_key():
    plain = FakeCall()
    reached = FakeCall(has_keys=True).come_up()
    reached.events.clear()
    for _ in range(30):
        plain.learn(Fate.CLOSED_EARLY, 0.1, is_control=True)
        reached.learn(Fate.CLOSED_EARLY, 0.1, is_control=True)
    assert plain.events == reached.events == []


def test_an_acknowledgement_delivers_and_starts_the_next_message():
    call = FakeCall().come_up()
    call.finish_probe(0.0)
    call.push(submit(1, [b"abc"], 5.0), [b"abc"], 3, "one", 1.0)
    call.push(submit(2, [b"abc"], 5.0), [b"abc"], 3, "two", 1.0)
    assert [e.body.request for e in call.sent if isinstance(e.body, Submit)] == [1]
    call.tell(ack(call.sent[-1].sequence), 1.5)
    assert [e.body.request for e in call.sent if isinstance(e.body, Submit)] == [1, 2]
    assert call.sent[-1].body.remaining_s == pytest.approx(4.5)  # it stood in the queue for half a second
    delivered = call.events[-1]
    assert isinstance(delivered, Delivered)
    assert (delivered.tag, delivered.transfer_s, delivered.waited_s) == ("one", 0.5, 0.0)
    call.tell(ack(call.sent[-1].sequence), 1.75)
    assert (call.events[-1].tag, call.events[-1].transfer_s, call.events[-1].waited_s) == ("two", 0.25, 0.5)


def test_a_message_that_cannot_leave_is_tried_again():
    call = FakeCall().come_up()
    call.finish_probe(0.0)
    call.can_transmit = False
    call.push(submit(1, [b"abc"]), [b"abc"], 3, "one", 0.1)
    call.can_transmit = True
    call.tick(0.6)
    assert isinstance(call.sent[-1].body, Submit)


def test_withdrawing_what_is_in_flight_reopens_the_data_socket_and_goes_on_with_the_next():
    call = FakeCall().come_up()
    call.finish_probe(0.0)
    for number in (1, 2):
        call.push(submit(number, [b"abc"]), [b"abc"], 3, number, 0.1)
    call.withdraw(1, 0.2)
    assert call.num_reopenings == 1
    assert call.is_up
    call.sent.clear()
    call.learn(Fate.CONNECTED, 0.3, is_control=False)
    assert [(e.sequence == 0, type(e.body)) for e in call.sent] == [(True, Probe), (False, Submit)]
    assert call.sent[1].body.request == 2
    assert [type(event) for event in call.events] == [Connected]


def test_withdrawing_what_waits_touches_no_socket():
    call = FakeCall().come_up()
    call.finish_probe(0.0)
    for number in (1, 2):
        call.push(submit(number, [b"abc"]), [b"abc"], 3, number, 0.1)
    call.withdraw(2, 0.2)
    call.withdraw("unheard of", 0.2)
    assert call.num_reopenings == 0
    call.tell(ack(call.sent[-1].sequence), 0.3)
    assert call.sent[-1].body.request == 1


def test_a_result_is_acknowledged_handed_over_once_and_never_twice():
    call = FakeCall().come_up()
    envelope = Envelope(4, result(9, [b"xyz"]))
    call.tell_data(envelope, [b"xyz"], 0.1)
    assert (call.said[-1].receipt.sequence, call.said[-1].held_s) == (4, 0.0)
    (received,) = [event for event in call.events if isinstance(event, ReceivedData)]
    assert (received.body, [bytes(f) for f in received.frames]) == (envelope.body, [b"xyz"])
    call.said.clear()
    call.tell_data(envelope, [b"xyz"], 0.2)
    assert call.acks == [(4, 0.0)]
    assert sum(isinstance(event, ReceivedData) for event in call.events) == 1


def test_what_is_not_handed_over_is_acknowledged_at_once():
    call = FakeCall().come_up()
    call.tell_data(Envelope(1, Probe(), takes_receipt=True), [bytes(100)], 0.1)
    call.tell_data(Envelope(2, result(9, [b"abc"]), takes_receipt=True), [], 0.1)
    call.tell_data(Envelope(2, result(9, []), takes_receipt=True), [], 0.1)
    assert [(message.receipt.sequence, message.held_s) for message in call.said[-3:]] == [(1, 0.0), (2, 0.0), (2, 0.0)]


def test_a_probe_is_acknowledged_and_thrown_away():
    call = FakeCall().come_up()
    call.tell_data(Envelope(1, Probe()), [bytes(100)], 0.1)
    assert (call.said[-1].receipt.sequence, call.said[-1].held_s) == (1, 0.0)
    assert [type(event) for event in call.events] == [Connected]


def test_the_first_probe_goes_at_once_and_the_next_after_five_seconds_without_a_sample():
    call = FakeCall().come_up()
    assert [type(e.body) for e in call.sent if e.sequence] == [Probe]
    call.finish_probe(0.1)
    call.sent.clear()
    for half in range(1, 11):
        call.tell(Ping(half), half / 2)
        call.tick(half / 2)
    assert call.sent == []
    call.tick(5.1)
    assert [type(e.body) for e in call.sent] == [Probe]
    assert call.traffic.probe_bytes > 65536


@pytest.mark.parametrize("message", [Cancel(1), HELLO])
def test_what_only_a_client_says_counts_as_malformed_from_a_node(message):
    call = FakeCall().come_up()
    call.tell(message, 0.1)
    assert call.traffic.malformed_messages == 1
    assert call.is_up


def test_a_request_from_a_node_counts_as_malformed_but_is_acknowledged():
    call = FakeCall().come_up()
    call.tell_data(Envelope(1, submit(1, [b"abc"])), [b"abc"], 0.1)
    assert call.traffic.malformed_messages == 1
    assert (call.said[-1].receipt.sequence, call.said[-1].held_s) == (1, 0.0)


def test_a_node_that_sends_nothing_but_nonsense_is_given_up():
    call = FakeCall(limits=Limits(malformed=10)).come_up()
    for _ in range(10):
        call.hear([memoryview(b"\xc1")], 1, 0.1)
    assert isinstance(call.events[-1], Lost)
    assert "it sent 10 malformed messages" in call.events[-1].reason


def test_anything_else_is_for_the_owner():
    call = FakeCall().come_up()
    refused = Refused("model", "no such model here")
    call.tell(refused, 0.1)
    assert call.events[-1] == Received(call, refused)


def test_before_the_welcome_nothing_reaches_the_owner():
    call = FakeCall()
    call.learn(Fate.CONNECTED, 0.0, is_control=True)
    call.tell(Pong(1, 0.0), 0.1)
    call.tell_data(Envelope(1, result(1, [])), [], 0.1)
    assert call.events == []
    assert call.said == [HELLO]
