"""What a session's `events.jsonl` tells of a user's own links, nodes and requests.

A log holds what was measured, as it was measured: bandwidth where something was sent, k and q where a node was heard.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from env.correction import Correction, Parts, fit_correction, parts_of
from env.traces import FloatArray
from runtime.errors import ConfigError
from runtime.types import DEVICE_NODE, LatencyBreakdown, Tier

MIN_REQUESTS = 20
"""Fewer tell nothing of a deployment."""

SESSION_GAP_S = 5.0
"""Sessions of one file follow each other after so long: what was between them is not played."""

_NODE_ROWS = ("is_up", "load_factor", "queue_delay_s", "utilisation_frac")

Series = tuple[FloatArray, FloatArray]
"""Instants, ascending, and values."""


@dataclass(frozen=True, slots=True, eq=False)
class Log:
    """What a log holds, on one clock from 0 on."""

    tiers: Mapping[str, Tier]  # of every node but the device
    num_layers: int
    input_kind: str
    arrivals_s: FloatArray  # (R,) ascending
    input_bytes: FloatArray  # (R,)
    deadline_s: FloatArray  # (R,)
    bandwidth_bps: Mapping[tuple[str, str], Series]  # by directed link
    rtt_s: Mapping[tuple[str, str], Series]
    load_factor: Mapping[str, Series]  # by node
    queue_delay_s: Mapping[str, Series]
    utilisation_frac: Mapping[str, Series]
    is_up: Mapping[str, Series]
    computed: Mapping[str, tuple["Computed", ...]]  # by node, the device included
    pairs: tuple[tuple[Parts, Parts], ...]  # predicted and measured, of requests that went as planned

    @property
    def length_s(self) -> float:
        """From the first request to the last, and one gap more: then it starts over."""
        return float(self.arrivals_s[-1] * len(self.arrivals_s) / max(len(self.arrivals_s) - 1, 1)) or 1.0

    def correction(self) -> Correction:
        """What the runtime took over what it had predicted of itself, component by component."""
        return fit_correction(self.pairs)


@dataclass(frozen=True, slots=True)
class Computed:
    """A request's share on one node: the layers, the seconds, and k as it was known."""

    layers: tuple[int, ...]
    seconds: float
    load_factor: float


def read_log(path: Path) -> Log:
    """Read the events of sessions on one deployment.

    Args:
        path: an `events.jsonl`, or the folder that holds one; rotated files beside it are read first.

    Raises:
        ConfigError: when there are too few events, or they are of several models or kinds of input.
    """
    path = path / "events.jsonl" if path.is_dir() else path
    older = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: file.suffix, reverse=True)
    events: list[dict[str, Any]] = []
    try:
        for file in (*older, path):
            events += [msgspec.json.decode(line) for line in file.read_bytes().splitlines() if line.strip()]
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"expected {path} to be the events of a session, got: {error}") from error
    events = [event for event in events if event.get("state") is not None]
    if len(events) < MIN_REQUESTS:
        raise ConfigError(f"expected at least {MIN_REQUESTS} requests in {path}, got {len(events)}; let it run longer")
    for what, found in (
        ("model", {event["model_id"] for event in events}),
        ("kind of input", {event["state"]["input_kind"] for event in events}),
        ("set of nodes", {tuple(sorted(node["name"] for node in event["state"]["nodes"])) for event in events}),
    ):
        if len(found) > 1:
            raise ConfigError(f"expected events of one {what} in {path}, got {len(found)}; split the file")
    return _collect(_on_one_clock(events))


