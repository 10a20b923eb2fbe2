"""runtime.model.tiles: a span run tile by tile gives what it gives whole, from the slices alone."""

import re
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from runtime.errors import PlanError, TensorMismatch
from runtime.model import tiles as tiles_module
from runtime.model.graph import LayerGraph, trace
from runtime.model.halo import TileState, assemble, run_tiled
from runtime.model.inputs import admit
from runtime.model.segment import Segment
from runtime.model.tiles import CACHED_PLANS, TileCache, TileSegment, slice_inputs
from runtime.model.zoo import Model, load_model
from runtime.planning.chains import plan_chain
from runtime.planning.tiling import Region, Tiling, find_sizes, find_spans, plan_tiles
from runtime.types import TileSpan
from tests.nets import RandomNet, Step, steps, tile_spans
from tests.splitting import all_values, cross, dim_order, same_bits

DOUBLE_TOLERANCE = 1e-9
"""Largest difference allowed in double precision, relative to the largest value of the tensor."""


FLOAT_TOLERANCE = 1e-4
"""The same in single precision, where tiles take convolutions with weights laid out beforehand."""

CHAIN_TOLERANCE = 1e-3
"""The same behind several spans: numbers of random nets grow from layer to layer, and what cancels does not."""


def make_graph(
    module: nn.Module, example: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[LayerGraph, dict[str, torch.Tensor]]:
    """A traced module in one precision, and the bits of all its values."""
    module, example = module.to(dtype).eval(), example.to(dtype)
    graph = trace(Model("random", module, example, None, example.shape[0], "factory"))
    return graph, all_values(graph, admit(graph.spec, example))


def assert_close(made: torch.Tensor, expected: torch.Tensor, tolerance: float = DOUBLE_TOLERANCE) -> None:
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    assert float((made - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def run_whole(graph: LayerGraph, tiling: Tiling, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return Segment(graph, tiling.stage).run({name: values[name] for name in tiling.stage.needs})


def try_tiling(graph: LayerGraph, span: TileSpan) -> Tiling | None:
    try:
        return plan_tiles(graph.spec, span)
    except PlanError:  # a second output is too small for these lines
        return None


def check_tiles(graph: LayerGraph, values: Mapping[str, torch.Tensor], span: TileSpan) -> None:
    for name, made in run_tiled(graph, [span], values).items():
        tolerance = DOUBLE_TOLERANCE if values[name].dtype == torch.float64 else FLOAT_TOLERANCE
        assert_close(made, values[name], tolerance)


def check_dependence(
    graph: LayerGraph, values: Mapping[str, torch.Tensor], tiling: Tiling, index: int, *, has_gaps: bool
) -> None:
    """A tile's output depends on nothing outside its input regions, and on their outermost rows and columns."""
    tile = tiling.tiles[index]
    hidden = {name: torch.full_like(values[name], torch.nan) for name in tile.inputs}
    for name, region in tile.inputs.items():
        cut(hidden[name], region).copy_(cut(values[name], region))
    for name, made in run_whole(graph, tiling, hidden).items():
        assert_close(cut(made, tile.outputs[name]), cut(values[name], tile.outputs[name]))
    if has_gaps:
        return
    for name, region in tile.inputs.items():
        for edge in (region.rows[0], region.rows[1] - 1):
            broken = {other: values[other].clone() for other in tile.inputs}
            broken[name][:, :, edge, slice(*region.cols)] = torch.nan
            made_broken = run_whole(graph, tiling, broken)
            assert any(made[:, :, slice(*tile.outputs[x].rows), :].isnan().any() for x, made in made_broken.items())


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[:, :, slice(*region.rows), slice(*region.cols)]


def check_chain(graph: LayerGraph, values: Mapping[str, torch.Tensor], spans: list[TileSpan]) -> None:
    try:
        made = run_tiled(graph, spans, values)
    except PlanError:  # a second output is too small for these lines
        return
    assert list(made) == list(plan_chain(graph.spec, spans).stage.makes)
    for name, tensor in made.items():
        assert_close(tensor, values[name], DOUBLE_TOLERANCE if tensor.dtype == torch.float64 else CHAIN_TOLERANCE)


def check_random_chain(graph: LayerGraph, values: Mapping[str, torch.Tensor], data: st.DataObject) -> None:
    """Spans that follow each other from the start of a stretch, on as many tiles, each with its own lines."""
    stretch = data.draw(st.sampled_from(find_spans(graph.spec)))
    sizes = find_sizes(graph.spec, (op for layer in graph.spec.layers for op in layer.spatial))
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    spans, start = [], stretch.start
    for stop in sorted(data.draw(st.sets(st.sampled_from(stretch.stops), min_size=1, max_size=4))):
        size = sizes[graph.spec.layers[stop - 1].outputs[-1]]
        if any(length < num for length, num in zip(size, grid, strict=True)):
            break  # too small for so many tiles
        lines = [
            sorted(data.draw(st.sets(st.integers(1, length - 1), min_size=num - 1, max_size=num - 1)))
            if num > 1
            else []
            for length, num in zip(size, grid, strict=True)
        ]
        spans.append(TileSpan(start, stop, tuple(lines[0]), tuple(lines[1])))
        start = stop
    if spans:
        check_chain(graph, values, spans)


SLOW = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]}


def check_random_net_in_single_precision(plan: list[Step], size: tuple[int, int], data: st.DataObject) -> None:
    """Its numbers grow from layer to layer, so spans start from the true values of the layer before."""
    graph, values = make_graph(RandomNet(plan, size), torch.randn(2, 3, *size), torch.float32)
    stretches = find_spans(graph.spec)
    assume(stretches)
    for _ in range(8):
        span = data.draw(tile_spans(graph.spec, data.draw(st.sampled_from(stretches))))
        if try_tiling(graph, span) is not None:
            check_tiles(graph, values, span)
        check_random_chain(graph, values, data)


def check_random_net(plan: list[Step], size: tuple[int, int], data: st.DataObject, *, spans: int) -> None:
    graph, values = make_graph(RandomNet(plan, size), torch.randn(2, 3, *size))
    stretches = find_spans(graph.spec)
    assume(stretches)
    has_gaps = any(kind in ("conv", "max", "same") and numbers[7] > 1 for kind, numbers in plan)
    for _ in range(spans):
        span = data.draw(tile_spans(graph.spec, data.draw(st.sampled_from(stretches))))
        tiling = try_tiling(graph, span)
        if tiling is not None:
            check_tiles(graph, values, span)
            index = data.draw(st.integers(0, len(tiling.tiles) - 1))
            check_dependence(graph, values, tiling, index, has_gaps=has_gaps)
        check_random_chain(graph, values, data)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=6, derandomize=True, **SLOW)
@given(steps(), st.tuples(st.integers(14, 30), st.integers(14, 30)), st.data())
def test_random_nets_give_the_same_tiled_as_whole(plan: list[Step], size: tuple[int, int], data: st.DataObject) -> None:
    check_random_net(plan, size, data, spans=4)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=3, derandomize=True, **SLOW)
