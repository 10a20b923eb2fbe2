import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.planning.arrays import Layout, encode_states
from runtime.planning.cost import PARTS, estimate, predict, total_s
from runtime.planning.estimators import last_value_arrays, tuned_arrays
from runtime.planning.problem import PlanningProblem, find_route
from runtime.planning.rows import ROW_FIELDS, CutTables, PlanCosts, compile_plan, compile_splits
from runtime.types import (
    CODECS,
    DEVICE_NODE,
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
from tests.graphs import chain, make_graph, make_problem, make_state


@st.composite
def problems(draw: st.DrawFn) -> PlanningProblem:
    """A random DAG with random layer times, ratios and coding speeds, entered at any stage."""
    length = draw(st.integers(1, 6))
    reads = [tuple(sorted(draw(st.sets(st.integers(-1, i - 1), min_size=1, max_size=3)))) for i in range(length)]
    graph = make_graph(reads, has_stage=draw(st.booleans()))
    problem = make_problem(graph, edges=2, input_kind=draw(st.sampled_from(["encoded", "image", "tensor"])))
    nodes = {
        name: NodeProfile(
            tuple(draw(st.floats(0.0, 0.1)) for _ in graph.layers),
            draw(st.sampled_from([1e3, 1e6])),
            2e6,
            0.001,
        )
        for name in problem.profile.nodes
    }
    ratios = {value.name: draw(st.sampled_from([0.5, 1.0, 1.5, 3.0])) for value in graph.values}
    return dataclasses.replace(problem, profile=ModelProfile(graph, nodes, ratios))


@st.composite
def states(draw: st.DrawFn, problem: PlanningProblem) -> SystemState:
    names = [DEVICE_NODE, *(node.name for node in problem.deployment.nodes)]
    links = []
    for source in names:
        for target in names:
            if source != target and draw(st.booleans()):
                ages = sorted(draw(st.lists(st.floats(0.0, 1e3), max_size=8)))
                samples = tuple(LinkSample(age, draw(st.floats(1e4, 1e9))) for age in ages)
                mean = draw(st.sampled_from([math.nan, 1e5, 1e8]))
                rtt = draw(st.sampled_from([math.nan, 0.0, 0.1]))
                links.append(LinkState(source, target, samples, mean, rtt, draw(st.integers(0, 10**6))))
    nodes = tuple(
        NodeState(
            n.name, n.tier, True, draw(st.sampled_from([math.nan, 1.0, 4.0])), 0.01, age_s=draw(st.floats(0, 1e3))
        )
        for n in problem.deployment.nodes
    )
    return make_state(
        problem,
        nodes=nodes,
        links=tuple(links),
        device_backlog_s=draw(st.floats(0, 1)),
        uplink_backlog_bytes=draw(st.integers(0, 10**6)),
        input_bytes=draw(st.integers(0, 10**5)),
    )


@settings(max_examples=25)
@given(problems(), st.sampled_from(CODECS), st.sampled_from(["edge0", None]))
def test_prefix_sums_give_every_split_the_row_that_its_route_gives(
    problem: PlanningProblem, codec: str, head: str | None
) -> None:
    num_layers = problem.graph.num_layers
    tables = CutTables.of(problem, codec)
    for i in range(problem.entry, num_layers):
        for j in range(i, num_layers + 1):
            if head is None and (j > i or j == num_layers):
                continue
            plan = Plan.split(num_layers, i, j, edge_nodes=() if head is None else (head,), codec=codec)
            walked = compile_plan(problem, plan)
            summed = compile_splits(problem, tables, np.array([i]), np.array([j]), head)
            for name in ROW_FIELDS:
                np.testing.assert_allclose(getattr(summed, name), getattr(walked, name), rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(st.data(), problems())
def test_a_batch_of_states_and_plans_equals_each_alone(data: st.DataObject, problem: PlanningProblem) -> None:
    num_layers = problem.graph.num_layers
    plans = [
        Plan.split(num_layers, i, j, edge_nodes=("edge1",))
        for i in range(problem.entry, num_layers + 1)
        for j in range(i, num_layers + 1)
    ]
    batch = [data.draw(states(problem)) for _ in range(3)]
    costs = PlanCosts.stack([compile_plan(problem, plan) for plan in plans])
    arrays = encode_states(costs.layout, batch)
    totals = total_s(predict(costs, tuned_arrays(arrays), arrays))
    for row, state in enumerate(batch):
        alone = [estimate(problem, plan, state).total_s for plan in plans]
        np.testing.assert_allclose(totals[row], alone, rtol=1e-9)


@settings(max_examples=25)
@given(st.data(), problems())
def test_an_estimate_s_parts_add_up(data: st.DataObject, problem: PlanningProblem) -> None:
    state = data.draw(states(problem))
    num_layers = problem.graph.num_layers
    i = data.draw(st.integers(0, num_layers))
    j = data.draw(st.integers(i, num_layers))
    latency = estimate(problem, Plan.split(num_layers, i, j, edge_nodes=("edge0",)), state)
    parts = [latency.codec_s, latency.queueing_s, latency.decision_s, latency.other_s]
    parts += [*latency.compute_s.values(), *latency.transfer_s.values()]
    assert math.isfinite(latency.total_s)
    assert min(parts) >= -1e-12
    assert sum(parts) == pytest.approx(latency.total_s)
