"""Which spans to cut into tiles, and by which grid: what a tiling is expected to cost, and a search over all of them.

Papers: D3 (VSM). As reconstructed: consecutive tileable layers on the edge run on several edge nodes. Differs: D3's rule
for grouping layers is not known; here a dynamic programme over the places where a span may start and stop picks the
groups, so a group ends where redundant work, scatter and gather cost more than the nodes win. Unequal nodes get unequal
tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.errors import PlanError
from runtime.planning.tiling import Tiling, crossing, find_sizes, find_spans, plan_tiles, region_bytes
from runtime.types import GraphSpec, SpatialOp, TileSpan, ValueSpec, Window

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


WEIGHT_BYTES_PER_S = 4e9
"""How fast a CPU reads and rearranges a convolution's weights, which it does for every tile anew. Measured with 512 and
1024 channels on maps of 8 to 28 rows, one thread, where this is a tenth of the time; a guess for other machines."""

PATIENCE = 8
"""Starts in a row that may win no compute over a later one before earlier ones are given up: redundant work has eaten
the gain, and only grows. Some, because layers of little work (gates, small pools) win nothing either. Guess."""


@dataclass(frozen=True, slots=True)
class TileNode:
    """An edge node as the tiles see it; the first of several is the head, which cuts, computes and puts together."""

    layer_s: tuple[float, ...]  # (num_layers,), load included
    to_bps: float = math.inf  # from the head to this node
    from_bps: float = math.inf  # back
    rtt_s: float = 0.0
    fixed_s: float = 0.0  # per message
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf
    weight_bytes_per_s: float = WEIGHT_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class TileCost:
    """What a tiled span is expected to take. Tuples have one entry per tile; the head's own crosses no link."""

    compute_s: tuple[float, ...]
    scatter_s: tuple[float, ...]  # coding, link and half the rtt
    gather_s: tuple[float, ...]
    scatter_bytes: tuple[int, ...]
    gather_bytes: tuple[int, ...]

    @property
    def total_s(self) -> float:
        """Seconds from the span's inputs to its outputs, at the head: until the slowest tile is back."""
        return max(map(math.fsum, zip(self.scatter_s, self.compute_s, self.gather_s, strict=True)))


@dataclass(frozen=True, slots=True)
class TileChoice:
    """The spans to cut, in order, and what that is expected to win."""

    spans: tuple[TileSpan, ...]  # empty: one node is best
    costs: tuple[TileCost, ...]  # one per span
    total_s: float  # of all layers asked about, tiled or not
    untiled_s: float  # of all of them on the head alone


def cost_tiles(graph: GraphSpec, span: TileSpan, nodes: Sequence[TileNode]) -> TileCost:
    """Predict what a tiled span takes.

    Args:
        graph: the model.
        span: layers and grid.
        nodes: one per tile, the head first.

    Raises:
        PlanError: when the graph has no such span or the lines do not cut it.
        ValueError: when there are fewer nodes than tiles.
    """
    tiling = plan_tiles(graph, span)
    if len(nodes) < len(tiling.tiles):
        raise ValueError(f"expected a node for each of the {len(tiling.tiles)} tiles, got {len(nodes)}")
    sent = [0] + [region_bytes(graph, tile.inputs) for tile in tiling.tiles[1:]]
    back = [0] + [region_bytes(graph, tile.outputs) for tile in tiling.tiles[1:]]
    compute = [tile_seconds(graph, tiling, node)[index] for index, node in enumerate(nodes[: len(tiling.tiles)])]
    links = _Links.of(nodes[: len(tiling.tiles)])
    scatter, gather = links.times(np.array(sent, float), np.array(back, float))
    return TileCost(tuple(compute), tuple(scatter.tolist()), tuple(gather.tolist()), tuple(sent), tuple(back))


def tile_seconds(graph: GraphSpec, tiling: Tiling, node: TileNode) -> tuple[float, ...]:
    """Seconds that one node needs for each tile of a span, if it has it to itself."""
    seconds = [0.0] * len(tiling.tiles)
    for layer in tiling.stage.layers:
        for op, (fixed_s, whole_s) in zip(graph.layers[layer].spatial, op_seconds(graph, node, layer), strict=True):
            whole_area = op.size[0] * op.size[1]
            for index, tile in enumerate(tiling.tiles):
                seconds[index] += fixed_s + whole_s * tile.ops[op.name].makes.area / whole_area
    return tuple(seconds)


