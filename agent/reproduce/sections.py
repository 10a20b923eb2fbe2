"""The tables of the papers as Markdown."""

import math
import statistics
from collections.abc import Callable, Sequence

from agent.report import markdown_table
from agent.reproduce.tables import CellMean, Pair, Reduction, pair, reduction, speedup, traffic, where
from agent.reproduce.tables import conditions as values_of

LOADPART_BASELINES = ("neurosurgeon", "neurosurgeon-k", "dads-light", "edge-only", "device-only")
D3_BASELINES = (
    "device-only",
    "edge-only",
    "cloud-only",
    "neurosurgeon@cloud",
    "dads-light@cloud",
    "d3-hpa",
    "optimal",
    "planner",
)


def loadpart_sections(means: Sequence[CellMean]) -> list[str]:
    """LoADPart's tables: what it saves against each rule, against Neurosurgeon without K in parts, and the means."""
    against = [
        (baseline, *_reduction_cells(reduction(pair(means, "loadpart", baseline)))) for baseline in LOADPART_BASELINES
    ]
    pairs = pair(means, "loadpart", "neurosurgeon")
    by_model = [
        (_short(model), *_reduction_cells(reduction(where(pairs, model=model)))) for model in values_of(means, "model")
    ]
    rates, levels = values_of(means, "mbps"), values_of(means, "level")
    by_condition = [
        (level, *(_percent(reduction(where(pairs, level=level, mbps=rate)).mean_frac) for rate in rates))
        for level in levels
    ]
    head = ("cells", "mean", "best", "worst")
    return [
        "Latency that LoADPart saves against other rules; negative: it costs. The paper states -14.2 % on average and "
        "-32.3 % at best (against whom is not certain; Neurosurgeon without K knows bandwidth alone).",
        markdown_table(("against", *head), against),
        "Against Neurosurgeon without K, by network:",
        markdown_table(("network", *head), by_model),
        "The same, mean by load level and uplink rate:",
        markdown_table(("level", *(f"{rate} Mbps" for rate in rates)), by_condition),
        "Mean latency over all load levels and rates, milliseconds:",
        _latency_table(means, "model"),
        "Mean latency over all networks and rates by load level, milliseconds:",
        _latency_table(means, "level"),
    ]


def d3_sections(means: Sequence[CellMean]) -> list[str]:
    """D3's tables: how many times quicker, how many times less backbone traffic, and the means."""
    times, bytes_ = [], []
    untiled = pair(means, "d3", "d3-hpa")
    by_model = [(_short(name), *_speedup_cells(where(untiled, model=name))) for name in values_of(means, "model")]
    for baseline in D3_BASELINES:
        pairs = pair(means, "d3", baseline)
        sent = traffic(pairs)
        times.append((baseline, *_speedup_cells(pairs)))
        bytes_.append(
            (
                *(baseline, str(sent.count), _times(sent.best), _times(sent.mean)),
                *(str(sent.only_baseline), str(sent.only_rule), _times(sent.total)),
            )
        )
    head = ("cells", "best", "geometric mean", "worst")
    return [
        "Latency of other rules over D3's: above 1, D3 is quicker. The paper states up to 3.4x against its best rivals.",
        markdown_table(("rule", *head), times),
        "What tiles win: latency of HPA alone (`d3-hpa`) over HPA with tiles (`d3`), by network:",
        markdown_table(("network", *head), by_model),
        "Backbone bytes of other rules over D3's. The paper states up to 3.68x. Where one of the two sends nothing there is "
        "no ratio; such cells are counted.",
        markdown_table(
            ("rule", "cells with both", "best", "geometric mean", "only it sends", "only D3 sends", "all bytes"), bytes_
        ),
        "The gap of D3's plans to `optimal`, the exact optimum without tiles: predicted from the readings of each request, "
        "and measured. Below 0: tiles, or readings or this machine changed between two turns.",
        markdown_table(
            ("rule", "network", "cells", "predicted mean", "worst", "measured mean", "worst"), _gap_rows(means)
        ),
        "Mean latency over all backbones, milliseconds:",
        _latency_table(means, "model"),
        "Mean latency over all networks by backbone, milliseconds (Neurosurgeon: chains only):",
        _latency_table(means, "network"),
        "Mean backbone bytes per inference over all backbones, KB:",
        _mean_table(means, "model", lambda mean: mean.backbone_bytes / 1e3),
    ]


def _speedup_cells(pairs: Sequence[Pair]) -> tuple[str, str, str, str]:
    ratio = speedup(pairs)
    return str(ratio.count), _times(ratio.best), _times(ratio.mean), _times(ratio.worst)


def _gap_rows(means: Sequence[CellMean]) -> list[tuple[str, ...]]:
    """HPA alone and D3 against `optimal`, by network and over all."""
    rows = []
    for rule in ("d3-hpa", "d3"):
        pairs = pair(means, rule, "optimal")
        groups = [(_short(model), where(pairs, model=model)) for model in values_of(means, "model")]
        for name, own in [*groups, ("all", pairs)]:
            if own:
                gaps = [[each.predicted_gap_frac for each in own], [each.gap_frac for each in own]]
                told = (text for found in gaps for text in (_percent(statistics.fmean(found)), _percent(max(found))))
                rows.append((rule, name, str(len(own)), *told))
    return rows


def _latency_table(means: Sequence[CellMean], by: str) -> str:
    return _mean_table(means, by, lambda mean: mean.latency_s * 1e3)


def _mean_table(means: Sequence[CellMean], by: str, value: Callable[[CellMean], float]) -> str:
    rules = list(dict.fromkeys(mean.rule for mean in means))
    rows = []
    for place in values_of(means, by):
        here = [mean for mean in means if (by, place) in (("model", mean.cell.model), *mean.cell.condition)]
        cells = []
        for rule in rules:
            own = [value(mean) for mean in here if mean.rule == rule]
            cells.append(f"{math.fsum(own) / len(own):.0f}" if own else "")
        rows.append((_short(place), *cells))
    return markdown_table((by, *rules), rows)


def _reduction_cells(saved: Reduction) -> tuple[str, str, str, str]:
    return str(saved.count), _percent(saved.mean_frac), _percent(saved.best_frac), _percent(saved.worst_frac)


def _percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else f"{100.0 * fraction:.1f} %"


def _times(ratio: float) -> str:
    if math.isinf(ratio):
        return "D3 sends nothing"
    return "" if math.isnan(ratio) else f"{ratio:.2f}x"


def _short(name: str) -> str:
    return name.rpartition(":")[2]
