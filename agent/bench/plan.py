"""Plan: how long a rule takes to decide, on graphs of 500 layers and with all nodes up; the planner's regret beside.

Each value is the least of five runs by turns, beside the time of a fixed numpy loop in the same runs: on a busy machine both
grow.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from agent.bench.regret import add_regret
from agent.bench.report import Bar, Report
from agent.checkpoint import FORMAT_VERSION, Checkpoint, Manifest, SeenRange, weight_shapes
from agent.frozen import FrozenPolicy
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS, FEATURES_VERSION
from runtime.planning.policies.d3 import MIN_DWELL, NUM_SAMPLES, D3Policy
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import PlanningProblem, Policy
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    GraphSpec,
    LayerSpec,
    LinkSample,
    LinkState,
    ModelProfile,
    NodeProfile,
    NodeState,
    SystemState,
    TensorSpec,
    Tier,
    ValueSpec,
)

NUM_LAYERS = 500
RUNS = 5
BLOCK_S = 0.2
"""A rule decides again and again for this long in each run."""

SHAPES = ("chain", "skips")
UPDATE = "d3 update"
LEARNT = "ppo"
HIDDEN = 64
"""Width of the policy's network, as `agent.network` has it."""
UPDATE_SEEDS = (8, 10)
"""States in which a change of one link or load does move some labels, on both graphs."""
SEED = 7
SPEED = {Tier.DEVICE: 1.0, Tier.EDGE: 0.3, Tier.CLOUD: 0.05}
"""Seconds of a layer against the device's. Made up: only how long the decision takes is measured."""

RULES = ("loadpart", "loadpart+tuned", "neurosurgeon", "dads-light", "dads-heavy", "d3", "optimal", "planner")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Time the decisions of the rules on a graph of 500 layers: one with skips, one a chain; and tell regret.

    How far the planner's predicted latency is above the optimum's, over the shipped profiles, has no bar.
    """

    json: Path | None = None
    """Where to write the report as JSON."""

    quick: bool = False
    """One run: shows that everything works, not how fast."""


def run_plan(config: PlanConfig) -> Report:
    """Measure every rule on both graphs; the bars are held to the worse of the two."""
    report = Report(
        "plan",
        "made-up graphs of 500 layers, one edge node and a cloud; the least of all decisions; regret: shipped profiles",
    )
    calls: dict[tuple[str, str], Callable[[], float]] = {}
    for shape in SHAPES:
        problem = make_problem(has_skips=shape == "skips")
        states = [make_state(problem, seed) for seed in range(4)]
        for rule in RULES:
            calls[rule, shape] = partial(_time_rule, load_policy(rule).build(problem), states)
        calls[LEARNT, shape] = partial(_time_rule, FrozenPolicy(problem, make_checkpoint()), states)
        calls[UPDATE, shape] = _UpdateTimer(problem, [make_state(problem, seed) for seed in UPDATE_SEEDS])
    calls["fixed numpy loop", ""] = _time_loop
    least_s = dict.fromkeys(calls, math.inf)
    for _ in range(1 if config.quick else RUNS):  # by turns: a busy moment slows no rule alone
        for case, call in calls.items():
            least_s[case] = min(least_s[case], call())
    for (rule, shape), seconds in least_s.items():
        report.add(f"{rule} {shape}".strip(), "least", seconds * 1e3, "ms")
    add_regret(report, is_quick=config.quick)
    for name, rule, unit, bound in (
        ("plan_loadpart_500_us", "loadpart", 1e6, 50.0),
        ("plan_d3_500_ms", "d3", 1e3, 10.0),
        ("plan_d3_update_ms", UPDATE, 1e3, 1.0),
        ("plan_optimal_500_ms", "optimal", 1e3, 20.0),
        ("plan_planner_us", "planner", 1e6, 150.0),
        ("plan_ppo_us", LEARNT, 1e6, 300.0),
    ):
        worst_s = max(least_s[rule, shape] for shape in SHAPES)
        report.bars.append(Bar(name, worst_s * unit, bound, "lower"))
    return report


def _time_rule(policy: Policy, states: list[SystemState]) -> float:
    """Seconds of one decision: the least for each state, of which the mean; a rule with a memory starts anew each time."""
    least_s = [math.inf] * len(states)
    until_s = time.perf_counter() + BLOCK_S
    while math.inf in least_s or time.perf_counter() < until_s:
        for index, state in enumerate(states):
            policy.reset()
            start_s = time.perf_counter()
            policy.plan(state)
            least_s[index] = min(least_s[index], time.perf_counter() - start_s)
    return sum(least_s) / len(least_s)


class _UpdateTimer:
    """Times the decisions in which D3 updates its labels: one link half as fast, or the edge at twice the k.

    Keeps the least of each change, there and back, over all calls; the value is that of the worst change.
    """

    def __init__(self, problem: PlanningProblem, states: list[SystemState]) -> None:
        policy = load_policy("d3-hpa").build(problem)
        assert isinstance(policy, D3Policy)
        self._policy = policy
        self._shown = [x for state in states for changed in _changes(state) for x in (state, changed, state)]
        self._least_s = [math.inf] * len(self._shown)

    def __call__(self) -> float:
        until_s = time.perf_counter() + BLOCK_S
        while time.perf_counter() < until_s:
            self._show()
        return max(seconds for seconds in self._least_s if seconds < math.inf)

    def _show(self) -> None:
        for index, state in enumerate(self._shown):
            for _ in range(MIN_DWELL + NUM_SAMPLES):
                updates, start_s = self._policy.num_updates, time.perf_counter()
                self._policy.plan(state)
                seconds = time.perf_counter() - start_s
                if self._policy.num_updates > updates:
                    self._least_s[index] = min(self._least_s[index], seconds)


def _changes(state: SystemState) -> list[SystemState]:
    changed = []
    for index in range(0, len(state.links), 2):  # the outward one of each pair
        link = state.links[index]
        samples = tuple(LinkSample(s.age_s, s.bandwidth_bps / 2) for s in link.samples)
        links = (*state.links[:index], replace(link, samples=samples), *state.links[index + 1 :])
        changed.append(replace(state, links=links))
    edge = replace(state.nodes[0], load_factor=2 * state.nodes[0].load_factor)
    return [*changed, replace(state, nodes=(edge, *state.nodes[1:]))]


def make_checkpoint() -> Checkpoint:
    """Make up a policy's weights: how long it takes to decide does not depend on what they are."""
    rng = np.random.default_rng(SEED)
    weights = {name: rng.normal(0.0, 0.1, shape).astype(np.float32) for name, shape in weight_shapes(HIDDEN).items()}
    seen = SeenRange(((-3.0, 3.0),) * len(CANDIDATE_COLUMNS), ((-3.0, 3.0),) * len(CONTEXT_COLUMNS))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        num_candidates=NUM_CANDIDATES,
        features_version=FEATURES_VERSION,
        hidden=HIDDEN,
        weights_sha256="",
        error_range=(-1.0, 1.0),
        seen=seen,
        config={},
        training={},
    )
    return Checkpoint("made up", weights, manifest)


