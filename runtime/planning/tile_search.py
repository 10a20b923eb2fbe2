"""Which spans to cut into tiles, and by which grid: a search over all of them.

Papers: D3 (VSM). As reconstructed: consecutive tileable layers on the edge run on several edge nodes. Differs: D3's rule
for grouping layers is not known; here a dynamic programme over the places where a span may start and stop picks the
groups, so a group ends where redundant work, scatter and gather cost more than the nodes win. Unequal nodes get unequal
tiles.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.errors import PlanError
from runtime.planning.tiles import Floats, TileCost, TileLinks, TileNode, cost_tiles, op_seconds
from runtime.planning.tiling import (
    Interval,
    crossing,
    cut_axis,
    find_sizes,
    find_spans,
    read_interval,
    scale_lines,
)
from runtime.types import GraphSpec, SpatialOp, TileSpan, ValueSpec, Window

Ints = NDArray[np.int64]

Bands = tuple[Interval, ...]
"""Ranges of one map along one axis, one per row or column of tiles."""

Lengths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """Operations of a layer that work on the same positions: a window, and what follows it position by position."""

    name: str  # of what the last of them makes
    reads: tuple[str, ...]
    windows: tuple[Window | None, Window | None]  # along rows and columns; None: position by position
    fixed_s: list[float]  # by node: seconds that no tile is spared
    each_s: list[float]  # by node: seconds per position


PATIENCE = 8
"""Starts in a row that may win no compute over a later one before earlier ones are given up: redundant work has eaten
the gain, and only grows. Some, because layers of little work (gates, small pools) win nothing either. Guess."""


@dataclass(frozen=True, slots=True)
class TileChoice:
    """The spans to cut, in order, and what that is expected to win."""

    spans: tuple[TileSpan, ...]  # empty: one node is best
    costs: tuple[TileCost, ...]  # one per span
    total_s: float  # of all layers asked about, tiled or not
    untiled_s: float  # of all of them on the head alone


def choose_tiles(graph: GraphSpec, nodes: Sequence[TileNode], start: int = 0, stop: int | None = None) -> TileChoice:
    """Find the spans and grids that make some consecutive layers of the edge fastest.

    Every grid of two to `len(nodes)` tiles on the first nodes is tried for every span; layers between spans run on
    the head.

    Args:
        graph: the model.
        nodes: the head, then the peers in the order in which they should be used.
        start: first layer on the edge.
        stop: end of the layers on the edge; None: the model's.
    """
    stop = graph.num_layers if stop is None else stop
    head_s = nodes[0].layer_s
    search = TileSearch(graph, nodes)
    best_s = [0.0]  # of the layers [start, j)
    steps: list[TileSpan | None] = [None]  # the span that ends there; None: the layer before runs on the head
    stretches = find_spans(graph)
    for j in range(start + 1, stop + 1):
        best_s.append(best_s[-1] + head_s[j - 1])
        steps.append(None)
        for stretch in stretches:
            if j in stretch.stops:
                first = max(stretch.start, start)
                found = search.best_into(first, j, best_s[first - start : j - start])
                if found is not None and found[0] < best_s[-1]:
                    best_s[-1], steps[-1] = found
    spans: list[TileSpan] = []
    alone_s: list[float] = []
    j = stop
    while j > start:
        step = steps[j - start]
        if step is None:
            alone_s.append(head_s[j - 1])
        else:
            spans.insert(0, _shift_lines(graph, step, nodes))
        j = j - 1 if step is None else step.start
    costs = tuple(cost_tiles(graph, span, nodes) for span in spans)
    total_s = math.fsum(alone_s) + math.fsum(cost.total_s for cost in costs)
    return TileChoice(tuple(spans), costs, total_s, math.fsum(head_s[start:stop]))


def _shift_lines(graph: GraphSpec, span: TileSpan, nodes: Sequence[TileNode]) -> TileSpan:
    """Move lines one by one as long as that helps: they were put where the speeds say, overlap not counted."""
    best_s = cost_tiles(graph, span, nodes).total_s
    has_moved = True
    while has_moved:
        has_moved = False
        for moved in _neighbours(span):
            try:
                total_s = cost_tiles(graph, moved, nodes).total_s
            except PlanError:  # lines that meet
                continue
            if total_s < best_s:
                best_s, span, has_moved = total_s, moved, True
                break
    return span


def _neighbours(span: TileSpan) -> list[TileSpan]:
    """The same span with one line moved by one."""
    moved = []
    for by in (-1, 1):
        for i, line in enumerate(span.row_lines):
            moved.append(replace(span, row_lines=(*span.row_lines[:i], line + by, *span.row_lines[i + 1 :])))
        for i, line in enumerate(span.col_lines):
            moved.append(replace(span, col_lines=(*span.col_lines[:i], line + by, *span.col_lines[i + 1 :])))
    return moved


def find_grids(num_nodes: int) -> list[tuple[int, int]]:
    """Grids (rows, columns) of two or more tiles that so many nodes can run."""
    sides = range(1, num_nodes + 1)
    # More rows first: rows of a map lie together in memory, so of two equal grids theirs is cheaper to cut.
    return [(rows, cols) for rows in reversed(sides) for cols in sides if 2 <= rows * cols <= num_nodes]


# --- every span that stops at one layer ---------------------------------------------------------------------------------


class TileSearch:
    """What all spans of a graph on some nodes share."""

    def __init__(self, graph: GraphSpec, nodes: Sequence[TileNode]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.grids = find_grids(len(nodes))
        self.links = {num: TileLinks.of(nodes[:num]) for num in range(2, len(nodes) + 1)}
        self.sizes = find_sizes(graph, (op for layer in graph.layers for op in layer.spatial))
        self.map_bytes = {value.name: _map_bytes(value) for value in graph.values if value.name in self.sizes}
        self._steps: dict[int, list[_Step]] = {}

    def steps(self, layer: int) -> list[_Step]:
        """What a layer does, last first."""
        known = self._steps.get(layer)
        if known is None:
            known = self._steps[layer] = self._make_steps(layer)
        return known

    def _make_steps(self, layer: int) -> list[_Step]:
        by_node = [op_seconds(self.graph, node, layer) for node in self.nodes]
        ops = self.graph.layers[layer].spatial
        num_readers = Counter(name for op in ops for name in op.reads)
        steps: list[_Step] = []
        for index, op in enumerate(ops):
            area, own = op.size[0] * op.size[1], [seconds[index] for seconds in by_node]
            rows, cols = (None if window == Window() else window for window in op.windows)
            step = _Step(op.name, op.reads, (rows, cols), [s for s, _ in own], [s / area for _, s in own])
            before = steps[-1] if steps else None
            is_follower = before is not None and op.reads == (before.name,) and rows is None and cols is None
            if before is not None and is_follower and num_readers[before.name] == 1 and self._is_inner(before, op):
                fixed_s = [a + b for a, b in zip(before.fixed_s, step.fixed_s, strict=True)]
                each_s = [a + b for a, b in zip(before.each_s, step.each_s, strict=True)]
                steps[-1] = _Step(op.name, before.reads, before.windows, fixed_s, each_s)
            else:
                steps.append(step)
        steps.reverse()
        return steps

    def _is_inner(self, before: _Step, op: SpatialOp) -> bool:
        """Whether only the next operation sees what a step makes, a map of the same size."""
        return before.name not in self.map_bytes and self.sizes[before.name] == op.size

    def best_into(self, first: int, stop: int, before_s: Sequence[float]) -> tuple[float, TileSpan] | None:
        """The best span that starts at `first` or later and stops at a layer, by the seconds until its outputs are there.

        Args:
            first: first layer that a span may have.
            stop: where it stops.
            before_s: seconds of what runs before each start.
        """
        end = _End(self, first, stop)
        best: tuple[float, TileSpan] | None = None
        for grid in self.grids:
            found = _Sweep(end, grid).best(before_s)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
        return best


class _End:
    """What all spans that stop at one layer share, whatever their grid; their starts are `first` to `stop`."""

    def __init__(self, search: TileSearch, first: int, stop: int) -> None:
        self.search = search
        self.first = first
        self.stop = stop
        self.crossing = crossing(search.graph, first, stop)
        self.size = search.sizes[search.graph.layers[stop - 1].outputs[-1]]
        self.sent_bytes, self.back_bytes = self._whole_bytes()
        self.alone_s = _sums_to_end(search.nodes[0].layer_s[first:stop])
        self._walks: dict[tuple[int, tuple[int, ...]], _Walk] = {}

    def _whole_bytes(self) -> tuple[Floats, Floats]:
        """Bytes of each start's inputs and outputs, uncut."""
        first, stop = self.first, self.stop
        sent, back = np.zeros(stop - first), np.zeros(stop - first)
        for value in self.search.graph.values:
            readers = [c for c in value.consumers if c < stop] if value.producer < stop - 1 else []
            if readers and readers[-1] >= first:
                sent[max(value.producer + 1 - first, 0) : readers[-1] + 1 - first] += value.tensor.nbytes
        for value in self.crossing:
            back[: value.producer + 1 - first] += value.tensor.nbytes
        return sent, back

    def walk(self, axis: int, lines: tuple[int, ...]) -> "_Walk":
        """The walk back along one axis from these cut positions; the same one for every grid that has them."""
        known = self._walks.get((axis, lines))
        if known is None:
            known = self._walks[axis, lines] = _Walk(self, axis, lines)
        return known


