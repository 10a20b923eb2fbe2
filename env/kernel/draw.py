"""Draw a world: links, loads, faults, then requests at a rate that the best plan can carry.

Everything has a random stream of its own, so what one thing draws moves no other's; a client's requests follow one
another in its stream, so request n is the same however many come.
"""

import math
from typing import Any

from env.kernel.compiled import ZERO, compiled, constants, entry
from env.kernel.decide import predict, total
from env.kernel.family import play, value_at
from env.kernel.layout import (
    ARRIVES,
    CONTENTION,
    DEADLINE,
    DOWN,
    EDGES,
    INPUT,
    NODES,
    NOISE,
    PATHS,
    RTT,
    STEPS,
    Place,
    Plans,
    View,
)
from env.kernel.load import WAIT_OF_LOAD, add_co_tenant, fill_background, limit_load, mean
from env.kernel.random import Stream, below, between, exponential, log_between, normal, uniform
from env.kernel.tiles import weigh_spans
from env.traces import FLOOR_BPS, GRID_S
from env.world import BACKBONE, DEVICE_CLOUD, PEERS
from runtime.planning.candidates import NUM_CANDIDATES

Array = Any

STATIC, BANDWIDTH, LOAD, BOTH, STREAMING, CONTENDED, OUTAGE, HANDOVER = constants(8)
"""Kinds of scenarios, in the order of `env.draw.SCENARIOS`."""

FIRST_S = 1.0
"""Nothing is asked before: the first statuses and probes are in."""

DEADLINE_FLOOR_S = 0.05
"""A deadline is no shorter than this and two round trips, as a session's default."""

_AFTER_S = 10.0
"""Background requests are drawn until so long, and two deadlines, after the last arrival of client 0."""

_BACKBONE_SIGMA, _BACKBONE_S = 0.2, 10.0
_JITTER_FRAC = 0.05  # of the gap between frames in `streaming`
_BUSY_MAX = 0.9

OF_EPISODE, OF_PATHS, OF_PAIRS = 0, 1, 1 + PATHS
"""Rows of the streams: of what there is one of; of each path; then by turns of a node and of a client."""


@entry
def draw(
    kind: int,
    streams: Array,
    p: Array,
    plans: Array,
    tiles: Array,
    views: Array,
    families: Array,
    levels: Array,
    recorded_bps: Array,
    recorded_load: Array,
    grid: Array,
    scale: Array,
    shift: Array,
    is_warm: Array,
    requests: Array,
    loads: Array,
    sizes: Array,
    busy: Array,
    background: Array,
    counts: Array,
) -> float:
    """Draw a world into arrays.

    Args:
        kind: of the scenario.
        streams: one row of words per stream.
        p: one record of `PLACE`.
        plans: one record of `PLANS`, the site's.
        tiles: of those plans, (T, TILE_COLUMNS).
        views: one record of `VIEW`, to predict with.
        families: records of `FAMILY`; the place says which are of its links.
        levels: two of them: of nodes' load over time, and of how it differs between nodes.
        recorded_bps: rates of the access links to play instead, shape (EDGES, STEPS); or none, shape (0, 0).
        recorded_load: loads of nodes over their mean, shape (NODES, STEPS); or none.
        grid: takes rates, round trips, contention and silence, (GRID_ROWS, STEPS).
        scale: takes every link's rate over its path's, (LINKS,).
        shift: takes by how much each client's clock is ahead; as many as there are clients.
        is_warm: takes whether each candidate's segments are built.
        requests: takes arrivals, bytes, deadlines and noise, (clients, R, REQUEST_COLUMNS).
        loads: takes the share of each node's time that background requests take, (NODES, STEPS).
        sizes: takes their mean size in idle seconds, 0 for none.
        busy: takes the share of the time that they take in all.
        background: takes background requests of all nodes: arrivals, then idle seconds, (2 NODES, M).
        counts: takes how many of them there are at each node.

    Returns:
        Until when background requests were drawn.
    """
    place, r, stream = p[0], plans[0], streams[OF_EPISODE]
    for row in range(len(grid)):
        _fill(grid[row], 1.0 if CONTENTION <= row < DOWN else 0.0)
    _draw_links(kind, stream, streams, place, r, families, recorded_bps, grid, scale)
    _draw_loads(kind, streams, place, r, levels, recorded_load, grid, loads, sizes, busy)
    if kind == OUTAGE:
        _add_outages(stream, place, grid)
    if kind == HANDOVER:
        _add_handovers(stream, place, grid)
    gap_s = _gap_s(kind, stream, place, r, tiles, views[0], grid, scale, sizes, busy, len(shift))
    warm_frac = between(stream, place.warm_frac)
    for plan in range(place.num_plans):
        is_warm[plan] = uniform(stream) < warm_frac
    for client in range(len(shift)):
        shift[client] = below(stream, STEPS) if client > 0 else 0
        _draw_requests(kind, streams[OF_PAIRS + 2 * client + 1], place, gap_s, requests[client])
    until_s = _limit_deadlines(requests, grid)
    _draw_backgrounds(streams, loads, sizes, until_s, background, counts)
    return until_s


