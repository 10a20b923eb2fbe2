"""Which spans to cut into tiles, and by which grid: a search over all of them.

Papers: D3 (VSM). As reconstructed: consecutive tileable layers on the edge run on several edge nodes. Differs: D3's rule
for grouping layers is not known; here a dynamic programme over the places where a span may start and stop picks the
groups, so a group ends where redundant work, scatter and gather cost more than the nodes win. Behind a span its map is
either whole at the head or left where it is, for a next span under the same grid. Unequal nodes get unequal tiles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import PlanError
from runtime.planning.tile_sweeps import APART, WHOLE, Into, Place, TileSearch, cut_lines
from runtime.planning.tiles import TileCost, TileNode, cost_tiles
from runtime.planning.tiling import find_sizes, find_spans, plan_tiles
from runtime.types import GraphSpec, TileSpan

SHIFT_ROUNDS = 3
"""How often lines are gone over at most: a line that moves changes what its neighbours are best at. Guess."""


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
    found = dict.fromkeys(_find_spans(graph, nodes, start, stop))
    return min((_as_choice(graph, spans, nodes, start, stop) for spans in found), key=lambda choice: choice.total_s)


def _as_choice(
    graph: GraphSpec, spans: Sequence[TileSpan], nodes: Sequence[TileNode], start: int, stop: int
) -> TileChoice:
    """Some spans, with lines where these nodes want them, and what they are expected to take."""
    head_s = nodes[0].layer_s
    shifted = _shift_lines(graph, spans, nodes)
    costs = cost_tiles(graph, shifted, nodes)
    inside = {layer for span in shifted for layer in range(span.start, span.stop)}
    alone_s = math.fsum(head_s[layer] for layer in range(start, stop) if layer not in inside)
    return TileChoice(
        shifted, costs, alone_s + math.fsum(cost.total_s for cost in costs), math.fsum(head_s[start:stop])
    )


@dataclass(slots=True)
class _Best:
    """Least seconds until the layers `[start, j)` are done and the map is at one place, for every j so far."""

    seconds: list[float]
    steps: list[Into | None]  # the span that ends there; None: the layer before runs on the head


def _find_spans(graph: GraphSpec, nodes: Sequence[TileNode], start: int, stop: int) -> tuple[tuple[TileSpan, ...], ...]:
    """The best spans if maps are left where they are between them, the best if not, and none."""
    head_s = nodes[0].layer_s
    search = TileSearch(graph, nodes)
    is_at_head = {WHOLE: True, APART: True, **dict.fromkeys(search.grids, False)}
    best = {place: _Best([0.0 if here else math.inf], [None]) for place, here in is_at_head.items()}
    stretches = find_spans(graph)
    for j in range(start + 1, stop + 1):
        for place, own in best.items():
            own.seconds.append(own.seconds[-1] + head_s[j - 1] if is_at_head[place] else math.inf)
            own.steps.append(None)
        for stretch in stretches:
            if j in stretch.stops:
                first = max(stretch.start, start)
                before_s = {place: own.seconds[first - start : j - start] for place, own in best.items()}
                for place, step in search.best_into(first, j, before_s).items():
                    if step.seconds < best[place].seconds[-1]:
                        best[place].seconds[-1], best[place].steps[-1] = step.seconds, step
    return _walk_back(best, WHOLE, start, stop), _walk_back(best, APART, start, stop), ()


def _walk_back(best: Mapping[Place, _Best], place: Place, start: int, stop: int) -> tuple[TileSpan, ...]:
    """The spans that led to the end."""
    spans: list[TileSpan] = []
    j = stop
    while j > start:
        step = best[place].steps[j - start]
        if step is None:
            j -= 1
        else:
            spans.append(step.span)
            place, j = step.source, step.span.start
    return tuple(reversed(spans))


def fit_lines(graph: GraphSpec, spans: Sequence[TileSpan], nodes: Sequence[TileNode]) -> tuple[TileSpan, ...]:
    """Cut spans where these nodes want it, whichever they were cut for: the same layers and grids, the head first.

    The spans as they are where that is no slower: speeds say nothing of links.
    """
    fitted = _shift_lines(graph, [_fit_to_speeds(graph, span, nodes) for span in spans], nodes)
    return min(tuple(spans), fitted, key=lambda each: sum_costs(graph, each, nodes))


def _fit_to_speeds(graph: GraphSpec, span: TileSpan, nodes: Sequence[TileNode]) -> TileSpan:
    num_rows, num_cols = len(span.row_lines) + 1, len(span.col_lines) + 1
    speed = [1.0 / max(math.fsum(node.tiled_s[span.start : span.stop]), 1e-12) for node in nodes[: num_rows * num_cols]]
    shares = np.reshape(speed, (1, num_rows, num_cols))
    size = find_sizes(graph, graph.layers[span.stop - 1].spatial)[graph.layers[span.stop - 1].outputs[-1]]
    rows, cols = (
        cut_lines(own, length)[0, 1:-1] for own, length in zip((shares.sum(2), shares.sum(1)), size, strict=True)
    )
    fitted = replace(span, row_lines=tuple(rows.tolist()), col_lines=tuple(cols.tolist()))
    try:
        plan_tiles(graph, fitted)
    except PlanError:  # lines that meet: a small map, and speeds far apart
        return span
    return fitted


def sum_costs(graph: GraphSpec, spans: Sequence[TileSpan], nodes: Sequence[TileNode]) -> float:
    """Seconds of some spans, one after the other.

    Raises:
        PlanError: as `cost_tiles`.
    """
    return math.fsum(cost.total_s for cost in cost_tiles(graph, spans, nodes))


def _shift_lines(graph: GraphSpec, spans: Sequence[TileSpan], nodes: Sequence[TileNode]) -> tuple[TileSpan, ...]:
    """Move lines one by one as long as that helps: they were put where the speeds say, overlap not counted.

    Of a moved span itself and the spans next to it the costs are looked at.
    """
    shifted = list(spans)
    for _ in range(SHIFT_ROUNDS):
        has_moved = False
        for index in range(len(shifted)):
            low = max(index - 1, 0)
            before, after = shifted[low:index], shifted[index + 1 : index + 2]
            best = _shift_span(graph, before, shifted[index], after, nodes)
            has_moved |= best != shifted[index]
            shifted[index] = best
        if not has_moved:
            break
    return tuple(shifted)


def _shift_span(
    graph: GraphSpec,
    before: Sequence[TileSpan],
    span: TileSpan,
    after: Sequence[TileSpan],
    nodes: Sequence[TileNode],
) -> TileSpan:
    best_s = sum_costs(graph, [*before, span, *after], nodes)
    has_moved = True
    while has_moved:
        has_moved = False
        for moved in _neighbours(span):
            try:
                total_s = sum_costs(graph, [*before, moved, *after], nodes)
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