class _Walk:
    """Lengths of all ranges along one axis, for cut positions at the end: worked out layer by layer, as far as asked."""

    def __init__(self, end: _End, axis: int, lines: tuple[int, ...]) -> None:
        self._search, self._axis = end.search, axis
        self._layer = end.stop
        self._need: dict[str, Bands] = {}
        self.cuts: dict[str, Bands] = {}
        self.legal_from = end.first  # first start for which the lines cut every value that crosses
        for value in end.crossing:
            scaled = scale_lines(lines[1:-1], lines[-1], value.tensor.shape[2 + axis])
            self.cuts[value.name] = cuts = cut_axis(scaled, value.tensor.shape[2 + axis])
            if any(low >= high for low, high in cuts):
                self.legal_from = max(self.legal_from, value.producer + 1)
        self.made: list[list[Lengths]] = []  # per layer from the end: of each operation, the last first
        self.read: list[dict[str, Bands]] = []  # per layer from the end: what a span that starts there is given

    def reach(self, depth: int) -> None:
        """Go on until `depth` layers from the end are done."""
        while len(self.made) < depth:
            self._layer -= 1
            made = []
            for step in self._search.steps(self._layer):
                bands = self._need.pop(step.name, None)
                if step.name in self.cuts:
                    bands = _join_bands(bands, self.cuts[step.name])
                assert bands is not None, f"nobody reads {step.name}"
                made.append(tuple(high - low for low, high in bands))
                self._note_reads(step, bands)
            self.made.append(made)
            self.read.append(self._need.copy())

    def _note_reads(self, step: _Step, made: Bands) -> None:
        window = step.windows[self._axis]
        for name in step.reads:
            length = self._search.sizes[name][self._axis]
            if window is not None:
                bands: Bands = tuple(read_interval(window, interval, length)[0] for interval in made)
            else:
                bands = made if length > 1 else ((0, 1),) * len(made)
            self._need[name] = _join_bands(self._need.get(name), bands)


