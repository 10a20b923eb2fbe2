"""runtime.planning.chains: what tiles keep and what they take between spans, against following every position."""

from collections.abc import Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.chains import Chain, Piece, find_chains, intersect, plan_chain, plan_parts, subtract, widen
from runtime.planning.problem import make_stage
from runtime.planning.tiling import Region, find_spans
from runtime.types import GraphSpec, SpatialOp, Tier, TileSpan, Window
from tests.nets import Sides, spatial_graph, spatial_graphs

SAME = (Window(3, 1, 1), Window(3, 1, 1))
HALVE = (Window(2, 2), Window(2, 2))
VGG_TOP = spatial_graph(
    (32, 32),
    [
        SpatialOp("a", ("x",), (32, 32), SAME, 900.0),
        SpatialOp("b", ("a",), (16, 16), HALVE, 10.0),
        SpatialOp("c", ("b",), (16, 16), SAME, 900.0),
    ],
)

Positions = set[tuple[int, int]]


def positions(region: Region) -> Positions:
    return {(row, col) for row in range(*region.rows) for col in range(*region.cols)}


@st.composite
def chains(draw: st.DrawFn) -> tuple[GraphSpec, Chain]:
    """A random chain of up to three spans of a random graph, every span with lines of its own."""
    graph = draw(spatial_graphs(Sides(kernel=5, stride=2, dilation=2)))
    stretches = find_spans(graph)
    assume(stretches)
    stretch = draw(st.sampled_from(stretches))
    stops = sorted(draw(st.sets(st.sampled_from(stretch.stops), min_size=1, max_size=3)))
    sizes = {value.name: value.tensor.shape[2:] for value in graph.values}
    num_rows, num_cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    spans, start = [], stretch.start
    for stop in stops:
        rows, cols = sizes[graph.layers[stop - 1].outputs[-1]]
        assume(rows >= num_rows and cols >= num_cols)
        lines = (
            tuple(sorted(draw(st.sets(st.integers(1, length - 1), min_size=num - 1, max_size=num - 1))))
            if num > 1
            else ()
            for length, num in ((rows, num_rows), (cols, num_cols))
        )
        spans.append(TileSpan(start, stop, *lines))
        start = stop
    try:
        return graph, plan_chain(graph, spans)
    except PlanError:  # a second output is too small for these lines
        assume(False)
        raise


def cover(pieces: Iterable[Piece], name: str) -> list[tuple[int, int]]:
    """Positions of one value in some pieces, as often as they are there."""
    return [each for piece in pieces if piece.name == name for each in positions(piece.region)]


@settings(max_examples=60)
@given(chains())
def test_every_tile_has_what_it_reads_and_is_given_nothing_that_it_has(case: tuple[GraphSpec, Chain]) -> None:
    _, chain = case
    made: dict[str, list[Positions]] = {}  # by value and tile: its own part
    has: list[dict[str, Positions]] = [{} for _ in range(chain.num_tiles)]
    for step in chain.steps:
        for index, tile in enumerate(step.tiling.tiles):
            for piece in step.takes[index]:
                owner = made[piece.name][piece.source] if piece.name in made else None
                assert owner is None or positions(piece.region) <= owner
                assert piece.source != index
                assert owner is not None or piece.source == 0
            for name, region in tile.inputs.items():
                taken, own = cover(step.takes[index], name), has[index].get(name, set())
                assert len(taken) == len(set(taken))
                assert not own & set(taken)
                if index or name in made:
                    assert positions(region) <= own | set(taken)
                if positions(region) >= own:
                    has[index][name] = positions(region)
        for name in step.tiling.stage.makes:
            made[name] = [positions(tile.outputs[name]) for tile in step.tiling.tiles]
            for own_parts, part in zip(has, made[name], strict=True):
                own_parts[name] = part
    for name in chain.stage.makes:
        given_back = [each for gives in chain.steps[-1].gives for each in cover(gives, name)]
        assert len(given_back) == len(set(given_back))
        assert set(given_back) == set().union(*made[name])


@settings(max_examples=60)
@given(chains())
def test_what_a_tile_takes_was_given_or_is_the_head_s_and_is_kept_until_then(case: tuple[GraphSpec, Chain]) -> None:
    graph, chain = case
    sizes = {value.name: value.tensor for value in graph.values}
    for before, after in zip(chain.steps, chain.steps[1:], strict=False):
        given_pieces = {piece for gives in before.gives for piece in gives}
        for tile, takes in enumerate(after.takes):
            assert all(piece in given_pieces or piece.source == 0 for piece in takes)
            assert after.is_early(tile) == all(piece.source == 0 for piece in takes)
        assert {name for tile in after.tiling.tiles for name in tile.inputs} <= before.keeps
    for step in chain.steps:
        assert step.keeps >= set(chain.stage.makes)
        for pieces, nbytes in [
            *zip(step.takes, step.take_bytes, strict=True),
            *zip(step.gives, step.give_bytes, strict=True),
        ]:
            per_position = (
                sizes[piece.name].nbytes / (sizes[piece.name].shape[2] * sizes[piece.name].shape[3]) for piece in pieces
            )
            assert nbytes == sum(p.region.area * each for p, each in zip(pieces, per_position, strict=True))
        labels = [piece.label for piece in step.takes[-1]]
        assert len(labels) == len(set(labels))