@given(steps(), st.tuples(st.integers(14, 30), st.integers(14, 30)), st.data())
def test_random_nets_with_weights_laid_out_beforehand_give_the_same(
    plan: list[Step], size: tuple[int, int], data: st.DataObject
) -> None:
    check_random_net_in_single_precision(plan, size, data)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=200, **SLOW)
@given(steps(), st.tuples(st.integers(14, 30), st.integers(14, 30)), st.data())
def test_many_random_nets_in_single_precision_give_the_same_tiled_as_whole(
    plan: list[Step], size: tuple[int, int], data: st.DataObject
) -> None:
    check_random_net_in_single_precision(plan, size, data)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=200, **SLOW)
@given(steps(), st.tuples(st.integers(14, 30), st.integers(14, 30)), st.data())
def test_many_random_nets_give_the_same_tiled_as_whole(
    plan: list[Step], size: tuple[int, int], data: st.DataObject
) -> None:
    check_random_net(plan, size, data, spans=8)


class Pools(nn.Module):
    """Every way to count what an average divides by, and windows that hang over the edge."""

    def __init__(self, *, count_include_pad: bool, ceil_mode: bool, divisor: int | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, (1, 7), padding=(0, 3))
        self.mean = nn.AvgPool2d(3, 2, 1, ceil_mode, count_include_pad, divisor)
        self.largest = nn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=ceil_mode)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) - 5.0  # all negative: a maximum over zeros of padding would show
        return self.head(self.largest(self.mean(x)).mean((2, 3)))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("divisor", [None, 7])
