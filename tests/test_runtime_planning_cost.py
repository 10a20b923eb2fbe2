import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.planning.arrays import encode_states
from runtime.planning.cost import estimate, predict, total_s
from runtime.planning.estimators import tuned_arrays
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import ROW_FIELDS, CutTables, PlanCosts, compile_plan, compile_splits
from runtime.types import (
    CODECS,
    DEVICE_NODE,
    LinkSample,
    LinkState,
    ModelProfile,
    NodeProfile,
    NodeState,
    Plan,
    SystemState,
)
from tests.graphs import make_graph, make_problem, make_state


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


def random_state(problem: PlanningProblem, seed: int) -> SystemState:
    """A state with some links and loads known and some not."""
    draw = np.random.default_rng(seed)
    links = []
    for source, target in itertools.permutations([DEVICE_NODE, *(n.name for n in problem.deployment.nodes)], 2):
        ages = np.sort(draw.uniform(0, 100, draw.integers(9)))
        samples = tuple(LinkSample(float(age), float(10 ** draw.uniform(4, 9))) for age in ages)
        mean, rtt = draw.choice([math.nan, 1e5, 1e8]), draw.choice([math.nan, 0.0, 0.1])
        if draw.random() < 0.7:
            links.append(LinkState(source, target, samples, float(mean), float(rtt), int(draw.integers(10**6))))
    nodes = tuple(
        NodeState(n.name, n.tier, True, float(draw.choice([math.nan, 1.0, 4.0])), 0.01, age_s=float(draw.uniform(0, 9)))
        for n in problem.deployment.nodes
    )
    return make_state(
        problem,
        nodes=nodes,
        links=tuple(links),
        device_backlog_s=float(draw.uniform()),
        uplink_backlog_bytes=int(draw.integers(10**6)),
        input_bytes=int(draw.integers(10**5)),
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
@given(problems(), st.integers(0, 2**32))
def test_a_batch_of_states_and_plans_equals_each_alone(problem: PlanningProblem, seed: int) -> None:
    num_layers = problem.graph.num_layers
    plans = [
        Plan.split(num_layers, i, j, edge_nodes=("edge1",))
        for i in range(problem.entry, num_layers + 1)
        for j in range(i, num_layers + 1)
    ]
    batch = [random_state(problem, seed + n) for n in range(3)]
    costs = PlanCosts.stack([compile_plan(problem, plan) for plan in plans])
    arrays = encode_states(costs.layout, batch)
    totals = total_s(predict(costs, tuned_arrays(arrays), arrays))
    for row, state in enumerate(batch):
        alone = [estimate(problem, plan, state).total_s for plan in plans]
        np.testing.assert_allclose(totals[row], alone, rtol=1e-9)


@settings(max_examples=25)
@given(problems(), st.integers(0, 2**32), st.data())
def test_an_estimate_s_parts_add_up(problem: PlanningProblem, seed: int, data: st.DataObject) -> None:
    state = random_state(problem, seed)
    num_layers = problem.graph.num_layers
    i = data.draw(st.integers(0, num_layers))
    j = data.draw(st.integers(i, num_layers))
    latency = estimate(problem, Plan.split(num_layers, i, j, edge_nodes=("edge0",)), state)
    parts = [latency.codec_s, latency.queueing_s, latency.decision_s, latency.other_s]
    parts += [*latency.compute_s.values(), *latency.transfer_s.values()]
    assert math.isfinite(latency.total_s)
    assert min(parts) >= -1e-12
    assert sum(parts) == pytest.approx(latency.total_s)
