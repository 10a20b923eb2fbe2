"""Predict: how far a request's predicted latency is from its true one, on nodes that nobody else uses.

Two predictions in the same state: with the nodes' measured profiles, and with profiles that a regression tells from the
other models of this benchmark alone, as if this machine had never measured the one at hand.
"""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import track

from agent.bench.report import Bar, Report
from agent.photos import sample_photo
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.planning.cost import estimate
from runtime.planning.policies.registry import load_policy
from runtime.planning.predictors import fit_machine, leave_models_out
from runtime.planning.problem import PlanningProblem
from runtime.presets import LinkConfig, LinkEmulation, NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.types import DEVICE_NODE, ModelProfile, NodeProfile, Plan, SystemState

MODELS = (
    "torchvision:resnet18",
    "torchvision:squeezenet1_1",
    "torchvision:googlenet",
    "torchvision:mobilenet_v3_large",
    "torchvision:alexnet",
    "torchvision:densenet121",
)
"""Of all sizes and with every kind of layer that the shipped profiles have, so that each can be told from the others."""

SPEEDS = {DEVICE_NODE: 4.0, "edge0": 3.0, "cloud": 3.0}
LINKS = {
    (DEVICE_NODE, "edge0"): (40e6, 0.002),
    ("edge0", "cloud"): (100e6, 0.005),
    (DEVICE_NODE, "cloud"): (15e6, 0.01),
}
ROUNDS = 5
QUICK_ROUNDS = 1
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Compare predicted with measured latencies on an idle deployment."""

    json: Path | None = None
    """Where to write the report as JSON."""

    quick: bool = False
    """Three models, few rounds: shows that everything works, not how well."""


@dataclass(frozen=True, slots=True)
class _Case:
    """One plan of one model: what was predicted and measured, and in which states."""

    plan: Plan
    live_s: tuple[float, ...]
    predicted_s: tuple[float, ...]
    states: tuple[SystemState, ...]


def run_predict(config: PredictConfig) -> Report:
    """Run plans of every kind on several models and predict them twice."""
    speeds = ", ".join(f"{name} {factor:g}x" for name, factor in SPEEDS.items())
    report = Report(
        "predict", f"a photograph, idle; nodes emulated ({speeds} one thread of this machine), links shaped"
    )
    models = MODELS[:3] if config.quick else MODELS
    found = {
        spec: _run_model(spec, QUICK_ROUNDS if config.quick else ROUNDS) for spec in track(models, description="models")
    }
    known = {spec: _this_machine(problem) for spec, (problem, _) in found.items()}
    left_out_errors = leave_models_out(list(known.values()), DEVICE_NODE)
    measured, left_out = [], []
    for (spec, (problem, cases)), compute in zip(found.items(), left_out_errors, strict=True):
        others = [profile for other, profile in known.items() if other != spec]
        guess = _with_layer_s(problem, fit_machine(others, DEVICE_NODE).layer_s(problem.graph))
        report.add(spec, "compute left out", compute, "predicted / measured - 1")
        for name, case in cases.items():
            live_s = statistics.median(case.live_s)
            guessed_s = statistics.median(estimate(guess, case.plan, state).total_s for state in case.states)
            label = f"{spec.partition(':')[2]} {name}"
            measured.append(statistics.median(case.predicted_s) / live_s - 1.0)
            left_out.append(guessed_s / live_s - 1.0)
            report.add(label, "live p50", live_s * 1e3, "ms")
            report.add(label, "measured profile", measured[-1], "predicted / live - 1")
            report.add(label, "left out", left_out[-1], "predicted / live - 1")
    for name, errors, bound in (
        ("predict_measured_median_frac", measured, 0.10),
        ("predict_left_out_median_frac", left_out, 0.25),
    ):
        report.bars.append(Bar(name, statistics.median(map(abs, errors)), bound, "lower"))
    return report


def _run_model(spec: str, rounds: int) -> tuple[PlanningProblem, dict[str, _Case]]:
    """Start nodes for one model, and run every plan by turns."""
    emulate = {name: NodeEmulation(slow_down=factor, mode="compute") for name, factor in SPEEDS.items()}
    links = tuple(
        LinkConfig(between=ends, emulate=LinkEmulation(rate_bps=bps, delay_s=delay_s))
        for ends, (bps, delay_s) in LINKS.items()
    )
    photo = sample_photo()
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(ModelConfig(spec=spec), edges=("edge0",), emulate=emulate, links=links))
        session = stack.enter_context(Session(cluster.deployment, load_policy("device-only")))
        problem = session.problem("encoded")
        plans = _plans(session.graph.num_layers)
        runs: dict[str, list[tuple[float, float, SystemState]]] = {name: [] for name in plans}
        for turn in range(rounds + 1):
            for name, plan in plans.items():
                state = session.state("encoded", photo.stat().st_size, DEADLINE_S)
                result = session.infer(photo, plan=plan, deadline_s=DEADLINE_S)
                assert result.latency is not None  # infer raises when there is no answer
                if turn:  # the first one builds segments on every node, and tells the links' rates
                    runs[name].append((result.latency.total_s, result.predicted.total_s, state))
    cases = {}
    for name, plan in plans.items():
        live_s, predicted_s, states = zip(*runs[name], strict=True)
        cases[name] = _Case(plan, live_s, predicted_s, states)
    return problem, cases


def _plans(n: int) -> dict[str, Plan]:
    """Every tier alone, two of them, all three; straight to the cloud and through the edge node."""
    return {
        "device": Plan.split(n, n, n),
        "edge": Plan.split(n, 0, n, edge_nodes=("edge0",)),
        "cloud": Plan.split(n, 0, 0),
        "device, edge": Plan.split(n, n // 3, n, edge_nodes=("edge0",)),
        "device, cloud": Plan.split(n, 2 * n // 3, 2 * n // 3),
        "all": Plan.split(n, n // 3, 2 * n // 3, edge_nodes=("edge0",)),
    }


def _this_machine(problem: PlanningProblem) -> ModelProfile:
    """What this machine measured of a model: the device's profile, not slowed down."""
    own = problem.profile.nodes[DEVICE_NODE]
    layer_s = tuple(seconds / SPEEDS[DEVICE_NODE] for seconds in own.layer_s)
    return ModelProfile(problem.graph, {DEVICE_NODE: replace(own, layer_s=layer_s)})


def _with_layer_s(problem: PlanningProblem, layer_s: tuple[float, ...]) -> PlanningProblem:
    """The same problem, had every node told these layer times, slowed down as it is."""

    def slowed(name: str, profile: NodeProfile) -> NodeProfile:
        return replace(profile, layer_s=tuple(SPEEDS[name] * seconds for seconds in layer_s))

    nodes = {name: slowed(name, profile) for name, profile in problem.profile.nodes.items()}
    return replace(problem, profile=replace(problem.profile, nodes=nodes))