def _time_loop() -> float:
    """Seconds of a fixed amount of the kind of work that rules do: small arrays, one after another."""
    values = np.linspace(0.0, 1.0, NUM_LAYERS)
    least_s = math.inf
    until_s = time.perf_counter() + BLOCK_S
    while time.perf_counter() < until_s:
        start_s = time.perf_counter()
        for _ in range(100):
            np.minimum(np.cumsum(values) * 0.5, 3.0).argmin()
        least_s = min(least_s, time.perf_counter() - start_s)
    return least_s


def make_problem(*, has_skips: bool) -> PlanningProblem:
    """Make up a graph: a chain, or one with a skip over one to three layers at every fourth layer."""
    rng = np.random.default_rng(SEED)
    reads = [{i - 1} for i in range(NUM_LAYERS)]
    if has_skips:
        for i in range(4, NUM_LAYERS, 4):
            reads[i].add(i - 1 - int(rng.integers(1, 4)))
    fall = np.exp(-4 * np.arange(NUM_LAYERS + 1) / NUM_LAYERS)
    sizes = np.maximum(rng.lognormal(np.log(2e5), 1.0, NUM_LAYERS + 1) * fall, 4).astype(int).tolist()
    values = [
        ValueSpec(
            f"v{i}",
            i,
            tuple(j for j in range(i + 1, min(i + 6, NUM_LAYERS)) if i in reads[j]),
            TensorSpec((sizes[i + 1],), "uint8", 1),
            i == NUM_LAYERS - 1,
        )
        for i in range(-1, NUM_LAYERS)
    ]
    layers = tuple(
        LayerSpec(f"layer{i}", "conv", tuple(f"v{s}" for s in sorted(reads[i])), (f"v{i}",)) for i in range(NUM_LAYERS)
    )
    name = f"bench-{'skips' if has_skips else 'chain'}-{NUM_LAYERS}"
    graph = GraphSpec(name, layers, tuple(values), (f"v{NUM_LAYERS - 1}",), "", 1, 0, None)
    edge = NodeConfig(name="edge0", tier=Tier.EDGE, address="tcp://127.0.0.1:11")
    cloud = NodeConfig(name="cloud", tier=Tier.CLOUD, address="tcp://127.0.0.1:9")
    deployment = Deployment(model=ModelConfig(spec="bench:graph"), nodes=(edge, cloud))
    idle_s = rng.lognormal(np.log(0.2 / NUM_LAYERS), 1.0, NUM_LAYERS)
    names = {DEVICE_NODE: Tier.DEVICE, "edge0": Tier.EDGE, "cloud": Tier.CLOUD}
    nodes = {
        node: NodeProfile(tuple((idle_s * SPEED[tier] * rng.lognormal(0.0, 0.3, NUM_LAYERS)).tolist()), 4e8, 6e8, 2e-4)
        for node, tier in names.items()
    }
    ratios = {f"v{i}": 1.6 for i in range(NUM_LAYERS)}
    return PlanningProblem(ModelProfile(graph, nodes, ratios), deployment, Constraints(), "tensor")


def make_state(problem: PlanningProblem, seed: int) -> SystemState:
    """Make up readings: 8 samples per link around 20 Mbit/s, loads up to k = 4."""
    rng = np.random.default_rng(seed)
    ends = [(DEVICE_NODE, "edge0"), ("edge0", "cloud"), (DEVICE_NODE, "cloud")]
    links = []
    for source, target in [pair for a, b in ends for pair in ((a, b), (b, a))]:
        rates = rng.lognormal(np.log(2e7), 0.8) * rng.lognormal(0.0, 0.2, 8)
        samples = tuple(LinkSample(0.4 * i, float(rate)) for i, rate in enumerate(rates))
        links.append(LinkState(source, target, samples, 2e7, float(rng.uniform(0.001, 0.02))))
    nodes = tuple(
        NodeState(node.name, node.tier, True, float(rng.uniform(1, 4)), float(rng.uniform(0, 0.01)), age_s=0.2)
        for node in problem.deployment.nodes
    )
    return replace(_STATE, nodes=nodes, links=tuple(links))


_STATE = SystemState(
    nodes=(),
    links=(),
    device_backlog_s=0.0,
    uplink_backlog_bytes=0,
    request_rate_hz=5.0,
    recent_errors=(),
    plan_in_force=None,
    input_kind="tensor",
    input_bytes=200_000,
    deadline_s=1.0,
)
