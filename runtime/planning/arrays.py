"""`SystemState` as arrays with a leading batch axis: one code serves one request on a device and many environments.

A `Layout` fixes which slot belongs to which node and directed link. A reading that was never taken is NaN, as in the
record.
"""

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from runtime.deployment import Deployment
from runtime.types import DEVICE_NODE, LinkSample, LinkState, NodeState, Plan, SystemState, Tier

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.intp]
Link: TypeAlias = tuple[str, str]

NUM_SAMPLES = 8
"""Bandwidth samples per link, newest first."""

NUM_ERRORS = 8
"""Recent prediction errors, newest first."""

NEVER_S = 1e9
"""Age of a bandwidth sample that does not exist: finite, so that differences of ages are numbers."""

_NAN = float("nan")
_INF = float("inf")
_LINK_COLUMNS = 2 * NUM_SAMPLES + 4
_NODE_COLUMNS = 6
_NO_LINK = (_NAN,) * NUM_SAMPLES + (NEVER_S,) * NUM_SAMPLES + (_NAN, _NAN, 0.0, _INF)
_NO_NODE = (0.0, _NAN, _NAN, 0.0, _NAN, _INF)
_NO_REQUEST = (0.0, 0.0, _NAN, 0.0, _NAN)
_DEVICE = (1.0, 1.0, 0.0, 0.0, _NAN, 0.0)


@dataclass(frozen=True, slots=True)
class Layout:
    """Slots of nodes and directed links; `node_slot` and `link_slot` find them by name."""

    nodes: tuple[str, ...]  # the device first
    links: tuple[Link, ...]
    node_slot: dict[str, int]
    link_slot: dict[Link, int]
    reverse: IntArray  # (num_links,) slot of the opposite direction, its own where there is none
    blank: tuple[float, ...]  # a packed state in which nothing was measured
    pack: struct.Struct

    @classmethod
    def of_deployment(cls, deployment: Deployment) -> "Layout":
        """Lay out a deployment: device, edges, cloud; every pair of them is linked in both directions."""
        names = [DEVICE_NODE, *(node.name for node in deployment.edges)]
        if deployment.cloud is not None:
            names.append(deployment.cloud.name)
        return _layout(tuple(names), tuple(itertools.permutations(names, 2)))

    @classmethod
    def of_state(cls, state: SystemState) -> "Layout":
        """Lay out just what a state holds, in its order."""
        return _layout((DEVICE_NODE, *(n.name for n in state.nodes)), tuple((x.source, x.target) for x in state.links))


@lru_cache(maxsize=256)
def _layout(nodes: tuple[str, ...], links: tuple[Link, ...]) -> Layout:
    node_slot = {name: slot for slot, name in enumerate(nodes)}
    link_slot = {link: slot for slot, link in enumerate(links)}
    reverse = np.array([link_slot.get((b, a), slot) for slot, (a, b) in enumerate(links)], dtype=np.intp)
    blank = (*_NO_LINK * len(links), *_DEVICE, *_NO_NODE * (len(nodes) - 1), *_NO_REQUEST, *(_NAN,) * NUM_ERRORS)
    return Layout(nodes, links, node_slot, link_slot, reverse, blank, struct.Struct(f"{len(blank)}d"))


@dataclass(frozen=True, slots=True)
class StateArrays:
    """A batch of states. B: batch, N: node slots, L: link slots; NaN: unknown."""

    bandwidth_bps: FloatArray  # (B, L, NUM_SAMPLES) newest first; the oldest is repeated where there are fewer
    sample_age_s: FloatArray  # (B, L, NUM_SAMPLES) NEVER_S where there is no sample
    mean_bandwidth_bps: FloatArray  # (B, L)
    rtt_s: FloatArray  # (B, L)
    backlog_bytes: FloatArray  # (B, L)
    rate_cap_bps: FloatArray  # (B, L) most that the transfer under way can have had; inf where there is none
    is_up: BoolArray  # (B, N) the device always
    load_factor: FloatArray  # (B, N)
    queue_delay_s: FloatArray  # (B, N)
    queue_length: FloatArray  # (B, N)
    utilisation_frac: FloatArray  # (B, N)
    node_age_s: FloatArray  # (B, N) inf: never heard of
    device_backlog_s: FloatArray  # (B,)
    uplink_backlog_bytes: FloatArray  # (B,)
    request_rate_hz: FloatArray  # (B,)
    input_bytes: FloatArray  # (B,)
    deadline_s: FloatArray  # (B,)
    recent_errors: FloatArray  # (B, NUM_ERRORS) newest first


