"""What is measured of an outgoing link, the queue in front of it, and when to probe it. No sockets, no clock.

The queue is ours, not the socket's: one tensor message is in flight at a time, so the bytes that wait are known and can
still be withdrawn, and every acknowledgement measures the link:

    transfer = received - started                   by two clocks whose difference pings tell; see `LinkMeter.add_receipt`
    transfer = acknowledged - started - rtt / 2     by one, while the other cannot be read
"""

import math
from collections import deque
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import msgspec

from runtime.types import LinkSample, LinkState
from runtime.wire.messages import LinkReport, Receipt

SAMPLES = 8
MIN_SAMPLE_BYTES = 16 * 1024
"""Smaller messages measure the round trip, not the bandwidth."""

PROBE_AFTER_S = 5.0
PROBE_S = 0.05
FIRST_PROBE_BYTES = 64 * 1024
MAX_PROBE_BYTES = 2**20

_MEAN_SAMPLES = 100  # guess: the long-run mean is plain over this many samples, then forgets slowly
_MIN_TRANSFER_S = 1e-6

Payload = TypeVar("Payload")


class LinkMeter:
    """What the sender measured of one directed link: recent samples, long-run mean, round trip.

    Attributes:
        rtt_s: smallest of the recent round trips, NaN before the first. The smallest, because what is above it is time that a
            peer's loop was busy, not the link's.
        ahead_s: what the peer's clock shows more than ours, NaN before the first round trip.
        reads_receipts: whether the last receipt could be read.
    """

    def __init__(self) -> None:
        """Start with nothing measured."""
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)  # (at_s, bandwidth_bps), newest first
        self._pings: deque[tuple[float, float]] = deque(maxlen=SAMPLES)  # (rtt_s, ahead_s)
        self.rtt_s = math.nan
        self.ahead_s = math.nan
        self.reads_receipts = True
        self._log_mean = math.nan
        self._num_samples = 0

    @property
    def bandwidth_bps(self) -> float:
        """Newest sample, NaN before the first."""
        return self._samples[0][1] if self._samples else math.nan

    @property
    def measured_s(self) -> float:
        """Instant of the newest sample, -inf before the first."""
        return self._samples[0][0] if self._samples else -math.inf

    def add_ping(self, sent_s: float, answered_s: float, peer_clock_s: float) -> None:
        """Take in a ping.

        Args:
            sent_s: instant it left.
            answered_s: instant its answer came.
            peer_clock_s: the peer's clock when it answered: it is taken to have done so half-way, as `rtt / 2` is taken off
                an acknowledgement. The shortest of the recent pings says best; in its time, 4 s, clocks part by less than
                0.1 ms on most machines.
        """
        self._pings.append((max(answered_s - sent_s, 0.0), peer_clock_s - (sent_s + answered_s) / 2))
        self.rtt_s, self.ahead_s = min(self._pings)

    def forget_rtt(self) -> None:
        """Drop the round trips: the peer is gone and may come back over another path."""
        self._pings.clear()
        self.rtt_s = self.ahead_s = math.nan

    def add_transfer(self, nbytes: int, started_s: float, acknowledged_s: float) -> float:
        """Take in a transfer by when its acknowledgement came.

        Args:
            nbytes: bytes that were sent; under `MIN_SAMPLE_BYTES` they give no bandwidth sample.
            started_s: instant the transfer began.
            acknowledged_s: instant its acknowledgement came.

        Returns:
            Seconds of the transfer itself, more than 0.
        """
        elapsed_s = acknowledged_s - started_s
        half_rtt_s = 0.0 if math.isnan(self.rtt_s) else self.rtt_s / 2
        # An acknowledgement takes a round trip at least, so half of what passed is a floor whatever the pings said.
        transfer_s = max(elapsed_s - half_rtt_s, elapsed_s / 2, _MIN_TRANSFER_S)
        if nbytes >= MIN_SAMPLE_BYTES:
            self._add_sample(acknowledged_s, nbytes * 8 / transfer_s)
        return transfer_s

    def add_receipt(self, nbytes: int, started_s: float, receipt: Receipt, now_s: float) -> float | None:
        """Take in a transfer by its receipt, however late that came or was read: it may have ridden on other data.

        Two clocks are known to each other within half of the shortest round trip, whichever side measured it. A receipt that
        contradicts this cannot be read, because a clock has jumped, or no ping was ever answered at once: then the transfer
        gives no sample here, and the next one is to be acknowledged by a message of its own, which `add_transfer` can read.

        Args:
            nbytes: as for `add_transfer`.
            started_s: instant the transfer began.
            receipt: says when it ended.
            now_s: this instant.

        Returns:
            Seconds of the transfer itself, more than 0; None if the receipt cannot be read.
        """
        rtt_s, ahead_s = self.rtt_s, self.ahead_s
        if receipt.rtt_s < rtt_s or rtt_s != rtt_s:  # NaN is not itself
            rtt_s, ahead_s = receipt.rtt_s, -receipt.ahead_s
        half_rtt_s, ended_s = rtt_s / 2, receipt.received_s - ahead_s
        elapsed_s = now_s - started_s
        self.reads_receipts = (
            0.0 <= half_rtt_s <= elapsed_s and -half_rtt_s <= ended_s - started_s <= elapsed_s + half_rtt_s
        )
        if not self.reads_receipts:
            return None
        transfer_s = max(ended_s - started_s, half_rtt_s, _MIN_TRANSFER_S)  # one way takes half a round trip at least
        if nbytes >= MIN_SAMPLE_BYTES:
            self._add_sample(min(ended_s, now_s), nbytes * 8 / transfer_s)
        return transfer_s

    def _add_sample(self, at_s: float, bandwidth_bps: float) -> None:
        self._samples.appendleft((at_s, bandwidth_bps))
        self._num_samples += 1
        if self._num_samples == 1:
            self._log_mean = math.log(bandwidth_bps)
        else:
            # In log space: bandwidths differ by factors, and one burst must not outweigh a slow minute.
            weight = 1 / min(self._num_samples, _MEAN_SAMPLES)
            self._log_mean += weight * (math.log(bandwidth_bps) - self._log_mean)

    def state(
        self, source: str, target: str, now_s: float, backlog_bytes: int, in_flight: "Outgoing[Any] | None" = None
    ) -> LinkState:
        """Give the link's state as a policy sees it.

        Args:
            source: who sends.
            target: who receives.
            now_s: this instant.
            backlog_bytes: bytes that wait or are in flight.
            in_flight: the message under way. What it has taken beyond a round trip bounds the rate from above long
                before its acknowledgement comes, if it ever does; one too small to measure by bounds nothing.
        """
        in_flight_bytes, in_flight_s = 0, 0.0
        if in_flight is not None and in_flight.nbytes >= MIN_SAMPLE_BYTES:
            rtt_s = 0.0 if math.isnan(self.rtt_s) else self.rtt_s
            in_flight_bytes, in_flight_s = in_flight.nbytes, max(now_s - in_flight.started_s - rtt_s, 0.0)
        return LinkState(
            source=source,
            target=target,
            samples=tuple(LinkSample(age_s=now_s - at_s, bandwidth_bps=bps) for at_s, bps in self._samples),
            mean_bandwidth_bps=math.exp(self._log_mean),
            rtt_s=self.rtt_s,
            backlog_bytes=backlog_bytes,
            in_flight_bytes=in_flight_bytes,
            in_flight_s=in_flight_s,
        )


