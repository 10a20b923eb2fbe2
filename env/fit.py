"""Fit the families to recorded traces, and report the synthetic ones beside the recorded."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from env.families import NUM_QUANTILES, Family, save_families
from env.traces import FloatArray, read_loads, read_networks, trace_files

LAGS_S = (0.2, 1.0, 2.0, 5.0, 10.0, 20.0)
_FAST_S = (0.1, 0.2, 0.35, 0.6, 1.0, 1.6, 2.5, 4.0)
_SLOW_S = (5.0, 8.0, 12.0, 20.0, 35.0, 60.0, 100.0)
_OUTAGE_FRAC = 0.05
"""Below this share of the family's mean a link counts as out, in the report."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One trace with even steps."""

    step_s: float
    values: FloatArray


def fit_folder(folder: str | Path, report: str | Path, table: str | Path | None = None) -> list[Family]:
    """Fit every family of `folder`/network and `folder`/load on their training files.

    Args:
        folder: holds `network/` and `load/` with files named `family__trace.csv`.
        report: Markdown file to write.
        table: JSON file to write; None replaces the table that the package ships.

    Raises:
        ConfigError: when a folder holds no training trace, or a file is not one.
    """
    place = Path(folder)
    recordings = {**_networks(place / "network"), **_loads(place / "load")}
    families = [_fit(name, kind, traces) for (kind, name), traces in sorted(recordings.items())]
    if table is None:
        save_families(families)
    else:
        save_families(families, Path(table))
    lines = [_HEAD]
    for family in families:
        lines += _report(family, recordings[(family.kind, family.name)])
    Path(report).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return families


def _networks(folder: Path) -> dict[tuple[str, str], list[Recording]]:
    files = trace_files(folder)
    by_family: dict[tuple[str, str], list[Recording]] = defaultdict(list)
    for file, trace in zip(files, read_networks(files), strict=True):
        step_s = trace.period_s / len(trace.starts_s)
        recording = Recording(step_s, np.asarray(trace.rates_bps))
        by_family[("network", file.stem.partition("__")[0])].append(recording)
    return by_family


def _loads(folder: Path) -> dict[tuple[str, str], list[Recording]]:
    files = trace_files(folder)
    by_family: dict[tuple[str, str], list[Recording]] = defaultdict(list)
    for file, trace in zip(files, read_loads(files), strict=True):
        values = np.asarray(trace.values)
        if trace.kind == "requests_per_s":
            values = values / max(float(values.mean()), 1e-12)
        recording = Recording(trace.period_s / len(trace.starts_s), values)
        by_family[("load", file.stem.partition("__")[0])].append(recording)
    return by_family


def _fit(name: str, kind: str, traces: Sequence[Recording]) -> Family:
    """Fit one family; traces count by their length in time."""
    values = np.concatenate([trace.values for trace in traces])
    weights = np.concatenate([np.full(len(t.values), t.step_s) for t in traces])
    order = np.argsort(values, kind="stable")
    share = (np.cumsum(weights[order]) - 0.5 * weights[order]) / weights.sum()
    quantiles = np.interp(np.linspace(0.0, 1.0, NUM_QUANTILES), share, values[order])
    normal = [ndtri(np.clip(_rank(values[order], share, t.values), 1e-4, 1.0 - 1e-4)) for t in traces]
    lengths = np.array([len(t.values) * t.step_s for t in traces])
    means = np.array([z.mean() for z in normal])
    level_var = float(np.average((means - np.average(means, weights=lengths)) ** 2, weights=lengths))
    level_var = min(level_var if len(traces) > 1 else 0.0, 0.95)
    seconds = 1.0 if max(t.step_s for t in traces) <= 1.0 else max(t.step_s for t in traces)
    lags = [lag * seconds for lag in LAGS_S]
    target = _acf([(t.step_s, z) for t, z in zip(traces, normal, strict=True)], lags)
    fast_s, slow_s, fast_var = _fit_memory(np.array(lags), target, seconds)
    return Family(name, kind, tuple(quantiles.tolist()), level_var, fast_s, slow_s, fast_var)


def _rank(ordered: FloatArray, share: FloatArray, values: FloatArray) -> FloatArray:
    """Mid-ranks: equal values get one rank."""
    low = np.searchsorted(ordered, values, side="left")
    high = np.searchsorted(ordered, values, side="right") - 1
    return 0.5 * (share[low] + share[high])


