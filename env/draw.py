"""Draw a world: links, loads, faults, then requests at a rate that the best plan can carry."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

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

_AFTER_S = 10.0
"""Background requests are drawn until so long, and two deadlines, after the last arrival of client 0."""

_STEADY_LINKS = ("static", "load")
_STEADY_NODES = ("static", "bandwidth")
_PEER_BPS, _PEER_RTT_S = 1e9, 0.001
_BACKBONE_SIGMA, _BACKBONE_S = 0.2, 10.0
_JITTER_FRAC = 0.05  # of the gap between frames in `streaming`

Bandwidth = Callable[[np.random.Generator, Site, int], FloatArray]
Load = Callable[[np.random.Generator, int], FloatArray]


class Streams:
    """Random streams of the things in one episode, each its own: what one thing draws moves no other's.

    The words that all of them are seeded with are hashed from the seed at once, for to hash them one by one is slow.
    """

    def __init__(self, seed: int | Sequence[int], num_nodes: int, num_clients: int) -> None:
        """Hash the seed."""
        count = 1 + NUM_PATHS + 2 * max(num_nodes, num_clients)
        self._words = np.random.SeedSequence(seed).generate_state(4 * count, np.uint64).reshape(count, 4)

    def of_episode(self) -> np.random.Generator:
        """Open the stream of what there is one of."""
        return self._open(0)

    def of_path(self, path: int) -> np.random.Generator:
        """Open the stream of a path."""
        return self._open(1 + path)

    def of_node(self, slot: int) -> np.random.Generator:
        """Open the stream of a node."""
        return self._open(1 + NUM_PATHS + 2 * slot)

    def of_client(self, client: int) -> np.random.Generator:
        """Open the stream of a client."""
        return self._open(2 + NUM_PATHS + 2 * client)

    def _open(self, number: int) -> np.random.Generator:
        words: Any = _Words(self._words[number])  # PCG64's annotation names fewer kinds than it takes
        return np.random.Generator(np.random.PCG64(words))


class _Words(ISeedSequence):
    """Words that were hashed before."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[np.uint64]:
        """Give the words; PCG64 asks for just these four."""
        del n_words, dtype
        return self._words


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
    streams = Streams(seed, len(site.candidates.costs.layout.nodes), site.ranges.clients[1])
    rng = streams.of_episode()
    path, scale = _links(site, rng)
    rate_bps, rtt_s = _paths(kind, site, streams, rng, bandwidth)
    loads = _loads(kind, site, streams, load)
    contention = np.stack([load.contention for load in loads])
    is_down = np.zeros(contention.shape, dtype=np.bool_)
    if kind == "outage":
        _add_outages(site, rng, rate_bps, is_down)
    if kind == "handover":
        _add_handovers(site, rng, rate_bps, rtt_s)
    num_clients = int(rng.integers(site.ranges.clients[0], site.ranges.clients[1] + 1)) if kind == "contention" else 1
    gap_s = _gap_s(kind, site, rng, (rate_bps, rtt_s, path, scale), loads, num_clients)
    warm_frac = rng.uniform(*site.ranges.warm_frac)
    is_warm = rng.random(site.candidates.costs.num_plans) < warm_frac
    shift = rng.integers(rate_bps.shape[1], size=num_clients)
    shift[0] = 0
    requests = [_requests(kind, site, streams.of_client(c), num_requests, gap_s) for c in range(num_clients)]
    arrivals_s, input_bytes, deadline_s, noise = (np.stack(column) for column in zip(*requests, strict=True))
    deadline_s = np.maximum(deadline_s, DEADLINE_FLOOR_S + 2.0 * float(rtt_s.max()))
    until_s = float(arrivals_s[0, -1] + 2.0 * deadline_s[0].max()) + _AFTER_S
    until_s = until_s if until_s < MAX_STEPS * GRID_S else math.inf
    return World(
        rate_bps=rate_bps,
        rtt_s=rtt_s,
        path=path,
        scale=scale,
        contention=contention,
        is_down=is_down,
        background=tuple(
            draw_background(load.rng, load.utilisation, load.mean_s, until_s) if load.mean_s > 0.0 else _NO_BACKGROUND
            for load in loads
        ),
        shift=shift,
        arrivals_s=arrivals_s,
        input_bytes=input_bytes,
        deadline_s=deadline_s,
        noise=noise,
        is_warm=is_warm,
        background_until_s=until_s,
    )


# --- links ------------------------------------------------------------------------------------------------------------


def _links(site: Site, rng: np.random.Generator) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Path of every link slot, and its rate over the path's: uplinks from the device are slower."""
    layout = site.candidates.costs.layout
    uplink_frac = log_uniform(rng, site.ranges.uplink_frac)
    scale = np.array([uplink_frac if source == DEVICE_NODE else 1.0 for source, _ in layout.links])
    cloud = site.problem.deployment.cloud
    return paths_of(layout, None if cloud is None else cloud.name), scale


