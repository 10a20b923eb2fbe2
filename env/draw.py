"""Draw a world: links, loads, faults, then requests at a rate that the best plan can carry."""

from collections.abc import Callable, Sequence

import numpy as np

from env.families import FLOOR_BPS
from env.site import Site, log_uniform
from env.traces import GRID_S, FloatArray
from env.world import BACKBONE, DEVICE_CLOUD, NUM_PATHS, PEERS, Background, World, paths_of
from runtime.planning.arrays import blank_states
from runtime.planning.cost import predict_total
from runtime.planning.estimators import ReadingsArrays
from runtime.types import DEVICE_NODE

SCENARIOS = ("static", "bandwidth", "load", "both", "streaming", "contention", "outage", "handover")

MAX_STEPS = 512
"""Grid steps of a world: after 102 s it starts over."""

MAX_BACKGROUND = 4096
"""Background requests of a node in a period; where there would be more, they are fewer and larger."""

FIRST_S = 1.0
"""Nothing is asked before: the first statuses and probes are in."""

DEADLINE_FLOOR_S = 0.05
"""A deadline is no shorter than this and two round trips, as a session's default."""

_EPISODE, _PATH, _NODE, _CLIENT = range(4)
_STEADY_LINKS = ("static", "load")
_STEADY_NODES = ("static", "bandwidth")
_PEER_BPS, _PEER_RTT_S = 1e9, 0.001
_BACKBONE_SIGMA, _BACKBONE_S = 0.2, 10.0
_JITTER_FRAC = 0.05  # of the gap between frames in `streaming`

Bandwidth = Callable[[np.random.Generator, Site, int], FloatArray]
Load = Callable[[np.random.Generator, int], FloatArray]


def stream(seed: int | Sequence[int], what: int, number: int) -> np.random.Generator:
    """Open the random stream of one thing in one episode."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(what, number))))


def draw_world(
    kind: str, site: Site, seed: int | Sequence[int], num_requests: int, bandwidth: Bandwidth, load: Load
) -> World:
    """Draw an episode's world.

    Args:
        kind: one of `SCENARIOS`.
        site: where it takes place.
        seed: of everything.
        num_requests: of each client.
        bandwidth: draws the rates of an access link, downwards, on the grid.
        load: draws a node's load over its mean, on the grid.
    """
    rng = stream(seed, _EPISODE, 0)
    path, scale = _links(site, rng)
    rate_bps, rtt_s = _paths(kind, site, seed, rng, bandwidth)
    contention, busy_frac, background = _nodes(kind, site, seed, load)
    is_down = np.zeros(contention.shape, dtype=np.bool_)
    if kind == "outage":
        _add_outages(site, rng, rate_bps, is_down)
    if kind == "handover":
        _add_handovers(site, rng, rate_bps, rtt_s)
    num_clients = int(rng.integers(site.ranges.clients[0], site.ranges.clients[1] + 1)) if kind == "contention" else 1
    gap_s = _gap_s(kind, site, rng, (rate_bps, rtt_s, path, scale), (contention, busy_frac, background), num_clients)
    warm_frac = rng.uniform(*site.ranges.warm_frac)
    is_warm = rng.random(site.candidates.costs.num_plans) < warm_frac
    shift = rng.integers(rate_bps.shape[1], size=num_clients)
    shift[0] = 0
    requests = [_requests(kind, site, stream(seed, _CLIENT, c), num_requests, gap_s) for c in range(num_clients)]
    arrivals_s, input_bytes, deadline_s, noise = (np.stack(column) for column in zip(*requests, strict=True))
    floor_s = DEADLINE_FLOOR_S + 2.0 * float(rtt_s.max())
    return World(
        rate_bps=rate_bps,
        rtt_s=rtt_s,
        path=path,
        scale=scale,
        contention=contention,
        is_down=is_down,
        background=background,
        shift=shift,
        arrivals_s=arrivals_s,
        input_bytes=input_bytes,
        deadline_s=np.maximum(deadline_s, floor_s),
        noise=noise,
        is_warm=is_warm,
    )


# --- links ------------------------------------------------------------------------------------------------------------


def _links(site: Site, rng: np.random.Generator) -> tuple["np.typing.NDArray[np.intp]", FloatArray]:
    """Path of every link slot, and its rate over the path's: uplinks from the device are slower."""
    layout = site.candidates.costs.layout
    uplink_frac = log_uniform(rng, site.ranges.uplink_frac)
    scale = np.array([uplink_frac if source == DEVICE_NODE else 1.0 for source, _ in layout.links])
    cloud = site.problem.deployment.cloud
    return paths_of(layout, None if cloud is None else cloud.name), scale