def test_pools_keep_their_count_rule_and_ceil_mode(
    count_include_pad: bool, ceil_mode: bool, divisor: int | None
) -> None:
    module = Pools(count_include_pad=count_include_pad, ceil_mode=ceil_mode, divisor=divisor)
    graph, values = make_graph(module, torch.randn(1, 3, 22, 24))
    (stretch,) = find_spans(graph.spec)
    assert (stretch.start, stretch.stop) == (0, 3)
    for span in (TileSpan(0, 3, (2, 4), (1,)), TileSpan(0, 2, (1, 2, 10), (11,)), TileSpan(1, 3, (5,), (5,))):
        check_tiles(graph, values, span)


class Mixed(nn.Module):
    """Forks, in-place joins and a cut in two: two values cross most places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, 5, padding=2, groups=4)
        self.tall = nn.Conv2d(8, 8, (7, 1), padding=(3, 0))
        self.down = nn.Conv2d(8, 8, 1, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.act = nn.PReLU(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        y = self.tall(self.wide(x))
        y += x
        torch.relu_(y)
        low, high = y.chunk(2, 1)
        y = torch.cat([high, self.act(y), low], 1)[:, ::2]
        z = self.pool(y) + self.down(x)
        z = z * torch.sigmoid(self.squeeze(z.mean((2, 3), keepdim=True)))
        return self.head(nn.functional.interpolate(z, scale_factor=2.0).amax((2, 3)))


@cache
def mixed(memory_format: torch.memory_format = torch.contiguous_format) -> tuple[LayerGraph, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = Mixed().to(memory_format=memory_format)  # type: ignore[call-overload]
    return make_graph(module, torch.randn(1, 3, 40, 36))


def middle_spans() -> list[TileSpan]:
    graph, _ = mixed()
    return [
        TileSpan(start, stop, lines, (3,))
        for stretch in find_spans(graph.spec)
        for start in stretch.starts
        for stop in stretch.stops
        if start < stop
        for lines in ((), (2, 7))
    ]


def test_the_gate_and_what_follows_it_are_tileable_but_not_the_mean_it_comes_from() -> None:
    graph, _ = mixed()
    names = [layer.name for layer in graph.spec.layers]
    inside = [[names[i] for i in range(stretch.start, stretch.stop)] for stretch in find_spans(graph.spec)]
    assert {"stem", "wide", "tall", "pool", "down"} <= set(inside[0])
    assert any("squeeze" in part for part in inside[1:])
    assert not any("mean" in name or "head" in name or "upsample" in name for part in inside for name in part)


@pytest.mark.parametrize("span", middle_spans(), ids=lambda s: f"{s.start}-{s.stop}-{len(s.row_lines)}")
def test_every_span_between_forks_and_joins_is_exact(span: TileSpan) -> None:
    graph, values = mixed()
    check_tiles(graph, values, span)
    tiling = plan_tiles(graph.spec, span)
    check_dependence(graph, values, tiling, len(tiling.tiles) // 2, has_gaps=False)


def test_a_tile_needs_only_its_slices_as_the_wire_delivers_them_and_changes_none() -> None:
    graph, values = mixed()
    span = TileSpan(0, find_spans(graph.spec)[0].stop, (4,), (4,))
    tiling, chain = plan_tiles(graph.spec, span), plan_chain(graph.spec, [span])
    parts = []
    for index, tile in enumerate(tiling.tiles):
        given = {name: cross(x, 16 * index) for name, x in slice_inputs(values, tile.inputs).items()}
        assert {name: tuple(x.shape[2:]) for name, x in given.items()} == {
            name: region.size for name, region in tile.inputs.items()
        }
        before = {name: x.clone() for name, x in given.items()}
        made = TileSegment(graph, tiling, index).run(given)
        parts.append({piece.label: cross(made[piece.name]) for piece in chain.steps[0].gives[index]})
        assert all(same_bits(given[name], x) for name, x in before.items())
    for name, whole in assemble(graph, chain, parts).items():
        assert_close(whole, values[name])


def test_slicing_copies_nothing_and_the_whole_value_stays_as_it_was() -> None:
    graph, values = mixed()
    tiling = plan_tiles(graph.spec, TileSpan(0, find_spans(graph.spec)[0].stop, (4,), ()))
    (name,) = tiling.stage.needs
    before = values[name].clone()
    sliced = slice_inputs(values, tiling.tiles[0].inputs)
    assert sliced[name].untyped_storage().data_ptr() == values[name].untyped_storage().data_ptr()
    TileSegment(graph, tiling, 0).run(sliced)
    assert same_bits(values[name], before)


def test_in_single_precision_tiles_lie_with_channels_innermost_and_so_does_what_is_put_together() -> None:
    torch.manual_seed(0)
    graph, values = make_graph(Mixed(), torch.randn(1, 3, 40, 36), torch.float32)
    for stop in find_spans(graph.spec)[0].stops:
        span = TileSpan(0, stop, (3,), ())
        check_tiles(graph, values, span)
        for tensor in run_tiled(graph, [span], values).values():
            assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_is_put_together_has_the_memory_order_of_the_whole_model(memory_format: torch.memory_format) -> None:
    graph, values = mixed(memory_format)
    stretch = find_spans(graph.spec)[0]
    for stop in stretch.stops:
        made = run_tiled(graph, [TileSpan(0, stop, (3,), ())], values)
        for name, tensor in made.items():
            assert dim_order(tensor) == dim_order(values[name])
            assert_close(tensor, values[name])


def test_a_tile_is_timed_layer_by_layer() -> None:
    graph, values = mixed()
    tiling = plan_tiles(graph.spec, TileSpan(0, 2, (4,), ()))
    layer_s = [0.0] * graph.num_layers
    tile = TileSegment(graph, tiling, 1)
    tile.run(slice_inputs(values, tiling.tiles[1].inputs), layer_s=layer_s)
    assert [seconds > 0.0 for seconds in layer_s] == [True, True, *[False] * (graph.num_layers - 2)]
    assert tile.first_run_s is not None


def test_parts_that_do_not_fit_are_refused() -> None:
    graph, values = mixed()
    tiling = plan_tiles(graph.spec, TileSpan(0, 2, (4,), ()))
    chain = plan_chain(graph.spec, [tiling.span])
    (step,) = chain.steps
    given = {name: values[name] for name in chain.stage.needs}
    states = [TileState(graph, tile, given if tile == 0 else None) for tile in (0, 1)]
    sent = states[0].give(step.takes[1])
    with pytest.raises(TensorMismatch, match=r"expected x\[.* of tile 0 as .*, got nothing"):
        states[1].take(step, {})
    for state in states:
        state.keep(step, TileSegment(graph, tiling, state.tile).run(state.take(step, sent)))
    parts = [state.give(step.gives[state.tile]) for state in states]
    label = step.gives[1][0].label
    with pytest.raises(TensorMismatch, match="expected the outputs of 2 tiles, got 1"):
        assemble(graph, chain, parts[:1])
    with pytest.raises(TensorMismatch, match=rf"expected {re.escape(label)} of tile 1 as .*, got nothing"):
        assemble(graph, chain, [parts[0], {}])
    with pytest.raises(TensorMismatch, match=r"of tile 0 .* got torch.float32"):
        assemble(graph, chain, [{x: y.float() for x, y in parts[0].items()}, parts[1]])
    with pytest.raises(TensorMismatch, match="sender and receiver do not run the same graph"):
        TileSegment(graph, tiling, 0).run(slice_inputs(values, tiling.tiles[1].inputs) | {})
    with pytest.raises(TensorMismatch, match="no x"):
        run_tiled(graph, [tiling.span], {})


def test_tiles_are_built_once_and_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "CACHED_TILES", 8)
    graph, _ = mixed()
    tiles = TileCache(graph)
    span = TileSpan(0, 2, (4,), ())
    first = tiles.get(span, 0)
    assert tiles.get(span, 0) is first
    assert tiles.tiling(span) is tiles.tiling(span)
    for line in range(1, 6):
        tiles.get(TileSpan(0, 1, (line,), ()), 0)
        tiles.get(TileSpan(0, 1, (line,), ()), 1)
    assert tiles.get(span, 0) is not first
    with pytest.raises(PlanError, match="not a tileable span"):
        tiles.get(TileSpan(0, graph.num_layers, (4,), ()), 0)


def test_tiles_of_a_few_plans_are_kept_however_many_spans_each_has() -> None:
    model = load_model("tests.models:chain")
    graph, _ = make_graph(model.module, model.example)
    stretch = find_spans(graph.spec)[0]
    layers = range(stretch.start, stretch.stop)
    cut = [layer for layer in layers if sum(op.weight_bytes for op in graph.spec.layers[layer].spatial) > 0]
    tiles = TileCache(graph)

    def use(line: int) -> list[TileSegment]:
        return [tiles.get(TileSpan(layer, layer + 1, (line,), ()), 0) for layer in cut if layer + 1 in stretch.stops]

    plans = [use(line) for line in range(1, 1 + CACHED_PLANS)]
    assert len(plans[0]) > 1
    assert all(use(1 + at) == plan for at, plan in enumerate(plans))  # every one still there
    for line in range(1 + CACHED_PLANS, 2 + 2 * CACHED_PLANS):
        use(line)
    assert not set(use(1)) & set(plans[0])


@pytest.mark.parametrize("name", ["chain", "residual", "branching", "views", "reordered"])
def test_the_nets_with_the_shapes_of_trouble_are_exact_too(name: str) -> None:
    model = load_model(f"tests.models:{name}")
    graph, values = make_graph(model.module, model.example)
    stretches = find_spans(graph.spec)
    assert stretches
    for stretch in stretches:
        for stop in stretch.stops:
            check_tiles(graph, values, TileSpan(stretch.start, stop, (3,), (2, 5)))


class Functional(nn.Module):
    """Written in place through a view: traced in torch's functional form, with other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.norm(self.stem(x)))
        y = x.mean((2, 3))
        y[:, :2].mul_(2.0)
        return self.head(y)


