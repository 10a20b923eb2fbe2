"""What pictures show beside statistics: one episode as each policy went through it, and what each would choose where."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agent.compare.contestants import Contestant
from agent.compare.statistics import FloatArray
from env.backend import TwinBackend
from env.scenario import Scenario
from env.site import Site
from env.traces import GRID_S
from runtime.planning.arrays import blank_states, decode_state
from runtime.planning.features import FeatureEncoder
from runtime.types import DEVICE_NODE, Plan, SystemState, Tier

TIERS = ("device", "device+edge", "device+edge+cloud", "device+cloud", "edge", "edge+cloud", "cloud")
"""Tiers that run layers under a plan."""

MAP_RATES_BPS = tuple(np.geomspace(0.5e6, 200e6, 18).tolist())
MAP_QUEUES = tuple(np.linspace(0.0, 6.0, 13).tolist())
"""Axes of the decision map: rate of every link of the device; queue delay at edge nodes over the site's scale."""

_MAP_BACKBONE_BPS, _MAP_EDGE_RTT_S, _MAP_CLOUD_RTT_S, _MAP_RATE = 200e6, 0.01, 0.06, 0.5
"""The rest of the map's conditions: a middling place, and a request every two times the scale."""


def tiers_of(plan: Plan, entry: int) -> int:
    """Index in `TIERS`."""
    names = [tier.label for tier in Tier if tier in plan.tiers[entry:]]
    return TIERS.index("+".join(names))


@dataclass(frozen=True, slots=True)
class Track:
    """One policy's way through an episode. R: requests."""

    policy: str
    at_s: FloatArray  # (R,)
    latency_s: FloatArray  # (R,) inf: never answered
    tiers: "np.typing.NDArray[np.int64]"  # (R,) index in `TIERS`


@dataclass(frozen=True, slots=True)
class Timeline:
    """One episode: what happened in any case, and every policy's way through it."""

    title: str
    grid_s: FloatArray  # (G,)
    uplinks_bps: dict[str, FloatArray]  # by link, on the grid
    contention: dict[str, FloatArray]  # by node, on the grid
    queue_delay_s: dict[str, FloatArray]  # by node, as the first policy's device heard it at each request
    tracks: tuple[Track, ...]


def record_timeline(
    site: Site,
    scenario: Scenario,
    seed: tuple[int, int],
    count: int,
    policies: Sequence[Contestant],
    *,
    self_play: bool = False,
) -> Timeline:
    """Play one episode with every policy, one by one; with `self_play` other devices have it too."""
    backend, world = TwinBackend((site,), num_requests=count), scenario.world(site, seed, count + 1)
    layout = site.candidates.costs.layout
    tracks: list[Track] = []
    heard: list[dict[str, float]] = []
    for contestant in policies:
        backend.start_world(0, world, contestant.build_others(site.problem, world) if self_play else ())
        policy = contestant.build(site.problem)
        at_s, tiers, ended, is_over = [], [], [], False
        while not is_over:
            state = backend.state()
            if not tracks:
                heard.append({node.name: node.queue_delay_s for node in state.nodes})
            plan = policy.plan(state)
            at_s.append(backend.time_s)
            tiers.append(tiers_of(plan, site.problem.entry))
            is_over, more = backend.step(plan)
            ended += more
        latency_s = np.array([request.latency_s for request in sorted(ended, key=lambda request: request.number)])
        tracks.append(Track(contestant.name, np.array(at_s), latency_s, np.array(tiers)))
    grid_s = np.float64(GRID_S) * np.arange(int(tracks[0].at_s[-1] / GRID_S) + 1)
    place = np.arange(len(grid_s)) % world.rate_bps.shape[1]
    uplinks = [(slot, link) for slot, link in enumerate(layout.links) if link[0] == DEVICE_NODE]
    return Timeline(
        title=f"{site.name}, {scenario.kind}, seed {seed[0]}",
        grid_s=grid_s,
        uplinks_bps={
            f"{source}>{target}": world.rate_bps[world.path[slot]][place] * world.scale[slot]
            for slot, (source, target) in uplinks
        },
        contention={name: world.contention[slot][place] for slot, name in enumerate(layout.nodes) if slot > 0},
        queue_delay_s={name: np.array([each[name] for each in heard]) for name in layout.nodes[1:]},
        tracks=tuple(tracks),
    )


def map_state(site: Site, rate_bps: float, queue_s: float) -> SystemState:
    """A state in which all is well but for the device's links and the edge nodes' queues."""
    layout = site.candidates.costs.layout
    scale_s = FeatureEncoder(site.problem).reference_s
    state, cloud = blank_states(layout, 1), site.problem.deployment.cloud
    for slot, link in enumerate(layout.links):
        is_own = DEVICE_NODE in link
        state.bandwidth_bps[0, slot] = rate_bps if is_own else _MAP_BACKBONE_BPS
        state.sample_age_s[0, slot, 0] = 0.1
        state.mean_bandwidth_bps[0, slot] = state.bandwidth_bps[0, slot, 0]
        state.rtt_s[0, slot] = _MAP_CLOUD_RTT_S if cloud is not None and cloud.name in link else _MAP_EDGE_RTT_S
    state.is_up[:] = True
    state.load_factor[:], state.queue_delay_s[:], state.node_age_s[:] = 1.0, 0.0, 0.1
    for node in site.problem.deployment.edges:
        state.queue_delay_s[0, layout.node_slot[node.name]] = queue_s
    state.request_rate_hz[:] = _MAP_RATE / scale_s
    state.input_bytes[:] = site.typical_bytes
    state.deadline_s[:] = 3.0 * site.model_s(DEVICE_NODE)
    tiers = {node.name: node.tier for node in site.problem.deployment.nodes}
    return decode_state(layout, state, 0, tiers=tiers, plan_in_force=None, input_kind=site.problem.input_kind)


def decision_map(site: Site, contestant: Contestant) -> "np.typing.NDArray[np.int64]":
    """Index in `TIERS` of what a policy chooses, shape (queues, rates)."""
    scale_s, policy = FeatureEncoder(site.problem).reference_s, contestant.build(site.problem)
    chosen = np.zeros((len(MAP_QUEUES), len(MAP_RATES_BPS)), dtype=np.int64)
    for row, queue in enumerate(MAP_QUEUES):
        for column, rate_bps in enumerate(MAP_RATES_BPS):
            policy.reset()
            plan = policy.plan(map_state(site, rate_bps, queue * scale_s))
            chosen[row, column] = tiers_of(plan, site.problem.entry)
    return chosen