def to_report(state: LinkState) -> LinkReport:
    """Put a link's state into the form that travels."""
    return LinkReport(
        target=state.target,
        samples=tuple((sample.age_s, sample.bandwidth_bps) for sample in state.samples),
        mean_bandwidth_bps=state.mean_bandwidth_bps,
        rtt_s=state.rtt_s,
        backlog_bytes=state.backlog_bytes,
    )


def from_report(report: LinkReport, source: str) -> LinkState:
    """Read a link's state from a report of `source`, as old as it was when that was made."""
    return LinkState(
        source=source,
        target=report.target,
        samples=tuple(LinkSample(age_s=age_s, bandwidth_bps=bps) for age_s, bps in report.samples[:SAMPLES]),
        mean_bandwidth_bps=report.mean_bandwidth_bps,
        rtt_s=report.rtt_s,
        backlog_bytes=report.backlog_bytes,
    )


class Outgoing(msgspec.Struct, Generic[Payload], eq=False):
    """One message in the queue or in flight."""

    tag: Hashable
    nbytes: int
    payload: Payload
    pushed_s: float
    sequence: int
    started_s: float = math.nan
    is_withdrawn: bool = False
    """In flight, and nobody waits for it any more."""
    is_repeated: bool = False
    """May have gone out before: an acknowledgement may be of that."""

    @property
    def waited_s(self) -> float:
        """Seconds in the queue."""
        return self.started_s - self.pushed_s


