"""runtime.planning.tiling: what a tile needs, against following every position through the graph one by one."""

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.tiling import (
    Region,
    Tiling,
    find_spans,
    overlap_frac,
    plan_tiles,
    read_interval,
    scale_lines,
    tile_flops,
)
from runtime.types import GraphSpec, SpatialOp, TileSpan, Window
from tests.graphs import chain
from tests.nets import ANY, Sides, follow, spatial_graph, spatial_graphs, tile_spans

SAME = Window(3, 1, 1)
HALVE = Window(2, 2)
VGG_TOP = spatial_graph(
    (32, 32),
    [
        SpatialOp("a", ("x",), (32, 32), (SAME, SAME), 900.0),
        SpatialOp("b", ("a",), (16, 16), (HALVE, HALVE), 10.0),
        SpatialOp("c", ("b",), (16, 16), (SAME, SAME), 900.0),
    ],
)


@st.composite
def tilings(draw: st.DrawFn, sides: Sides = ANY) -> tuple[GraphSpec, Tiling]:
    graph = draw(spatial_graphs(sides))
    stretches = find_spans(graph)
    assume(stretches)
    span = draw(tile_spans(graph, draw(st.sampled_from(stretches))))
    try:
        return graph, plan_tiles(graph, span)
    except PlanError:
        assume(False)  # a second output is too small for these lines
        raise


@settings(max_examples=25)
@given(tilings())
def test_a_tile_reads_every_position_that_it_depends_on(case: tuple[GraphSpec, Tiling]) -> None:
    graph, tiling = case
    for index, tile in enumerate(tiling.tiles):
        made = {**{name: op.makes for name, op in tile.ops.items()}, **tile.inputs}
        for axis in (0, 1):
            for name, positions in follow(graph, tiling, index, axis).items():
                assert positions <= set(range(*(made[name].rows, made[name].cols)[axis]))


@settings(max_examples=25)
@given(tilings(Sides(stride=2, dilation=1)))
def test_without_gaps_in_the_windows_a_tile_reads_nothing_else_at_its_ends(case: tuple[GraphSpec, Tiling]) -> None:
    graph, tiling = case
    for index, tile in enumerate(tiling.tiles):
        made = {**{name: op.makes for name, op in tile.ops.items()}, **tile.inputs}
        for axis in (0, 1):
            for name, positions in follow(graph, tiling, index, axis).items():
                assert (min(positions), max(positions) + 1) == (made[name].rows, made[name].cols)[axis]


@settings(max_examples=25)
@given(tilings())
def test_the_tiles_make_every_position_of_every_output_once(case: tuple[GraphSpec, Tiling]) -> None:
    graph, tiling = case
    shapes = {value.name: value.tensor.shape for value in graph.values}
    for name in tiling.stage.makes:
        regions = [tile.outputs[name] for tile in tiling.tiles]
        positions = [p for region in regions for p in product(range(*region.rows), range(*region.cols))]
        assert sorted(positions) == list(product(range(shapes[name][2]), range(shapes[name][3])))


@settings(max_examples=25)
@given(tilings())
def test_the_padded_region_is_what_the_windows_cover(case: tuple[GraphSpec, Tiling]) -> None:
    graph, tiling = case
    ops = {op.name: op for layer in graph.layers for op in layer.spatial}
    for tile in tiling.tiles:
        for name, share in tile.ops.items():
            for axis in (0, 1):
                window, made = ops[name].windows[axis], share.makes.size[axis]
                covered = (made - 1) * window.stride + window.extent
                assert all(
                    read.size[axis] + sum(share.pads[2 * axis : 2 * axis + 2]) == covered for read in share.reads
                )
                assert min(share.pads) >= 0
                assert all(min(read.size) >= 1 for read in share.reads)