def op_seconds(graph: GraphSpec, node: TileNode, layer: int) -> list[tuple[float, float]]:
    """Seconds of each operation of a layer: those that no tile is spared, and those that shrink with its area.

    A layer's time is shared out by FLOPs; at most all of an operation's time goes into reading its weights.
    """
    ops = graph.layers[layer].spatial
    total = math.fsum(op.flops for op in ops)
    seconds = []
    for op in ops:
        own_s = node.layer_s[layer] * (op.flops / total if total else 1.0 / len(ops))
        fixed_s = min(op.weight_bytes / node.weight_bytes_per_s, own_s)
        seconds.append((fixed_s, own_s - fixed_s))
    return seconds


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
    best_s = [0.0]  # of the layers [start, j)
    steps: list[TileSpan | None] = [None]  # the span that ends there; None: the layer before runs on the head
    stretches = find_spans(graph)
    for j in range(start + 1, stop + 1):
        best_s.append(best_s[-1] + head_s[j - 1])
        steps.append(None)
        for stretch in stretches:
            if j in stretch.stops:
                starts = np.arange(max(stretch.start, start), j)
                found = _best_into(graph, nodes, starts, j, best_s[int(starts[0]) - start : j - start])
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


def _best_into(
    graph: GraphSpec, nodes: Sequence[TileNode], starts: Ints, stop: int, before_s: Sequence[float]
) -> tuple[float, TileSpan] | None:
    """The best span that stops at a layer, by the seconds until its outputs are there."""
    best: tuple[float, TileSpan] | None = None
    for grid in find_grids(len(nodes)):
        sweep = _Sweep(graph, nodes, starts, stop, grid)
        total = sweep.total_s() + np.asarray(before_s)
        pick = int(np.argmin(total))
        if np.isfinite(total[pick]) and (best is None or total[pick] < best[0]):
            best = (float(total[pick]), sweep.span(pick))
    return best


def find_grids(num_nodes: int) -> list[tuple[int, int]]:
    """Grids (rows, columns) of two or more tiles that so many nodes can run."""
    sides = range(1, num_nodes + 1)
    # More rows first: rows of a map lie together in memory, so of two equal grids theirs is cheaper to cut.
    return [(rows, cols) for rows in reversed(sides) for cols in sides if 2 <= rows * cols <= num_nodes]


# --- all starts at once -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Links:
    """Seconds per byte and per message of every tile's way to its node and back; nothing for the head's own."""

    there_s: Floats  # (tiles,) per byte
    back_s: Floats
    fixed_s: Floats  # (tiles,) per message, half the rtt included

    @classmethod
    def of(cls, nodes: Sequence[TileNode]) -> "_Links":
        head = nodes[0]
        there = [8.0 / n.to_bps + 1.0 / head.encode_bytes_per_s + 1.0 / n.decode_bytes_per_s for n in nodes]
        back = [8.0 / n.from_bps + 1.0 / n.encode_bytes_per_s + 1.0 / head.decode_bytes_per_s for n in nodes]
        fixed = [n.rtt_s / 2.0 + n.fixed_s for n in nodes]
        is_peer = np.arange(len(nodes)) > 0
        return cls(np.where(is_peer, there, 0.0), np.where(is_peer, back, 0.0), np.where(is_peer, fixed, 0.0))

    def times(self, sent_bytes: Floats, back_bytes: Floats) -> tuple[Floats, Floats]:
        """Seconds of scatter and gather, bytes and result of shape (..., tiles)."""
        return self.fixed_s + self.there_s * sent_bytes, self.fixed_s + self.back_s * back_bytes


