"""A user's own deployment in the twin: a site with nodes as fast as a log shows them, and a scenario that plays it.

Between readings values are joined by straight lines; of what was never seen nominal values stand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from env.draw import FIRST_S, MAX_STEPS, WordArray, draw_background, make_streams
from env.kernel.draw import OF_PAIRS
from env.kernel.load import WAIT_OF_LOAD
from env.logs import Computed, Log
from env.ranges import Ranges
from env.site import Site, scale_profile
from env.traces import GRID_S, FloatArray
from env.world import NUM_PATHS, Background, World, paths_of
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.errors import ConfigError
from runtime.planning.arrays import IntArray, Layout
from runtime.planning.estimators import MIN_BANDWIDTH_BPS, NOMINAL_BANDWIDTH_BPS, NOMINAL_RTT_S
from runtime.planning.problem import PlanningProblem
from runtime.profiles.record import MeasuredModel
from runtime.types import DEVICE_NODE, Constraints, ModelProfile

_UTILISATION_MAX = 0.9
_SPREAD = 0.05
"""Sigma of the log of a node's measured time around k times its profile. Guess."""

_NO_DEADLINE_S = 1e6

_NO_BACKGROUND = Background(np.zeros(0), np.zeros(0))


def site_from_log(log: Log, model: MeasuredModel, *, constraints: Constraints | None = None) -> Site:
    """Put a site together: a measured model on nodes as fast as the log shows them.

    A node's slow-down is the median of its measured seconds over k times what the model's own machine needs for the same
    layers. Nodes that computed for no request have no speed, and are left out.

    Raises:
        ConfigError: when the log is of another model, or no node but the device ever computed.
        PlanError: when no split is legal.
    """
    if log.num_layers != model.graph.num_layers:
        raise ConfigError(
            f"expected events of {model.spec} with {model.graph.num_layers} layers, got {log.num_layers}; name the model "
            "that the log is of"
        )
    entry = model.graph.entry(log.input_kind)
    found = {name: _slow_down(shares, model.profile.layer_s, entry) for name, shares in log.computed.items()}
    slow = {DEVICE_NODE: math.exp(float(np.log(Ranges().slow_device).mean()))}  # unless it has computed
    slow |= {name: factor for name, factor in found.items() if math.isfinite(factor)}
    names = [name for name in log.tiers if name in slow]
    if not names:
        raise ConfigError("expected requests that a node had a share in, got none; run another policy for a while")
    limits = (
        Constraints(tiles=False) if constraints is None else constraints
    )  # logs tell too little of links between edges
    nodes = tuple(
        NodeConfig(name=name, tier=log.tiers[name], address=f"tcp://127.0.0.1:{7001 + 2 * at}")
        for at, name in enumerate(names)
    )
    deployment = Deployment(
        model=ModelConfig(spec=model.spec, input_kind=log.input_kind), nodes=nodes, constraints=limits
    )
    profiles = {name: scale_profile(model.profile, slow[name]) for name in (DEVICE_NODE, *names)}
    profile = ModelProfile(model.graph, profiles, dict(model.ratios.by_value))
    return Site(model.spec, PlanningProblem(profile, deployment, limits, log.input_kind))


def _slow_down(shares: Sequence[Computed], layer_s: Sequence[float], entry: int) -> float:
    """Median over a node's shares, NaN where none had a layer that takes time."""
    ratios = []
    for share in shares:
        idle_s = math.fsum(layer_s[at] for at in share.layers if at >= entry)
        if idle_s > 0.0:
            ratios.append(share.seconds / (idle_s * share.load_factor))
    return float(np.median(ratios)) if ratios else math.nan


