"""What a plan costs when requests follow each other: how long one holds every resource, and how long others then wait."""

import numpy as np

from runtime.planning.arrays import FloatArray
from runtime.planning.cost import PARTS, total_s

HELD_PARTS = ("device", "edge", "cloud", "uplink", "backbone_up")
"""What one request holds and the next must wait for. Results are small: the ways back are left out."""

_HELD = [PARTS.index(name) for name in HELD_PARTS]


def held_s(parts: FloatArray) -> FloatArray:
    """Seconds for which one request holds each resource, shape (..., len(HELD_PARTS)); `parts` as of `predict`."""
    held: FloatArray = parts[..., _HELD]
    return held


def bottleneck_s(parts: FloatArray) -> FloatArray:
    """Longest stage: the least time between requests that the plan keeps up with (DADS, heavy load)."""
    longest: FloatArray = held_s(parts).max(axis=-1)
    return longest


def wait_s(held: FloatArray, rate_hz: FloatArray) -> FloatArray:
    """Mean wait for a resource that each request holds for `held` seconds; infinite where requests come faster.

    References:
        Pollaczek-Khinchine for Poisson arrivals and a fixed service time: rate held^2 / (2 (1 - rate held)).
    """
    free = 1.0 - rate_hz * held
    wait: FloatArray = np.where(free > 0.0, 0.5 * rate_hz * held * held / np.where(free > 0.0, free, 1.0), np.inf)
    return wait


def stream_s(parts: FloatArray, rate_hz: FloatArray) -> FloatArray:
    """Predicted latency in a stream of requests, shape (B, K): this request's, plus the wait for every resource.

    Args:
        parts: as of `predict`, shape (B, K, len(PARTS)).
        rate_hz: shape (B,).
    """
    latency: FloatArray = total_s(parts) + wait_s(held_s(parts), rate_hz[:, None, None]).sum(axis=-1)
    return latency
