"""Live against twin: the same worlds and the same plans through both, component by component and as a whole.

Two kinds of episodes. *Probes*: links of constant rates, idle nodes, one request at a time, every kind of plan; there the
twin's parts are known in closed form, and the correction is fitted to them. *Checks*: the worlds of a scenario, with the
plans that the planner takes in the twin; they are never fitted to, and only their medians are compared.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from env.backend import Ended, TwinBackend
from env.correction import ComponentError, Correction, Parts, component_errors, fit_correction, parts_of, tiers_of
from env.draw import FIRST_S, MAX_STEPS
from env.live import LiveBackend
from env.live_site import LiveSite
from env.play import playable
from env.scenario import Scenario
from env.site import Site
from env.world import NUM_PATHS, Background, World, paths_of
from runtime.planning.arrays import blank_states
from runtime.planning.cost import describe, predict
from runtime.planning.estimators import ReadingsArrays
from runtime.planning.policies.planner import build_planner
from runtime.planning.rows import compile_plan
from runtime.types import LatencyBreakdown, Plan, Tier

PROBE_RATES_BPS = (8e6, 40e6)
"""Access links of the probes; the way back is as fast. Guess: where uploads and computing weigh alike."""

PROBE_BACKBONE_BPS, PROBE_RTT_S, PROBE_BACKBONE_RTT_S = 100e6, 0.002, 0.002

GAP_FRAC = 1.3
"""Gap between probes over the longest of them: one is over before the next one comes."""

DEADLINE_FRAC = 20.0
"""Deadline of probes over the longest of them: the device never steps in."""

_NO_BACKGROUND = Background(np.zeros(0), np.zeros(0))


@dataclass(frozen=True, slots=True)
class Check:
    """One model in one scenario: medians over the same requests under the same plans."""

    model: str
    scenario: str
    count: int
    twin_s: float
    corrected_s: float  # the twin with the correction
    live_s: float
    is_replayed: bool = False
    """Some node replayed; the bar is for those that compute."""

    @property
    def error_frac(self) -> float:
        """Corrected twin over live, minus 1."""
        return self.corrected_s / self.live_s - 1.0

    @property
    def plain_error_frac(self) -> float:
        """Twin without correction over live, minus 1."""
        return self.twin_s / self.live_s - 1.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found."""

    correction: Correction
    components: dict[str, tuple[ComponentError, ...]]  # by model, before the correction
    checks: tuple[Check, ...]