def _join_bands(first: Bands | None, second: Bands) -> Bands:
    if first is None or first == second:
        return second
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(first, second, strict=True))


def _add_areas(totals: list[int], rows: Bands, cols: Bands, each: int) -> list[int]:
    """Add the area of every tile, times a number, to what is there."""
    lengths = [high - low for low, high in cols]
    areas = [(high - low) * length for low, high in rows for length in lengths]
    return [total + area * each for total, area in zip(totals, areas, strict=True)]


class _Tally:
    """Seconds of computing of all spans with the same cut positions, from the end to wherever one starts."""

    def __init__(self, end: _End, rows: _Walk, cols: _Walk, num_tiles: int) -> None:
        self.rows, self.cols = rows, cols
        self._end = end
        self._compute: list[list[float]] = []  # per depth: by tile
        self._now = [0.0] * num_tiles

    def compute_s(self, depth: int) -> list[float]:
        """Seconds per tile of the last `depth` layers."""
        self.rows.reach(depth)
        self.cols.reach(depth)
        while len(self._compute) < depth:
            at = len(self._compute)
            steps = self._end.search.steps(self._end.stop - 1 - at)
            now = self._now
            for rows, cols, step in zip(self.rows.made[at], self.cols.made[at], steps, strict=True):
                areas = [row * col for row in rows for col in cols]
                # Fewer tiles than nodes: the last ones do nothing.
                now = [
                    s + fixed + area * each
                    for s, fixed, area, each in zip(now, step.fixed_s, areas, step.each_s, strict=False)
                ]
            self._now = now
            self._compute.append(now)
        return self._compute[depth - 1]

    def sent_bytes(self, depth: int) -> list[int]:
        """Bytes that each tile of a span of so many layers is given; the head's own crosses no link."""
        map_bytes, cols_of = self._end.search.map_bytes, self.cols.read[depth - 1]
        sent = [0] * len(self._now)
        for name, rows in self.rows.read[depth - 1].items():
            sent = _add_areas(sent, rows, cols_of[name], map_bytes[name])
        sent[0] = 0
        return sent


