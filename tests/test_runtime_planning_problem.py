import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.problem import check_plan, find_route, make_stage
from runtime.types import Constraints, GraphSpec, Plan, SpatialOp, Tier, TileSpan, Window
from tests.graphs import RESIDUAL, chain, make_graph, make_problem
from tests.nets import spatial_graph

D, E, C = Tier.DEVICE, Tier.EDGE, Tier.CLOUD


@st.composite
def graphs_and_plans(draw: st.DrawFn) -> tuple[GraphSpec, Plan]:
    """A random DAG and a random monotone assignment of its layers."""
    length = draw(st.integers(1, 9))
    reads = [tuple(sorted(draw(st.sets(st.integers(-1, i - 1), min_size=1, max_size=3)))) for i in range(length)]
    graph = make_graph(reads)
    tiers: list[Tier] = []
    for sources in reads:
        low = max((tiers[s] for s in sources if s >= 0), default=D)
        tiers.append(Tier(draw(st.integers(low, C))))
    has_head = E in tiers or draw(st.booleans())
    return graph, Plan(tuple(tiers), ("edge0",) if has_head else ())


@given(graphs_and_plans())
def test_a_route_runs_every_layer_once_and_every_tier_finds_what_it_needs(case: tuple[GraphSpec, Plan]) -> None:
    graph, plan = case
    route = find_route(graph, plan, "tensor")
    layers = [i for tier in Tier for i in route.stage(tier).layers]
    assert sorted(layers) == list(range(graph.num_layers))
    at_hand = {"x"}
    for hop, tier in enumerate(route.tiers):
        if hop:
            crossing = route.up[hop - 1]
            assert set(crossing) <= at_hand
            assert len(set(crossing)) == len(crossing)
            at_hand = set(crossing)
        stage = route.stage(tier)
        assert set(stage.needs) <= at_hand
        at_hand |= set(stage.makes)


@given(graphs_and_plans())
def test_nothing_crosses_that_nobody_beyond_reads(case: tuple[GraphSpec, Plan]) -> None:
    graph, plan = case
    route = find_route(graph, plan, "tensor")
    consumers = {value.name: value.consumers for value in graph.values}
    for hop, crossing in enumerate(route.up):
        beyond = {i for tier in route.tiers[hop + 1 :] for i in route.stage(tier).layers}
        for name in crossing:
            assert beyond & set(consumers[name])


@given(graphs_and_plans())
def test_every_output_is_made_on_one_tier(case: tuple[GraphSpec, Plan]) -> None:
    graph, plan = case
    route = find_route(graph, plan, "tensor")
    made = [name for tier in Tier for name in route.stage(tier).makes if name in graph.outputs]
    assert sorted(made) == sorted(set(graph.outputs))


def test_a_skip_over_a_cut_is_sent_once_beside_the_main_path() -> None:
    route = find_route(make_graph(RESIDUAL), Plan.split(5, 2, 2), "tensor")
    assert route.up == (("v0", "v1"),)


def test_what_the_head_does_not_read_goes_through_it_to_the_cloud() -> None:
    graph = make_graph(RESIDUAL)
    route = find_route(graph, Plan((D, E, E, C, C), ("edge0",)), "tensor")
    assert route.up == (("v0",), ("v0", "v2"))
    assert route.edge.needs == ("v0",)


def test_with_a_head_and_no_edge_layer_everything_still_goes_through_the_head() -> None:
    route = find_route(chain(3), Plan.split(3, 1, 1, edge_nodes=("edge0",)), "tensor")
    assert route.tiers == (D, E, C)
    assert route.up == (("v0",), ("v0",))


def test_a_device_only_plan_visits_no_node_even_with_a_head() -> None:
    route = find_route(chain(3), Plan.split(3, 3, 3, edge_nodes=("edge0",)), "tensor")
    assert route.tiers == (D,)
    assert route.up == ()


@pytest.mark.parametrize(
    ("kind", "crossing"), [("encoded", "input.encoded.0"), ("image", "input.image"), ("tensor", "x")]
)
def test_cloud_only_sends_the_input_as_it_came(kind: str, crossing: str) -> None:
    graph = chain(3, has_stage=True)
    route = find_route(graph, Plan.split(5, 0, 0), kind)
    assert route.up == ((crossing,),)
    assert route.device.layers == ()
    assert len(route.cloud.layers) == graph.num_layers - graph.entry(kind)


def test_layers_before_the_entry_are_put_on_the_device() -> None:
    problem = make_problem(chain(3, has_stage=True), input_kind="tensor")
    assert check_plan(problem, Plan.split(5, 0, 0)).tiers == (D, D, C, C, C)