def _paths(
    kind: str, site: Site, seed: int | Sequence[int], rng: np.random.Generator, bandwidth: Bandwidth
) -> tuple[FloatArray, FloatArray]:
    """Rates and round trips of the paths. The cloud is reached through the access link of the first edge node."""
    ranges = site.ranges
    rate_bps, rtt_s = np.empty((NUM_PATHS, MAX_STEPS)), np.empty((NUM_PATHS, MAX_STEPS))
    access_scale = log_uniform(rng, ranges.access_scale)
    for edge in range(DEVICE_CLOUD):
        if edge < max(site.num_edges, 1):
            rate_bps[edge] = access_scale * bandwidth(stream(seed, _PATH, edge), site, MAX_STEPS)
        else:
            rate_bps[edge] = rate_bps[0]
        rtt_s[edge] = log_uniform(rng, ranges.edge_rtt_s)
    rate_bps[DEVICE_CLOUD] = rate_bps[0] * rng.uniform(0.5, 1.0)
    rtt_s[DEVICE_CLOUD] = rtt_s[0] + log_uniform(rng, ranges.cloud_rtt_s)
    wobble = np.ones(MAX_STEPS)
    if kind in _STEADY_LINKS:
        rate_bps[: DEVICE_CLOUD + 1] = np.exp(
            np.log(np.maximum(rate_bps[: DEVICE_CLOUD + 1], FLOOR_BPS)).mean(axis=1, keepdims=True)
        )
    else:
        knots = stream(seed, _PATH, BACKBONE).standard_normal(round(MAX_STEPS * GRID_S / _BACKBONE_S) + 1)
        wobble = np.exp(
            _BACKBONE_SIGMA * np.interp(np.linspace(0, len(knots) - 1, MAX_STEPS), range(len(knots)), knots)
        )
    rate_bps[BACKBONE] = log_uniform(rng, ranges.backbone_bps) * wobble
    rtt_s[BACKBONE] = log_uniform(rng, ranges.backbone_rtt_s)
    rate_bps[PEERS], rtt_s[PEERS] = _PEER_BPS, _PEER_RTT_S
    return np.maximum(rate_bps, FLOOR_BPS), rtt_s


def _add_outages(
    site: Site, rng: np.random.Generator, rate_bps: FloatArray, is_down: "np.typing.NDArray[np.bool_]"
) -> None:
    """Let access links and edge nodes fail for a while, one after the other and independently."""
    ranges = site.ranges
    for path in range(DEVICE_CLOUD + 1):
        for start, stop in _spells(rng, log_uniform(rng, ranges.outage_gap_s), log_uniform(rng, ranges.outage_s)):
            rate_bps[path, start:stop] = FLOOR_BPS
    for node in range(1, site.num_edges + 1):
        for start, stop in _spells(rng, log_uniform(rng, ranges.outage_gap_s), log_uniform(rng, ranges.outage_s)):
            is_down[node, start:stop] = True


def _spells(rng: np.random.Generator, gap_s: float, length_s: float) -> list[tuple[int, int]]:
    """Grid ranges of exponential lengths, exponential gaps between them."""
    out, at_s = [], FIRST_S + rng.exponential(gap_s)
    while at_s < MAX_STEPS * GRID_S:
        stop_s = at_s + max(rng.exponential(length_s), GRID_S)
        out.append((round(at_s / GRID_S), min(round(stop_s / GRID_S), MAX_STEPS)))
        at_s = stop_s + rng.exponential(gap_s)
    return out


