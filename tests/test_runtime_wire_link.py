import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.types import LinkSample, LinkState
from runtime.wire.link import (
    FIRST_PROBE_BYTES,
    MAX_PROBE_BYTES,
    MIN_SAMPLE_BYTES,
    SAMPLES,
    LinkMeter,
    Uplink,
    due_probe_bytes,
    from_report,
    to_report,
)
from runtime.wire.messages import Receipt

MB = 10**6


def measure(meter: LinkMeter, seconds: float, nbytes: int = MB, at_s: float = 100.0) -> float:
    return meter.add_transfer(nbytes, at_s, at_s + seconds)


def ping(meter: LinkMeter, rtt_s: float, ahead_s: float = 0.0, sent_s: float = 50.0) -> None:
    meter.add_ping(sent_s, sent_s + rtt_s, sent_s + rtt_s / 2 + ahead_s)


def test_nothing_is_known_at_first():
    state = LinkMeter().state("device", "edge", 5.0, 0)
    assert state.samples == ()
    assert math.isnan(state.mean_bandwidth_bps)
    assert math.isnan(state.rtt_s)


def test_a_transfer_is_what_passed_less_half_a_round_trip():
    meter = LinkMeter()
    ping(meter, 0.2)
    assert measure(meter, 1.1) == pytest.approx(1.0)
    assert meter.bandwidth_bps == pytest.approx(8 * MB)


def test_a_transfer_under_way_tells_what_it_has_taken_beyond_a_round_trip():
    meter, uplink = LinkMeter(), Uplink()
    ping(meter, 0.2)
    uplink.push("request", MB, None, 10.0)
    uplink.start(10.0)
    state = meter.state("device", "edge", 13.0, uplink.backlog_bytes, uplink.in_flight)
    assert (state.in_flight_bytes, state.in_flight_s) == (MB, pytest.approx(2.8))
    assert meter.state("device", "edge", 10.1, MB, uplink.in_flight).in_flight_s == 0.0
    uplink.ack(1)
    assert meter.state("device", "edge", 13.0, 0, uplink.in_flight).in_flight_bytes == 0


def test_a_small_message_under_way_bounds_nothing():
    uplink = Uplink()
    uplink.push("request", MIN_SAMPLE_BYTES - 1, None, 10.0)
    uplink.start(10.0)
    assert LinkMeter().state("device", "edge", 13.0, 0, uplink.in_flight).in_flight_s == 0.0


@given(rtt_s=st.floats(0, 10), seconds=st.floats(0, 10))
def test_no_round_trip_makes_a_transfer_shorter_than_half_of_what_passed(rtt_s, seconds):
    meter = LinkMeter()
    ping(meter, rtt_s)
    transfer_s = measure(meter, seconds)
    assert 0 < transfer_s <= max(seconds, 1.1e-6) * (1 + 1e-6)
    assert transfer_s >= seconds / 2 * (1 - 1e-6)
    assert math.isfinite(meter.bandwidth_bps)


@given(
    ahead_s=st.floats(-1e6, 1e6),
    rtt_s=st.floats(1e-4, 1),
    skew=st.floats(0, 1),
    seconds=st.floats(1e-3, 10),
    held_s=st.floats(0, 10),
    knows=st.sampled_from(["sender", "receiver", "both"]),
)
def test_a_receipt_tells_the_transfer_whatever_it_rode_on(ahead_s, rtt_s, skew, seconds, held_s, knows):
    """`skew` is the share of the round trip that the way there takes, which nobody can measure."""
    sender, receiver = LinkMeter(), LinkMeter()
    if knows != "receiver":
        sender.add_ping(50.0, 50.0 + rtt_s, 50.0 + skew * rtt_s + ahead_s)
    if knows != "sender":
        receiver.add_ping(50.0 + ahead_s, 50.0 + ahead_s + rtt_s, 50.0 + (1 - skew) * rtt_s)
    started_s, took_s = 100.0, seconds + skew * rtt_s
    arrived_s = started_s + took_s
    receipt = Receipt(1, arrived_s + ahead_s, receiver.rtt_s, receiver.ahead_s)
    back_s = arrived_s + held_s + (1 - skew) * rtt_s + 5.0
    transfer_s = sender.add_receipt(MB, started_s, receipt, back_s)
    assert sender.reads_receipts
    assert transfer_s == pytest.approx(seconds + rtt_s / 2, abs=1e-6)
    assert sender.state("a", "b", back_s, 0).samples[0].age_s == pytest.approx(back_s - arrived_s, abs=rtt_s)


def test_the_side_with_the_shorter_round_trip_says_how_the_clocks_differ():
    meter = LinkMeter()
    ping(meter, 0.3, ahead_s=1000.1)
    assert meter.add_receipt(MB, 100.0, Receipt(1, 1101.0, 0.02, -1000.0), 102.0) == pytest.approx(1.0)
    assert meter.add_receipt(MB, 100.0, Receipt(1, 1101.0, 0.4, -999.0), 102.0) == pytest.approx(0.9)