def test_the_functional_form_is_tileable() -> None:
    graph, values = make_graph(Functional(), torch.randn(1, 3, 16, 16))
    (stretch,) = find_spans(graph.spec)
    check_tiles(graph, values, TileSpan(stretch.start, stretch.stop, (5,), (9,)))


def chain_of(graph: LayerGraph) -> list[TileSpan]:
    """All stops of the first stretch, one span each, three rows of two tiles where the map has room."""
    stretch, sizes = find_spans(graph.spec)[0], {value.name: value.tensor.shape for value in graph.spec.values}
    spans, start = [], stretch.start
    for stop in stretch.stops:
        rows, cols = sizes[graph.spec.layers[stop - 1].outputs[-1]][2:]
        spans.append(TileSpan(start, stop, (rows // 3, 2 * rows // 3), (cols // 2 + stop % 2,)))
        start = stop
    return spans


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_borders_alone_are_enough_from_span_to_span(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    graph, values = make_graph(Mixed(), torch.randn(1, 3, 40, 36), dtype)
    spans = chain_of(graph)
    assert len(spans) > 3
    check_chain(graph, values, spans)
    outside = {name: value for name, value in values.items() if name in plan_chain(graph.spec, spans).stage.needs}
    before = {name: value.clone() for name, value in outside.items()}
    check_chain(graph, {**values, **outside}, spans)
    assert all(same_bits(outside[name], value) for name, value in before.items())


def test_a_tile_keeps_what_is_still_needed_and_nothing_else() -> None:
    graph, values = mixed()
    chain = plan_chain(graph.spec, chain_of(graph)[:3])
    state = TileState(graph, 0, {name: values[name] for name in chain.stage.needs})
    others = {piece.label: cut(values[piece.name], piece.region) for step in chain.steps for piece in step.takes[0]}
    for step in chain.steps:
        inputs = state.take(step, others)
        state.keep(step, TileSegment(graph, step.tiling, 0).run(inputs))
        assert set(state.names) <= step.keeps
        for name, made in state.give(step.gives[0]).items():
            piece = next(piece for piece in step.gives[0] if piece.label == name)
            assert_close(made, cut(values[piece.name], piece.region))
    assert set(state.names) == set(chain.stage.makes)
