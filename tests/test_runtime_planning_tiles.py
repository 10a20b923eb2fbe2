"""runtime.planning.tiles: which spans and grids, against trying all of them."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.chains import find_chains
from runtime.planning.problem import make_stage
from runtime.planning.tile_search import TileChoice, choose_tiles, fit_lines, sum_costs
from runtime.planning.tile_sweeps import APART, WHOLE, TileSearch, find_grids
from runtime.planning.tiles import TileNode, cost_tiles
from runtime.planning.tiling import find_spans, plan_tiles
from runtime.profiles.shipped import load_shipped_profile
from runtime.types import GraphSpec, SpatialOp, Tier, TileSpan, Window
from tests.graphs import chain
from tests.nets import Sides, spatial_graph, spatial_graphs

SAME = (Window(3, 1, 1), Window(3, 1, 1))
HALVE = (Window(2, 2), Window(2, 2))


def same_convs(length: int, size: int = 32) -> GraphSpec:
    ops = [
        SpatialOp(f"v{i}", (f"v{i - 1}" if i else "x",), (size, size), SAME, 1000.0 * size * size)
        for i in range(length)
    ]
    return spatial_graph((size, size), ops)


def make_nodes(graph: GraphSpec, *speeds: float, bps: float = 1e9, fixed_s: float = 1e-4) -> list[TileNode]:
    """Nodes that take a microsecond per thousand FLOPs, over their speed."""
    return [TileNode(tuple(1e-9 * x.flops / s for x in graph.layers), bps, bps, 0.0, fixed_s) for s in speeds]


def untiled_s(graph: GraphSpec, node: TileNode, choice: TileChoice) -> float:
    inside = {index for span in choice.spans for index in range(span.start, span.stop)}
    return math.fsum(s for index, s in enumerate(node.layer_s) if index not in inside)


def try_all(graph: GraphSpec, nodes: list[TileNode]) -> float:
    """Least seconds over all sequences of spans cut by one line of rows or of columns, for two nodes."""
    length = graph.num_layers
    best = [0.0] + [math.inf] * length
    sizes = {value.name: value.tensor.shape[2:] for value in graph.values}
    for stop in range(1, length + 1):
        best[stop] = best[stop - 1] + nodes[0].layer_s[stop - 1]
        rows, cols = sizes[graph.layers[stop - 1].outputs[-1]]
        for start in range(stop):
            for span in (
                *(TileSpan(start, stop, (line,), ()) for line in range(1, rows)),
                *(TileSpan(start, stop, (), (line,)) for line in range(1, cols)),
            ):
                try:
                    best[stop] = min(best[stop], best[start] + cost_tiles(graph, [span], nodes)[0].total_s)
                except PlanError:
                    continue
    return best[length]


SPATIAL = spatial_graphs(Sides(kernel=3, stride=2, dilation=1))


@settings(max_examples=25)
@given(SPATIAL, st.lists(st.floats(0.2, 5.0), min_size=2, max_size=4), st.sampled_from([1e6, 1e8, 1e10]))
def test_the_choice_is_legal_and_costs_what_it_says(graph: GraphSpec, speeds: list[float], bps: float) -> None:
    nodes = make_nodes(graph, *speeds, bps=bps)
    choice = choose_tiles(graph, nodes)
    assert choice.untiled_s == pytest.approx(sum(nodes[0].layer_s))
    assert choice.total_s <= choice.untiled_s * (1 + 1e-12)
    assert all(first.stop <= second.start for first, second in pairwise(choice.spans))
    assert choice.costs == cost_tiles(graph, choice.spans, nodes)
    for span in choice.spans:
        assert 2 <= len(plan_tiles(graph, span).tiles) <= len(nodes)
    spent = sum(cost.total_s for cost in choice.costs) + untiled_s(graph, nodes[0], choice)
    assert choice.total_s == pytest.approx(spent, rel=1e-9)


@settings(max_examples=5, derandomize=True)
@given(spatial_graphs(Sides(kernel=3, stride=1, dilation=1)), st.floats(0.5, 2.0), st.sampled_from([3e7, 1e9]))
def test_two_nodes_are_used_nearly_as_well_as_trying_every_line_can(graph: GraphSpec, speed: float, bps: float) -> None:
    nodes = make_nodes(graph, 1.0, speed, bps=bps, fixed_s=0.0)
    assert choose_tiles(graph, nodes).total_s <= 1.02 * try_all(graph, nodes)


@pytest.mark.parametrize("bps", [1e8, 1e10])
def test_the_search_prices_spans_of_a_real_network_as_they_cost(bps: float) -> None:
    """It puts operations of a layer together where they work on the same positions."""
    shipped = load_shipped_profile("torchvision:resnet18")
    nodes = [TileNode(shipped.profile.layer_s), *[TileNode(shipped.profile.layer_s, bps, bps, 1e-3, 1e-4)] * 3]
    (stretch,) = find_spans(shipped.graph)
    search = TileSearch(shipped.graph, nodes)
    before_s = dict.fromkeys((APART, WHOLE, *search.grids), [0.0] * stretch.stop)
    found = [search.best_into(stretch.start, stop, before_s) for stop in stretch.stops if stop > stretch.start]
    steps = [each[APART] for each in found if APART in each]
    assert len(steps) > 10
    for step in steps:
        assert step.seconds == pytest.approx(sum_costs(shipped.graph, [step.span], nodes), rel=1e-9)


def test_a_slow_link_leaves_the_layers_on_the_head() -> None:
    graph = same_convs(6)
    choice = choose_tiles(graph, make_nodes(graph, 1.0, 1.0, bps=1e5))
    assert choice.spans == ()
    assert choice.total_s == pytest.approx(choice.untiled_s)


def test_redundant_work_ends_a_span_though_messages_cost_too() -> None:
    graph = same_convs(12, size=16)
    free, dear = (make_nodes(graph, 1.0, 1.0, bps=3e8, fixed_s=fixed_s) for fixed_s in (0.0, 3e-5))
    longest = [max(span.stop - span.start for span in choose_tiles(graph, nodes).spans) for nodes in (free, dear)]
    assert longest[0] < longest[1] < 12
    assert choose_tiles(graph, dear).total_s < sum_costs(graph, [TileSpan(0, 12, (8,), ())], dear)


def test_maps_are_left_where_they_are_between_spans() -> None:
    graph = same_convs(6, size=64)
    nodes = make_nodes(graph, 1.0, 1.0, bps=1e8, fixed_s=0.0)
    choice = choose_tiles(graph, nodes)
    (spans,) = find_chains(choice.spans)
    assert len(spans) > 1
    apart_s = math.fsum(sum_costs(graph, [span], nodes) for span in spans)
    assert choice.total_s < 0.8 * apart_s
    half_bytes = 4 * 4 * 64 * 32
    for before, after in pairwise(choice.costs):
        assert max(before.gather_bytes[1], after.scatter_bytes[1]) < 0.4 * half_bytes


def test_unequal_nodes_get_unequal_tiles() -> None:
    graph = same_convs(1, size=40)
    choice = choose_tiles(graph, make_nodes(graph, 1.0, 3.0, bps=math.inf, fixed_s=0.0))
    (span,) = choice.spans
    (line,) = (*span.row_lines, *span.col_lines)
    assert line == pytest.approx(10, abs=1)
    compute = choice.costs[0].compute_s
    assert max(compute) < 1.15 * min(compute)


def test_lines_are_fitted_to_the_nodes_unless_the_span_was_better_as_it_was() -> None:
    graph, span = same_convs(2), TileSpan(0, 2, (12, 22), ())
    near, far = (make_nodes(graph, 1.0, 1.5, 11.0, bps=bps) for bps in (1e10, 1e8))
    fitted = fit_lines(graph, [span], near)
    assert sum_costs(graph, fitted, near) < 0.5 * sum_costs(graph, [span], near)
    # A fast node behind a slow link is not to be sent the most; but there lines go by speed, and get stuck.
    assert sum_costs(graph, fitted, far) > sum_costs(graph, [span], far)
    assert fit_lines(graph, [span], far) == (span,)


def test_lines_go_on_from_where_they_were_when_those_by_speed_would_meet() -> None:
    graph = same_convs(1, size=8)
    for span in (TileSpan(0, 1, (4,), ()), TileSpan(0, 1, (), (4,))):
        for speed in (3.0, 100.0):
            nodes = make_nodes(graph, 1.0, speed)
            fitted = fit_lines(graph, [span], nodes)
            assert sum_costs(graph, fitted, nodes) < sum_costs(graph, [span], nodes)


def test_a_node_that_is_too_slow_gets_no_tile() -> None:
    graph = same_convs(3)
    (head, peer, useless) = make_nodes(graph, 1.0, 1.0, 1.0)
    useless = replace(useless, rtt_s=10.0)
    choice = choose_tiles(graph, [head, peer, useless])
    assert choice.spans
    assert all(len(plan_tiles(graph, span).tiles) == 2 for span in choice.spans)


def test_four_nodes_are_faster_than_two() -> None:
    graph = same_convs(4, size=64)
    two, four = (choose_tiles(graph, make_nodes(graph, *[1.0] * n)).total_s for n in (2, 4))
    assert four < two < make_nodes(graph, 1.0)[0].layer_s[0] * 4


def test_the_parts_of_the_cost_follow_from_bytes_rates_and_work() -> None:
    graph = same_convs(2)
    nodes = [TileNode((0.2, 0.4), encode_bytes_per_s=1e6), TileNode((0.4, 0.8), 8e6, 16e6, 0.01, 0.001)]
    (cost,) = cost_tiles(graph, [TileSpan(0, 2, (16,), ())], nodes)
    sent, back = 4 * 4 * 18 * 32, 4 * 4 * 16 * 32
    assert cost.scatter_bytes == (0, sent)
    assert cost.gather_bytes == (0, back)
    assert cost.scatter_s == pytest.approx((0.0, 0.006 + sent * (1e-6 + 1e-6)))
    assert cost.gather_s == pytest.approx((0.0, 0.006 + back * 0.5e-6))
    assert cost.compute_s == pytest.approx((0.2 * 17 / 32 + 0.2, 0.4 * 17 / 32 + 0.4))
    assert cost.total_s == pytest.approx(cost.scatter_s[1] + cost.compute_s[1] + cost.gather_s[1])


def test_every_tile_reads_all_the_weights() -> None:
    (op,) = same_convs(1).layers[0].spatial
    graph = spatial_graph(op.size, [replace(op, weight_bytes=1_000_000), replace(op, name="w", reads=("v0",))])
    nodes = [TileNode((0.5, 0.5), weight_bytes_per_s=1e7), TileNode((0.05, 0.5), weight_bytes_per_s=1e7)]
    (cost,) = cost_tiles(graph, [TileSpan(0, 2, (16,), ())], nodes)
    assert cost.compute_s == pytest.approx((0.1 + 0.4 * 17 / 32 + 0.25, 0.05 + 0.25))


def test_tiles_cost_what_their_own_kernels_take_and_the_head_pays_for_cutting() -> None:
    graph = same_convs(2)
    nodes = [
        TileNode((0.5, 0.5), fixed_s=0.002, tile_layer_s=(0.2, 0.4)),
        TileNode((0.5, 0.5), rtt_s=0.01, fixed_s=0.001),
    ]
    (cost,) = cost_tiles(graph, [TileSpan(0, 2, (16,), ())], nodes)
    assert cost.compute_s == pytest.approx((0.2 * 17 / 32 + 0.2, 0.5 * 17 / 32 + 0.25))
    assert cost.scatter_s == cost.gather_s == pytest.approx((0.002, 0.006))
    assert choose_tiles(graph, nodes[:1] * 2).untiled_s == pytest.approx(1.0)


def test_only_the_layers_asked_about_are_tiled() -> None:
    graph = same_convs(6)
    choice = choose_tiles(graph, make_nodes(graph, 1.0, 1.0), 2, 5)
    assert choice.spans
    assert all(2 <= span.start < span.stop <= 5 for span in choice.spans)
    assert choice.untiled_s == pytest.approx(3 * make_nodes(graph, 1.0)[0].layer_s[0])


def test_a_graph_without_spans_has_no_tiles() -> None:
    graph = chain(4)
    assert choose_tiles(graph, [TileNode((0.1,) * 4)] * 2) == TileChoice((), (), pytest.approx(0.4), pytest.approx(0.4))


def test_a_skip_over_the_start_of_a_span_is_scattered_and_over_its_end_gathered() -> None:
    size = (32, 32)
    ops = [
        SpatialOp("a", ("x",), size, SAME, 1e6),
        SpatialOp("b", ("a",), size, SAME, 1e6),
        SpatialOp("c", ("a", "b"), size, flops=1e3),
        SpatialOp("d", ("c", "a"), size, flops=1e3),
    ]
    graph = spatial_graph(size, ops)
    (stretch,) = find_spans(graph)
    assert stretch.stops == (1, 2, 3, 4)
    one_map = 4 * 4 * 16 * 32
    span = TileSpan(0, 2, (16,), ())
    assert make_stage(graph, Tier.EDGE, (0, 1)).makes == ("a", "b")
    assert cost_tiles(graph, [span], make_nodes(graph, 1.0, 1.0))[0].gather_bytes == (0, 2 * one_map)
    span = TileSpan(2, 4, (16,), ())
    assert cost_tiles(graph, [span], make_nodes(graph, 1.0, 1.0))[0].scatter_bytes == (0, 2 * one_map)


def test_grids_use_no_more_tiles_than_there_are_nodes() -> None:
    assert find_grids(1) == []
    assert sorted(find_grids(4)) == [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


def test_too_few_nodes_are_refused() -> None:
    graph = same_convs(2)
    with pytest.raises(ValueError, match="a node for each of the 4 tiles, got 2"):
        cost_tiles(graph, [TileSpan(0, 2, (16,), (16,))], make_nodes(graph, 1.0, 1.0))


def test_nothing_is_warned_of_where_a_node_needs_no_time() -> None:
    graph = same_convs(3)
    nodes = [TileNode((0.0,) * 3), *make_nodes(graph, 1.0)]
    with np.errstate(all="raise"):
        assert choose_tiles(graph, nodes).total_s == 0.0