def test_a_receipt_that_cannot_be_read_gives_no_sample_and_asks_for_a_word_of_its_own():
    meter = LinkMeter()
    assert meter.reads_receipts
    assert meter.add_receipt(MB, 100.0, Receipt(1, 7.0, math.nan, math.nan), 103.0) is None
    assert not meter.reads_receipts
    measure(meter, 1.0)
    assert not meter.reads_receipts
    ping(meter, 0.01)
    assert meter.add_receipt(10, 100.0, Receipt(1, 101.0, math.nan, math.nan), 103.0) == pytest.approx(1.0)
    assert meter.reads_receipts
    for outside_s in (99.0, 104.0, -1e300, math.nan, math.inf):
        assert meter.add_receipt(MB, 100.0, Receipt(1, outside_s, math.nan, math.nan), 103.0) is None
        assert not meter.reads_receipts
    assert len(meter.state("a", "b", 110.0, 0).samples) == 1


@given(*[st.floats(width=64)] * 4, st.floats(0, 1e9))
def test_no_receipt_breaks_the_meter(received_s, rtt_s, ahead_s, peer_clock_s, elapsed_s):
    meter = LinkMeter()
    for _ in range(2):
        receipt = Receipt(1, received_s, rtt_s, ahead_s)
        transfer_s = meter.add_receipt(MB, 100.0, receipt, 100.0 + elapsed_s)
        assert transfer_s is None or 0 < transfer_s <= 2 * max(elapsed_s, 1e-6)
        assert (transfer_s is not None) == meter.reads_receipts
        state = meter.state("a", "b", 100.0 + elapsed_s, 0)
        assert all(sample.bandwidth_bps > 0 and sample.age_s >= 0 for sample in state.samples)
        meter.add_ping(50.0, 50.1, peer_clock_s)


def test_the_round_trip_is_the_smallest_of_the_recent_ones():
    meter = LinkMeter()
    for rtt_s in (0.05, 0.01, 0.03):
        ping(meter, rtt_s)
    assert meter.rtt_s == pytest.approx(0.01)
    for _ in range(SAMPLES):
        ping(meter, 0.2)
    assert meter.rtt_s == pytest.approx(0.2)
    meter.forget_rtt()
    assert math.isnan(meter.rtt_s)


def test_a_small_message_measures_no_bandwidth():
    meter = LinkMeter()
    assert measure(meter, 0.5, MIN_SAMPLE_BYTES - 1) == 0.5
    assert math.isnan(meter.bandwidth_bps)
    measure(meter, 0.5, MIN_SAMPLE_BYTES)
    assert not math.isnan(meter.bandwidth_bps)


def test_the_last_eight_samples_are_kept_newest_first_and_age():
    meter = LinkMeter()
    for i in range(SAMPLES + 3):
        measure(meter, 1.0, (i + 1) * MB, at_s=float(i))
    state = meter.state("device", "edge", 20.0, 7)
    assert [round(s.bandwidth_bps / 8 / MB) for s in state.samples] == [11, 10, 9, 8, 7, 6, 5, 4]
    assert [s.age_s for s in state.samples] == [9, 10, 11, 12, 13, 14, 15, 16]
    assert (state.source, state.target, state.backlog_bytes) == ("device", "edge", 7)


def test_the_long_run_mean_is_geometric():
    meter = LinkMeter()
    measure(meter, 1.0)
    measure(meter, 100.0)
    assert meter.state("a", "b", 0.0, 0).mean_bandwidth_bps == pytest.approx(8 * MB / 10)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=300))
def test_the_long_run_mean_stays_between_the_extremes(seconds):
    meter = LinkMeter()
    for transfer_s in seconds:
        measure(meter, transfer_s)
    mean = meter.state("a", "b", 0.0, 0).mean_bandwidth_bps
    low, high = 8 * MB / max(seconds), 8 * MB / min(seconds)
    assert low * 0.999 <= mean <= high * 1.001


def test_a_report_carries_a_state():
    state = LinkState("edge", "cloud", (LinkSample(1.0, 5e6), LinkSample(2.0, 6e6)), 5.5e6, 0.01, 12)
    assert from_report(to_report(state), "edge") == state


# --- probes ---------------------------------------------------------------------------------------------------------


def test_an_idle_link_never_measured_is_probed_with_64_kb():
    assert due_probe_bytes(LinkMeter(), True, 0.0) == FIRST_PROBE_BYTES == 65536


def test_a_link_in_use_or_measured_lately_is_not_probed():
    meter = LinkMeter()
    assert due_probe_bytes(meter, False, 1000.0) == 0
    measure(meter, 1.0, at_s=99.0)
    assert due_probe_bytes(meter, True, 104.9) == 0
    assert due_probe_bytes(meter, True, 105.0) > 0


