"""What plans are expected to cost in given states: one array function for any plan, any number of them, any batch."""

import math
from dataclasses import dataclass

import numpy as np

from runtime.planning.arrays import FloatArray, Layout, StateArrays, encode_states
from runtime.planning.estimators import (
    NOMINAL_BANDWIDTH_BPS,
    NOMINAL_RTT_S,
    ArrayEstimator,
    ReadingsArrays,
    tuned_arrays,
)
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import NUM_HOPS, PlanCosts, compile_plan
from runtime.types import GraphSpec, LatencyBreakdown, Plan, SystemState, Tier

PARTS = (
    "device",
    "edge",
    "cloud",
    "uplink",
    "backbone_up",
    "backbone_down",
    "downlink",
    "round_trips",
    "codec",
    "wait_device",
    "wait_uplink",
    "wait_backbone",
    "wait_nodes",
    "messages",
)
"""Parts of a predicted latency in seconds. A plan straight to the cloud uses uplink and downlink, no backbone. With
tiles `edge` is the head's own layers and, for every tiled span, the slowest of its tiles from scatter to gather."""

_ONES = np.ones(len(PARTS))
_UPLINK, _ROUND_TRIPS = PARTS.index("uplink"), PARTS.index("round_trips")


def sum_layers(layer_s: tuple[float, ...], layers: tuple[int, ...]) -> float:
    """Idle seconds of some layers on one node."""
    return math.fsum(layer_s[i] for i in layers)


def value_bytes(graph: GraphSpec, names: tuple[str, ...], input_bytes: int) -> int:
    """Raw bytes of the named values; an encoded input counts as what the request really brings."""
    wanted = set(names)
    sized = sum(v.tensor.nbytes for v in graph.values if v.name in wanted and v.is_sized)
    has_encoded = any(v.name in wanted and not v.is_sized for v in graph.values)
    return sized + (input_bytes if has_encoded else 0)


@dataclass(frozen=True, slots=True)
class _LinkTimes:
    """What the links make of the plans. B: batch, K: plans, H: transfers."""

    s_per_byte: FloatArray  # (B, K, H) 0 where there is no transfer
    half_rtt_s: FloatArray  # (B, K, H) 0 where there is no transfer


@dataclass(frozen=True, slots=True)
class _Terms:
    """A prediction before it is put together."""

    compute: FloatArray  # (B, K, 3)
    transfer: FloatArray  # (B, K, H)
    single: tuple[FloatArray, ...]  # the parts from `round_trips` on, each broadcasts to (B, K)


def predict(costs: PlanCosts, readings: ReadingsArrays, state: StateArrays) -> FloatArray:
    """Predict the latency of every plan in every state, shape (B, K, len(PARTS)), seconds.

    Compute is idle seconds times k; a transfer is bytes over rate, coded where that is expected to be faster; each
    round trip counts once; waiting is the device's backlog where the device runs layers, what the uplink's queue still
    holds when the tensors are ready, the head's queue towards the cloud, and q of every node that runs layers. The
    device's links count as one uplink with one queue. NaN where a node's profile is not known.

    Args:
        costs: the plans' rows.
        readings: what is believed of links and nodes; unknown links are completed with nominal values.
        state: input bytes and backlogs.
    """
    return predict_complete(costs, _complete_used(costs, readings), state)


def predict_complete(costs: PlanCosts, readings: ReadingsArrays, state: StateArrays) -> FloatArray:
    """Predict as `predict` does, from readings without unknown links (`complete`)."""
    terms = _predict_terms(costs, readings, state)
    parts = np.empty((len(state.input_bytes), costs.num_plans, len(PARTS)))
    parts[..., :_UPLINK] = terms.compute
    parts[..., _UPLINK:_ROUND_TRIPS] = terms.transfer
    for part, single in enumerate(terms.single, start=_ROUND_TRIPS):
        parts[..., part] = single
    return parts


def predict_total(costs: PlanCosts, readings: ReadingsArrays, state: StateArrays) -> FloatArray:
    """Predict as `predict` does, but only the sum of the parts, shape (B, K)."""
    terms = _predict_terms(costs, _complete_used(costs, readings), state)
    total: FloatArray = terms.compute @ _ONES[:3] + terms.transfer @ _ONES[:NUM_HOPS]
    for single in terms.single:
        total += single
    return total


def total_s(parts: FloatArray) -> FloatArray:
    """Add up the parts: shape (B, K)."""
    total: FloatArray = parts @ _ONES
    return total