def test_a_stage_needs_what_others_made_and_makes_what_others_read() -> None:
    stage = make_stage(make_graph(RESIDUAL), E, (2, 3))
    assert (stage.needs, stage.makes) == (("v0", "v1"), ("v3",))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((D, D)), "expected a tier for each of the 3 layers"),
        (Plan((C, E, E), ("edge0",)), "layer 0 .layer0. runs on cloud but layer 1 .layer1."),
        (Plan((D, E, C)), "names no edge node"),
        (Plan((D, E, C), ("edge7",)), "expected edge_nodes among .'edge0'.*got 'edge7'"),
        (Plan((D, E, C), ("cloud",)), "got 'cloud'"),
        (Plan((D, E, C), ("edge0", "edge0")), "every edge node once"),
        (Plan((D, D, C), codec="zip"), "expected a codec among"),
        (Plan((D, D, C), codec="int8"), "lossless_only"),
        (Plan((D, E, C), ("edge0",), (TileSpan(1, 2, (4,), ()),)), "an edge node for each, got 2 tiles"),
        (Plan((D, E, C), ("edge0",), (TileSpan(1, 2, (), ()),)), "expected 2 to 16 tiles"),
    ],
)
def test_an_illegal_plan_is_refused_with_what_would_be_legal(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan(make_problem(chain(3)), plan)


def test_a_plan_without_cloud_node_cannot_use_the_cloud() -> None:
    with pytest.raises(PlanError, match="no cloud node"):
        check_plan(make_problem(chain(2), has_cloud=False), Plan.split(2, 1, 1))


def test_private_input_keeps_the_stage_and_every_reader_of_the_input_on_the_device() -> None:
    graph = make_graph([(-1,), (-1,), (0, 1)], has_stage=True)
    problem = make_problem(graph, constraints=Constraints(private_input=True), input_kind="encoded")
    for tiers in itertools.product(Tier, repeat=graph.num_layers):
        plan = Plan(tiers, ("edge0",))
        is_private = tiers[:4] == (D, D, D, D)
        try:
            check_plan(problem, plan)
        except PlanError:
            continue
        assert is_private
    assert check_plan(problem, Plan((D, D, D, D, C), ("edge0",)))


def test_tiers_that_are_not_allowed_are_refused() -> None:
    problem = make_problem(chain(2), constraints=Constraints(allowed_tiers=(D, E)))
    with pytest.raises(PlanError, match="allow only device, edge"):
        check_plan(problem, Plan.split(2, 1, 1))


def test_a_device_without_the_model_runs_no_layer() -> None:
    limits = Constraints(device_has_model=False, deadline_s=1.0)
    problem = make_problem(chain(2), constraints=limits)
    with pytest.raises(PlanError, match="does not hold the model"):
        check_plan(problem, Plan.split(2, 1, 1))
    assert check_plan(problem, Plan.split(2, 0, 0))


def test_split_refuses_points_out_of_order() -> None:
    with pytest.raises(ValueError, match="0 <= i <= j <= 4"):
        Plan.split(4, 3, 2)


def test_a_plan_describes_itself_by_ranges() -> None:
    assert Plan.split(6, 2, 4, edge_nodes=("edge1",)).describe() == "device[0:2) edge1[2:4) cloud[4:6)"
    assert Plan.split(6, 2, 2, edge_nodes=("edge1",)).describe() == "device[0:2) cloud[2:6) via edge1"


def test_tiles_must_be_tileable_in_order_inside_the_edges_share_and_have_a_node_each() -> None:
    op = SpatialOp("v1", ("v0",), (8, 8), (Window(3, 1, 1), Window(3, 1, 1)), 1.0)
    graph = spatial_graph((8, 8), [replace(op, name=f"v{i}", reads=(f"v{i - 1}" if i else "x",)) for i in range(4)])
    problem = make_problem(graph, edges=2)
    tiers = (D, E, E, C)
    first, second = TileSpan(1, 2, (4,), ()), TileSpan(2, 3, (), (3,))
    plan = Plan(tiers, ("edge0", "edge1"), (first, second))
    assert check_plan(problem, plan) == plan
    assert plan.describe() == ("device[0:1) edge0[1:3) cloud[3:4), tiles [1:2) 2x1 [2:3) 1x2 on edge0+edge1")
    for changes, message in (
        ({"tiles": (second, first)}, "in ascending order"),
        ({"tiles": (TileSpan(0, 2, (4,), ()),)}, "inside the layers 1 to 2 of edge"),
        ({"tiles": (TileSpan(1, 5, (4,), ()),)}, r"inside the layers 1 to 2 of edge"),
        ({"tiles": (TileSpan(1, 3, (9,), ()),)}, "expected ascending lines that cut the 8 rows"),
        ({"tiles": (TileSpan(1, 3, (2, 4), ()),)}, "got 3 tiles on"),
        ({"edge_nodes": ("edge0",)}, "name more edge_nodes or use fewer lines"),
    ):
        with pytest.raises(PlanError, match=message):
            check_plan(problem, replace(plan, **changes))
    dense = make_problem(chain(4), edges=2)
    with pytest.raises(PlanError, match=r"layers 1 to 2 are not a tileable span of this model \(tileable: none"):
        check_plan(dense, plan)