# --- links ------------------------------------------------------------------------------------------------------------


@compiled
def _fill(row: Array, value: float) -> None:
    for step in range(len(row)):
        row[step] = value


@compiled
def _put_scaled(row: Array, factor: float, of: Array) -> None:
    for step in range(len(row)):
        row[step] = factor * of[step]


@compiled
def _draw_links(
    kind: int,
    stream: Stream,
    streams: Array,
    p: Place,
    r: Plans,
    families: Array,
    recorded_bps: Array,
    grid: Array,
    scale: Array,
) -> None:
    """Rates and round trips of the paths. The cloud is reached through the access link of the first edge node."""
    uplink_frac = log_between(stream, p.uplink_frac)
    for link in range(r.num_links):
        scale[link] = uplink_frac if r.link_source[link] == 0 else 1.0  # uplinks from the device are slower
    access = log_between(stream, p.access_scale)
    for edge in range(EDGES):
        if edge >= max(p.num_edges, 1):
            _put_scaled(grid[edge], 1.0, grid[0])
        elif len(recorded_bps):
            _put_scaled(grid[edge], access, recorded_bps[edge])
        else:
            own = streams[OF_PATHS + edge]
            play(own, families[p.families[below(own, p.num_families)]], grid[edge])
            _put_scaled(grid[edge], access, grid[edge])
        _fill(grid[RTT + edge], log_between(stream, p.edge_rtt_s))
    _put_scaled(grid[DEVICE_CLOUD], 0.5 + 0.5 * uniform(stream), grid[0])
    _fill(grid[RTT + DEVICE_CLOUD], grid[RTT, 0] + log_between(stream, p.cloud_rtt_s))
    _fill(grid[BACKBONE], log_between(stream, p.backbone_bps))
    _fill(grid[RTT + BACKBONE], log_between(stream, p.backbone_rtt_s))
    own = streams[OF_PATHS + PEERS]
    _fill(grid[PEERS], log_between(own, p.peer_bps))
    _fill(grid[RTT + PEERS], log_between(own, p.peer_rtt_s))
    if kind == STATIC or kind == LOAD:
        for path in range(DEVICE_CLOUD + 1):
            _fill(grid[path], _steady_bps(grid[path]))
    else:
        _wobble(streams[OF_PATHS + BACKBONE], grid[BACKBONE])
    _lift(grid)


@compiled
def _steady_bps(rate_bps: Array) -> float:
    """Geometric mean."""
    total = 0.0
    for bps in rate_bps:
        total += math.log(max(bps, FLOOR_BPS))
    return math.exp(total / len(rate_bps))


@compiled
def _wobble(stream: Stream, rate_bps: Array) -> None:
    """Let a rate vary slowly: straight lines between knots, in the logarithm."""
    spans = round(len(rate_bps) * GRID_S / _BACKBONE_S)
    per_step, before, after, knot = spans / (len(rate_bps) - 1), normal(stream), normal(stream), 0
    for step in range(len(rate_bps)):
        while per_step * step > knot + 1:
            before, after, knot = after, normal(stream), knot + 1
        rate_bps[step] *= math.exp(_BACKBONE_SIGMA * (before + (per_step * step - knot) * (after - before)))


@compiled
def _lift(grid: Array) -> None:
    for path in range(PATHS):
        for step in range(STEPS):
            grid[path, step] = max(grid[path, step], FLOOR_BPS)


