"""From episodes to rows, and rows as Markdown and CSV."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from agent.compare.contestants import BOUNDS, CLAIRVOYANT, ROLLOUT
from agent.compare.play import Episode
from agent.compare.statistics import (
    FloatArray,
    IntArray,
    Interval,
    draw_counts,
    geometric_means,
    interval,
    means,
    quantiles,
)
from agent.report import markdown_table

ALL, KNOWN, UNKNOWN = "all", "train", "held-out"
BEST = "best"
"""As a baseline: per scenario and statistic, that of the baselines which is best in it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A policy under one scenario on a group of models."""

    scenario: str
    models: str
    policy: str
    episodes: int
    geo_mean: Interval  # latencies over the site's scale
    mean: Interval
    p95: Interval
    p99: Interval
    missed_frac: float
    uplink_bytes: float
    backbone_bytes: float
    switches_frac: float
    decision_s: float
    guarded_frac: float
    reasons: dict[str, int]
    mean_over: dict[str, Interval]  # ratio of means to each baseline, `BEST` first
    p95_over: dict[str, Interval]
    geo_over: dict[str, Interval]
    regret: dict[str, Interval]  # mean over that of each bound, minus 1


@dataclass(frozen=True, slots=True)
class _Draws:
    """A policy's statistics under every draw of the episodes."""

    geo: FloatArray
    mean: FloatArray
    p95: FloatArray
    p99: FloatArray


def make_rows(
    episodes: Sequence[Episode], baselines: Sequence[str], held_out: Sequence[str], resamples: int
) -> list[Row]:
    """Work out everything for all models and, where both kinds are there, for trained-on and held-out ones apart."""
    rows = []
    groups: dict[str, list[Episode]] = {
        ALL: list(episodes),
        KNOWN: [e for e in episodes if e.model not in held_out],
        UNKNOWN: [e for e in episodes if e.model in held_out],
    }
    has_both = bool(groups[KNOWN] and groups[UNKNOWN])
    for group, own in groups.items():
        if group == ALL or has_both:
            for scenario in dict.fromkeys(e.scenario for e in own):
                rows += _scenario_rows([e for e in own if e.scenario == scenario], group, baselines, resamples)
    return rows


def _scenario_rows(episodes: Sequence[Episode], group: str, baselines: Sequence[str], resamples: int) -> list[Row]:
    by_policy: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_policy.setdefault(episode.policy, []).append(episode)
    worlds = [[(e.site, e.seed) for e in own] for own in by_policy.values()]
    assert all(world == worlds[0] for world in worlds)  # the same worlds in the same order: what makes draws paired
    counts = draw_counts(len(worlds[0]), resamples)
    draws = {policy: _draw(own, counts) for policy, own in by_policy.items()}
    known = [name for name in baselines if name in draws]
    return [_make_row(policy, own, group, draws, known) for policy, own in by_policy.items()]


def _draw(episodes: Sequence[Episode], counts: IntArray) -> _Draws:
    values = np.stack([episode.relative for episode in episodes])
    p95, p99 = (quantiles(values, counts, share) for share in (0.95, 0.99))
    return _Draws(geometric_means(values, counts), means(values, counts), p95, p99)


def _make_row(
    policy: str, episodes: Sequence[Episode], group: str, draws: dict[str, _Draws], baselines: Sequence[str]
) -> Row:
    own, count = draws[policy], sum(len(episode.latency_s) for episode in episodes)
    reasons: Counter[str] = Counter()
    for episode in episodes:
        reasons.update(episode.reasons)
    return Row(
        scenario=episodes[0].scenario,
        models=group,
        policy=policy,
        episodes=len(episodes),
        geo_mean=interval(own.geo),
        mean=interval(own.mean),
        p95=interval(own.p95),
        p99=interval(own.p99),
        missed_frac=float(np.mean([episode.missed_frac for episode in episodes])),
        uplink_bytes=float(np.mean([episode.uplink_bytes for episode in episodes])),
        backbone_bytes=float(np.mean([episode.backbone_bytes for episode in episodes])),
        switches_frac=sum(episode.num_switches for episode in episodes) / count,
        decision_s=float(np.median([episode.decision_s for episode in episodes])),
        guarded_frac=sum(reasons.values()) / count,
        reasons=dict(reasons),
        mean_over=_ratios(draws, policy, baselines, lambda of: of.mean),
        p95_over=_ratios(draws, policy, baselines, lambda of: of.p95),
        geo_over=_ratios(draws, policy, baselines, lambda of: of.geo),
        regret={bound: interval(own.mean / draws[bound].mean - 1.0) for bound in BOUNDS if bound in draws},
    )


def _ratios(
    draws: dict[str, _Draws], policy: str, baselines: Sequence[str], of: Callable[[_Draws], FloatArray]
) -> dict[str, Interval]:
    own = of(draws[policy])
    ratios = {name: interval(own / of(draws[name])) for name in baselines}
    if not ratios:
        return {}
    best = min(baselines, key=lambda name: of(draws[name])[0])
    return {BEST: ratios[best], **ratios}