def _acf(traces: Sequence[tuple[float, FloatArray]], lags_s: Sequence[float]) -> FloatArray:
    """Autocorrelation within traces at each lag, averaged over traces by length; NaN where no trace tells."""
    total, weight = np.zeros(len(lags_s)), np.zeros(len(lags_s))
    for step_s, z in traces:
        centred = z - z.mean()
        variance = float((centred**2).mean())
        for at, lag_s in enumerate(lags_s):
            lag = round(lag_s / step_s)
            if variance < 1e-6 or lag < 1 or lag >= len(z) // 2 or abs(lag * step_s - lag_s) > 0.3 * lag_s:
                continue
            total[at] += float((centred[lag:] * centred[:-lag]).mean()) / variance * len(z) * step_s
            weight[at] += len(z) * step_s
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), math.nan)


def _fit_memory(lags_s: FloatArray, target: FloatArray, seconds: float) -> tuple[float, float, float]:
    """Search the time constants on a grid, the share of the fast one by least squares."""
    known = ~np.isnan(target)
    if not known.any():
        return seconds, 20.0 * seconds, 0.5
    best = (math.inf, seconds, 20.0 * seconds, 0.5)
    for fast_s in np.array(_FAST_S) * seconds:
        for slow_s in np.array(_SLOW_S) * seconds:
            fast, slow = np.exp(-lags_s[known] / fast_s), np.exp(-lags_s[known] / slow_s)
            gap = fast - slow
            share = float(np.clip(((target[known] - slow) @ gap) / max(float(gap @ gap), 1e-12), 0.0, 1.0))
            error = float(((share * fast + (1.0 - share) * slow - target[known]) ** 2).sum())
            best = min(best, (error, float(fast_s), float(slow_s), share))
    return best[1:]


# --- the report -------------------------------------------------------------------------------------------------------

_HEAD = """# Synthetic families beside the recordings they were fitted to

Written by `scripts/fit_scenarios.py`, from training files only. Synthetic traces have the lengths, steps and number of the
recordings. Network values in Mbit/s; load relative to its trace's mean, or utilisation. ACF: autocorrelation within a
trace of the values' normal scores, for the lags in units of 1 s (or the recording's own step where that is longer). An
outage is a run below 5 % of the family's mean.
"""


def _report(family: Family, traces: Sequence[Recording]) -> list[str]:
    rng = np.random.default_rng(7)
    synthetic = [Recording(t.step_s, family.sample(rng, len(t.values), t.step_s)) for t in traces]
    unit = 1e6 if family.kind == "network" else 1.0
    rows = [_statistics(family, traces, unit), _statistics(family, synthetic, unit)]
    names = ["mean", "sd", "p5", "p25", "p50", "p75", "p95", *(f"ACF {lag:g}" for lag in LAGS_S), "sd of trace means"]
    names += ["out, share", "outage mean s", "outage p95 s"]
    lines = [
        f"\n## {family.name} ({family.kind}, {len(traces)} files)\n",
        f"level_var {family.level_var:.3f}, fast {family.fast_s:g} s ({family.fast_var:.2f}), slow {family.slow_s:g} s\n",
        "| statistic | recorded | synthetic |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {a:.3g} | {b:.3g} |" for name, a, b in zip(names, *rows, strict=True)]
    return lines


def _statistics(family: Family, traces: Sequence[Recording], unit: float) -> list[float]:
    values = np.concatenate([t.values for t in traces]) / unit
    limit = _OUTAGE_FRAC * family.mean
    runs = np.concatenate([_runs(t.values < limit) * t.step_s for t in traces])
    seconds = 1.0 if max(t.step_s for t in traces) <= 1.0 else max(t.step_s for t in traces)
    ordered = np.sort(np.concatenate([t.values for t in traces]))
    share = (np.arange(len(ordered)) + 0.5) / len(ordered)
    normal = [(t.step_s, ndtri(np.clip(_rank(ordered, share, t.values), 1e-4, 1 - 1e-4))) for t in traces]
    acf = _acf(normal, [lag * seconds for lag in LAGS_S])
    means = np.array([t.values.mean() / unit for t in traces])
    out = float(np.concatenate([t.values < limit for t in traces]).mean())
    tail = [out, float(runs.mean()), float(np.quantile(runs, 0.95))] if len(runs) else [out, 0.0, 0.0]
    quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    return [float(values.mean()), float(values.std()), *quantiles.tolist(), *acf.tolist(), float(means.std()), *tail]


def _runs(is_out: "np.typing.NDArray[np.bool_]") -> FloatArray:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_out, [False]]).astype(np.int8)))
    return (edges[1::2] - edges[::2]).astype(np.float64)