@dataclass(frozen=True, eq=False)
class LogScenario:
    """Plays a log from an instant that the seed draws, over again after its end.

    Requests come as they came, with their bytes and deadlines; links have the rates and round trips that were read, nodes
    the k; background requests are drawn to keep nodes as busy as they were besides the log's own requests, of a size that
    makes them wait as long as they did. A node counts as down where the session found it so.
    """

    log: Log

    @property
    def kind(self) -> str:
        """For tables."""
        return "log"

    def world(self, site: Site, seed: int | Sequence[int], num_requests: int) -> World:
        """Draw an episode's world."""
        log, slots = self.log, site.candidates.costs.layout
        streams, rng = make_streams(seed), np.random.default_rng(seed)
        from_s = float(rng.uniform(0.0, log.length_s))
        grid_s = from_s + GRID_S * np.arange(MAX_STEPS, dtype=np.float64)
        cloud = site.problem.deployment.cloud
        path = paths_of(slots, None if cloud is None else cloud.name)
        rate_bps, rtt_s, scale = self._links(slots, path, grid_s)
        contention, background = np.ones((len(slots.nodes), MAX_STEPS)), [_NO_BACKGROUND] * len(slots.nodes)
        is_down = np.zeros((len(slots.nodes), MAX_STEPS), dtype=np.bool_)
        for slot, name in enumerate(slots.nodes[1:], start=1):
            contention[slot] = np.maximum(self._play(*log.load_factor[name], grid_s, otherwise=1.0), 1.0)
            is_down[slot] = self._play(*log.is_up[name], grid_s, otherwise=1.0) < 0.5
            background[slot] = self._background(name, grid_s, streams[OF_PAIRS + 2 * slot])
        arrivals_s, rows = self._requests(from_s, num_requests)
        return World(
            rate_bps=rate_bps,
            rtt_s=rtt_s,
            path=path,
            scale=scale,
            contention=contention,
            is_down=is_down,
            background=tuple(background),
            shift=np.zeros(1, dtype=np.intp),
            arrivals_s=arrivals_s[None],
            input_bytes=np.maximum(log.input_bytes[rows], 1.0)[None],
            deadline_s=np.minimum(log.deadline_s[rows], _NO_DEADLINE_S)[None],
            noise=np.exp(_SPREAD * rng.standard_normal((1, num_requests, 3))),
            is_warm=np.ones(site.candidates.costs.num_plans, dtype=np.bool_),
        )

    def _links(self, slots: Layout, path: IntArray, grid_s: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Rates and round trips of the paths, and every link's rate over its path's: outward links give the path."""
        log = self.log
        rate_bps = np.full((NUM_PATHS, MAX_STEPS), NOMINAL_BANDWIDTH_BPS)
        rtt_s = np.full((NUM_PATHS, MAX_STEPS), NOMINAL_RTT_S)
        scale = np.ones(len(slots.links))
        for slot, link in enumerate(slots.links):
            if slots.node_slot[link[0]] > slots.node_slot[link[1]]:
                continue
            back, trips = slots.reverse[slot], log.rtt_s.get(link)
            rates, rates_back = (log.bandwidth_bps.get(slots.links[at]) for at in (slot, back))
            if rates is not None:
                log_bps = np.log(np.maximum(rates[1], MIN_BANDWIDTH_BPS))
                rate_bps[path[slot]] = np.exp(self._play(rates[0], log_bps, grid_s))
                if rates_back is not None:
                    scale[back] = np.median(rates_back[1]) / np.median(rates[1])
            if trips is not None:
                rtt_s[path[slot]] = self._play(*trips, grid_s)
        return rate_bps, rtt_s, scale

    def _play(
        self, instants_s: FloatArray, values: FloatArray, grid_s: FloatArray, otherwise: float = 0.0
    ) -> FloatArray:
        """Values on the grid, the log over again after its end."""
        if not len(instants_s):
            return np.full(len(grid_s), otherwise)
        return np.interp(grid_s % self.log.length_s, instants_s, values)

    def _background(self, name: str, grid_s: FloatArray, stream: WordArray) -> Background:
        """Requests of others, as busy and as long as fits what was read."""
        log = self.log
        own_frac = math.fsum(share.seconds for share in log.computed.get(name, ())) / log.length_s
        utilisation = np.clip(self._play(*log.utilisation_frac[name], grid_s) - own_frac, 0.0, _UTILISATION_MAX)
        mean, waits_s = float(utilisation.mean()), log.queue_delay_s[name][1]
        wait_s = float(waits_s.mean()) if len(waits_s) else 0.0
        if mean <= 0.01 or wait_s <= 0.0:
            return _NO_BACKGROUND
        return draw_background(stream, utilisation, wait_s * (1.0 - mean) / (WAIT_OF_LOAD * mean))

    def _requests(self, from_s: float, count: int) -> tuple[FloatArray, IntArray]:
        """Arrivals from an instant of the log on, and which of its requests they are."""
        log = self.log
        numbers = int(np.searchsorted(log.arrivals_s, from_s)) + np.arange(count)
        rounds, rows = np.divmod(numbers, len(log.arrivals_s))
        return FIRST_S + log.arrivals_s[rows] + rounds * log.length_s - from_s, rows
