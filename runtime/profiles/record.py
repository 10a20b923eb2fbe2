"""What one machine measured of one model, and what follows from it: layer times that add up to segment times.

The layers of a model are timed one by one inside whole runs. Their sum is not the time of a segment that runs alone: it
finds other data in the caches, and checks and places its inputs. So a spread set of segments is timed as well, and the
layer times are moved as little as needed for the sums to agree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.types import GraphSpec, NodeProfile

POINTS = 8
"""Parts with as many layers each that a model is cut into; segments start and stop at their borders."""

FITTED_SPANS = tuple((a, b) for a in range(0, POINTS, 2) for b in range(a + 2, POINTS + 1, 2) if b - a < POINTS)
"""Segments that calibrate, in parts: every one between even borders."""

CHECKED_SPANS = ((0, 3), (1, 3), (1, 5), (1, 7), (3, 5), (3, 7), (5, 7), (5, 8))
"""Segments that only tell how good the calibration is."""

SEGMENT_ERROR_FRAC = 0.02
LAYER_ERROR_FRAC = 0.2
"""How far the time of a segment and of one layer are trusted: their ratio is the weight of the regression's ridge. Guess:
errors on held-out segments are the same for a tenth and for ten times of it."""


FASTER_FRAC = 0.9
"""A whole run that takes less than this share of another one's time shows that the other one's machine was not idle."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the numbers were measured on; names no host."""

    processor: str
    cores: int
    device: str  # cpu, or the GPU's name
    threads: int
    torch: str


@dataclass(frozen=True, slots=True)
class SegmentTime:
    """Idle seconds of layers `[start, stop)` run as one segment."""

    start: int
    stop: int
    seconds: float
    is_fitted: bool
    """Whether the calibration saw it; the others tell its error."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one machine measured of one graph. Every time is a minimum: noise of a shared machine only ever adds."""

    machine: Machine
    measured_at: str  # UTC, ISO 8601
    rounds: int
    spread_frac: float
    """Median whole run over the fastest one, minus 1: how busy the machine was while it was measured."""
    whole_s: float
    raw_layer_s: tuple[float, ...]  # (num_layers,), inside whole runs
    segments: tuple[SegmentTime, ...]
    profile: NodeProfile
    """What follows: calibrated layer times and coding speed."""

    def errors(self) -> tuple[float, ...]:
        """Relative error of every predicted segment that the calibration did not see."""
        return tuple(
            math.fsum(self.profile.layer_s[s.start : s.stop]) / s.seconds - 1 for s in self.segments if not s.is_fitted
        )


@dataclass(frozen=True, slots=True)
class Ratios:
    """How well the lossless codec packs each value of a model, and how fast it was on them."""

    by_value: Mapping[str, float]  # raw bytes / coded bytes by value name; the request's own input is not among them
    weights: str
    """`seeded:SEED` or what else was loaded. Of seeded weights the ratios are an estimate for trained ones."""
    pictures: int
    """Photographs it was measured on; 0: the model's example input."""
    encode_bytes_per_s: float
    decode_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A model's layers, times and ratios: all that planning and simulation need of it."""

    spec: str
    graph: GraphSpec
    measurement: Measurement
    ratios: Ratios

    @property
    def profile(self) -> NodeProfile:
        """The machine's profile, with the coding speed on the model's own values."""
        return replace(
            self.measurement.profile,
            encode_bytes_per_s=self.ratios.encode_bytes_per_s,
            decode_bytes_per_s=self.ratios.decode_bytes_per_s,
        )


# --- calibration ------------------------------------------------------------------------------------------------------


def pick_segments(num_layers: int) -> dict[tuple[int, int], bool]:
    """Segments `[start, stop)` to time, and whether the calibration may see them; the whole model is not among them.

    The same for every machine and run, so that measurements can be merged.
    """
    borders = [round(num_layers * point / POINTS) for point in range(POINTS + 1)]
    picked: dict[tuple[int, int], bool] = {}
    for spans, is_fitted in ((FITTED_SPANS, True), (CHECKED_SPANS, False)):
        for first, last in spans:
            span = (borders[first], borders[last])
            if 0 < span[1] - span[0] < num_layers:
                picked.setdefault(span, is_fitted)
    return picked


