"""Which region of every map each tile of a span needs: integers only.

Papers: D3 (VSM) and DeepThings (FTP) cut the last map of some fused layers into a grid and walk backwards to what each
tile reads. As reconstructed; the walk here is the general one (reference: any kernel, stride, padding, dilation, ceil
mode). Differs: regions are joined where the graph forks and cropped where it joins again, several maps may cross the
span's end, and padding is added only at the true borders of a map. DeepThings' own rule (half a kernel around a pooled
position) reads too little for overlapping pools and asymmetric kernels.

Rows and columns never mix: every rule here is about one axis, and a region is what the rows and the columns say.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from runtime.errors import PlanError
from runtime.planning.problem import ById, Stage, make_stage
from runtime.types import GraphSpec, SpatialOp, Tier, TileSpan, ValueSpec, Window

Interval = tuple[int, int]
"""Half-open range of rows or columns."""


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a map."""

    rows: Interval
    cols: Interval

    @property
    def size(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return (self.rows[1] - self.rows[0], self.cols[1] - self.cols[0])

    @property
    def area(self) -> int:
        """Number of positions."""
        return self.size[0] * self.size[1]

    def within(self, outer: "Region") -> "Region":
        """The same rectangle, counted from the start of another one that holds it."""
        top, left = outer.rows[0], outer.cols[0]
        rows, cols = self.rows, self.cols
        return Region((rows[0] - top, rows[1] - top), (cols[0] - left, cols[1] - left))


@dataclass(frozen=True, slots=True)
class OpTile:
    """One operation's share of a tile."""

    makes: Region
    reads: tuple[Region, ...]  # one per entry of `SpatialOp.reads`
    pads: tuple[int, int, int, int]  # positions of padding before and after the rows, before and after the columns


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of a span: what it is given, what each operation makes, what it hands on."""

    inputs: Mapping[str, Region]
    ops: Mapping[str, OpTile]
    outputs: Mapping[str, Region]  # of all tiles together: every position of every output once


@dataclass(frozen=True, slots=True)
class Tiling:
    """A span cut into tiles, row by row. `stage` is what the span needs and makes as a whole."""

    span: TileSpan
    stage: Stage
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class TileableSpan:
    """The longest tileable stretch of layers around a place, and where it may be cut shorter.

    A span may start at any of `starts` and stop at any of `stops` inside it.
    """

    start: int
    stop: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]


# --- one axis -----------------------------------------------------------------------------------------------------------


def read_interval(window: Window, made: Interval, length: int) -> tuple[Interval, Interval]:
    """Find what a window reads for some of its results.

    Args:
        window: along this axis.
        made: half-open range of results, not empty.
        length: positions of the input.

    Returns:
        The half-open range of the input, and the positions of padding before and after it.
    """
    low = made[0] * window.stride - window.padding
    high = (made[1] - 1) * window.stride - window.padding + window.extent
    return (max(low, 0), min(high, length)), (max(-low, 0), max(high - length, 0))


def hull(first: Interval | None, second: Interval) -> Interval:
    """The shortest range that holds both."""
    return second if first is None else (min(first[0], second[0]), max(first[1], second[1]))


def scale_lines(lines: Sequence[int], length: int, to_length: int) -> tuple[int, ...]:
    """Carry cut positions from a map of one length over to one of another, rounded half up."""
    return tuple((2 * line * to_length + length) // (2 * length) for line in lines)


def cut_axis(lines: Sequence[int], length: int) -> tuple[Interval, ...]:
    """The ranges between cut positions."""
    return tuple(pairwise((0, *lines, length)))


@dataclass(frozen=True, slots=True)
class _Band:
    """One row or column of tiles: ranges of what is made and read, of one axis."""

    makes: Mapping[str, Interval]
    reads: Mapping[str, tuple[Interval, ...]]
    pads: Mapping[str, Interval]
    inputs: Mapping[str, Interval]
    outputs: Mapping[str, Interval]


def _walk_back(ops: Sequence[SpatialOp], lengths: Mapping[str, int], ends: Mapping[str, Interval], axis: int) -> _Band:
    """Walk from a band of the outputs back to the inputs."""
    need: dict[str, Interval] = dict(ends)
    makes: dict[str, Interval] = {}
    reads: dict[str, tuple[Interval, ...]] = {}
    pads: dict[str, Interval] = {}
    for op in reversed(ops):
        made = makes[op.name] = need.pop(op.name)
        wanted = []
        for name in op.reads:
            is_broadcast = lengths[name] == 1 and op.windows[axis] == Window()
            whole = ((0, 1), (0, 0))
            interval, pads[op.name] = whole if is_broadcast else read_interval(op.windows[axis], made, lengths[name])
            wanted.append(interval)
            need[name] = hull(need.get(name), interval)
        reads[op.name] = tuple(wanted)
    return _Band(makes, reads, pads, need, ends)


# --- a span -------------------------------------------------------------------------------------------------------------


def plan_tiles(graph: GraphSpec, span: TileSpan) -> Tiling:
    """Work out the regions of every tile of a span.

    `row_lines` and `col_lines` cut the last value that the span's last layer hands on; other values that cross the
    span's end are cut at the same fractions of their size.

    Args:
        graph: the model.
        span: layers and grid.

    Returns:
        The tiles, row by row; `tiles[t]` runs on `Plan.edge_nodes[t]`.

    Raises:
        PlanError: when the span is not tileable in this graph, or the lines do not cut every output.
    """
    return _plan_tiles(ById(graph), span)


@lru_cache(maxsize=1024)
def _plan_tiles(by_id: ById, span: TileSpan) -> Tiling:
    graph = by_id.spec
    check_span(graph, span.start, span.stop)
    stage = make_stage(graph, Tier.EDGE, range(span.start, span.stop))
    ops = tuple(op for layer in graph.layers[span.start : span.stop] for op in layer.spatial)
    sizes = find_sizes(graph, ops)
    row_bands, col_bands = (_find_bands(graph, span, stage, ops, sizes, axis) for axis in (0, 1))
    tiles = tuple(_join(ops, stage, rows, cols) for rows in row_bands for cols in col_bands)
    return Tiling(span, stage, tiles)


def _find_bands(
    graph: GraphSpec,
    span: TileSpan,
    stage: Stage,
    ops: Sequence[SpatialOp],
    sizes: Mapping[str, tuple[int, int]],
    axis: int,
) -> list[_Band]:
    lines = (span.row_lines, span.col_lines)[axis]
    lengths = {name: size[axis] for name, size in sizes.items()}
    reference = lengths[graph.layers[span.stop - 1].outputs[-1]]
    cuts = {name: cut_axis(scale_lines(lines, reference, lengths[name]), lengths[name]) for name in stage.makes}
    for name, intervals in cuts.items():
        if any(low >= high for low, high in intervals):
            raise PlanError(
                f"expected ascending lines that cut the {lengths[name]} {('rows', 'columns')[axis]} of {name} into "
                f"{len(lines) + 1} parts, got {lines} of {reference}; use fewer lines or end the span earlier"
            )
    bands = range(len(lines) + 1)
    return [_walk_back(ops, lengths, {name: cuts[name][band] for name in stage.makes}, axis) for band in bands]


def _join(ops: Iterable[SpatialOp], stage: Stage, rows: _Band, cols: _Band) -> Tile:
    """Make a tile of a band of rows and a band of columns."""
    made = {}
    for op in ops:
        pairs = zip(rows.reads[op.name], cols.reads[op.name], strict=True)
        region = Region(rows.makes[op.name], cols.makes[op.name])
        made[op.name] = OpTile(region, tuple(Region(*x) for x in pairs), (*rows.pads[op.name], *cols.pads[op.name]))
    inputs = {name: Region(rows.inputs[name], cols.inputs[name]) for name in stage.needs}
    outputs = {name: Region(rows.outputs[name], cols.outputs[name]) for name in stage.makes}
    return Tile(inputs, made, outputs)


def find_sizes(graph: GraphSpec, ops: Iterable[SpatialOp]) -> dict[str, tuple[int, int]]:
    """Rows and columns of every map that some operations read or make."""
    sizes = {}
    tensors = {value.name: value.tensor for value in graph.values}
    for op in ops:
        for name in op.reads:
            if name not in sizes:
                _, _, rows, cols = tensors[name].shape
                sizes[name] = (rows, cols)
        sizes[op.name] = op.size
    return sizes


# --- which spans there are ----------------------------------------------------------------------------------------------


def find_spans(graph: GraphSpec) -> tuple[TileableSpan, ...]:
    """Find the longest tileable stretches of a graph and the places inside them where a span may start and stop.

    A stretch ends before any layer that is not made region by region. A span may stop wherever each value that crosses
    there and was made in the stretch has at least two rows and two columns; several values may cross.
    """
    return _find_spans(ById(graph))


@lru_cache(maxsize=64)
def _find_spans(by_id: ById) -> tuple[TileableSpan, ...]:
    graph = by_id.spec
    spans = []
    start = 0
    for index in range(graph.num_layers + 1):
        if index < graph.num_layers and graph.layers[index].spatial:
            continue
        if index > start:
            stops = _find_stops(graph, start, index)
            if stops:
                spans.append(TileableSpan(start, stops[-1], tuple(range(start, stops[-1])), stops))
        start = index + 1
    return tuple(spans)


def crossing(graph: GraphSpec, start: int, stop: int) -> list[ValueSpec]:
    """Values made by the layers `[start, stop)` that are read after them or are outputs of the model."""
    return [
        value
        for value in graph.values
        if start <= value.producer < stop and (value.is_output or any(c >= stop for c in value.consumers))
    ]


def _find_stops(graph: GraphSpec, start: int, end: int) -> tuple[int, ...]:
    """Places in the stretch `[start, end)` where every value that crosses can be cut."""
    barred: set[int] = set()
    for value in graph.values:
        if start <= value.producer < end and min(value.tensor.shape[2:]) < 2:
            last = end if value.is_output else max(value.consumers)
            barred.update(range(value.producer + 1, min(last, end) + 1))
    return tuple(stop for stop in range(start + 1, end + 1) if stop not in barred)


def check_span(graph: GraphSpec, start: int, stop: int) -> None:
    """Check that layers `[start, stop)` are tileable.

    Raises:
        PlanError: naming what is tileable.
    """
    spans = find_spans(graph)
    if any(span.start <= start < stop and stop in span.stops for span in spans):
        return
    known = ", ".join(f"[{span.start}, {span.stop})" for span in spans) or "none"
    raise PlanError(
        f"layers {start} to {stop} are not a tileable span of this model (tileable: {known}, and what "
        "find_spans(graph) lists inside them); use a plan without tiles or a span inside one of these"
    )


# --- what a tiling costs ------------------------------------------------------------------------------------------------


def tile_flops(graph: GraphSpec, tiling: Tiling) -> tuple[float, ...]:
    """FLOPs of every tile, what its neighbours compute too included."""
    ops = [op for layer in graph.layers[tiling.span.start : tiling.span.stop] for op in layer.spatial]
    return tuple(
        sum(op.flops * tile.ops[op.name].makes.area / (op.size[0] * op.size[1]) for op in ops) for tile in tiling.tiles
    )


def overlap_frac(graph: GraphSpec, tiling: Tiling) -> float:
    """Redundant work: FLOPs of all tiles over those of the span in one piece, minus one."""
    whole = sum(op.flops for layer in graph.layers[tiling.span.start : tiling.span.stop] for op in layer.spatial)
    return sum(tile_flops(graph, tiling)) / whole - 1.0 if whole else 0.0
