"""runtime.planning.grids: tiles for every edge share, priced as `cost_tiles` does, chosen where they pay."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.arrays import encode_states
from runtime.planning.candidates import candidates
from runtime.planning.cost import estimate, predict_total
from runtime.planning.estimators import last_value_arrays
from runtime.planning.grids import tile_options, tiled_plans
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import PlanningProblem, check_plan
from runtime.planning.rows import PlanCosts, compile_plan
from runtime.planning.tiles import TILE_HAND_OVER_S, TileNode, cost_tiles
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    GraphSpec,
    LinkSample,
    LinkState,
    ModelProfile,
    NodeProfile,
    Plan,
    SpatialOp,
    SystemState,
    Tier,
    TileSpan,
    Window,
)
from tests.graphs import make_deployment, make_state
from tests.nets import spatial_graph

SAME = (Window(3, 1, 1), Window(3, 1, 1))


def tower(length: int = 8, size: int = 32) -> GraphSpec:
    """Convolutions of one size."""
    ops = [
        SpatialOp(f"v{i}", (f"v{i - 1}" if i else "x",), (size, size), SAME, 1000.0 * size * size)
        for i in range(length)
    ]
    return spatial_graph((size, size), ops)


def make_problem(graph: GraphSpec, *edge_speeds: float, constraints: Constraints | None = None) -> PlanningProblem:
    """Edge nodes that need 20 ms a layer over their speed; device and cloud are far slower."""
    deployment = make_deployment(edges=len(edge_speeds), constraints=constraints)
    speeds = {DEVICE_NODE: 0.05, "cloud": 0.05, **{f"edge{i}": speed for i, speed in enumerate(edge_speeds)}}
    nodes = {name: NodeProfile((0.02 / speed,) * graph.num_layers, 1e9, 1e9, 1e-4) for name, speed in speeds.items()}
    return PlanningProblem(ModelProfile(graph, nodes), deployment, deployment.constraints, "tensor")


def state_of(
    problem: PlanningProblem, *, between_edges_bps: float = 1e9, k: dict[str, float] | None = None, **changes: object
) -> SystemState:
    """Everything measured: 100 Mbit/s to and from everywhere, but between edge nodes."""
    names = [DEVICE_NODE, *(node.name for node in problem.deployment.nodes)]
    links = []
    for a, b in itertools.permutations(names, 2):
        bps = between_edges_bps if a.startswith("edge") and b.startswith("edge") else 1e8
        links.append(LinkState(a, b, (LinkSample(0.1, bps),), bps, 1e-3))
    state = make_state(problem, links=tuple(links), **changes)
    nodes = tuple(replace(node, load_factor=(k or {}).get(node.name, 1.0)) for node in state.nodes)
    return replace(state, nodes=nodes)


def edge_plan(problem: PlanningProblem, *names: str, tiles: tuple[TileSpan, ...] = ()) -> Plan:
    return check_plan(problem, Plan((Tier.EDGE,) * problem.graph.num_layers, names, tiles))


@settings(max_examples=25)
@given(st.floats(0.3, 3.0), st.floats(1.0, 4.0), st.sampled_from([1e7, 1e9]), st.integers(4, 28))
def test_a_tiled_edge_share_costs_what_cost_tiles_says(speed: float, k: float, bps: float, line: int) -> None:
    problem = make_problem(tower(), 1.0, speed)
    spans = (TileSpan(1, 3, (line,), ()), TileSpan(4, 6, (), (line,)))
    state = state_of(problem, between_edges_bps=bps, k={"edge1": k})
    plan = edge_plan(problem, "edge0", "edge1", tiles=spans)
    profiles = problem.profile.nodes
    nodes = [
        TileNode(profiles["edge0"].layer_s, fixed_s=1e-4),
        TileNode(tuple(k * s for s in profiles["edge1"].layer_s), bps, bps, 1e-3, 1e-4, TILE_HAND_OVER_S),
    ]
    expected_s = 4 * 0.02 + math.fsum(cost.total_s for cost in cost_tiles(problem.graph, spans, nodes))
    assert estimate(problem, plan, state, last_value_arrays).compute_s["edge0"] == pytest.approx(expected_s)


def test_rows_can_be_stacked_and_picked_with_their_tiles() -> None:
    problem = make_problem(tower(), 1.0, 0.5, 2.0)
    spans = (TileSpan(1, 3, (9,), ()), TileSpan(4, 6, (8, 20), ()))
    plans = [
        edge_plan(problem, "edge0", "edge1", "edge2", tiles=spans),
        edge_plan(problem, "edge1"),
        edge_plan(problem, "edge2", "edge0", tiles=spans[:1]),
    ]
    singles = [compile_plan(problem, plan) for plan in plans]
    arrays = encode_states(
        singles[0].layout, [state_of(problem), state_of(problem, between_edges_bps=1e7, k={"edge0": 2.0})]
    )
    readings = last_value_arrays(arrays)
    alone = np.concatenate([predict_total(costs, readings, arrays) for costs in singles], axis=1)
    stacked = PlanCosts.stack(singles)
    assert predict_total(stacked, readings, arrays) == pytest.approx(alone)
    rows = np.array([2, 0, 0, 1], dtype=np.intp)
    assert predict_total(stacked.take(rows), readings, arrays) == pytest.approx(alone[:, rows])
    assert stacked.take(np.array([1], dtype=np.intp)).tiles is None
    assert stacked.needs[:, 1:4].tolist() == [[1, 1, 1], [0, 1, 0], [1, 0, 1]]


def test_every_edge_share_gets_tiles_that_fit_it() -> None:
    problem = make_problem(tower(), 1.0, 1.0)
    n = problem.graph.num_layers
    for i, j in itertools.combinations(range(n + 1), 2):
        plan = Plan.split(n, i, j, edge_nodes=("edge0",))
        for tiled in tiled_plans(problem, plan):
            assert check_plan(problem, tiled) == tiled
            assert (tiled.tiers, tiled.head) == (plan.tiers, "edge0")
    assert tiled_plans(problem, Plan.split(n, 0, n, edge_nodes=("edge1",)))
    assert tiled_plans(problem, Plan.split(n, 0, 0, edge_nodes=("edge0",))) == ()
    assert tiled_plans(problem, Plan.split(n, 0, 0)) == ()


def test_one_edge_node_or_none_that_is_known_leaves_nothing_to_choose() -> None:
    graph = tower()
    assert tile_options(make_problem(graph, 1.0), "edge0") == ()
    problem = make_problem(graph, 1.0, 1.0)
    known = {name: node for name, node in problem.profile.nodes.items() if name != "edge1"}
    assert tile_options(replace(problem, profile=ModelProfile(graph, known)), "edge0") == ()
    for limits in (Constraints(allowed_tiers=(Tier.DEVICE, Tier.CLOUD)), Constraints(tiles=False)):
        assert tile_options(make_problem(graph, 1.0, 1.0, constraints=limits), "edge0") == ()


def test_a_plan_in_tiles_is_refused_where_the_constraints_rule_tiles_out() -> None:
    graph = tower()
    problem = make_problem(graph, 1.0, 1.0)
    tiled = tiled_plans(problem, Plan.split(graph.num_layers, 0, graph.num_layers, edge_nodes=("edge0",)))[0]
    with pytest.raises(PlanError, match="tiles = true"):
        check_plan(replace(problem, constraints=Constraints(tiles=False)), tiled)


def test_spans_that_were_chosen_for_average_nodes_are_cut_for_the_ones_there_are() -> None:
    exact = make_problem(tower(), 0.6, 1.0, 1.8)
    average = NodeProfile((0.02,) * exact.graph.num_layers, 1e9, 1e9, 1e-4)
    quick = replace(exact, average_edge=average)
    plan = edge_plan(exact, "edge0")
    state = state_of(exact)
    least = [
        min(estimate(problem, tiled, state).total_s for tiled in tiled_plans(problem, plan))
        for problem in (exact, quick)
    ]
    assert least[1] <= 1.08 * least[0] < 0.7 * estimate(exact, plan, state).total_s
    others = replace(make_problem(exact.graph, 1.5, 1.0, 0.5), average_edge=average)
    mine, theirs = (tile_options(problem, "edge0")[-1] for problem in (quick, others))
    for a, b in zip(mine.spans, theirs.spans, strict=True):
        assert (a.start, a.stop, len(a.row_lines), len(a.col_lines)) == (
            b.start,
            b.stop,
            len(b.row_lines),
            len(b.col_lines),
        )
        assert (a.row_lines, a.col_lines) != (b.row_lines, b.col_lines)


def test_unequal_nodes_get_unequal_tiles_and_faster_peers_come_first() -> None:
    problem = make_problem(tower(), 1.0, 0.5, 3.0)
    for option in tile_options(problem, "edge0"):
        assert option.edge_nodes[:2] == ("edge0", "edge2")
        for span in option.spans:
            lines = span.row_lines or span.col_lines
            assert lines[0] < 32 / span.num_tiles  # the head is slower than the peer that comes next


@pytest.mark.parametrize("rule", ["planner", "d3"])
def test_tiles_are_chosen_where_they_pay_and_left_where_not(rule: str) -> None:
    problem = make_problem(tower(), 1.0, 1.0)
    policy = load_policy(rule).build(problem)

    def choose(state: SystemState) -> Plan:
        policy.reset()
        return policy.plan(state)

    fast = state_of(problem, between_edges_bps=1e9)
    plan = choose(fast)
    assert plan.tiles
    assert set(plan.edge_nodes) == {"edge0", "edge1"}
    alone = replace(plan, edge_nodes=(plan.edge_nodes[0],), tiles=())
    assert estimate(problem, plan, fast).total_s < 0.8 * estimate(problem, alone, fast).total_s
    assert choose(state_of(problem, between_edges_bps=2e5)).tiles == ()
    assert choose(state_of(problem, down=("edge1",))).edge_nodes == ("edge0",)
    assert choose(state_of(problem, k={"edge1": 50.0})).tiles == ()
    strangers = tuple(x for x in fast.links if DEVICE_NODE in (x.source, x.target))  # the edge nodes told of no other
    assert choose(replace(fast, links=strangers)).tiles == ()


def test_d3_takes_the_labels_of_hpa_and_hpa_alone_cuts_no_tiles() -> None:
    problem = make_problem(tower(), 1.0, 1.0)
    state = state_of(problem)
    hpa, d3 = (load_policy(name).build(problem).plan(state) for name in ("d3-hpa", "d3"))
    assert hpa.tiles == ()
    assert d3.tiles
    assert (d3.tiers, d3.head) == (hpa.tiers, hpa.head)


def test_d3_keeps_its_tiles_until_it_labels_again() -> None:
    problem = make_problem(tower(), 1.0, 1.0)
    policy = load_policy("d3").build(problem)
    plan = policy.plan(state_of(problem))
    assert policy.plan(state_of(problem, between_edges_bps=2e5)) == plan
    assert policy.plan(state_of(problem, down=("edge1",))).tiles == ()


def test_candidates_hold_tiled_plans_only_where_there_are_nodes_for_them() -> None:
    one, two = (candidates(make_problem(tower(), *speeds)) for speeds in ((1.0,), (1.0, 1.0)))
    assert not any(plan.tiles for plan in one.plans)
    assert one.costs.tiles is None
    assert any(plan.tiles for plan in two.plans[: two.num_plans])
    assert len(set(two.plans[: two.num_plans])) == two.num_plans