def calibrate(raw_layer_s: Sequence[float], whole_s: float, segments: Sequence[SegmentTime]) -> tuple[float, ...]:
    """Move layer times as little as needed for their sums to agree with the whole run and the segments.

    Ridge regression of one factor per layer around 1, on relative errors.

    Args:
        raw_layer_s: (num_layers,), as timed inside whole runs.
        whole_s: of the whole model.
        segments: those with `is_fitted` count.
    """
    layer_s = np.asarray(raw_layer_s, dtype=float)
    layer_s = layer_s * (whole_s / layer_s.sum())
    fitted = [(s.start, s.stop, s.seconds) for s in segments if s.is_fitted]
    rows = np.zeros((1 + len(fitted), len(layer_s)))
    for row, (start, stop, seconds) in zip(rows, [(0, len(layer_s), whole_s), *fitted], strict=True):
        row[start:stop] = layer_s[start:stop] / seconds
    gram = rows @ rows.T + (SEGMENT_ERROR_FRAC / LAYER_ERROR_FRAC) ** 2 * np.eye(len(rows))
    factors = 1 + rows.T @ np.linalg.solve(gram, 1 - rows.sum(axis=1))
    return tuple((layer_s * np.clip(factors, 0.5, 2.0)).tolist())


def merge(old: Measurement, new: Measurement) -> Measurement:
    """The lesser of two measurements of the same graph, time by time; `old` is dropped when the machine is another."""
    if old.machine != new.machine or len(old.raw_layer_s) != len(new.raw_layer_s):
        return new
    whole_s = min(old.whole_s, new.whole_s)
    best: dict[tuple[int, int], SegmentTime] = {}
    for measurement in (old, new):
        for segment in _align(measurement, whole_s):
            known = best.get((segment.start, segment.stop))
            if known is None or segment.seconds < known.seconds:
                best[segment.start, segment.stop] = segment
    segments = tuple(best.values())
    raw_layer_s = tuple(map(min, old.raw_layer_s, new.raw_layer_s))
    return replace(
        new,
        rounds=old.rounds + new.rounds,
        spread_frac=(old if old.whole_s < new.whole_s else new).spread_frac,
        whole_s=whole_s,
        raw_layer_s=raw_layer_s,
        segments=segments,
        profile=NodeProfile(
            layer_s=calibrate(raw_layer_s, whole_s, segments),
            encode_bytes_per_s=max(old.profile.encode_bytes_per_s, new.profile.encode_bytes_per_s),
            decode_bytes_per_s=max(old.profile.decode_bytes_per_s, new.profile.decode_bytes_per_s),
            fixed_s=new.profile.fixed_s,
            tile_layer_s=_lesser(old.profile.tile_layer_s, new.profile.tile_layer_s),
        ),
    )


def _lesser(old: tuple[float, ...], new: tuple[float, ...]) -> tuple[float, ...]:
    """The lesser of each time; what is known, where one of them is empty."""
    return tuple(map(min, old, new)) if old and new else old or new


def _align(measurement: Measurement, whole_s: float) -> tuple[SegmentTime, ...]:
    """Segments as they would be on a machine that needs `whole_s`; as they are, where it was hardly slower."""
    if whole_s >= FASTER_FRAC * measurement.whole_s:
        return measurement.segments
    scale = whole_s / measurement.whole_s
    return tuple(replace(s, seconds=s.seconds * scale) for s in measurement.segments)


# --- cuts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """What crosses when layers `[0, layer)` run here and the others elsewhere."""

    layer: int
    raw_bytes: int
    coded_bytes: float  # expected, lossless

    @property
    def ratio(self) -> float:
        """Raw bytes / coded bytes."""
        return self.raw_bytes / self.coded_bytes


def list_cuts(graph: GraphSpec, by_value: Mapping[str, float]) -> tuple[Cut, ...]:
    """Every cut after the first layer and before the last, with what crosses it raw and coded."""
    cuts = []
    for layer in range(1, graph.num_layers):
        crossing = [v for v in graph.values if v.producer < layer and any(c >= layer for c in v.consumers)]
        raw = sum(v.tensor.nbytes for v in crossing)
        coded = sum(v.tensor.nbytes / by_value.get(v.name, 1.0) for v in crossing)
        if raw:
            cuts.append(Cut(layer, raw, coded))
    return tuple(cuts)