def _paths(
    kind: str, site: Site, streams: Streams, rng: np.random.Generator, bandwidth: Bandwidth
) -> tuple[FloatArray, FloatArray]:
    """Rates and round trips of the paths. The cloud is reached through the access link of the first edge node."""
    ranges = site.ranges
    rate_bps, rtt_s = np.empty((NUM_PATHS, MAX_STEPS)), np.empty((NUM_PATHS, MAX_STEPS))
    access_scale = log_uniform(rng, ranges.access_scale)
    for edge in range(DEVICE_CLOUD):
        if edge < max(site.num_edges, 1):
            rate_bps[edge] = access_scale * bandwidth(streams.of_path(edge), site, MAX_STEPS)
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
        knots = streams.of_path(BACKBONE).standard_normal(round(MAX_STEPS * GRID_S / _BACKBONE_S) + 1)
        wobble = np.exp(
            _BACKBONE_SIGMA * np.interp(np.linspace(0, len(knots) - 1, MAX_STEPS), range(len(knots)), knots)
        )
    rate_bps[BACKBONE] = log_uniform(rng, ranges.backbone_bps) * wobble
    rtt_s[BACKBONE] = log_uniform(rng, ranges.backbone_rtt_s)
    rate_bps[PEERS], rtt_s[PEERS] = _PEER_BPS, _PEER_RTT_S
    return np.maximum(rate_bps, FLOOR_BPS), rtt_s


def _add_outages(site: Site, rng: np.random.Generator, rate_bps: FloatArray, is_down: npt.NDArray[np.bool_]) -> None:
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


@dataclass(frozen=True, slots=True)
class _Load:
    """What others ask of one node."""

    contention: FloatArray  # (G,)
    utilisation: FloatArray  # (G,) share of the time that background requests take while there is no contention
    mean_s: float  # of a background request
    busy_frac: float  # mean share of the time that they take in all
    rng: np.random.Generator  # for what is still to be drawn


_NO_LOAD = _Load(np.ones(MAX_STEPS), np.zeros(MAX_STEPS), 0.0, 0.0, np.random.default_rng(0))
_NO_BACKGROUND = Background(np.zeros(0), np.zeros(0))
_GRID_ENDS_S = GRID_S * np.arange(MAX_STEPS + 1)
_SIZE_SIGMA = 0.5
"""Of the log of background requests' sizes."""


def _loads(kind: str, site: Site, streams: Streams, load: Load) -> list[_Load]:
    """Draw contention and utilisation of every node slot."""
    return [
        _NO_LOAD if slot == 0 or kind in _STEADY_NODES else _load(site, streams.of_node(slot), site.model_s(name), load)
        for slot, name in enumerate(site.candidates.costs.layout.nodes)
    ]


def _load(site: Site, rng: np.random.Generator, model_s: float, load: Load) -> _Load:
    """Draw contention and utilisation of one node; sizes of background requests vary around one share of the model."""
    contention, limit = _co_tenant(site, rng), site.ranges.utilisation_max
    utilisation = rng.uniform(*site.ranges.utilisation) * load(rng, MAX_STEPS)
    # A co-tenant slows background requests down too: together they may not ask for more than there is.
    utilisation = np.minimum(np.maximum(utilisation, 0.0), limit / contention)
    work_s = float(utilisation.sum()) * GRID_S
    mean_s = max(log_uniform(rng, site.ranges.background_size) * model_s, work_s / (0.9 * MAX_BACKGROUND))
    return _Load(contention, utilisation, mean_s, float(utilisation @ contention) / MAX_STEPS, rng)


def _co_tenant(site: Site, rng: np.random.Generator) -> FloatArray:
    """Contention by a co-tenant that comes and goes: 1 while it is away."""
    on_s, share = log_uniform(rng, site.ranges.co_tenant_on_s), rng.uniform(*site.ranges.co_tenant)
    turns = MAX_STEPS * GRID_S / on_s
    ends_s = np.cumsum(rng.exponential(on_s, size=int(turns + 6.0 * math.sqrt(turns) + 8)))
    is_on = (np.searchsorted(ends_s, _GRID_ENDS_S[:-1]) + int(rng.integers(2))) % 2 == 0
    return np.where(is_on, 1.0 / (1.0 - share), 1.0)


def draw_background(
    rng: np.random.Generator, utilisation: FloatArray, size_s: float, until_s: float = math.inf
) -> Background:
    """Draw Poisson arrivals whose rate follows the utilisation on the grid, up to an instant.

    Sizes vary around `size_s`, or more where there would be too many.
    """
    work_s = np.zeros(MAX_STEPS + 1)
    np.cumsum(utilisation, out=work_s[1:])
    work_s *= GRID_S
    mean_s = max(size_s, float(work_s[-1]) / (0.9 * MAX_BACKGROUND))
    done = work_s / mean_s
    expected = float(np.interp(until_s, _GRID_ENDS_S, done))
    turns = np.cumsum(rng.standard_exponential(int(expected + 6.0 * math.sqrt(expected) + 8)))
    turns = turns[: np.searchsorted(turns, expected)]
    arrivals_s = np.interp(turns, done, _GRID_ENDS_S)
    size = np.exp(_SIZE_SIGMA * rng.standard_normal(len(turns)) - 0.5 * _SIZE_SIGMA**2)
    return Background(arrivals_s, mean_s * size)


# --- requests ---------------------------------------------------------------------------------------------------------


def _gap_s(
    kind: str,
    site: Site,
    rng: np.random.Generator,
    links: tuple[FloatArray, FloatArray, npt.NDArray[np.intp], FloatArray],
    loads: Sequence[_Load],
    num_clients: int,
) -> float:
    """Mean gap between the requests of one client: drawn over the best plan's latency, but no less than it can carry."""
    rate_bps, rtt_s, path, scale = links
    link_bps = rate_bps.mean(axis=1)[path] * scale
    link_rtt_s = rtt_s.mean(axis=1)[path]
    k = np.array([load.contention.mean() for load in loads])
    busy_frac, size_s = np.array([load.busy_frac for load in loads]), np.array([load.mean_s for load in loads])
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