@pytest.mark.parametrize(
    ("bandwidth_bps", "nbytes"), [(1e5, MIN_SAMPLE_BYTES), (16e6, 100_000), (1e10, MAX_PROBE_BYTES)]
)
def test_a_probe_takes_about_50_ms_within_its_bounds(bandwidth_bps, nbytes):
    meter = LinkMeter()
    measure(meter, MB * 8 / bandwidth_bps, at_s=0.0)
    assert due_probe_bytes(meter, True, 1e6) == pytest.approx(nbytes, rel=0.001)


# --- the queue ------------------------------------------------------------------------------------------------------


def test_one_message_is_in_flight_at_a_time_and_they_go_in_order():
    uplink: Uplink[str] = Uplink()
    assert uplink.is_idle
    uplink.push("a", 10, "A", 1.0)
    uplink.push("b", 20, "B", 2.0)
    assert uplink.backlog_bytes == 30
    first = uplink.start(3.0)
    assert first is not None
    assert (first.payload, first.waited_s) == ("A", 2.0)
    assert uplink.start(3.5) is None
    assert uplink.backlog_bytes == 30
    assert uplink.ack(first.sequence) is first
    assert uplink.backlog_bytes == 20
    second = uplink.start(4.0)
    assert second is not None
    assert second.sequence > first.sequence
    assert not uplink.is_idle
    assert uplink.ack(second.sequence) is second
    assert uplink.is_idle


def test_an_acknowledgement_of_another_message_counts_for_nothing():
    uplink: Uplink[str] = Uplink()
    assert uplink.ack(1) is None
    uplink.push("a", 10, "A", 1.0)
    assert uplink.ack(1) is None
    item = uplink.start(1.0)
    assert item is not None
    assert uplink.ack(item.sequence + 1) is None
    assert uplink.ack(item.sequence) is item
    assert uplink.ack(item.sequence) is None


def test_a_queued_message_that_is_dropped_is_gone_and_one_in_flight_is_marked():
    uplink: Uplink[str] = Uplink()
    for tag in "abab":
        uplink.push(tag, 1, tag, 0.0)
    item = uplink.start(0.0)
    assert item is not None
    assert uplink.drop("b") is False
    assert uplink.backlog_bytes == 2
    assert uplink.drop("a") is True
    assert item.is_withdrawn
    assert uplink.backlog_bytes == 1
    assert uplink.drop("a") is False
    assert uplink.ack(item.sequence) is item
    assert uplink.is_idle


def test_a_message_that_did_not_get_out_is_first_again_unless_it_was_withdrawn():
    uplink: Uplink[str] = Uplink()
    uplink.push("a", 1, "A", 0.0)
    uplink.push("b", 1, "B", 0.0)
    first = uplink.start(1.0)
    uplink.postpone()
    again = uplink.start(2.0)
    assert again is first
    assert again is not None
    assert again.waited_s == 2.0
    uplink.drop("a")
    uplink.postpone()
    following = uplink.start(3.0)
    assert following is not None
    assert following.tag == "b"


def test_after_clear_nothing_is_left_and_numbers_go_on():
    uplink: Uplink[str] = Uplink()
    uplink.push("a", 1, "A", 0.0)
    item = uplink.start(0.0)
    assert item is not None
    uplink.push("b", 1, "B", 0.0)
    uplink.clear()
    assert uplink.is_idle
    assert uplink.backlog_bytes == 0
    assert uplink.ack(item.sequence) is None
    uplink.push("c", 1, "C", 0.0)
    later = uplink.start(0.0)
    assert later is not None
    assert later.sequence > item.sequence


@given(st.lists(st.sampled_from(["push", "start", "ack", "postpone", "drop"]), max_size=60), st.data())
def test_whatever_happens_order_is_kept_nothing_is_lost_and_nothing_comes_twice(actions, data):
    uplink: Uplink[int] = Uplink()
    pushed, dropped, done = [], set(), []
    for now_s, action in enumerate(actions):
        if action == "push":
            pushed.append(len(pushed))
            uplink.push(pushed[-1], 1, pushed[-1], float(now_s))
        elif action == "start":
            uplink.start(float(now_s))
        elif action == "postpone":
            uplink.postpone()
        elif action == "drop" and pushed:
            tag = data.draw(st.sampled_from(pushed))
            uplink.drop(tag)
            dropped.add(tag)
        elif action == "ack":
            done += _finish(uplink)
    while not uplink.is_idle:
        uplink.start(1e3)
        done += _finish(uplink)
    assert done == sorted(set(done))
    assert set(pushed) - dropped <= set(done)


def _finish(uplink: Uplink[int]) -> list[int]:
    found = [item for number in range(1, 100) if (item := uplink.ack(number)) is not None]
    return [item.payload for item in found if not item.is_withdrawn]