def calibrate(
    sites: Sequence[LiveSite],
    scenarios: Sequence[Scenario],
    *,
    num_probes: int,
    num_requests: int,
    seeds: Sequence[int],
    show: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Run probes at every site, fit one correction, then check it in every scenario.

    Args:
        sites: one per model.
        scenarios: to check in.
        num_probes: requests per site to fit to.
        num_requests: per site, scenario and seed.
        seeds: of the checks' worlds.
        show: told what is being done.

    Raises:
        OffcutError: when processes fail.
    """
    backend = LiveBackend(sites, num_requests=max(_probes_per_rate(num_probes), num_requests))
    pairs: dict[str, list[tuple[Parts, Parts]]] = {}
    checks = []
    try:
        for at, site in enumerate(sites):
            show(f"probing {site.site.name}")
            pairs[site.site.name] = probe(backend, at, num_probes)
        correction = fit_correction([pair for of_model in pairs.values() for pair in of_model])
        for (at, site), scenario in itertools.product(enumerate(sites), scenarios):
            show(f"checking {site.site.name} in {scenario.kind}")
            is_replayed = any(node.emulate is not None and node.emulate.is_replay for node in site.deployment.nodes)
            found = check(backend, at, scenario, correction, num_requests=num_requests, seeds=seeds)
            checks.append(replace(found, is_replayed=is_replayed))
    finally:
        backend.close()
    return Calibration(
        correction, {name: component_errors(of_model) for name, of_model in pairs.items()}, tuple(checks)
    )


# --- probes -------------------------------------------------------------------------------------------------------------


def probe(backend: LiveBackend, at: int, count: int) -> list[tuple[Parts, Parts]]:
    """Run one request at a time at a site, under every kind of plan in turn: worked out and measured parts.

    Requests that the device completed itself tell nothing and are left out.
    """
    site, out = backend.sites[at], []
    plans, tier_of = _kinds_of_plans(site), tiers_of(site)
    per_rate = _probes_per_rate(count)
    for rate_bps in PROBE_RATES_BPS:
        world = _still_world(site, plans, rate_bps, per_rate + 1)
        backend.start_world(at, world)
        for ended in _play(backend, [plans[number % len(plans)] for number in range(per_rate)]):
            if ended.outcome in ("remote", "device") and ended.latency is not None:
                worked = work_out(site, world, ended.plan)
                out.append((parts_of(worked, tier_of), parts_of(ended.latency, tier_of)))
    return out


def _probes_per_rate(count: int) -> int:
    return max(count // len(PROBE_RATES_BPS), 1)


def work_out(site: Site, world: World, plan: Plan) -> LatencyBreakdown:
    """What a request takes in the twin in a world where nothing changes and nobody waits."""
    costs = compile_plan(site.problem, plan)
    state = blank_states(costs.layout, 1)
    state.input_bytes[:] = world.input_bytes[0, 0]
    readings = ReadingsArrays(
        bandwidth_bps=(world.rate_bps[world.path, 0] * world.scale)[None],
        rtt_s=world.rtt_s[world.path, 0][None],
        load_factor=world.contention[:, 0][None],
        queue_delay_s=np.zeros((1, len(costs.layout.nodes))),
    )
    return describe(costs, predict(costs, readings, state)[0, 0], readings)


def _kinds_of_plans(site: Site) -> tuple[Plan, ...]:
    """Candidates that differ in the tiers and the head they use, up to three of each kind."""
    kinds: dict[tuple[object, ...], list[Plan]] = {}
    for plan in site.candidates.plans[: site.candidates.num_plans]:
        if plan.tiles:  # they cross links that worlds do not shape in live, and run on several nodes at once
            continue
        key = (plan.head, *(plan.uses(tier) for tier in Tier))
        kinds.setdefault(key, []).append(plan)
    picked = [plans[:: max(len(plans) // 3, 1)][:3] for plans in kinds.values()]
    return tuple(plan for of_kind in itertools.zip_longest(*picked) for plan in of_kind if plan is not None)


def _still_world(site: Site, plans: Sequence[Plan], rate_bps: float, count: int) -> World:
    slots = site.candidates.costs.layout
    cloud = site.problem.deployment.cloud
    rates, rtts = np.full((NUM_PATHS, MAX_STEPS), rate_bps), np.full((NUM_PATHS, MAX_STEPS), PROBE_RTT_S)
    rates[4:], rtts[4:] = PROBE_BACKBONE_BPS, PROBE_BACKBONE_RTT_S
    num_nodes = len(slots.nodes)
    world = World(
        rate_bps=rates,
        rtt_s=rtts,
        path=paths_of(slots, None if cloud is None else cloud.name),
        scale=np.ones(len(slots.links)),
        contention=np.ones((num_nodes, MAX_STEPS)),
        is_down=np.zeros((num_nodes, MAX_STEPS), dtype=np.bool_),
        background=(_NO_BACKGROUND,) * num_nodes,
        shift=np.zeros(1, dtype=np.intp),
        arrivals_s=np.zeros((1, count)),
        input_bytes=np.full((1, count), site.typical_bytes),
        deadline_s=np.zeros((1, count)),
        noise=np.ones((1, count, 3)),
        is_warm=np.ones(site.candidates.costs.num_plans, dtype=np.bool_),
    )
    longest_s = max(work_out(site, world, plan).total_s for plan in plans) + 0.02
    arrivals_s = FIRST_S + GAP_FRAC * longest_s * np.arange(count, dtype=np.float64)
    return replace(world, arrivals_s=arrivals_s[None], deadline_s=np.full((1, count), DEADLINE_FRAC * longest_s))


# --- checks -------------------------------------------------------------------------------------------------------------


def check(
    live: LiveBackend, at: int, scenario: Scenario, correction: Correction, *, num_requests: int, seeds: Sequence[int]
) -> Check:
    """Run the planner's plans of the twin through the twin, the corrected twin and the runtime."""
    site = live.sites[at]
    plain = TwinBackend([site], num_requests=num_requests)
    corrected = TwinBackend([correction.site(site)], num_requests=num_requests)
    twin_s: list[float] = []
    corrected_s: list[float] = []
    live_s: list[float] = []
    for seed in seeds:
        world = playable(site, scenario.world(site, seed, num_requests + 1))
        plain.start_world(0, world)
        plans, ended = _play_planner(plain)
        twin_s += _counted(ended)
        corrected.start_world(0, correction.world(site, world))
        corrected_s += _counted(_play(corrected, plans))
        live.start_world(at, world)
        live_s += _counted(_play(live, plans))
    return Check(
        model=site.name,
        scenario=scenario.kind,
        count=len(live_s),
        twin_s=float(np.median(twin_s)),
        corrected_s=float(np.median(corrected_s)),
        live_s=float(np.median(live_s)),
    )


def _play_planner(backend: TwinBackend) -> tuple[list[Plan], list[Ended]]:
    planner = build_planner(backend.sites[0].problem)
    plans: list[Plan] = []
    out: list[Ended] = []
    is_over = False
    while not is_over:
        plans.append(planner.plan(backend.state()))
        is_over, ended = backend.step(plans[-1])
        out += ended
    return plans, out


def _play(backend: TwinBackend | LiveBackend, plans: Sequence[Plan]) -> list[Ended]:
    return [ended for plan in plans for ended in backend.step(plan)[1]]


def _counted(ended: Sequence[Ended]) -> list[float]:
    return [one.counted_s for one in sorted(ended, key=lambda one: one.number)]