@compiled
def _add_outages(stream: Stream, p: Place, grid: Array) -> None:
    """Let access links and edge nodes fail for a while, one after the other and independently."""
    for path in range(DEVICE_CLOUD + 1):
        _add_spells(stream, p, grid[path], FLOOR_BPS)
    for node in range(1, p.num_edges + 1):
        _add_spells(stream, p, grid[DOWN + node], 1.0)


@compiled
def _add_spells(stream: Stream, p: Place, row: Array, value: float) -> None:
    """Put a value in for exponential lengths, exponential gaps between them."""
    mean_gap_s, mean_s = log_between(stream, p.outage_gap_s), log_between(stream, p.outage_s)
    at_s = FIRST_S + mean_gap_s * exponential(stream)
    while at_s < len(row) * GRID_S:
        stop_s = at_s + max(mean_s * exponential(stream), GRID_S)
        for step in range(round(at_s / GRID_S), min(round(stop_s / GRID_S), len(row))):
            row[step] = value
        at_s = stop_s + mean_gap_s * exponential(stream)


@compiled
def _add_handovers(stream: Stream, p: Place, grid: Array) -> None:
    """Let the device move from one edge node's reach to the next; the links to the others are weak meanwhile.

    With one edge node the device moves out of its reach and back. The cloud stays as far as it is.
    """
    places = max(p.num_edges, 2)
    every_s, weak = log_between(stream, p.handover_every_s), log_between(stream, p.handover_weak)
    at_s, place = 0.0, below(stream, places)
    while at_s < STEPS * GRID_S:
        stop_s = at_s + every_s * (0.5 + uniform(stream))
        start, stop = round(at_s / GRID_S), min(round(stop_s / GRID_S), STEPS)
        for edge in range(EDGES):
            if edge != place:
                for step in range(start, stop):
                    grid[edge, step] *= weak
                    grid[RTT + edge, step] += p.handover_rtt_s
        silent = max(round(log_between(stream, p.handover_outage_s) / GRID_S), 1)
        if start > 0:
            for path in range(DEVICE_CLOUD + 1):
                for step in range(start, min(start + silent, STEPS)):
                    grid[path, step] = FLOOR_BPS
        at_s, place = stop_s, (place + 1) % places
    _lift(grid)


@compiled
def _draw_loads(
    kind: int,
    streams: Array,
    p: Place,
    r: Plans,
    levels: Array,
    recorded_load: Array,
    grid: Array,
    loads: Array,
    sizes: Array,
    busy: Array,
) -> None:
    """Co-tenants and background load of all nodes but the device; none where the kind has none."""
    for node in range(NODES):
        sizes[node] = busy[node] = 0.0
        if 0 < node < r.num_nodes and kind != STATIC and kind != BANDWIDTH:
            own = streams[OF_PAIRS + 2 * node]
            _draw_load(own, levels, recorded_load, node, loads[node])
            add_co_tenant(own, p, grid[CONTENTION + node])
            sizes[node], busy[node] = limit_load(own, p, p.model_s[node], grid[CONTENTION + node], loads[node])


@compiled
def _draw_backgrounds(
    streams: Array, loads: Array, sizes: Array, until_s: float, background: Array, counts: Array
) -> None:
    """Background requests of all nodes up to an instant: arrivals, then idle seconds, and how many there are."""
    for node in range(NODES):
        counts[node] = 0
        if sizes[node] > 0.0:
            counts[node] = fill_background(
                streams[OF_PAIRS + 2 * node],
                loads[node],
                sizes[node],
                until_s,
                background[node],
                background[NODES + node],
            )


@compiled
def _draw_load(stream: Stream, levels: Array, recorded_load: Array, node: int, out: Array) -> None:
    """Draw a node's load over its mean."""
    if len(recorded_load):
        _put_scaled(out, 1.0, recorded_load[node])
        return
    level = value_at(levels[1], normal(stream))
    play(stream, levels[0], out)
    _put_scaled(out, level, out)


# --- requests ---------------------------------------------------------------------------------------------------------


