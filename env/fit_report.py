"""Synthetic traces beside the recordings that their families were fitted to: a table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from env.families import Family
from env.recording import LAGS_S, OUTAGE_FRAC, Recording, autocorrelation, mean_of, normal_scores, spells_s, unit_s
from env.traces import FloatArray

_HEAD = """# Synthetic families beside the recordings they were fitted to

Written by `scripts/fit_scenarios.py`, from training files only. Synthetic traces have the lengths and steps of the
recordings, and are {times} times as many. Network values in Mbit/s; load relative to its trace's mean, or utilisation. ACF:
autocorrelation within a trace of the values' normal scores, for the lags in units of 1 s (or the recording's own step
where that is longer). An outage is a run below {percent:g} % of the family's mean.

![marginals, autocorrelation and outages]({png})
"""

_TIMES = 5
_SEED = 7

Pairs = Sequence[tuple[Family, Sequence[Recording]]]


def write_report(fitted: Pairs, path: Path) -> None:
    """Write a table per family into a Markdown file, and a PNG of the same name beside it."""
    png = path.with_suffix(".png")
    lines = [_HEAD.format(times=_TIMES, percent=100 * OUTAGE_FRAC, png=png.name)]
    rows = []
    for family, recorded in fitted:
        rng = np.random.default_rng(_SEED)
        lines += _table(family, recorded, synthetic := _synthesise(family, recorded, rng))
        rows.append((family, recorded, synthetic))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(rows, png)


def _synthesise(family: Family, recorded: Sequence[Recording], rng: np.random.Generator) -> list[Recording]:
    return [Recording(t.step_s, family.sample(rng, len(t.values), t.step_s)) for _ in range(_TIMES) for t in recorded]


def _unit(family: Family) -> float:
    return 1e6 if family.kind == "network" else 1.0


def _table(family: Family, recorded: Sequence[Recording], synthetic: Sequence[Recording]) -> list[str]:
    limit = OUTAGE_FRAC * mean_of(recorded)
    rows = [_statistics(traces, limit, _unit(family)) for traces in (recorded, synthetic)]
    names = ["mean", "sd", "p5", "p25", "p50", "p75", "p95", *(f"ACF {lag:g}" for lag in LAGS_S), "sd of trace means"]
    names += ["out, share", "outage mean s", "outage p95 s"]
    return [
        f"\n## {family.name} ({family.kind}, {len(recorded)} files)\n",
        f"level_var {family.level_var:.3f}, fast {family.fast_s:g} s ({family.fast_var:.2f}), slow {family.slow_s:g} s\n",
        "| statistic | recorded | synthetic |",
        "|---|---|---|",
        *(f"| {name} | {a:.3g} | {b:.3g} |" for name, a, b in zip(names, *rows, strict=True)),
    ]


def _statistics(traces: Sequence[Recording], limit: float, unit: float) -> list[float]:
    values = np.concatenate([t.values for t in traces])
    acf = _acf(traces)
    means = np.array([t.values.mean() / unit for t in traces])
    out_s, _ = spells_s(traces, limit)
    outages = [float(out_s.mean()), float(np.quantile(out_s, 0.95))] if len(out_s) else [0.0, 0.0]
    quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) / unit
    out_frac = float(np.mean(values < limit))
    spread = [float(values.mean() / unit), float(values.std() / unit)]
    return [*spread, *quantiles.tolist(), *acf.tolist(), float(means.std()), out_frac, *outages]


def _acf(traces: Sequence[Recording]) -> FloatArray:
    return autocorrelation(normal_scores(traces), [lag * unit_s(traces) for lag in LAGS_S])


def _draw(rows: Sequence[tuple[Family, Sequence[Recording], Sequence[Recording]]], path: Path) -> None:
    """Draw a row per family: distribution of values, autocorrelation, outages longer than so much."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(rows), 3, figsize=(11, 2.1 * len(rows)), squeeze=False, layout="constrained")
    for (family, recorded, synthetic), row in zip(rows, axes, strict=True):
        limit = OUTAGE_FRAC * mean_of(recorded)
        for traces, label, style in ((recorded, "recorded", "-"), (synthetic, "synthetic", "--")):
            _draw_values(row[0], traces, _unit(family), label, style)
            row[1].plot(np.array(LAGS_S) * unit_s(traces), _acf(traces), style, marker=".")
            _draw_lengths(row[2], spells_s(traces, limit)[0], style)
        row[0].set_ylabel(family.name)
        row[0].set_xlabel("Mbit/s" if family.kind == "network" else "load")
        row[1].set(xlabel="lag, s", ylim=(-0.1, 1.0))
        row[2].set_xlabel("outage, s")
    for axis, title in zip(
        axes[0], ("share of values below", "autocorrelation", "share of outages longer"), strict=True
    ):
        axis.set_title(title)
    axes[0][0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_values(axis: Any, traces: Sequence[Recording], unit: float, label: str, style: str) -> None:
    share = np.linspace(0.0, 1.0, 201)
    axis.plot(np.quantile(np.concatenate([t.values for t in traces]), share) / unit, share, style, label=label)


def _draw_lengths(axis: Any, lengths_s: FloatArray, style: str) -> None:
    if len(lengths_s):
        axis.step(np.sort(lengths_s), 1.0 - np.arange(len(lengths_s)) / len(lengths_s), style, where="post")
        axis.set(xscale="log", yscale="log")
