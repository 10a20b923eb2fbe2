"""Draw a world from a kind of scenario, a site and a seed: everything but recorded traces is compiled (`env.kernel`)."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from env.families import load_families, make_table
from env.kernel import draw as kernel
from env.kernel import layout
from env.kernel.layout import BACKGROUND
from env.kernel.load import fill_alone
from env.kernel.random import seed_streams
from env.records import place_of, plans_of
from env.site import Site
from env.traces import FloatArray
from env.world import NUM_PATHS, Background, World

SCENARIOS = ("static", "bandwidth", "load", "both", "streaming", "contention", "outage", "handover")

MAX_STEPS = layout.STEPS
"""Grid steps of a world: after 102 s it starts over."""

FIRST_S = kernel.FIRST_S
"""Nothing is asked before: the first statuses and probes are in."""

WordArray = npt.NDArray[np.uint64]

_LOAD_LEVELS = ("azurellm2023", "servegen")
"""Families of a node's load: over time, and between nodes."""

_NO_TRACES = np.zeros((0, 0))
_NUM_STREAMS = kernel.OF_PAIRS + 2 * max(layout.NODES, layout.CLIENTS)


class _Scratch(threading.local):
    """What a draw works in: to allocate it anew each time takes longer than to fill it."""

    def __init__(self) -> None:
        self.views = layout.make_records(layout.VIEW, 1)
        self.loads = np.empty((layout.NODES, MAX_STEPS))
        self.sizes, self.busy = np.empty(layout.NODES), np.empty(layout.NODES)
        self.background = np.empty((2 * layout.NODES, BACKGROUND))
        self.counts = np.empty(layout.NODES, dtype=np.int64)


_SCRATCH = _Scratch()


def make_streams(seed: int | Sequence[int]) -> WordArray:
    """Hash a seed into random streams, a row of four words each (`env.kernel.draw`)."""
    words, streams = hash_seed(seed).generate_state(4, np.uint64), np.empty((_NUM_STREAMS, 4), np.uint64)
    seed_streams(words, streams)
    return streams


def hash_seed(seed: int | Sequence[int], spawn_key: tuple[int, ...] = ()) -> np.random.SeedSequence:
    """Hash a seed as `SeedSequence` does; numbers of one word each are handed over as such, which is faster."""
    numbers = (seed,) if type(seed) is int else seed
    is_plain = isinstance(numbers, tuple | list) and all(type(n) is int and 0 <= n < 2**32 for n in numbers)
    words: Any = np.array(numbers, dtype=np.uint32) if is_plain else seed
    return np.random.SeedSequence(words, spawn_key=spawn_key)


def draw_world(
    kind: str,
    site: Site,
    seed: int | Sequence[int],
    num_requests: int,
    rates_bps: FloatArray = _NO_TRACES,
    recorded: FloatArray = _NO_TRACES,
) -> World:
    """Draw an episode's world.

    Args:
        kind: one of `SCENARIOS`.
        site: where it takes place.
        seed: of everything.
        num_requests: of each client.
        rates_bps: of the access links, downwards, shape (EDGES, MAX_STEPS); without, fitted families are played.
        recorded: loads of each node over its mean, shape (NODES, MAX_STEPS); without, fitted families are played.
    """
    streams, (plans, tiles, _) = make_streams(seed), plans_of(site)
    costs = site.candidates.costs
    num_nodes, num_links = len(costs.layout.nodes), len(costs.layout.links)
    num_clients = 1
    if kind == "contention":
        fewest, most = site.ranges.clients
        num_clients = fewest + int(streams[kernel.OF_EPISODE, 0]) % (most - fewest + 1)
    grid = np.empty((layout.GRID_ROWS, MAX_STEPS))
    requests = np.empty((num_clients, num_requests, layout.REQUEST_COLUMNS))
    scale, shift = np.empty(num_links), np.empty(num_clients, dtype=np.int64)
    is_warm = np.empty(costs.num_plans, dtype=np.bool_)
    table, levels = _tables()
    work = _SCRATCH
    until_s = kernel.draw(
        SCENARIOS.index(kind), streams, place_of(site), plans, tiles, work.views, table, levels, rates_bps, recorded, grid,
        scale, shift, is_warm, requests, work.loads, work.sizes, work.busy, work.background, work.counts,
    )  # fmt: skip
    return World(
        rate_bps=grid[:NUM_PATHS],
        rtt_s=grid[layout.RTT : layout.RTT + NUM_PATHS],
        path=plans["path"][0, :num_links],
        scale=scale,
        contention=grid[layout.CONTENTION : layout.CONTENTION + num_nodes],
        is_down=grid[layout.DOWN : layout.DOWN + num_nodes] > 0.0,
        background=tuple(
            Background(work.background[node, :count].copy(), work.background[layout.NODES + node, :count].copy())
            for node, count in enumerate(work.counts[:num_nodes].tolist())
        ),
        shift=shift,
        arrivals_s=requests[..., layout.ARRIVES],
        input_bytes=requests[..., layout.INPUT],
        deadline_s=requests[..., layout.DEADLINE],
        noise=requests[..., layout.NOISE :],
        is_warm=is_warm,
        background_until_s=until_s,
    )


def draw_background(stream: WordArray, utilisation: FloatArray, size_s: float) -> Background:
    """Draw Poisson arrivals over a period whose rate follows the utilisation on the grid.

    Sizes vary around `size_s`, or more where there would be too many.
    """
    arrivals_s, service_s = np.empty(BACKGROUND), np.empty(BACKGROUND)
    count = fill_alone(stream, utilisation, size_s, arrivals_s, service_s)
    return Background(arrivals_s[:count], service_s[:count])


@lru_cache(maxsize=1)
def _tables() -> tuple[layout.Family, layout.Family]:
    families = load_families()
    return make_table(list(families.values())), make_table([families[name] for name in _LOAD_LEVELS])