def _on_one_clock(events: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Put sessions one behind the other; events in the order of arrival."""
    out: list[tuple[float, dict[str, Any]]] = []
    began_s, offset_s, end_s = -math.inf, 0.0, 0.0
    for event in events:
        spent_s = (event["measured"] or {}).get("total_s") or 0.0
        start_s = datetime.fromisoformat(event["at"]).timestamp() - event["arrived_after_s"] - spent_s
        if abs(start_s - began_s) > SESSION_GAP_S + (event["state"]["deadline_s"] or 0.0):
            began_s, offset_s = start_s, (end_s + SESSION_GAP_S if out else 0.0) - event["arrived_after_s"]
        at_s = max(offset_s + event["arrived_after_s"], 0.0)
        end_s = max(end_s, at_s)
        out.append((at_s, event))
    return sorted(out, key=lambda item: item[0])


class _Readings:
    """What states tell of links and nodes, by instant: the same reading hangs in many states."""

    def __init__(self, names: Iterable[str]) -> None:
        self.links: dict[str, dict[tuple[str, str], dict[float, float]]] = {"bandwidth_bps": {}, "rtt_s": {}}
        self.nodes: dict[str, dict[str, dict[float, float]]] = {row: {name: {} for name in names} for row in _NODE_ROWS}

    def take(self, at_s: float, state: Mapping[str, Any]) -> None:
        """Take in one state."""
        for link in state["links"]:
            ends = (link["source"], link["target"])
            for sample in link["samples"]:
                instant_s = round(at_s - sample["age_s"], 2)  # the states differ by less about the instant of a sample
                self.links["bandwidth_bps"].setdefault(ends, {})[instant_s] = sample["bandwidth_bps"]
            if link["rtt_s"] is not None:
                self.links["rtt_s"].setdefault(ends, {})[at_s] = link["rtt_s"]
        for node in state["nodes"]:
            self.nodes["is_up"][node["name"]][at_s] = float(node["is_up"])
            for row in _NODE_ROWS[1:]:
                if node["age_s"] is not None and node[row] is not None:
                    self.nodes[row][node["name"]][at_s - node["age_s"]] = node[row]


def _collect(events: list[tuple[float, dict[str, Any]]]) -> Log:
    first_s, states = events[0][0], [event["state"] for _, event in events]
    tiers = {node["name"]: Tier(node["tier"]) for node in states[0]["nodes"]}
    tier_of = {DEVICE_NODE: "device", **{name: tier.label for name, tier in tiers.items()}}
    readings, computed, pairs = _Readings(tiers), dict[str, list[Computed]](), []
    for at_s, event in events:
        readings.take(at_s - first_s, event["state"])
        # What was in tiles ran on several nodes, in part beside each other: it tells no node's speed.
        if event["outcome"] in ("remote", "device") and event["measured"] is not None and not event["tiles"]:
            _note_computed(computed, event, tier_of)
            predicted, measured = (_breakdown(event[name]) for name in ("predicted", "measured"))
            if math.isfinite(predicted.total_s):
                pairs.append((parts_of(predicted, tier_of), parts_of(measured, tier_of)))
    series = {row: {name: _series(known) for name, known in of.items()} for row, of in readings.nodes.items()}
    return Log(
        tiers=tiers,
        num_layers=max(len(event["tiers"]) for _, event in events),
        input_kind=states[0]["input_kind"],
        arrivals_s=np.array([at_s - first_s for at_s, _ in events]),
        input_bytes=np.array([float(state["input_bytes"]) for state in states]),
        deadline_s=np.array([float(state["deadline_s"] or math.inf) for state in states]),
        bandwidth_bps={ends: _series(known) for ends, known in readings.links["bandwidth_bps"].items()},
        rtt_s={ends: _series(known) for ends, known in readings.links["rtt_s"].items()},
        **series,
        computed={name: tuple(shares) for name, shares in computed.items()},
        pairs=tuple(pairs),
    )


def _note_computed(computed: dict[str, list[Computed]], event: dict[str, Any], tier_of: Mapping[str, str]) -> None:
    known = {node["name"]: node["load_factor"] for node in event["state"]["nodes"]}
    for name, seconds in event["measured"]["compute_s"].items():
        layers = tuple(at for at, digit in enumerate(event["tiers"]) if Tier(int(digit)).label == tier_of[name])
        computed.setdefault(name, []).append(Computed(layers, seconds, max(known.get(name) or 1.0, 1.0)))


def _breakdown(record: Mapping[str, Any]) -> LatencyBreakdown:
    known = {row: {name: _number(value) for name, value in record[row].items()} for row in ("compute_s", "transfer_s")}
    names = ("codec_s", "queueing_s", "decision_s", "other_s", "total_s")
    return LatencyBreakdown(**known, **{name: _number(record[name]) for name in names}, source=record["source"])  # type: ignore[arg-type]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _series(known: Mapping[float, float]) -> Series:
    instants_s = sorted(known)
    return np.array(instants_s), np.array([known[at_s] for at_s in instants_s])
