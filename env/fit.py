"""Fit the families to recorded traces, and report the synthetic ones beside the recorded."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from env.families import NUM_LENGTHS, NUM_QUANTILES, Family, save_families
from env.fit_report import write_report
from env.recording import (
    LAGS_S,
    OUTAGE_FRAC,
    Recording,
    autocorrelation,
    mean_of,
    normal_scores,
    ranks,
    spells_s,
    unit_s,
)
from env.traces import FloatArray, read_loads, read_networks, trace_files

_FAST_S = (0.1, 0.2, 0.35, 0.6, 1.0, 1.6, 2.5, 4.0)
_SLOW_S = (5.0, 8.0, 12.0, 20.0, 35.0, 60.0, 100.0)
_MAX_LEVEL_VAR = 0.95


def fit_folder(folder: str | Path, report: str | Path, table: str | Path | None = None) -> list[Family]:
    """Fit every family of `folder`/network and `folder`/load on their training files.

    Args:
        folder: holds `network/` and `load/` with files named `family__trace.csv`.
        report: Markdown file to write, and a PNG of the same name beside it.
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
    write_report([(family, recordings[(family.kind, family.name)]) for family in families], Path(report))
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
    """Fit one family; traces count by their length in time. Loads have no outages: no load is a low one."""
    limit = OUTAGE_FRAC * mean_of(traces) if kind == "network" else -math.inf
    up = [Recording(t.step_s, np.where(t.values < limit, math.nan, t.values)) for t in traces]
    values = np.concatenate([t.values for t in traces])
    weights = np.concatenate([np.full(len(t.values), t.step_s) for t in traces])
    is_out = values < limit
    ordered, share = ranks(values[~is_out], weights[~is_out])
    quantiles = np.interp(np.linspace(0.0, 1.0, NUM_QUANTILES), share, ordered)
    normal = normal_scores(up)
    seconds = unit_s(traces)
    lags = [lag * seconds for lag in LAGS_S]
    fast_s, slow_s, fast_var = _fit_memory(np.array(lags), autocorrelation(normal, lags), seconds)
    family = Family(name, kind, tuple(quantiles.tolist()), _level_var(normal), fast_s, slow_s, fast_var)
    return _with_outages(family, traces, limit, values[is_out], weights[is_out]) if is_out.any() else family


def _level_var(normal: Sequence[Recording]) -> float:
    """Variance between traces of what is left of them, weighed by how much that is."""
    known = [(z.values[~np.isnan(z.values)], z.step_s) for z in normal]
    lengths = np.array([len(z) * step_s for z, step_s in known])
    means = np.array([z.mean() if len(z) else 0.0 for z, _ in known])
    if len(normal) == 1:
        return 0.0
    return min(float(np.average((means - np.average(means, weights=lengths)) ** 2, weights=lengths)), _MAX_LEVEL_VAR)


def _with_outages(
    family: Family, traces: Sequence[Recording], limit: float, out_values: FloatArray, out_weights: FloatArray
) -> Family:
    """Give a family the recorded lengths of its outages and of what lies between them.

    What lies between is cut short where a trace begins or ends: it is stretched until the share of the time that the
    family is out is the recorded one.
    """
    out_s, up_s = (_atoms(lengths_s) for lengths_s in spells_s(traces, limit))
    share = float(out_weights.sum()) / sum(len(t.values) * t.step_s for t in traces)
    up_s *= out_s.sum() * (1.0 - share) / share / up_s.sum()
    return replace(
        family,
        out_value=float(np.average(out_values, weights=out_weights)),
        out_s=tuple(out_s.tolist()),
        up_s=tuple(up_s.tolist()),
    )


def _atoms(lengths_s: FloatArray) -> FloatArray:
    """Sum lengths up as so many that are each as likely, of the same mean: means between even quantiles."""
    running = np.concatenate([[0.0], np.cumsum(np.sort(lengths_s))])
    at = np.interp(np.linspace(0.0, len(lengths_s), NUM_LENGTHS + 1), np.arange(len(running)), running)
    means_s: FloatArray = np.diff(at) * (NUM_LENGTHS / len(lengths_s))
    return means_s


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