def test_padding_is_added_at_true_borders_only() -> None:
    assert read_interval(SAME, (0, 4), 8) == ((0, 5), (1, 0))
    assert read_interval(SAME, (4, 8), 8) == ((3, 8), (0, 1))
    assert read_interval(Window(3, 2, 1), (2, 3), 8) == ((3, 6), (0, 0))
    assert read_interval(Window(3, 2), (3, 4), 8) == ((6, 8), (0, 1))  # ceil mode: the last window hangs over


def test_overlapping_pools_read_more_than_their_stride() -> None:
    # DeepThings' rule would read [0, 4): two rows too few.
    assert read_interval(Window(3, 2), (0, 2), 9)[0] == (0, 5)


def test_two_rows_of_tiles_share_the_halo_alone() -> None:
    tiling = plan_tiles(VGG_TOP, TileSpan(0, 3, (8,), ()))
    assert [tile.inputs["x"].rows for tile in tiling.tiles] == [(0, 19), (13, 32)]
    assert [tile.outputs["c"].rows for tile in tiling.tiles] == [(0, 8), (8, 16)]
    assert tile_flops(VGG_TOP, tiling) == pytest.approx(
        (900 * 18 / 32 + 10 * 9 / 16 + 450, 900 * 18 / 32 + 10 * 9 / 16 + 450)
    )
    assert overlap_frac(VGG_TOP, tiling) == pytest.approx((900 * 4 / 32 + 10 * 2 / 16) / 1810)


@settings(max_examples=25)
@given(tilings(Sides(kernel=5, stride=1, dilation=1)))
def test_redundant_work_is_the_least_that_the_grid_allows(case: tuple[GraphSpec, Tiling]) -> None:
    graph, tiling = case
    ops = [op for layer in graph.layers[tiling.span.start : tiling.span.stop] for op in layer.spatial]
    least = 0.0
    for index in range(len(tiling.tiles)):
        rows, cols = (follow(graph, tiling, index, axis) for axis in (0, 1))
        least += sum(op.flops * len(rows[op.name]) * len(cols[op.name]) / (op.size[0] * op.size[1]) for op in ops)
    assert sum(tile_flops(graph, tiling)) <= 1.05 * least


@given(st.integers(2, 60), st.integers(2, 60), st.data())
def test_lines_are_carried_to_other_sizes_in_order(length: int, to_length: int, data: st.DataObject) -> None:
    lines = sorted(data.draw(st.sets(st.integers(1, length - 1))))
    scaled = scale_lines(lines, length, to_length)
    assert list(scaled) == sorted(scaled)
    assert all(abs(b / to_length - a / length) <= 0.5 / to_length + 1e-9 for a, b in zip(lines, scaled, strict=True))


def test_a_layer_that_is_not_local_ends_a_span() -> None:
    graph = chain(3)
    assert find_spans(graph) == ()
    with pytest.raises(PlanError, match=r"layers 0 to 2 are not a tileable span of this model \(tileable: none"):
        plan_tiles(graph, TileSpan(0, 2, (1,), ()))


def test_a_span_cannot_stop_where_a_map_of_one_row_crosses() -> None:
    column = SpatialOp("v", ("x",), (1, 8), (Window(8), Window()))
    joined = SpatialOp("w", ("x", "v"), (8, 8))
    graph = spatial_graph((8, 8), [column, joined])
    assert [span.stops for span in find_spans(graph)] == [(2,)]
    tiling = plan_tiles(graph, TileSpan(0, 2, (4,), ()))
    assert [tile.ops["v"].makes for tile in tiling.tiles] == [Region((0, 1), (0, 8))] * 2
    with pytest.raises(PlanError, match="layers 0 to 1 are not a tileable span"):
        plan_tiles(graph, TileSpan(0, 1, (), (4,)))


@pytest.mark.parametrize("lines", [(0,), (16,), (9, 9), (9, 4), (-1,), (40,)])
def test_lines_that_do_not_cut_the_output_are_refused(lines: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="ascending lines that cut the 16 rows of c"):
        plan_tiles(VGG_TOP, TileSpan(0, 3, lines, ()))