# --- Markdown -----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """The ratios to the best baseline, a table per group of models and statistic: policies down, scenarios across."""
    sections = []
    for group in dict.fromkeys(row.models for row in rows):
        own = [row for row in rows if row.models == group]
        scenarios = list(dict.fromkeys(row.scenario for row in own))
        sections.append(f"## {_GROUPS[group]}")
        for title, pick in (("means", _mean_over), ("95th percentiles", _p95_over), ("geometric means", _geo_over)):
            best = {row.scenario: _best_of(row, pick(row)) for row in own}
            head = ("policy", *(f"{scenario} ({best[scenario]})" for scenario in scenarios))
            sections.append(f"Ratio of {title} to the best baseline (named in brackets), with 95 % intervals:")
            sections.append(markdown_table(head, _across(own, scenarios, lambda row, pick=pick: _ratio(pick(row)))))  # type: ignore[misc]
    return "\n\n".join(sections)


_GROUPS = {ALL: "All models", KNOWN: "Models that policies were trained on", UNKNOWN: "Models held out"}


def _mean_over(row: Row) -> dict[str, Interval]:
    return row.mean_over


def _p95_over(row: Row) -> dict[str, Interval]:
    return row.p95_over


def _geo_over(row: Row) -> dict[str, Interval]:
    return row.geo_over


def _best_of(row: Row, ratios: dict[str, Interval]) -> str:
    """Name of the baseline that was best: the one with the same ratio."""
    return next((name for name in ratios if name != BEST and ratios[name] == ratios[BEST]), "none")


def _ratio(ratios: dict[str, Interval]) -> str:
    return _cell(ratios[BEST]) if BEST in ratios else ""


def _cell(value: Interval) -> str:
    mark = "*" if value.excludes_one else ""
    return f"{value.value:.3g}{mark} [{value.low:.3g}, {value.high:.3g}]"


def _across(rows: Sequence[Row], scenarios: Sequence[str], cell: Callable[[Row], str]) -> Iterable[Sequence[str]]:
    for policy in dict.fromkeys(row.policy for row in rows):
        by_scenario = {row.scenario: cell(row) for row in rows if row.policy == policy}
        yield (policy, *(by_scenario.get(scenario, "") for scenario in scenarios))


def details(rows: Sequence[Row]) -> str:
    """Every statistic, a table per scenario, all models together."""
    sections = []
    own = [row for row in rows if row.models == ALL]
    for scenario in dict.fromkeys(row.scenario for row in own):
        here = [row for row in own if row.scenario == scenario]
        head = (
            *("policy", "geo. mean", "mean", "p95", "p99", "missed %", "up KB", "backbone KB", "switches %"),
            *("decision us", "guarded %", "over clairvoyant %", "over rollout %"),
        )
        sections += [f"### {scenario} ({here[0].episodes} episodes)", markdown_table(head, map(_detail, here))]
    return "\n\n".join(sections)


def _detail(row: Row) -> Sequence[str]:
    over = [f"{100.0 * row.regret[b].value:+.1f}" if b in row.regret else "" for b in (CLAIRVOYANT, ROLLOUT)]
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(row.reasons.items()))
    return (
        row.policy,
        *(f"{value.value:.3f}" for value in (row.geo_mean, row.mean)),
        *(f"{value.value:.2f}" for value in (row.p95, row.p99)),
        f"{100.0 * row.missed_frac:.2f}",
        f"{row.uplink_bytes / 1e3:.1f}",
        f"{row.backbone_bytes / 1e3:.1f}",
        f"{100.0 * row.switches_frac:.1f}",
        "" if np.isnan(row.decision_s) else f"{1e6 * row.decision_s:.0f}",
        f"{100.0 * row.guarded_frac:.2f} ({reasons})" if reasons else "",
        *over,
    )


# --- CSV ----------------------------------------------------------------------------------------------------------------


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write every row with all its intervals."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(flat)


def _flat(row: Row) -> dict[str, object]:
    out: dict[str, object] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        parts = value if isinstance(value, dict) else {"": value}
        for name, part in parts.items():
            key = f"{field.name}_{name}" if name else field.name
            if isinstance(part, Interval):
                out |= {key: f"{part.value:.6g}", f"{key}_low": f"{part.low:.6g}", f"{key}_high": f"{part.high:.6g}"}
            else:
                out[key] = f"{part:.6g}" if isinstance(part, float) else part
    return out


def write_episodes(episodes: Sequence[Episode], folder: Path) -> None:
    """Write a line per episode, and all latencies, so that statistics can be redone: `latencies.npz` by line number."""
    with (folder / "episodes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            (
                *(
                    "policy",
                    "scenario",
                    "model",
                    "site",
                    "seed",
                    "requests",
                    "scale_s",
                    "mean_s",
                    "geo_mean_s",
                    "p95_s",
                ),
                *("missed_frac", "uplink_bytes", "backbone_bytes", "switches", "decision_s", "guarded"),
            )
        )
        for episode in episodes:
            own_s = episode.relative * episode.scale_s
            numbers = (
                *(episode.scale_s, own_s.mean(), np.exp(np.log(own_s).mean()), np.quantile(own_s, 0.95)),
                *(episode.missed_frac, episode.uplink_bytes, episode.backbone_bytes),
            )
            writer.writerow(
                (
                    *(episode.policy, episode.scenario, episode.model, episode.site, episode.seed, len(own_s)),
                    *(f"{number:.6g}" for number in numbers),
                    *(episode.num_switches, f"{episode.decision_s:.3g}", sum(episode.reasons.values())),
                )
            )
    np.savez_compressed(
        folder / "latencies.npz",
        latency_s=np.stack([episode.latency_s for episode in episodes]).astype(np.float32),
        deadline_s=np.stack([episode.deadline_s for episode in episodes]).astype(np.float32),
        outcome=np.stack([episode.outcome for episode in episodes]),
    )