def _add_handovers(site: Site, rng: np.random.Generator, rate_bps: FloatArray, rtt_s: FloatArray) -> None:
    """Let the device move from one edge node's reach to the next; the links to the others are weak meanwhile.

    With one edge node the device moves out of its reach and back. The cloud stays as far as it is.
    """
    ranges = site.ranges
    places = max(site.num_edges, 2)
    every_s, weak = log_uniform(rng, ranges.handover_every_s), log_uniform(rng, ranges.handover_weak)
    at_s, place = 0.0, int(rng.integers(places))
    while at_s < MAX_STEPS * GRID_S:
        stop_s = at_s + every_s * rng.uniform(0.5, 1.5)
        start, stop = round(at_s / GRID_S), round(stop_s / GRID_S)
        for edge in range(DEVICE_CLOUD):
            if edge != place:
                rate_bps[edge, start:stop] *= weak
                rtt_s[edge, start:stop] += ranges.handover_rtt_s
        silent = start + max(round(log_uniform(rng, ranges.handover_outage_s) / GRID_S), 1)
        if start > 0:
            rate_bps[: DEVICE_CLOUD + 1, start:silent] = FLOOR_BPS
        at_s, place = stop_s, (place + 1) % places
    np.maximum(rate_bps, FLOOR_BPS, out=rate_bps)


# --- nodes ------------------------------------------------------------------------------------------------------------

_NO_BACKGROUND = Background(np.zeros(0), np.zeros(0))


def _nodes(
    kind: str, site: Site, seed: int | Sequence[int], load: Load
) -> tuple[FloatArray, FloatArray, tuple[Background, ...]]:
    """Contention, mean utilisation by background requests, and those requests, of every node slot."""
    nodes = site.candidates.costs.layout.nodes
    contention, busy_frac = np.ones((len(nodes), MAX_STEPS)), np.zeros(len(nodes))
    background = [_NO_BACKGROUND] * len(nodes)
    for slot, name in enumerate(nodes):
        if slot == 0 or kind in _STEADY_NODES:
            continue
        rng = stream(seed, _NODE, slot)
        contention[slot] = _co_tenant(site, rng)
        limit = site.ranges.utilisation_max
        utilisation = np.clip(rng.uniform(*site.ranges.utilisation) * load(rng, MAX_STEPS), 0.0, limit)
        # A co-tenant slows background requests down too: together they may not ask for more than there is.
        utilisation = np.minimum(utilisation, limit / contention[slot])
        busy_frac[slot] = float((utilisation * contention[slot]).mean())
        size_s = log_uniform(rng, site.ranges.background_size) * site.model_s(name)
        background[slot] = draw_background(rng, utilisation, size_s)
    return contention, busy_frac, tuple(background)


def _co_tenant(site: Site, rng: np.random.Generator) -> FloatArray:
    """Contention by a co-tenant that comes and goes: 1 while it is away."""
    on_s, share = log_uniform(rng, site.ranges.co_tenant_on_s), rng.uniform(*site.ranges.co_tenant)
    lengths = rng.exponential(on_s, size=4 * round(MAX_STEPS * GRID_S / site.ranges.co_tenant_on_s[0]))
    turns = np.searchsorted(np.cumsum(lengths), GRID_S * np.arange(MAX_STEPS))
    is_on = (turns + int(rng.integers(2))) % 2 == 0
    return np.where(is_on, 1.0 / (1.0 - share), 1.0)


def draw_background(rng: np.random.Generator, utilisation: FloatArray, size_s: float) -> Background:
    """Poisson arrivals whose rate follows the utilisation on the grid; sizes vary around `size_s`, or more if need be."""
    work_s = float(utilisation.sum() * GRID_S)
    mean_s = max(size_s, work_s / (0.9 * MAX_BACKGROUND))
    expected = work_s / mean_s
    turns = np.cumsum(rng.exponential(1.0, size=int(expected + 6.0 * np.sqrt(expected) + 8)))
    turns = turns[turns < expected]
    done = np.concatenate([[0.0], np.cumsum(utilisation) * (GRID_S / mean_s)])
    arrivals_s = np.interp(turns, done, GRID_S * np.arange(len(done)))
    sigma = 0.5
    service_s = mean_s * np.exp(sigma * rng.standard_normal(len(turns)) - 0.5 * sigma * sigma)
    return Background(arrivals_s, service_s)


# --- requests ---------------------------------------------------------------------------------------------------------


