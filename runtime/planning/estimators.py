"""What a rule believes of links and nodes: pure functions over what was measured.

`last_value` believes the newest sample. `tuned` weighs all samples by age and falls back to the long-run mean. Each is
an array function over a batch of states; on one `SystemState` it is the same arithmetic with batch 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from runtime.planning.arrays import NUM_SAMPLES, FloatArray, Layout, StateArrays, encode_states
from runtime.types import SystemState

NOMINAL_BANDWIDTH_BPS = 20e6
"""Rate of a link of which nothing was ever measured, so that a first request can be planned. Guess: a middling Wi-Fi
or LTE uplink."""

NOMINAL_RTT_S = 0.02
"""Round trip of a link that was never pinged. Guess: between a local network and a near data centre."""

MIN_BANDWIDTH_BPS = 1e3
"""Rates below count as this, so that a dead link costs very much, and not infinity."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What a rule believes, made from a `SystemState`.

    A link that is missing or NaN is unknown; `rate_bps` and `round_trip_s` always answer, and so do `k` and `q`: a
    node never heard of counts as idle.
    """

    bandwidth_bps: Mapping[tuple[str, str], float]  # directed link -> rate, NaN unknown
    rtt_s: Mapping[tuple[str, str], float]  # NaN unknown
    load_factor: Mapping[str, float]  # k per node, >= 1
    queue_delay_s: Mapping[str, float]  # q per node, >= 0

    def rate_bps(self, source: str, target: str) -> float:
        """Rate of a directed link; unknown: that of the opposite direction, else `NOMINAL_BANDWIDTH_BPS`."""
        return _known(self.bandwidth_bps, source, target, NOMINAL_BANDWIDTH_BPS)

    def round_trip_s(self, source: str, target: str) -> float:
        """Round trip of a link; unknown: as measured from the other end, else `NOMINAL_RTT_S`."""
        return _known(self.rtt_s, source, target, NOMINAL_RTT_S)

    def k(self, name: str) -> float:
        """Load factor of a node, 1 for one that is not known."""
        return self.load_factor.get(name, 1.0)

    def q(self, name: str) -> float:
        """Queue delay of a node, 0 for one that is not known."""
        return self.queue_delay_s.get(name, 0.0)


def _known(readings: Mapping[tuple[str, str], float], source: str, target: str, nominal: float) -> float:
    own = readings.get((source, target), math.nan)
    if own == own:
        return own
    opposite = readings.get((target, source), math.nan)
    return opposite if opposite == opposite else nominal


Estimator: TypeAlias = Callable[[SystemState], Readings]


@dataclass(frozen=True, slots=True)
class ReadingsArrays:
    """`Readings` of a batch. B: batch, N: node slots, L: link slots."""

    bandwidth_bps: FloatArray  # (B, L) NaN unknown
    rtt_s: FloatArray  # (B, L) NaN unknown
    load_factor: FloatArray  # (B, N)
    queue_delay_s: FloatArray  # (B, N)


ArrayEstimator: TypeAlias = Callable[[StateArrays], ReadingsArrays]


@dataclass(frozen=True, slots=True)
class TunedSettings:
    """Time constants of `tuned`."""

    bandwidth_time_s: float = 2.0
    """A sample's weight falls to 1/e in this time (rl-study: about 2 s)."""
    mean_weight: float = 0.1
    """Weight of the long-run mean, in fresh samples. Guess: outweighs a lone sample after some 5 s."""
    stale_after_s: float = 1.5
    """Age from which k and q are no longer believed. Guess: three statuses missed."""
    load_time_s: float = 5.0
    """After that, k - 1 and q fall to 1/e in this time. Guess."""


def last_value_arrays(state: StateArrays) -> ReadingsArrays:
    """Believe the newest sample, k and q as last heard; without a sample the long-run mean."""
    newest = state.bandwidth_bps[..., 0]
    bandwidth = np.where(np.isnan(newest), state.mean_bandwidth_bps, newest)
    return ReadingsArrays(
        bandwidth_bps=np.maximum(bandwidth, MIN_BANDWIDTH_BPS),
        rtt_s=state.rtt_s,
        load_factor=np.fmax(state.load_factor, 1.0),
        queue_delay_s=np.fmax(state.queue_delay_s, 0.0),
    )


_FRESH = TunedSettings()
_ONES = np.ones(NUM_SAMPLES)