@dataclass(slots=True)
class _Ranges:
    """Half-open ranges of one map along one axis: (starts, bands)."""

    low: Ints
    high: Ints

    @property
    def length(self) -> Ints:
        return self.high - self.low

    def at(self, row: int) -> "_Ranges":
        return _Ranges(self.low[row : row + 1], self.high[row : row + 1])

    def joined(self, other: "_Ranges | None") -> "_Ranges":
        if other is None:
            return self
        return _Ranges(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def through(self, window: Window, length: int) -> "_Ranges":
        """What is read for these ranges: `tiling.read_interval` for arrays."""
        if window == Window():
            return self if length > 1 else _Ranges(np.zeros_like(self.low), np.ones_like(self.high))
        low = self.low * window.stride - window.padding
        high = (self.high - 1) * window.stride - window.padding + window.extent
        return _Ranges(np.maximum(low, 0), np.minimum(high, length))


Needs = tuple[dict[str, _Ranges], dict[str, _Ranges]]
"""What is read of every map so far, along rows and along columns."""


class _Sweep:
    """All spans that stop at one layer under one grid: one walk backwards, every start with its own lines."""

    def __init__(
        self, graph: GraphSpec, nodes: Sequence[TileNode], starts: Ints, stop: int, grid: tuple[int, int]
    ) -> None:
        num_tiles = grid[0] * grid[1]
        self.graph = graph
        self.nodes = nodes[:num_tiles]
        self.starts = starts  # (starts,) ascending and consecutive
        self.first = int(starts[0])
        self.stop = stop
        self.links = _Links.of(self.nodes)
        self.ends = {value.name: value for value in crossing(graph, self.first, stop)}
        shares = self._shares().reshape(-1, *grid)
        self.is_legal = np.asarray(np.isfinite(shares).all(axis=(1, 2)), dtype=np.bool_)
        shares = np.nan_to_num(shares, nan=1.0 / num_tiles)
        _, _, rows, cols = self.ends[graph.layers[stop - 1].outputs[-1]].tensor.shape
        self.lines = (_lines(shares.sum(2), rows), _lines(shares.sum(1), cols))  # each (starts, bands + 1)
        self.cuts = {name: (self._cut(value, 0), self._cut(value, 1)) for name, value in self.ends.items()}

    def span(self, pick: int) -> TileSpan:
        """The span that begins at one of the starts."""
        rows, cols = (tuple(int(x) for x in lines[pick, 1:-1]) for lines in self.lines)
        return TileSpan(int(self.starts[pick]), self.stop, rows, cols)

    def total_s(self) -> Floats:
        """Seconds of every start's span; inf where the grid does not fit."""
        compute, sent = self._walk()
        back = np.zeros_like(sent)
        for name, value in self.ends.items():
            made = _areas(*self.cuts[name]) * _map_bytes(value)
            back += np.where((self.starts <= value.producer)[:, None], made, 0)
        scatter, gather = self.links.times(sent, back)
        total: Floats = (scatter + compute + gather).max(axis=1)
        return np.where(self.is_legal, total, np.inf)

    def _shares(self) -> Floats:
        """Share of the span that each node should take, so that all are done at the same time: (starts, tiles).

        NaN in the rows of starts where some node had better do nothing.
        """
        speeds = []
        sent, back = self._whole_bytes()
        for node, there_s, back_s in zip(self.nodes, self.links.there_s, self.links.back_s, strict=True):
            layer_s = np.asarray(node.layer_s[self.first : self.stop])
            speeds.append(1.0 / np.maximum(layer_s[::-1].cumsum()[::-1] + sent * there_s + back * back_s, 1e-12))
        speed = np.stack(speeds, axis=1)
        waits = 2.0 * self.links.fixed_s
        done_s = (1.0 + (waits * speed).sum(1, keepdims=True)) / speed.sum(1, keepdims=True)
        shares: Floats = (done_s - waits) * speed
        return np.where((shares > 0.0).all(1, keepdims=True), shares, np.nan)

    def _whole_bytes(self) -> tuple[Floats, Floats]:
        """Bytes of each start's inputs and outputs, uncut."""
        sent, back = np.zeros(len(self.starts)), np.zeros(len(self.starts))
        for value in self.graph.values:
            readers = [c for c in value.consumers if c < self.stop]
            if value.producer < self.stop and readers:
                sent += np.where((self.starts > value.producer) & (self.starts <= readers[-1]), value.tensor.nbytes, 0)
        for value in self.ends.values():
            back += np.where(self.starts <= value.producer, value.tensor.nbytes, 0)
        return sent, back

    def _cut(self, value: ValueSpec, axis: int) -> _Ranges:
        """A value's ranges where it crosses the end: `tiling.scale_lines` for arrays."""
        lines, length = self.lines[axis], value.tensor.shape[2 + axis]
        reference = lines[:, -1:]
        scaled = (2 * lines * length + reference) // (2 * reference)
        is_cut = (np.diff(scaled) > 0).all(axis=1) | (self.starts > value.producer)
        self.is_legal &= is_cut
        return _Ranges(scaled[:, :-1], scaled[:, 1:])

    def _walk(self) -> tuple[Floats, Floats]:
        """Seconds of computing and bytes of inputs, each (starts, tiles); starts that are given up become illegal."""
        sizes = find_sizes(self.graph, (op for x in self.graph.layers[self.first : self.stop] for op in x.spatial))
        map_bytes = {value.name: _map_bytes(value) for value in self.graph.values if value.name in sizes}
        needs: Needs = ({}, {})
        compute, sent = (np.zeros((len(self.starts), len(self.nodes))) for _ in range(2))
        alone_s = np.asarray(self.nodes[0].layer_s[self.first : self.stop])[::-1].cumsum()[::-1]
        best_s, best_row = 0.0, len(self.starts)
        for row in range(len(self.starts) - 1, -1, -1):
            index = self.first + row
            # (operations, 2, tiles)
            seconds = np.array([op_seconds(self.graph, node, index) for node in self.nodes]).transpose(1, 2, 0)
            for op, (fixed_s, whole_s) in zip(self.graph.layers[index].spatial[::-1], seconds[::-1], strict=True):
                rows, cols = (self._made(op.name, axis, needs[axis]) for axis in (0, 1))
                area = _areas(rows, cols)[: row + 1] / (op.size[0] * op.size[1])
                compute[: row + 1] += fixed_s + area * whole_s
                _read(op, (rows, cols), sizes, needs)
            for name in needs[0]:
                rows, cols = (need[name].at(row) for need in needs)
                sent[row] += _areas(rows, cols)[0] * map_bytes[name]
            gain_s = alone_s[row] - compute[row].max()
            if not self.is_legal[row]:  # its lines meet, so its times say nothing
                best_row = row
            elif gain_s > best_s:
                best_s, best_row = gain_s, row
            elif best_row - row > PATIENCE:
                self.is_legal[:row] = False
                break
        sent[:, 0] = 0.0
        return compute, sent

    def _made(self, name: str, axis: int, need: dict[str, _Ranges]) -> _Ranges:
        """What is made of a map: all that is read of it, and what crosses the end."""
        read = need.pop(name, None)
        if name in self.cuts:
            return self.cuts[name][axis].joined(read)
        assert read is not None, f"nobody reads {name}"
        return read


def _read(
    op: SpatialOp,
    made: tuple[_Ranges, _Ranges],
    sizes: dict[str, tuple[int, int]],
    needs: Needs,
) -> None:
    """Add what an operation reads to what is needed."""
    for name in op.reads:
        for axis in (0, 1):
            wanted = made[axis].through(op.windows[axis], sizes[name][axis])
            needs[axis][name] = wanted.joined(needs[axis].get(name))


def _areas(rows: _Ranges, cols: _Ranges) -> Floats:
    """Positions per tile, row by row: (starts, tiles)."""
    areas: Floats = (rows.length[:, :, None] * cols.length[:, None, :]).reshape(len(rows.low), -1).astype(float)
    return areas


def _map_bytes(value: ValueSpec) -> int:
    """Bytes of one position of a map."""
    return value.tensor.shape[0] * value.tensor.shape[1] * value.tensor.itemsize


def _lines(shares: Floats, length: int) -> Ints:
    """Cut positions at the shares' running sums, the ends included: (starts, bands + 1)."""
    edges = np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(axis=1)], axis=1)
    lines: Ints = np.rint(edges / edges[:, -1:] * length).astype(np.int64)
    return lines