def _gap_s(
    kind: str,
    site: Site,
    rng: np.random.Generator,
    links: tuple[FloatArray, FloatArray, "np.typing.NDArray[np.intp]", FloatArray],
    nodes: tuple[FloatArray, FloatArray, tuple[Background, ...]],
    num_clients: int,
) -> float:
    """Mean gap between the requests of one client: drawn over the best plan's latency, but no less than it can carry."""
    rate_bps, rtt_s, path, scale = links
    contention, busy_frac, background = nodes
    link_bps = rate_bps.mean(axis=1)[path] * scale
    link_rtt_s = rtt_s.mean(axis=1)[path]
    k = contention.mean(axis=1)
    size_s = np.array([float(b.service_s.mean()) if len(b.service_s) else 0.0 for b in background])
    wait_s = 0.64 * busy_frac / (1.0 - np.minimum(busy_frac, 0.9)) * size_s * k  # M/G/1, (1 + cv^2) / 2 of the sizes
    costs = site.candidates.costs
    state = blank_states(costs.layout, 1)
    state.input_bytes[:] = site.typical_bytes
    readings = ReadingsArrays(link_bps[None], link_rtt_s[None], k[None], wait_s[None])
    is_legal = np.isfinite(total := predict_total(costs, readings, state)[0])
    best = int(np.where(is_legal, total, np.inf).argmin())
    bounds = site.ranges.gap_streaming if kind == "streaming" else site.ranges.gap
    busiest_s = _bottleneck_s(site, best, link_bps, link_rtt_s, k / (1.0 - busy_frac), num_clients)
    return max(log_uniform(rng, bounds) * float(total[best]), busiest_s / site.ranges.utilisation_cap)


def _bottleneck_s(
    site: Site, plan: int, link_bps: FloatArray, link_rtt_s: FloatArray, slow_down: FloatArray, num_clients: int
) -> float:
    """Longest time that one request of every client holds any server under a plan."""
    costs = site.candidates.costs
    idle_s, node = costs.full("idle_s")[plan], costs.full("node")[plan]
    shared = np.array([1.0, num_clients, num_clients])
    compute_s = idle_s * slow_down[node] * shared
    link, has_hop = costs.full("link")[plan], costs.full("has_hop")[plan]
    nbytes = costs.full("plain_bytes")[plan] + costs.full("has_input")[plan] * site.typical_bytes
    is_shared = np.array([1.0, num_clients, num_clients, 1.0])
    # A message holds its link until it is acknowledged.
    transfer_s = (nbytes * 8.0 / link_bps[link] + link_rtt_s[link]) * has_hop * is_shared
    return float(max(compute_s.max(), transfer_s.max()))


def _requests(
    kind: str, site: Site, rng: np.random.Generator, count: int, gap_s: float
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Arrivals, input bytes, deadlines and service noise of one client: one row of draws per request."""
    ranges = site.ranges
    phase, factor = rng.random(), log_uniform(rng, ranges.deadline_factor)
    draws = rng.random((count, 6))
    if kind == "streaming":
        arrivals_s = gap_s * (np.arange(count) + phase + _JITTER_FRAC * draws[:, 0])
    else:
        arrivals_s = np.cumsum(-gap_s * np.log1p(-draws[:, 0]))
    # Box-Muller: a fixed number of draws per request, so that a longer episode begins like a shorter one.
    radius = np.sqrt(-2.0 * np.log1p(-draws[:, 1:3]))
    size = radius[:, 0] * np.cos(2.0 * np.pi * draws[:, 3])
    normal = np.stack(
        [
            radius[:, 1] * np.cos(2.0 * np.pi * draws[:, 4]),
            radius[:, 1] * np.sin(2.0 * np.pi * draws[:, 4]),
            radius[:, 0] * np.sin(2.0 * np.pi * draws[:, 3]),
        ],
        axis=1,
    )
    is_encoded = site.problem.input_kind == "encoded"
    sigma = ranges.input_sigma if is_encoded else 0.0
    input_bytes = np.maximum(site.typical_bytes * np.exp(sigma * size), 1.0)
    local_s = site.model_s(DEVICE_NODE) if DEVICE_NODE in site.problem.profile.nodes else 1.0
    deadline_s = np.full(count, factor * local_s)
    if site.problem.constraints.deadline_s is not None:
        deadline_s[:] = site.problem.constraints.deadline_s
    return FIRST_S + arrivals_s, input_bytes, deadline_s, np.exp(ranges.service_noise * normal)
