"""Regret of the planner to the exact optimum, over the profiles that ship and a stated sample of conditions.

The planner chooses among 32 candidates per problem, `optimal` among all plans that the order of tiers allows; both see the
same readings, and both plans are priced by the cost model under these. What is lost is what the candidates leave out.
"""

import math
from collections.abc import Sequence

import numpy as np

from agent.bench.report import Report
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.planning.conditions import ConditionRange
from runtime.planning.cost import estimate
from runtime.planning.policies.optimal import build_optimal
from runtime.planning.policies.planner import build_planner
from runtime.planning.problem import PlanningProblem
from runtime.presets import PRESETS
from runtime.profiles.shipped import load_shipped_profile, shipped_specs
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    LinkSample,
    LinkState,
    ModelProfile,
    NodeProfile,
    NodeState,
    SystemState,
    Tier,
)

MACHINES = {DEVICE_NODE: "rpi4", "edge0": "desktop", "cloud": "gpu"}
"""Presets, as in the reproduction of D3."""

COUNT = 50
QUICK_COUNT = 2
SEED = 11


def add_regret(report: Report, *, is_quick: bool) -> None:
    """Add a row per model, and one of all."""
    found = []
    for spec in shipped_specs()[: 2 if is_quick else None]:
        regret = measure_regret(make_shipped_problem(spec), QUICK_COUNT if is_quick else COUNT)
        _add(report, spec.partition(":")[2], regret)
        found += regret
    _add(report, "all models", found)


def _add(report: Report, name: str, regret: Sequence[float]) -> None:
    case = f"planner's regret, {name}"
    report.add(case, "mean", 100.0 * float(np.mean(regret)), "%")
    report.add(case, "p95", 100.0 * float(np.quantile(regret, 0.95)), "%")


def measure_regret(problem: PlanningProblem, count: int) -> list[float]:
    """Predicted latency of the planner's plan over the optimum's, minus 1, under `count` conditions."""
    planner, optimal = build_planner(problem), build_optimal(problem)
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(count):
        state = draw_state(problem, rng)
        planned_s = estimate(problem, planner.plan(state), state).total_s
        found.append(planned_s / estimate(problem, optimal.plan(state), state).total_s - 1.0)
    return found


def make_shipped_problem(spec: str) -> PlanningProblem:
    """A device, an edge node and a cloud of the presets' speeds, with a model's shipped profile; files are sent."""
    shipped = load_shipped_profile(spec)
    edge = NodeConfig(name="edge0", tier=Tier.EDGE, address="tcp://127.0.0.1:11")
    cloud = NodeConfig(name="cloud", tier=Tier.CLOUD, address="tcp://127.0.0.1:9")
    nodes = {name: _slowed(shipped.profile, PRESETS[preset].slow_down) for name, preset in MACHINES.items()}
    profile = ModelProfile(shipped.graph, nodes, shipped.ratios.by_value)
    return PlanningProblem(
        profile, Deployment(model=ModelConfig(spec=spec), nodes=(edge, cloud)), Constraints(), "encoded"
    )


def _slowed(profile: NodeProfile, factor: float) -> NodeProfile:
    return NodeProfile(
        tuple(factor * seconds for seconds in profile.layer_s),
        profile.encode_bytes_per_s,
        profile.decode_bytes_per_s,
        profile.fixed_s,
    )


def draw_state(problem: PlanningProblem, rng: np.random.Generator) -> SystemState:
    """Draw rates, round trips, k, q and a file's size, each evenly in its logarithm over `ConditionRange`."""
    ranges = ConditionRange()

    def draw(bounds: tuple[float, float]) -> float:
        return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))

    links = []
    for ends in ((DEVICE_NODE, "edge0"), ("edge0", "cloud"), (DEVICE_NODE, "cloud")):
        bps, rtt_s = draw(ranges.bandwidth_bps), draw(ranges.rtt_s)
        links += [LinkState(a, b, (LinkSample(0.0, bps),), bps, rtt_s) for a, b in (ends, ends[::-1])]
    nodes = tuple(
        NodeState(node.name, node.tier, True, draw(ranges.load_factor), draw(ranges.queue_delay_s), age_s=0.0)
        for node in problem.deployment.nodes
    )
    return SystemState(
        nodes=nodes,
        links=tuple(links),
        device_backlog_s=0.0,
        uplink_backlog_bytes=0,
        request_rate_hz=math.nan,
        recent_errors=(),
        plan_in_force=None,
        input_kind=problem.input_kind,
        input_bytes=round(draw((3e4, 1e6))),
        deadline_s=math.inf,
    )
