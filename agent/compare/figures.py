"""Pictures of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from agent.compare.play import Episode
from agent.compare.scenes import MAP_QUEUES, MAP_RATES_BPS, TIERS, Timeline
from agent.report import load_pyplot

Figure: TypeAlias = Any
"""Matplotlib's; it is not loaded before it is drawn."""


def draw_latencies(episodes: Sequence[Episode], scenario: str) -> Figure:
    """Cumulative distribution of the latencies over the sites' scales under one scenario, a line per policy."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    here = [episode for episode in episodes if episode.scenario == scenario]
    for index, policy in enumerate(dict.fromkeys(episode.policy for episode in here)):
        values = np.sort(np.concatenate([episode.relative for episode in here if episode.policy == policy]))
        style = ("-", "--", ":")[index // 10 % 3]
        axes.plot(values, np.arange(1, len(values) + 1) / len(values), style, color=f"C{index % 10}", label=policy)
    axes.set(xscale="log", xlabel="latency over the site's best", ylabel="share of the requests", title=scenario)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_timeline(timeline: Timeline) -> Figure:
    """One episode: links, nodes, latencies, and which tiers every policy used for which request."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        4,
        1,
        figsize=(12, 11),
        sharex=True,
        layout="constrained",
        height_ratios=(2, 2, 3, 0.35 * len(timeline.tracks) + 1),
    )
    for name, rate_bps in timeline.uplinks_bps.items():
        axes[0].plot(timeline.grid_s, rate_bps / 1e6, label=name, linewidth=1)
    axes[0].set(ylabel="uplink, Mbit/s", yscale="log", title=timeline.title)
    for index, (name, contention) in enumerate(timeline.contention.items()):
        axes[1].plot(
            timeline.grid_s, contention, color=f"C{index}", linestyle=":", label=f"{name}: slow-down by others"
        )
        delay_s = timeline.queue_delay_s[name]
        axes[1].plot(
            timeline.tracks[0].at_s, 1.0 + delay_s, color=f"C{index}", linewidth=1, label=f"{name}: 1 + queue, s"
        )
    axes[1].set(ylabel="load")
    for index, track in enumerate(timeline.tracks):
        axes[2].plot(track.at_s, track.latency_s, marker=".", linewidth=0.7, color=f"C{index % 10}", label=track.policy)
    axes[2].set(ylabel="latency, s", yscale="log")
    colours = _colours()
    for index, track in enumerate(timeline.tracks):
        axes[3].scatter(
            track.at_s, np.full(len(track.at_s), index), c=[colours[t] for t in track.tiers], marker="|", s=140
        )
    axes[3].set(xlabel="seconds", yticks=range(len(timeline.tracks)), yticklabels=[t.policy for t in timeline.tracks])
    axes[3].invert_yaxis()
    for panel in axes[:3]:
        panel.legend(fontsize=7, ncols=3, loc="upper right")
    _add_tiers(figure, colours)
    return figure


def draw_maps(maps: Mapping[str, Any], title: str) -> Figure:
    """Which tiers every policy uses, over the rate of the device's links and the edge nodes' queues."""
    pyplot = load_pyplot()
    from matplotlib.colors import ListedColormap

    columns = min(len(maps), 4)
    figure, axes = pyplot.subplots(
        -(-len(maps) // columns), columns, figsize=(3.4 * columns, 2.9 * -(-len(maps) // columns)), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    colours = _colours()
    for panel in axes.flat[len(maps) :]:
        panel.set_visible(False)
    for (policy, chosen), panel in zip(maps.items(), axes.flat, strict=False):
        shades = ListedColormap(colours)
        panel.pcolormesh(
            np.array(MAP_RATES_BPS) / 1e6, MAP_QUEUES, chosen, cmap=shades, vmin=-0.5, vmax=len(TIERS) - 0.5
        )
        panel.set(xscale="log", title=policy)
    figure.supxlabel("rate of the device's links, Mbit/s")
    figure.supylabel("queue delay at edge nodes over the site's best latency")
    figure.suptitle(title)
    _add_tiers(figure, colours)
    return figure


def _colours() -> list[Any]:
    pyplot = load_pyplot()
    return [pyplot.get_cmap("tab10")(index) for index in (0, 9, 4, 6, 2, 8, 1)]


def _add_tiers(figure: Figure, colours: Sequence[Any]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in zip(TIERS, colours, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(TIERS), fontsize=8)