Record = TypeVar("Record")


def take_rows(record: Record, rows: slice | IntArray) -> Record:
    """Pick rows of every array of a batch, whichever record it is."""
    names = (field.name for field in fields(record))  # type: ignore[arg-type]
    return type(record)(*(getattr(record, name)[rows] for name in names))


def blank_states(layout: Layout, count: int) -> StateArrays:
    """Make a batch in which nothing was measured and no node is up."""
    return _unpack(layout, np.tile(np.array(layout.blank), (count, 1)))


def encode_states(layout: Layout, states: Sequence[SystemState]) -> StateArrays:
    """Convert records to arrays; nodes and links that the layout does not know are left out."""
    # Packing by struct costs a third of what an array made from a list of numbers does.
    packed = b"".join(layout.pack.pack(*_numbers(layout, state)) for state in states)
    return _unpack(layout, np.frombuffer(packed).reshape(len(states), -1))


def decode_state(
    layout: Layout,
    arrays: StateArrays,
    row: int,
    *,
    tiers: Mapping[str, Tier],
    plan_in_force: Plan | None,
    input_kind: str,
) -> SystemState:
    """Convert one row of a batch to the record that `encode_states` would have made it of; bytes are rounded.

    Of a transfer under way the arrays hold no more than the rate that it cannot exceed, so its bytes count as all that
    is queued, over a time that gives this rate.

    Args:
        layout: of the arrays.
        arrays: a batch.
        row: which of its states.
        tiers: tier of every node but the device, by name.
        plan_in_force: of the last request that ended.
        input_kind: of the request at hand.
    """
    nodes = tuple(
        NodeState(
            name=name,
            tier=tiers[name],
            is_up=bool(arrays.is_up[row, slot]),
            load_factor=float(arrays.load_factor[row, slot]),
            queue_delay_s=float(arrays.queue_delay_s[row, slot]),
            queue_length=int(arrays.queue_length[row, slot]),
            utilisation_frac=float(arrays.utilisation_frac[row, slot]),
            age_s=_INF if arrays.node_age_s[row, slot] >= NEVER_S else float(arrays.node_age_s[row, slot]),
        )
        for name, slot in layout.node_slot.items()
        if name != DEVICE_NODE
    )
    errors = arrays.recent_errors[row]
    return SystemState(
        nodes=nodes,
        links=tuple(_link_state(link, arrays, row, slot) for slot, link in enumerate(layout.links)),
        device_backlog_s=float(arrays.device_backlog_s[row]),
        uplink_backlog_bytes=round(float(arrays.uplink_backlog_bytes[row])),
        request_rate_hz=float(arrays.request_rate_hz[row]),
        recent_errors=tuple(errors[~np.isnan(errors)].tolist()),
        plan_in_force=plan_in_force,
        input_kind=input_kind,
        input_bytes=round(float(arrays.input_bytes[row])),
        deadline_s=float(arrays.deadline_s[row]),
    )


def _link_state(link: Link, arrays: StateArrays, row: int, slot: int) -> LinkState:
    ages_s, rates_bps = arrays.sample_age_s[row, slot].tolist(), arrays.bandwidth_bps[row, slot].tolist()
    backlog_bytes, cap_bps = round(float(arrays.backlog_bytes[row, slot])), float(arrays.rate_cap_bps[row, slot])
    in_flight_bytes = 0 if math.isinf(cap_bps) else max(backlog_bytes, 1)
    return LinkState(
        source=link[0],
        target=link[1],
        samples=tuple(LinkSample(a, b) for a, b in zip(ages_s, rates_bps, strict=True) if a < NEVER_S),
        mean_bandwidth_bps=float(arrays.mean_bandwidth_bps[row, slot]),
        rtt_s=float(arrays.rtt_s[row, slot]),
        backlog_bytes=backlog_bytes,
        in_flight_bytes=in_flight_bytes,
        in_flight_s=in_flight_bytes * 8.0 / cap_bps,
    )