def _predict_terms(costs: PlanCosts, readings: ReadingsArrays, state: StateArrays) -> _Terms:
    links = _link_times(costs, readings)
    compute = readings.load_factor.take(costs.node, axis=1) * costs.idle_s
    if costs.tiles is not None:
        compute[..., Tier.EDGE] += costs.tiles.seconds(
            readings.bandwidth_bps, readings.rtt_s, readings.load_factor, readings.queue_delay_s, costs.num_plans
        )
    transfer, codec = _transfers(costs, links, state.input_bytes)
    wait_uplink = state.uplink_backlog_bytes[:, None] * links.s_per_byte[..., 0]
    backbone_bytes = state.backlog_bytes.take(costs.link[:, 1], axis=1)
    queue_s = readings.queue_delay_s.take(costs.node, axis=1) * costs.has_layers  # the device's own is 0
    single = (
        links.half_rtt_s @ _ONES[:NUM_HOPS],
        codec,
        state.device_backlog_s[:, None] * costs.has_layers[:, 0],
        np.maximum(wait_uplink - compute[..., 0], 0.0),
        backbone_bytes * links.s_per_byte[..., 1],
        queue_s @ _ONES[:3],
        costs.message_s,
    )
    return _Terms(compute, transfer, single)


def _link_times(costs: PlanCosts, readings: ReadingsArrays) -> _LinkTimes:
    return _LinkTimes(
        s_per_byte=(8.0 / readings.bandwidth_bps).take(costs.link, axis=1) * costs.has_hop,
        half_rtt_s=(0.5 * readings.rtt_s).take(costs.link, axis=1) * costs.has_hop,
    )


def _complete_used(costs: PlanCosts, readings: ReadingsArrays) -> ReadingsArrays:
    """Complete the readings, unless all links that a plan takes are known: those between edge nodes often are not."""
    both = (readings.bandwidth_bps + readings.rtt_s).take(costs.used_links, axis=1)
    return complete(readings, costs.layout) if np.isnan(both).any() else readings


def complete(readings: ReadingsArrays, layout: Layout) -> ReadingsArrays:
    """Replace unknown rates and round trips by the opposite direction's, else by the nominal ones."""
    if not np.isnan(readings.bandwidth_bps + readings.rtt_s).any():
        return readings
    return ReadingsArrays(
        bandwidth_bps=_complete(readings.bandwidth_bps, layout, NOMINAL_BANDWIDTH_BPS),
        rtt_s=_complete(readings.rtt_s, layout, NOMINAL_RTT_S),
        load_factor=readings.load_factor,
        queue_delay_s=readings.queue_delay_s,
    )


def _complete(readings: FloatArray, layout: Layout, nominal: float) -> FloatArray:
    opposite = readings.take(layout.reverse, axis=1)
    return np.where(np.isnan(readings), np.where(np.isnan(opposite), nominal, opposite), readings)


def _transfers(costs: PlanCosts, links: _LinkTimes, input_bytes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Seconds on every link, shape (B, K, H), and of the codec, shape (B, K)."""
    saved_s = costs.saved_bytes * links.s_per_byte
    is_coded = saved_s > costs.coding_s
    if costs.has_relays:  # the head passes on what came in as it came: the first sender decided for both links
        np.copyto(is_coded[..., 1::2], is_coded[..., 0::2], where=costs.is_relayed[:, None])
    sent_bytes = costs.plain_bytes
    if costs.sends_input:
        sent_bytes = sent_bytes + costs.has_input * input_bytes[:, None, None]
    transfer = sent_bytes * links.s_per_byte
    transfer -= saved_s * is_coded
    return transfer, (costs.coding_s * is_coded) @ _ONES[:NUM_HOPS] + costs.plain_codec_s


def estimate(
    problem: PlanningProblem, plan: Plan, state: SystemState, estimator: ArrayEstimator = tuned_arrays
) -> LatencyBreakdown:
    """Predict one plan's latency in one state: `predict` with batch 1.

    A node whose profile is not known makes its part NaN, and with it the total.
    """
    costs = compile_plan(problem, plan)
    arrays = encode_states(costs.layout, (state,))
    readings = estimator(arrays)
    return describe(costs, predict(costs, readings, arrays)[0, 0], readings)


def describe(costs: PlanCosts, parts: FloatArray, readings: ReadingsArrays, row: int = 0) -> LatencyBreakdown:
    """Put one plan's predicted parts, shape (len(PARTS),), into a record; `readings` has batch 1."""
    layout, by_part = costs.layout, dict(zip(PARTS, parts.tolist(), strict=True))
    half_rtt_s = _link_times(costs, _complete_used(costs, readings)).half_rtt_s[0, row]
    transfer: dict[str, float] = {}
    for hop in range(NUM_HOPS):
        if costs.has_hop[row, hop]:
            source, target = layout.links[costs.link[row, hop]]
            transfer[f"{source}>{target}"] = float(parts[_UPLINK + hop] + half_rtt_s[hop])
    nodes = [layout.nodes[slot] for slot in costs.node[row]]
    return LatencyBreakdown(
        compute_s={nodes[tier]: by_part[tier.label] for tier in Tier if costs.has_layers[row, tier]},
        codec_s=by_part["codec"],
        transfer_s=transfer,
        queueing_s=math.fsum(by_part[name] for name in PARTS if name.startswith("wait_")),
        decision_s=0.0,
        other_s=by_part["messages"],
        total_s=float(total_s(parts)),
        source="estimated",
    )