REGIONS = st.builds(
    lambda top, left, rows, cols: Region((top, top + rows), (left, left + cols)),
    *[st.integers(0, 6)] * 2,
    *[st.integers(1, 6)] * 2,
)


@given(REGIONS, REGIONS)
def test_rectangles_are_subtracted_and_joined_position_by_position(first: Region, second: Region) -> None:
    common = intersect(first, second)
    assert (set() if common is None else positions(common)) == positions(first) & positions(second)
    parts = [positions(part) for part in subtract(first, second)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*parts) == positions(first) - positions(second)
    assert subtract(first, None) == [first]
    kept = positions(widen(first, second))
    assert kept == (positions(second) if positions(first) <= positions(second) else positions(first))


def test_only_borders_cross_between_spans() -> None:
    chain = plan_chain(VGG_TOP, [TileSpan(0, 2, (8,), ()), TileSpan(2, 3, (8,), ())])
    first, second = chain.steps
    assert [piece.label for piece in first.takes[1]] == ["x[15:32,0:32]"]
    assert first.takes[0] == ()
    assert [[piece.label for piece in takes] for takes in second.takes] == [["b[8:9,0:16]"], ["b[7:8,0:16]"]]
    assert first.gives == second.takes[::-1]
    assert first.give_bytes == second.take_bytes == (4 * 4 * 16,) * 2
    assert [piece.label for piece in second.gives[1]] == ["c[8:16,0:16]"]
    assert second.is_early(1)
    assert (first.keeps, second.keeps) == ({"b", "c"}, {"c"})


def test_three_tiles_in_a_row_hand_borders_on_by_way_of_the_head() -> None:
    chain = plan_chain(VGG_TOP, [TileSpan(0, 2, (5, 11), ()), TileSpan(2, 3, (5, 11), ())])
    second = chain.steps[1]
    assert [[(piece.label, piece.source) for piece in takes] for takes in second.takes] == [
        [("b[5:6,0:16]", 1)],
        [("b[4:5,0:16]", 0), ("b[11:12,0:16]", 2)],
        [("b[10:11,0:16]", 1)],
    ]
    assert [piece.label for piece in chain.steps[0].gives[1]] == ["b[5:6,0:16]", "b[10:11,0:16]"]
    assert not any(second.is_early(tile) for tile in (1, 2))


def test_spans_are_put_together_that_follow_each_other_on_as_many_tiles() -> None:
    a, b = TileSpan(0, 1, (8,), ()), TileSpan(1, 2, (), (8,))
    c, d = TileSpan(2, 3, (4, 8), ()), TileSpan(4, 5, (4, 8), ())
    assert find_chains((a, b, c, d)) == ((a, b), (c,), (d,))
    assert find_chains(()) == ()
    with pytest.raises(PlanError, match="without a gap, on as many tiles, got"):
        plan_chain(VGG_TOP, [TileSpan(0, 1, (8,), ()), TileSpan(2, 3, (8,), ())])


def test_a_stage_runs_its_chains_and_what_lies_between_them_in_order() -> None:
    stage = make_stage(VGG_TOP, Tier.EDGE, (0, 1, 2))
    parts = plan_parts(VGG_TOP, stage, (TileSpan(0, 1, (16,), ()), TileSpan(2, 3, (4,), (4,))))
    assert [part.stage.layers for part in parts] == [(0,), (1,), (2,)]
    assert [None if part.chain is None else (part.first, part.chain.num_tiles) for part in parts] == [
        (0, 2),
        None,
        (1, 4),
    ]
    assert [(part.stage.needs, part.stage.makes) for part in parts] == [
        (("x",), ("a",)),
        (("a",), ("b",)),
        (("b",), ("c",)),
    ]
    assert [part.stage.layers for part in plan_parts(VGG_TOP, stage, (TileSpan(1, 2, (4,), ()),))] == [(0,), (1,), (2,)]
    assert plan_parts(VGG_TOP, stage, ())[0].stage == stage
    (part,) = plan_parts(VGG_TOP, stage, (TileSpan(0, 2, (4,), ()), TileSpan(2, 3, (4,), ())))
    assert part.chain is not None
    assert (part.stage.layers, len(part.chain.steps)) == ((0, 1, 2), 2)


@pytest.mark.parametrize("spans", [((1, 3),), ((0, 1), (0, 1)), ((2, 3), (0, 1))])
def test_spans_that_overlap_or_leave_the_stage_are_refused(spans: tuple[tuple[int, int], ...]) -> None:
    stage = make_stage(VGG_TOP, Tier.EDGE, (0, 1) if spans == ((1, 3),) else (0, 1, 2))
    with pytest.raises(PlanError, match="in ascending order, inside the layers 0 to"):
        plan_parts(VGG_TOP, stage, [TileSpan(start, stop, (4,), ()) for start, stop in spans])
