"""Random planning problems and states, from one integer seed, without torch."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.cost import estimate
from runtime.planning.estimators import last_value_arrays
from runtime.planning.problem import PlanningProblem, check_plan
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    GraphSpec,
    LinkSample,
    LinkState,
    ModelProfile,
    NodeProfile,
    NodeState,
    Plan,
    SystemState,
    Tier,
)
from tests.graphs import make_deployment, make_graph, make_state

SPEED = {Tier.DEVICE: 1.0, Tier.EDGE: 0.3, Tier.CLOUD: 0.05}


def random_reads(rng: np.random.Generator, length: int, *, is_chain: bool = False) -> list[tuple[int, ...]]:
    """Which earlier layers each layer reads; the input now and then, as -1."""
    reads = []
    for i in range(length):
        near = {i - 1} if is_chain or rng.random() < 0.8 else set()
        more = 0 if is_chain else int(rng.integers(0, 3))
        near |= {int(s) for s in rng.integers(max(-1, i - 5), i, size=more)}
        reads.append(tuple(sorted(near or {i - 1})))
    return reads


def random_problem(
    seed: int,
    length: int = 6,
    *,
    is_chain: bool = False,
    edges: int = 1,
    has_cloud: bool = True,
    constraints: Constraints | None = None,
    input_kind: str = "tensor",
    has_stage: bool = False,
) -> PlanningProblem:
    """A random graph with sizes and layer times over two orders of magnitude; tiers differ in speed per layer."""
    rng = np.random.default_rng(seed)
    graph = make_graph(random_reads(rng, length, is_chain=is_chain), has_stage=has_stage)
    fall = np.exp(-4 * np.arange(len(graph.values)) / len(graph.values))  # deeper values are smaller, as in most CNNs
    sizes = {
        v.name: max(int(rng.lognormal(math.log(2e5), 1.0) * f), 4)
        for v, f in zip(graph.values, fall, strict=True)
        if v.is_sized
    }
    graph = with_sizes(graph, sizes, f"random-{seed}-{length}-{is_chain}-{has_stage}")
    deployment = make_deployment(edges=edges, has_cloud=has_cloud)
    layer_s = rng.lognormal(math.log(0.2 / length), 1.0, graph.num_layers)
    # So fast that coding always pays, or never: rules choose per value, the cost model per transfer.
    codec_bytes_per_s = 1e11 if seed % 4 else 1e3
    nodes = {DEVICE_NODE: _profile(layer_s, codec_bytes_per_s)}
    for node in deployment.nodes:
        factor = SPEED[node.tier] * rng.lognormal(0.0, 0.3, graph.num_layers)
        nodes[node.name] = _profile(layer_s * factor, codec_bytes_per_s, fixed_s=float(rng.uniform(0, 1e-3)))
    ratios = {v.name: float(rng.uniform(1.2, 2)) for v in graph.values if rng.random() < 0.5 and v.is_sized}
    return PlanningProblem(ModelProfile(graph, nodes, ratios), deployment, constraints or Constraints(), input_kind)


@st.composite
def planning_cases(draw: st.DrawFn, max_layers: int = 4) -> tuple[PlanningProblem, SystemState]:
    """Any small graph with any sizes, speeds, links and loads, drawn so that a failure shrinks to a simple one."""
    length = draw(st.integers(1, max_layers))
    reads = [
        tuple(sorted(draw(st.sets(st.integers(-1, i - 1), min_size=1, max_size=3), label=f"reads of layer {i}")))
        for i in range(length)
    ]
    kind = draw(st.sampled_from(("tensor", "image", "encoded")))
    graph = make_graph(reads, has_stage=kind != "tensor" or draw(st.booleans()))
    bytes_of = {v.name: draw(st.integers(4, 10**6)) for v in graph.values if v.is_sized}
    graph = with_sizes(graph, bytes_of, f"drawn-{reads}-{bytes_of}")
    deployment = make_deployment(edges=draw(st.integers(1, 2)), has_cloud=True)
    seconds, codec_bytes_per_s = st.floats(1e-4, 0.1), draw(st.sampled_from((1e3, 1e11)))
    profiles = {
        name: _profile(
            np.array(draw(st.lists(seconds, min_size=graph.num_layers, max_size=graph.num_layers))),
            codec_bytes_per_s,
            fixed_s=0.0 if name == DEVICE_NODE else draw(st.floats(0, 1e-3)),
        )
        for name in (DEVICE_NODE, *(node.name for node in deployment.nodes))
    }
    ratios = {name: ratio for name in bytes_of if (ratio := draw(st.sampled_from((1.0, 1.3, 2.0)))) > 1}
    tiers = draw(st.sampled_from((tuple(Tier), (Tier.DEVICE, Tier.CLOUD), (Tier.DEVICE, Tier.EDGE))))
    limits = Constraints(private_input=draw(st.booleans()), allowed_tiers=tiers)
    problem = PlanningProblem(ModelProfile(graph, profiles, ratios), deployment, limits, kind)
    links = tuple(
        LinkState(source, target, (LinkSample(0.1, bps := draw(st.floats(1e6, 3e8))),), bps, draw(st.floats(0, 0.01)))
        for source, target in link_ends(problem)
    )
    nodes = tuple(
        NodeState(node.name, node.tier, True, draw(st.floats(1, 8)), draw(st.floats(0, 0.03)), age_s=0.2)
        for node in deployment.nodes
    )
    backlog_s = draw(st.sampled_from((0.0, 0.02)))
    return problem, make_state(problem, links=links, nodes=nodes, device_backlog_s=backlog_s)


def with_sizes(graph: GraphSpec, sizes: dict[str, int], graph_id: str) -> GraphSpec:
    """The same graph with other bytes per value and another id."""
    values = tuple(
        replace(v, tensor=replace(v.tensor, shape=(sizes[v.name],), itemsize=1)) if v.name in sizes else v
        for v in graph.values
    )
    return replace(graph, values=values, graph_id=graph_id)


def _profile(layer_s: np.ndarray, codec_bytes_per_s: float, fixed_s: float = 0.0) -> NodeProfile:
    return NodeProfile(tuple(layer_s.tolist()), codec_bytes_per_s, codec_bytes_per_s, fixed_s)


def link_ends(problem: PlanningProblem) -> list[tuple[str, str]]:
    """Every directed link of the deployment."""
    edges = [node.name for node in problem.deployment.edges]
    cloud = [] if problem.deployment.cloud is None else [problem.deployment.cloud.name]
    both = [(DEVICE_NODE, far) for far in edges + cloud] + [(edge, far) for edge in edges for far in cloud]
    return [ends for a, b in both for ends in ((a, b), (b, a))]


def random_state(problem: PlanningProblem, seed: int, **changes: object) -> SystemState:
    """Rates from 1 to 300 Mbit/s, k up to 8, q up to 30 ms, everything up."""
    rng = np.random.default_rng(seed)
    links = []
    for source, target in link_ends(problem):
        bps = float(rng.lognormal(math.log(2e7), 1.3))
        links.append(LinkState(source, target, (LinkSample(0.1, bps),), bps, float(rng.uniform(0, 0.01))))
    nodes = [
        NodeState(
            node.name, node.tier, True, float(max(rng.lognormal(0, 0.8), 1)), float(rng.uniform(0, 0.03)), age_s=0.2
        )
        for node in problem.deployment.nodes
    ]
    return make_state(problem, **{"links": tuple(links), "nodes": tuple(nodes), **changes})


def legal_plans(problem: PlanningProblem) -> Iterator[Plan]:
    """Every legal plan without tiles; a head only where the edge is allowed."""
    free = problem.graph.num_layers - problem.entry
    heads = [(), *((node.name,) for node in problem.deployment.edges if Tier.EDGE in problem.constraints.allowed_tiers)]
    for rest in itertools.product(Tier, repeat=free):
        tiers = (Tier.DEVICE,) * problem.entry + rest
        for head in heads:
            try:
                yield check_plan(problem, Plan(tiers, head))
            except PlanError:
                continue


def predict_s(problem: PlanningProblem, plan: Plan, state: SystemState) -> float:
    """Predicted seconds by the cost model, which shares no arithmetic with the rules."""
    return estimate(problem, plan, state, last_value_arrays).total_s
