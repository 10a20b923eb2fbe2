"""How one side of a conversation tells what has arrived, and what the other side makes of it."""

import math

import pytest

from runtime.wire.messages import Ack, Envelope, Pong, Receipt
from tests.hubs import ack, result, submit
from tests.test_runtime_wire_call import FakeCall


def test_a_result_that_takes_a_receipt_is_acknowledged_by_the_next_data_that_leaves():
    call = FakeCall().come_up()
    call.finish_probe(0.1)
    call.said.clear()
    call.tell_data(Envelope(4, result(9, [b"xyz"]), takes_receipt=True), [b"xyz"], 0.2)
    assert call.said == []
    call.push(submit(1, [b"abc"]), [b"abc"], 3, 1, 0.3)
    receipt = call.sent[-1].receipt
    assert (receipt.sequence, receipt.received_s) == (4, 0.2)
    call.settle(0.4)
    assert call.said == []
    call.tell(ack(call.sent[-1].sequence), 0.5)
    call.push(submit(2, [b"abc"]), [b"abc"], 3, 2, 0.6)
    assert call.sent[-1].receipt is None


def test_a_result_that_takes_a_receipt_is_acknowledged_with_its_age_when_no_data_leaves():
    call = FakeCall().come_up()
    call.push(submit(1, [b"abc"]), [b"abc"], 3, 1, 0.1)  # waits for the probe
    call.said.clear()
    call.tell_data(Envelope(4, result(9, []), takes_receipt=True), [], 0.2)
    call.settle(0.25)
    assert call.acks == [(4, pytest.approx(0.05))]
    call.settle(0.3)
    assert len(call.said) == 1
    call.tell_data(Envelope(5, result(10, []), takes_receipt=True), [], 0.4)
    call.tell_data(Envelope(6, result(11, []), takes_receipt=True), [], 0.5)  # the owner is not asked in between
    call.settle(0.5)
    assert call.acks[1:] == [(5, pytest.approx(0.1)), (6, 0.0)]


def test_every_acknowledgement_says_when_by_its_sender_s_clock_and_how_well_it_knows_the_other():
    call = FakeCall().come_up()
    call.tell(Pong(1, 1000.0), 0.1)  # its clock shows 1000 when ours shows 0.05
    rtt_s, ahead_s = call.meter.rtt_s, call.meter.ahead_s
    assert (rtt_s, ahead_s) == (pytest.approx(0.1), pytest.approx(999.95))
    call.said.clear()
    call.tell_data(Envelope(4, result(9, [])), [], 0.2)
    call.tell_data(Envelope(5, result(10, []), takes_receipt=True), [], 0.3)
    call.settle(0.35)
    assert call.said == [
        Ack(Receipt(4, 0.2, rtt_s, ahead_s)),
        Ack(Receipt(5, 0.3, rtt_s, ahead_s), pytest.approx(0.05)),
    ]


def test_an_acknowledgement_that_cannot_be_read_gives_no_sample_of_what_went_out_twice():
    call = FakeCall().come_up()
    call.finish_probe(0.1)
    samples = len(call.link_state("device", 1.0).samples)
    call.push(submit(1, [bytes(20_000)]), [bytes(20_000)], 20_000, 1, 1.0)
    call.uplink.postpone()
    call.pump(2.0)
    call.tell(ack(call.sent[-1].sequence), 2.001)
    assert call.events[-1].transfer_s == pytest.approx(0.001)
    assert len(call.link_state("device", 3.0).samples) == samples


def test_a_receipt_completes_the_message_in_flight_before_what_it_rides_on_is_handed_over():
    call = FakeCall().come_up()
    call.tell(Pong(1, 1000.0), 0.1)  # its clock shows 1000 when ours shows 0.05
    call.tell(Ack(Receipt(call.sent[-1].sequence, 1000.05, math.nan, math.nan)), 0.1)
    call.push(submit(1, [bytes(20_000)]), [bytes(20_000)], 20_000, "tag", 0.2)
    assert call.sent[-1].takes_receipt
    call.events.clear()
    receipt = Receipt(call.sent[-1].sequence, 1000.45, math.nan, math.nan)
    call.tell_data(Envelope(1, result(1, []), receipt=receipt), [], 0.9)
    delivered, received = call.events
    assert (delivered.tag, delivered.transfer_s) == ("tag", pytest.approx(0.3))
    assert received.body.request == 1
    assert call.link_state("device", 0.9).samples[0].age_s == pytest.approx(0.4)


def test_only_a_message_with_nothing_behind_it_takes_a_receipt():
    call = FakeCall().come_up()
    call.tell(Pong(1, 1000.0), 0.1)  # its clock shows 1000 when ours shows 0.05
    for number in (1, 2):
        call.push(submit(number, [b"abc"]), [b"abc"], 3, number, 0.1)
    assert not call.sent[-1].takes_receipt  # a probe
    call.tell(Ack(Receipt(call.sent[-1].sequence, 1000.1, math.nan, math.nan)), 0.2)
    assert not call.sent[-1].takes_receipt
    call.tell(Ack(Receipt(call.sent[-1].sequence, 1000.2, math.nan, math.nan), 0.05), 0.3)
    assert call.sent[-1].takes_receipt


def test_the_time_that_an_acknowledgement_was_held_is_none_of_the_transfer():
    call = FakeCall().come_up()
    call.finish_probe(0.1)
    for held_s, transfer_s in ((0.2, 0.3), (-1.0, 0.5), (math.nan, 0.5), (9.0, 0.5)):
        call.push(submit(1, [b"abc"]), [b"abc"], 3, 1, 1.0)
        call.tell(ack(call.sent[-1].sequence, held_s), 1.5)
        assert call.events[-1].transfer_s == pytest.approx(transfer_s)


def test_an_acknowledgement_that_is_read_late_tells_the_transfer_by_the_clock_of_whoever_received():
    call = FakeCall().come_up()
    call.finish_probe(0.1)
    call.tell(Pong(1, 1000.0), 0.1)  # its clock shows 1000 when ours shows 0.05
    call.push(submit(1, [bytes(20_000)]), [bytes(20_000)], 20_000, 1, 1.0)
    assert not call.sent[-1].takes_receipt  # the clock was not known when the probe was acknowledged
    call.tell(Ack(Receipt(call.sent[-1].sequence, 1001.25, math.nan, math.nan)), 9.0)
    assert call.events[-1].transfer_s == pytest.approx(0.3)
    assert call.link_state("device", 9.0).samples[0].age_s == pytest.approx(7.7)
    call.push(submit(2, [b"abc"]), [b"abc"], 3, 2, 9.0)
    assert call.sent[-1].takes_receipt