class _Sweep:
    """All spans that stop at one layer under one grid, every start with its own lines."""

    def __init__(self, end: _End, grid: tuple[int, int]) -> None:
        self._end = end
        self._num_tiles = grid[0] * grid[1]
        self._links = end.search.links[self._num_tiles]
        shares = self._shares().reshape(-1, *grid)
        self._is_legal = np.asarray(np.isfinite(shares).all(axis=(1, 2)))
        shares = np.nan_to_num(shares, nan=1.0 / self._num_tiles)
        lines = (_lines(shares.sum(2), end.size[0]), _lines(shares.sum(1), end.size[1]))
        self._lines = [(tuple(rows), tuple(cols)) for rows, cols in zip(*(x.tolist() for x in lines), strict=True)]

    def best(self, before_s: Sequence[float]) -> tuple[float, TileSpan] | None:
        """The quickest, what runs before it included; None where the grid fits none."""
        end = self._end
        tallies: dict[tuple[Lengths, Lengths], _Tally] = {}
        compute, sent, back, starts = [], [], [], []
        best_s, best_start = 0.0, end.stop
        for start in range(end.stop - 1, end.first - 1, -1):
            lines, depth = self._lines[start - end.first], end.stop - start
            tally = tallies.get(lines)
            if tally is None:
                tally = tallies[lines] = _Tally(end, end.walk(0, lines[0]), end.walk(1, lines[1]), self._num_tiles)
            is_legal = self._is_legal[start - end.first]
            if not is_legal or start < tally.rows.legal_from or start < tally.cols.legal_from:
                best_start = start  # lines that meet: the times say nothing
                continue
            seconds = tally.compute_s(depth)
            starts.append(start)
            compute.append(seconds)
            sent.append(tally.sent_bytes(depth))
            back.append(self._back_bytes(tally, start))
            gain_s = end.alone_s[start - end.first] - max(seconds)
            if gain_s > best_s:
                best_s, best_start = gain_s, start
            elif best_start - start > PATIENCE:
                break
        if not starts:
            return None
        scatter, gather = self._links.times(np.array(sent, float), np.array(back, float))
        total = (scatter + np.array(compute) + gather).max(axis=1) + [before_s[start - end.first] for start in starts]
        pick = len(starts) - 1 - int(np.argmin(total[::-1]))  # of equal ones the longest
        rows, cols = (own[1:-1] for own in self._lines[starts[pick] - end.first])
        return float(total[pick]), TileSpan(starts[pick], end.stop, rows, cols)

    def _back_bytes(self, tally: _Tally, start: int) -> list[int]:
        back = [0] * self._num_tiles
        for value in self._end.crossing:
            if start <= value.producer:
                rows, cols = tally.rows.cuts[value.name], tally.cols.cuts[value.name]
                back = _add_areas(back, rows, cols, self._end.search.map_bytes[value.name])
        return back

    def _shares(self) -> Floats:
        """Share of the span that each node should take, so that all are done at the same time: (starts, tiles).

        NaN in the rows of starts where some node had better do nothing.
        """
        end, speeds = self._end, []
        nodes = end.search.nodes[: self._num_tiles]
        for node, there_s, back_s in zip(nodes, self._links.there_s, self._links.back_s, strict=True):
            own_s = _sums_to_end(node.tiled_s[end.first : end.stop])
            speeds.append(1.0 / np.maximum(own_s + end.sent_bytes * there_s + end.back_bytes * back_s, 1e-12))
        speed = np.stack(speeds, axis=1)
        waits = 2.0 * self._links.fixed_s
        done_s = (1.0 + (waits * speed).sum(1, keepdims=True)) / speed.sum(1, keepdims=True)
        shares: Floats = (done_s - waits) * speed
        return np.where((shares > 0.0).all(1, keepdims=True), shares, np.nan)


def _sums_to_end(seconds: Sequence[float]) -> Floats:
    sums: Floats = np.asarray(seconds)[::-1].cumsum()[::-1]
    return sums


def _map_bytes(value: ValueSpec) -> int:
    """Bytes of one position of a map."""
    return value.tensor.shape[0] * value.tensor.shape[1] * value.tensor.itemsize


def _lines(shares: Floats, length: int) -> Ints:
    """Cut positions at the shares' running sums, the ends included: (starts, bands + 1)."""
    edges = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
    lines: Ints = np.rint(edges / edges[:, -1:] * length).astype(np.int64)
    return lines