@compiled
def _gap_s(
    kind: int,
    stream: Stream,
    p: Place,
    r: Plans,
    tiles: Array,
    v: View,
    grid: Array,
    scale: Array,
    sizes: Array,
    busy: Array,
    num_clients: int,
) -> float:
    """Mean gap between the requests of one client: drawn over the best plan's latency, but no less than it can carry."""
    for link in range(r.num_links):
        v.s_per_byte[link] = 8.0 / (mean(grid[r.path[link]]) * scale[link])
        v.half_rtt_s[link] = 0.5 * mean(grid[RTT + r.path[link]])
        v.backlog_bytes[link] = 0.0
    v.input_bytes, v.device_backlog_s, v.uplink_backlog_bytes = p.typical_bytes, 0.0, 0.0
    for node in range(r.num_nodes):
        k = mean(grid[CONTENTION + node])
        v.k[node] = k
        v.q_s[node] = WAIT_OF_LOAD * busy[node] / (1.0 - min(busy[node], _BUSY_MAX)) * sizes[node] * k
    if r.num_tiled > 0:
        weigh_spans(tiles, r, v)
    best, best_s = ZERO, math.inf
    for row in range(NUM_CANDIDATES):
        if r.rows[row].padding == 0:
            total_s = total(predict(r, v, row))
            if total_s < best_s:
                best, best_s = row, total_s
    wanted_s = best_s * log_between(stream, p.gap_streaming if kind == STREAMING else p.gap)
    return float(max(wanted_s, _bottleneck_s(r, v, best, busy, num_clients) / p.utilisation_cap))


@compiled
def _bottleneck_s(r: Plans, v: View, plan: int, busy: Array, num_clients: int) -> float:
    """Longest time that one request of every client holds any server under a plan."""
    longest_s = 0.0
    for tier in range(3):
        node = r.rows[plan].node[tier]
        compute_s = r.rows[plan].idle_s[tier] * v.k[node]
        if tier == 1 and r.rows[plan].num_peers > 0:
            compute_s += v.tiled_s[plan]
        compute_s /= 1.0 - busy[node]
        longest_s = max(longest_s, compute_s if tier == 0 else compute_s * num_clients)
    for hop in range(4):
        if r.rows[plan].has_hop[hop] != 0:
            link = r.rows[plan].link[hop]
            nbytes = r.rows[plan].plain_bytes[hop] + r.rows[plan].has_input[hop] * v.input_bytes
            # A message holds its link until it is acknowledged.
            transfer_s = nbytes * v.s_per_byte[link] + 2.0 * v.half_rtt_s[link]
            longest_s = max(longest_s, transfer_s * num_clients if hop == 1 or hop == 2 else transfer_s)
    return longest_s


@compiled
def _draw_requests(kind: int, stream: Stream, p: Place, gap_s: float, out: Array) -> None:
    """Arrivals, input bytes, deadlines and service noise of one client."""
    phase, factor = uniform(stream), log_between(stream, p.deadline_factor)
    deadline_s = factor * p.local_s if math.isnan(p.deadline_s) else p.deadline_s
    at_s = FIRST_S
    for number in range(len(out)):
        if kind == STREAMING:
            at_s = FIRST_S + gap_s * (number + phase + _JITTER_FRAC * uniform(stream))
        else:
            at_s += gap_s * exponential(stream)
        out[number, ARRIVES] = at_s
        out[number, INPUT] = max(p.typical_bytes * math.exp(p.input_sigma * normal(stream)), 1.0)
        out[number, DEADLINE] = deadline_s
        for tier in range(3):
            out[number, NOISE + tier] = math.exp(p.service_noise * normal(stream))


@compiled
def _limit_deadlines(requests: Array, grid: Array) -> float:
    """Leave every request time for its messages; gives until when background requests are wanted."""
    longest_s = 0.0
    for path in range(PATHS):
        for step in range(STEPS):
            longest_s = max(longest_s, grid[RTT + path, step])
    floor_s = DEADLINE_FLOOR_S + 2.0 * longest_s
    for client in range(requests.shape[0]):
        for number in range(requests.shape[1]):
            requests[client, number, DEADLINE] = max(requests[client, number, DEADLINE], floor_s)
    until_s = requests[0, -1, ARRIVES] + 2.0 * requests[0, 0, DEADLINE] + _AFTER_S
    return until_s if until_s < STEPS * GRID_S else math.inf