def _unpack(layout: Layout, packed: FloatArray) -> StateArrays:
    """Name the columns of packed states, shape (B, columns): views, no copies."""
    count, num_links, num_nodes = len(packed), len(layout.links), len(layout.nodes)
    of_links = packed[:, : num_links * _LINK_COLUMNS].reshape(count, num_links, _LINK_COLUMNS)
    begin = num_links * _LINK_COLUMNS
    of_nodes = packed[:, begin : begin + num_nodes * _NODE_COLUMNS].reshape(count, num_nodes, _NODE_COLUMNS)
    rest = packed[:, begin + num_nodes * _NODE_COLUMNS :]
    scalars = 2 * NUM_SAMPLES
    return StateArrays(
        bandwidth_bps=of_links[:, :, :NUM_SAMPLES],
        sample_age_s=of_links[:, :, NUM_SAMPLES:scalars],
        mean_bandwidth_bps=of_links[:, :, scalars],
        rtt_s=of_links[:, :, scalars + 1],
        backlog_bytes=of_links[:, :, scalars + 2],
        rate_cap_bps=of_links[:, :, scalars + 3],
        is_up=of_nodes[:, :, 0] > 0,
        load_factor=of_nodes[:, :, 1],
        queue_delay_s=of_nodes[:, :, 2],
        queue_length=of_nodes[:, :, 3],
        utilisation_frac=of_nodes[:, :, 4],
        node_age_s=of_nodes[:, :, 5],
        device_backlog_s=rest[:, 0],
        uplink_backlog_bytes=rest[:, 1],
        request_rate_hz=rest[:, 2],
        input_bytes=rest[:, 3],
        deadline_s=rest[:, 4],
        recent_errors=rest[:, 5:],
    )


def _numbers(layout: Layout, state: SystemState) -> list[float]:
    """One state's numbers: links, nodes, then what belongs to neither."""
    flat = list(layout.blank)
    for link in state.links:
        slot = layout.link_slot.get((link.source, link.target))
        if slot is not None:
            at = slot * _LINK_COLUMNS
            flat[at : at + _LINK_COLUMNS] = _link_numbers(link)
    begin = len(layout.links) * _LINK_COLUMNS
    for node in state.nodes:
        slot = layout.node_slot.get(node.name)
        if slot is not None:
            at = begin + slot * _NODE_COLUMNS
            flat[at : at + _NODE_COLUMNS] = _node_numbers(node)
    begin += len(layout.nodes) * _NODE_COLUMNS
    flat[begin : begin + len(_NO_REQUEST)] = (
        state.device_backlog_s,
        state.uplink_backlog_bytes,
        state.request_rate_hz,
        state.input_bytes,
        state.deadline_s,
    )
    begin += len(_NO_REQUEST)
    errors = state.recent_errors[:NUM_ERRORS]
    flat[begin : begin + len(errors)] = errors
    return flat


def _link_numbers(link: LinkState) -> list[float]:
    samples = link.samples[:NUM_SAMPLES]
    missing = NUM_SAMPLES - len(samples)
    numbers = [sample.bandwidth_bps for sample in samples]
    if missing:
        numbers += (numbers[-1] if numbers else _NAN,) * missing
    numbers += [sample.age_s for sample in samples]
    if missing:
        numbers += (NEVER_S,) * missing
    cap_bps = link.in_flight_bytes * 8.0 / link.in_flight_s if link.in_flight_s > 0 else _INF
    numbers += (link.mean_bandwidth_bps, link.rtt_s, link.backlog_bytes, cap_bps)
    return numbers


def _node_numbers(node: NodeState) -> tuple[float, ...]:
    return (node.is_up, node.load_factor, node.queue_delay_s, node.queue_length, node.utilisation_frac, node.age_s)
