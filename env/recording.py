"""Recorded traces with even steps, and the statistics that synthetic ones are held to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from env.traces import FloatArray

LAGS_S = (0.2, 1.0, 2.0, 5.0, 10.0, 20.0)

OUTAGE_FRAC = 0.05
"""Below this share of its family's mean a link counts as out."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One trace with even steps. NaN where it does not count."""

    step_s: float
    values: FloatArray


def mean_of(traces: Sequence[Recording]) -> float:
    """Mean over time."""
    spans_s = [t.step_s * len(t.values) for t in traces]
    return float(np.average([t.values.mean() for t in traces], weights=spans_s))


def unit_s(traces: Sequence[Recording]) -> float:
    """What lags are multiples of: one second, or the longest step where that is longer."""
    return max(1.0, *(t.step_s for t in traces))


def normal_scores(traces: Sequence[Recording]) -> list[Recording]:
    """Replace values by the normal quantiles of their ranks among all of them; equal values get one rank."""
    values = np.concatenate([t.values for t in traces])
    weights = np.concatenate([np.full(len(t.values), t.step_s) for t in traces])
    counts = ~np.isnan(values)
    ordered, share = ranks(values[counts], weights[counts])
    return [Recording(t.step_s, _scores(ordered, share, t.values)) for t in traces]


def ranks(values: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sort values, and give the share of the weights up to the middle of each."""
    order = np.argsort(values, kind="stable")
    share = (np.cumsum(weights[order]) - 0.5 * weights[order]) / weights.sum()
    return values[order], share


def _scores(ordered: FloatArray, share: FloatArray, values: FloatArray) -> FloatArray:
    low = np.minimum(np.searchsorted(ordered, values, side="left"), len(ordered) - 1)
    high = np.searchsorted(ordered, values, side="right") - 1
    middle = np.where(np.isnan(values), math.nan, 0.5 * (share[low] + share[high]))
    scores: FloatArray = ndtri(np.clip(middle, 1e-4, 1.0 - 1e-4))
    return scores


def autocorrelation(traces: Sequence[Recording], lags_s: Sequence[float]) -> FloatArray:
    """Autocorrelation within traces at each lag, averaged over traces by length; NaN where no trace tells."""
    total, weight = np.zeros(len(lags_s)), np.zeros(len(lags_s))
    for trace in traces:
        counts = ~np.isnan(trace.values)
        if counts.sum() < 2:
            continue
        centred = trace.values - trace.values[counts].mean()
        variance = float((centred[counts] ** 2).mean())
        span_s = len(centred) * trace.step_s
        for at, lag_s in enumerate(lags_s):
            lag = round(lag_s / trace.step_s)
            if variance < 1e-6 or not 1 <= lag < len(centred) // 2 or abs(lag * trace.step_s - lag_s) > 0.3 * lag_s:
                continue
            products = centred[lag:] * centred[:-lag]
            if not np.isnan(products).all():
                total[at] += float(np.nanmean(products)) / variance * span_s
                weight[at] += span_s
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), math.nan)


def spells_s(traces: Sequence[Recording], limit: float) -> tuple[FloatArray, FloatArray]:
    """Lengths of the outages, and of what lies between them and the traces' ends."""
    pieces: tuple[list[FloatArray], list[FloatArray]] = ([], [])
    for trace in traces:
        is_out = trace.values < limit
        for lengths, runs in zip(pieces, (_runs(is_out), _runs(~is_out)), strict=True):
            lengths.append(runs * trace.step_s)
    return np.concatenate(pieces[0]), np.concatenate(pieces[1])


def _runs(is_on: npt.NDArray[np.bool_]) -> FloatArray:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_on, [False]]).astype(np.int8)))
    return (edges[1::2] - edges[::2]).astype(np.float64)