def tuned_arrays(state: StateArrays, settings: TunedSettings = _FRESH) -> ReadingsArrays:
    """Believe an exponentially weighted mean of the samples in log space, shrunk to the long-run mean as they age.

    With weights w = exp(-age / bandwidth_time_s), the log rate is the mean of the samples' logs under w and of the
    long-run mean's log under `mean_weight`; a transfer in flight caps it at what it can have had at most. k decays to
    1 and q to 0 once they are stale (LoADPart's T_stale, as reconstructed).

    References:
        Ours; the time constant is from a feasibility study on synthetic traces.
    """
    rate = -1.0 / settings.bandwidth_time_s
    log_samples = np.log(np.maximum(state.bandwidth_bps, MIN_BANDWIDTH_BPS))
    newest_age_s = state.sample_age_s[..., :1]
    # Relative to the newest, so that old samples of a link without a mean still have a weight above 0.
    relative = np.exp(np.minimum((state.sample_age_s - newest_age_s) * rate, 0.0))
    weight = relative @ _ONES
    log_rate = (relative * log_samples) @ _ONES / weight
    weight = weight * np.exp(newest_age_s[..., 0] * rate)
    trust = weight / (weight + settings.mean_weight)
    log_mean = np.log(np.maximum(state.mean_bandwidth_bps, MIN_BANDWIDTH_BPS))
    log_both = log_mean + trust * (log_rate - log_mean)
    # With one of the two unknown, the other; fmax ignores what is not a number.
    bandwidth = np.exp(np.where(np.isnan(log_both), np.fmax(log_rate, log_mean), log_both))
    bandwidth = np.maximum(np.minimum(bandwidth, state.rate_cap_bps), MIN_BANDWIDTH_BPS)
    load_factor, queue_delay_s = np.fmax(state.load_factor, 1.0), np.fmax(state.queue_delay_s, 0.0)
    if not (state.node_age_s <= settings.stale_after_s).all():  # most often there is nothing to forget
        stale_s = np.maximum(state.node_age_s - settings.stale_after_s, 0.0)
        decay = np.exp(stale_s * (-1.0 / settings.load_time_s))
        load_factor = 1.0 + decay * (load_factor - 1.0)
        queue_delay_s = decay * queue_delay_s
    return ReadingsArrays(bandwidth, state.rtt_s, load_factor, queue_delay_s)


def last_value(state: SystemState) -> Readings:
    """Believe the newest sample of each link, and each node's k and q as last heard.

    The same as `last_value_arrays`, in plain numbers: arrays of one would cost a scan of 500 layers several times over.
    """
    bandwidth: dict[tuple[str, str], float] = {}
    rtt: dict[tuple[str, str], float] = {}
    for link in state.links:
        newest_bps = link.samples[0].bandwidth_bps if link.samples else math.nan
        bps = link.mean_bandwidth_bps if math.isnan(newest_bps) else newest_bps
        bandwidth[link.source, link.target] = bps if math.isnan(bps) else max(bps, MIN_BANDWIDTH_BPS)
        rtt[link.source, link.target] = link.rtt_s
    # NaN compares as not above: a node that never told its load counts as idle.
    return Readings(
        bandwidth_bps=bandwidth,
        rtt_s=rtt,
        load_factor={n.name: n.load_factor if n.load_factor > 1.0 else 1.0 for n in state.nodes},
        queue_delay_s={n.name: n.queue_delay_s if n.queue_delay_s > 0.0 else 0.0 for n in state.nodes},
    )


def tuned(state: SystemState, settings: TunedSettings = _FRESH) -> Readings:
    """Believe the samples by age, the long-run mean when they are old; distrust stale loads (`tuned_arrays`)."""
    layout = Layout.of_state(state)
    return _named(layout, tuned_arrays(encode_states(layout, (state,)), settings))


def _named(layout: Layout, readings: ReadingsArrays) -> Readings:
    return Readings(
        bandwidth_bps=dict(zip(layout.links, readings.bandwidth_bps[0].tolist(), strict=True)),
        rtt_s=dict(zip(layout.links, readings.rtt_s[0].tolist(), strict=True)),
        load_factor=dict(zip(layout.nodes, readings.load_factor[0].tolist(), strict=True)),
        queue_delay_s=dict(zip(layout.nodes, readings.queue_delay_s[0].tolist(), strict=True)),
    )
