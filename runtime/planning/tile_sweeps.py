"""What every span that stops at one layer costs, whatever its start and grid: the inner loop of `choose_tiles`."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.planning.tiles import Floats, TileLinks, TileNode, op_seconds
from runtime.planning.tiling import crossing, find_sizes
from runtime.types import GraphSpec, SpatialOp, TileSpan, ValueSpec, Window

Ints = NDArray[np.int64]

Bands = tuple[Ints, Ints]
"""First and end positions of ranges of one map along one axis: those of all cut positions that are looked at."""

Lines = tuple[int, ...]
"""Cut positions along one axis, the ends included."""

Place = tuple[int, int]
"""Where a map is behind some layers: cut under this grid, or `WHOLE`, or `APART`."""

WHOLE = (1, 1)
"""At the head."""

APART = (0, 0)
"""At the head, and so behind every span before. What such spans cost the search knows; how wide the borders of a map are that
was left cut it guesses, and may be wrong: so the best of these is compared with the best of all."""

PATIENCE = 8
"""Starts in a row that may win no compute over a later one before earlier ones are given up: redundant work has eaten
the gain, and only grows. Some, because layers of little work (gates, small pools) win nothing either. Guess."""


@dataclass(frozen=True, slots=True)
class _Step:
    """Operations of a layer that work on the same positions: a window, and what follows it position by position."""

    name: str  # of what the last of them makes
    reads: tuple[str, ...]
    windows: tuple[Window | None, Window | None]  # along rows and columns; None: position by position
    fixed_s: Floats  # by node: seconds that no tile is spared
    each_s: Floats  # by node: seconds per position


@dataclass(frozen=True, slots=True)
class Into:
    """The best span that stops at a layer: seconds with what runs before it, and where it takes its map from."""

    seconds: float
    span: TileSpan
    source: Place


def find_grids(num_nodes: int) -> list[tuple[int, int]]:
    """Grids (rows, columns) of two or more tiles that so many nodes can run."""
    sides = range(1, num_nodes + 1)
    # More rows first: rows of a map lie together in memory, so of two equal grids theirs is cheaper to cut.
    return [(rows, cols) for rows in reversed(sides) for cols in sides if 2 <= rows * cols <= num_nodes]


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
            fixed_s, each_s = np.array([s for s, _ in own]), np.array([s / area for _, s in own])
            step = _Step(op.name, op.reads, (rows, cols), fixed_s, each_s)
            before = steps[-1] if steps else None
            is_follower = before is not None and op.reads == (before.name,) and rows is None and cols is None
            if before is not None and is_follower and num_readers[before.name] == 1 and self._is_inner(before, op):
                fixed_s, each_s = before.fixed_s + fixed_s, before.each_s + each_s
                steps[-1] = _Step(op.name, before.reads, before.windows, fixed_s, each_s)
            else:
                steps.append(step)
        steps.reverse()
        return steps

    def _is_inner(self, before: _Step, op: SpatialOp) -> bool:
        """Whether only the next operation sees what a step makes, a map of the same size."""
        return before.name not in self.map_bytes and self.sizes[before.name] == op.size

    def best_into(self, first: int, stop: int, before_s: Mapping[Place, Sequence[float]]) -> dict[Place, Into]:
        """The best spans that start at `first` or later and stop at a layer, by where they leave their map.

        Args:
            first: first layer that a span may have.
            stop: where it stops.
            before_s: by where the map is, seconds of what runs before each start.
        """
        if not self.grids:
            return {}
        end = _End(self, first, stop)
        sweeps = [_Sweep(end, grid, is_inner=is_inner) for grid in self.grids for is_inner in (False, True)]
        tally = _Tally(end, sweeps)
        for sweep in sweeps:
            sweep.find_places(tally)
        start = stop
        while start > first and any(sweep.is_open for sweep in sweeps):
            start -= 1
            tally.take_in(start)
            for sweep in sweeps:
                if sweep.is_open:
                    sweep.look(start, tally)
        best: dict[Place, Into] = {}
        for sweep in sweeps:
            for place, found in sweep.best(before_s).items():
                if place not in best or found.seconds < best[place].seconds:
                    best[place] = found
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
        self.alone_s: list[float] = _sums_to_end(search.nodes[0].layer_s[first:stop]).tolist()

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


class _Walk:
    """Ranges along one axis for many cut positions at the end at once, layer by layer towards the start."""

    def __init__(self, end: _End, axis: int, cuts: Iterable[Lines]) -> None:
        self._search, self._axis = end.search, axis
        self._need: dict[str, Bands] = {}
        self._scaled: dict[int, tuple[Bands, NDArray[np.bool_]]] = {}  # by length of a map
        self.cuts: dict[str, Bands] = {}
        known = list(dict.fromkeys(cuts))
        counts = np.array([len(lines) - 1 for lines in known])
        first = np.concatenate([[0], counts[:-1].cumsum()])  # of each cut's ranges
        low = np.array([line for lines in known for line in lines[:-1]], dtype=np.int64)
        high = np.array([line for lines in known for line in lines[1:]], dtype=np.int64)
        length = end.size[axis]
        legal_from = np.full(len(known), end.first)
        for value in end.crossing:
            own = value.tensor.shape[2 + axis]
            if own not in self._scaled:  # as `scale_lines` has it
                bands = ((2 * low * own + length) // (2 * length), (2 * high * own + length) // (2 * length))
                self._scaled[own] = bands, np.logical_or.reduceat(bands[0] >= bands[1], first)
            self.cuts[value.name], meets = self._scaled[own]
            legal_from = np.where(meets, np.maximum(legal_from, value.producer + 1), legal_from)
        self.place = dict(zip(known, first.tolist(), strict=True))  # where the ranges of each cut begin
        self.legal_from = dict(zip(known, legal_from.tolist(), strict=True))
        """By cut: the first start for which it cuts every value that crosses."""

    def step(self, step: _Step) -> Ints:
        """Go over one step; return the lengths of what it makes."""
        bands = self._need.pop(step.name, None)
        if step.name in self.cuts:
            bands = _join_bands(bands, self.cuts[step.name])
        assert bands is not None, f"nobody reads {step.name}"
        for name in step.reads:
            self._need[name] = _join_bands(self._need.get(name), self._read(name, step.windows[self._axis], bands))
        return bands[1] - bands[0]

    def _read(self, name: str, window: Window | None, made: Bands) -> Bands:
        length = self._search.sizes[name][self._axis]
        if window is not None:  # as `read_interval` has it
            low = made[0] * window.stride - window.padding
            high = (made[1] - 1) * window.stride - window.padding + window.extent
            return np.maximum(low, 0), np.minimum(high, length)
        return made if length > 1 else (np.zeros_like(made[0]), np.ones_like(made[1]))

    def given(self) -> dict[str, Ints]:
        """Lengths of what a span that starts here is given, by name."""
        return {name: high - low for name, (low, high) in self._need.items()}


def _join_bands(first: Bands | None, second: Bands) -> Bands:
    if first is None:
        return second
    return np.minimum(first[0], second[0]), np.maximum(first[1], second[1])


class _Tally:
    """What the tiles of all cuts compute and are sent in the spans that stop at one layer and start at another."""

    def __init__(self, end: _End, sweeps: Sequence["_Sweep"]) -> None:
        self._end = end
        self.rows = _Walk(end, 0, (lines[0] for sweep in sweeps for lines in sweep.lines))
        self.cols = _Walk(end, 1, (lines[1] for sweep in sweeps for lines in sweep.lines))
        self.place: dict[tuple[Lines, Lines], int] = {}  # where the tiles of each grid begin
        rows: list[int] = []
        cols: list[int] = []
        nodes: list[int] = []
        for pair in dict.fromkeys(lines for sweep in sweeps for lines in sweep.lines):
            self.place[pair] = len(rows)
            num_rows, num_cols = len(pair[0]) - 1, len(pair[1]) - 1
            rows += [self.rows.place[pair[0]] + row for row in range(num_rows) for _ in range(num_cols)]
            cols += [self.cols.place[pair[1]] + col for _ in range(num_rows) for col in range(num_cols)]
            nodes += range(num_rows * num_cols)
        self._row, self._col, self._node = (np.array(each, dtype=np.intp) for each in (rows, cols, nodes))
        self._crosses = (self._node > 0).astype(np.float64)  # the head's own tile crosses no link
        self._compute_s, self._back = np.zeros(len(rows)), np.zeros(len(rows))
        self.compute_s: list[float] = []  # by tile, from the start that was taken in last
        self.sent_bytes: list[float] = []
        self.back_bytes: list[float] = []

    def take_in(self, layer: int) -> None:
        """Let the spans start one layer earlier."""
        search = self._end.search
        for step in search.steps(layer):
            areas = self.rows.step(step).take(self._row) * self.cols.step(step).take(self._col)
            self._compute_s = self._compute_s + step.fixed_s.take(self._node) + areas * step.each_s.take(self._node)
        for value in self._end.crossing:
            if value.producer == layer:
                (top, bottom), (left, right) = self.rows.cuts[value.name], self.cols.cuts[value.name]
                areas = (bottom - top).take(self._row) * (right - left).take(self._col)
                self._back = self._back + areas * search.map_bytes[value.name]
        sent, cols = np.zeros(len(self._row)), self.cols.given()
        for name, rows in self.rows.given().items():
            sent += rows.take(self._row) * cols[name].take(self._col) * search.map_bytes[name]
        self.compute_s, self.back_bytes = self._compute_s.tolist(), self._back.tolist()
        self.sent_bytes = (sent * self._crosses).tolist()


class _Sweep:
    """All spans that stop at one layer under one grid, every start with its own lines.

    Args:
        end: what they share.
        grid: rows and columns of tiles.
        is_inner: lines are put where nothing but computing counts, as within a chain; else scatter and gather do, too.
    """

    def __init__(self, end: _End, grid: tuple[int, int], *, is_inner: bool) -> None:
        self._end = end
        self._grid = grid
        self._num_tiles = grid[0] * grid[1]
        self._links = end.search.links[self._num_tiles]
        self._is_inner = is_inner
        shares = self._shares().reshape(-1, *grid)
        self._is_legal: list[bool] = np.asarray(np.isfinite(shares).all(axis=(1, 2))).tolist()
        shares = np.nan_to_num(shares, nan=1.0 / self._num_tiles)
        lines = (cut_lines(shares.sum(2), end.size[0]), cut_lines(shares.sum(1), end.size[1]))
        self.lines = [(tuple(rows), tuple(cols)) for rows, cols in zip(*(x.tolist() for x in lines), strict=True)]
        self.is_open = True
        self._places: list[tuple[int, int]] = []  # by start: first tile in the tally, first legal start of the lines
        self._best_s, self._best_start = 0.0, end.stop
        self._starts: list[int] = []
        self._compute: list[list[float]] = []
        self._sent: list[list[float]] = []
        self._back: list[list[float]] = []

    def find_places(self, tally: _Tally) -> None:
        """Note where the tiles of every start are in the tally."""
        found = {}
        for lines in dict.fromkeys(self.lines):
            legal_from = max(tally.rows.legal_from[lines[0]], tally.cols.legal_from[lines[1]])
            found[lines] = (tally.place[lines], legal_from)
        self._places = [found[lines] for lines in self.lines]

    def look(self, start: int, tally: _Tally) -> None:
        """Note what the span from a start costs; close where earlier ones cannot be better."""
        end = self._end
        place, legal_from = self._places[start - end.first]
        if not self._is_legal[start - end.first] or start < legal_from:
            self._best_start = start  # lines that meet: the times say nothing
            return
        own = slice(place, place + self._num_tiles)
        self._starts.append(start)
        self._compute.append(tally.compute_s[own])
        self._sent.append(tally.sent_bytes[own])
        self._back.append(tally.back_bytes[own])
        gain_s = end.alone_s[start - end.first] - max(self._compute[-1])
        if gain_s > self._best_s:
            self._best_s, self._best_start = gain_s, start
        elif self._best_start - start > PATIENCE:
            self.is_open = False

    def best(self, before_s: Mapping[Place, Sequence[float]]) -> dict[Place, Into]:
        """The quickest by where they leave their map, what runs before included; empty where the grid fits none."""
        if not self._starts:
            return {}
        at = np.array(self._starts) - self._end.first
        compute, sent, back = (np.array(each) for each in (self._compute, self._sent, self._back))
        scatter, gather = self._links.times(sent, back)
        borders, stay = self._borders_s(at, sent), self._links.fixed_s
        best: dict[Place, Into] = {}
        for source, target, entry_s, exit_s in (
            (APART, APART, scatter, gather),
            (WHOLE, WHOLE, scatter, gather),
            (WHOLE, self._grid, scatter, stay),
            (self._grid, self._grid, borders, stay),
            (self._grid, WHOLE, borders, gather),
        ):
            total = (entry_s + compute + exit_s).max(axis=1) + np.asarray(before_s[source])[at]
            pick = len(at) - 1 - int(np.argmin(total[::-1]))  # of equal ones the longest
            if total[pick] < (best[target].seconds if target in best else math.inf):
                rows, cols = (own[1:-1] for own in self.lines[int(at[pick])])
                span = TileSpan(self._starts[pick], self._end.stop, rows, cols)
                best[target] = Into(float(total[pick]), span, source)
        return best

    def _borders_s(self, at: Ints, sent_bytes: Floats) -> Floats:
        """Seconds until the borders of a map that is cut under the same grid have crossed, there and back.

        A guess: where the lines of the span before are is not known yet, so it is taken as cut alike.
        """
        lines = [self.lines[start] for start in at.tolist()]
        rows, cols = (np.diff(np.array([pair[axis] for pair in lines]), axis=1) for axis in (0, 1))
        shares = (rows[:, :, None] * cols[:, None, :]).reshape(len(at), -1) / math.prod(self._end.size)
        borders = np.maximum(sent_bytes - shares * self._end.sent_bytes[at, None], 0.0)
        seconds: Floats = self._links.fixed_s + (self._links.there_s + self._links.back_s) * borders
        return seconds

    def _shares(self) -> Floats:
        """Share of the span that each node should take, so that all are done at the same time: (starts, tiles).

        NaN in the rows of starts where some node had better do nothing.
        """
        end, speeds = self._end, []
        nodes = end.search.nodes[: self._num_tiles]
        for node, there_s, back_s in zip(nodes, self._links.there_s, self._links.back_s, strict=True):
            own_s = _sums_to_end(node.tiled_s[end.first : end.stop])
            if not self._is_inner:
                own_s = own_s + end.sent_bytes * there_s + end.back_bytes * back_s
            speeds.append(1.0 / np.maximum(own_s, 1e-12))
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


def cut_lines(shares: Floats, length: int) -> Ints:
    """Cut positions at the shares' running sums, the ends included: (starts, bands + 1)."""
    edges = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
    lines: Ints = np.rint(edges / edges[:, -1:] * length).astype(np.int64)
    return lines