class Uplink(Generic[Payload]):
    """The queue in front of one link: first in, first out, one message in flight.

    Attributes:
        waiting: the messages behind the one in flight.
    """

    def __init__(self) -> None:
        """Start empty; sequence numbers start at 1."""
        self.waiting: deque[Outgoing[Payload]] = deque()
        self._in_flight: Outgoing[Payload] | None = None
        self._last_sequence = 0

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing waits and nothing is in flight."""
        return self._in_flight is None and not self.waiting

    @property
    def in_flight(self) -> Outgoing[Payload] | None:
        """The message under way, None while the link is idle."""
        return self._in_flight

    @property
    def backlog_bytes(self) -> int:
        """Bytes ahead of a message pushed now. How far the one in flight has come is not known: it counts whole."""
        flying = 0 if self._in_flight is None else self._in_flight.nbytes
        return flying + sum(item.nbytes for item in self.waiting) if self.waiting else flying

    def push(self, tag: Hashable, nbytes: int, payload: Payload, now_s: float) -> None:
        """Put a message at the end of the queue."""
        self._last_sequence += 1
        self.waiting.append(Outgoing(tag, nbytes, payload, pushed_s=now_s, sequence=self._last_sequence))

    def start(self, now_s: float) -> Outgoing[Payload] | None:
        """Take the first message in flight; None while one is, or when none waits."""
        if self._in_flight is not None or not self.waiting:
            return None
        self._in_flight = self.waiting.popleft()
        self._in_flight.started_s = now_s
        return self._in_flight

    def postpone(self) -> None:
        """Put the message in flight back in front of the queue: it did not get out, or its connection is gone."""
        if self._in_flight is not None and not self._in_flight.is_withdrawn:
            self._in_flight.is_repeated = True
            self.waiting.appendleft(self._in_flight)
        self._in_flight = None

    def ack(self, sequence: int) -> Outgoing[Payload] | None:
        """Complete the message in flight; None if the acknowledgement is for another one."""
        item = self._in_flight
        if item is None or item.sequence != sequence:
            return None
        self._in_flight = None
        return item

    def drop(self, tag: Hashable) -> bool:
        """Withdraw all messages with a tag: those that wait are gone, the one in flight is marked.

        Returns:
            True if it was in flight. It stays so until `ack`, `postpone` or `clear`.
        """
        self.waiting = deque(item for item in self.waiting if item.tag != tag)
        item = self._in_flight
        if item is None or item.tag != tag or item.is_withdrawn:
            return False
        item.is_withdrawn = True
        return True

    def clear(self) -> None:
        """Forget everything; sequence numbers go on from where they are."""
        self.waiting.clear()
        self._in_flight = None


def due_probe_bytes(meter: LinkMeter, is_idle: bool, now_s: float) -> int:
    """Tell how many bytes to probe a link with now; 0: not now.

    Only an idle link whose newest sample is old is probed, with what takes about 50 ms at the last known bandwidth.
    """
    if not is_idle or now_s - meter.measured_s < PROBE_AFTER_S:
        return 0
    if math.isnan(meter.bandwidth_bps):
        return FIRST_PROBE_BYTES
    return min(max(int(meter.bandwidth_bps * PROBE_S / 8), MIN_SAMPLE_BYTES), MAX_PROBE_BYTES)
