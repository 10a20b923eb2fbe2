"""Tiled spans that follow each other: between them only the borders of tiles change hands (halo exchange).

Papers: D3 (VSM) gathers the map behind every span at one node and cuts it anew. Differs: where the next span begins
where this one stops, on as many tiles, a node keeps its part of the map and is given what its next tile reads beyond it.
So less crosses, and a span can be short: less redundant work.

Integers only, as in `runtime.planning.tiling`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from runtime.errors import PlanError
from runtime.planning.problem import ById, Stage, find_route, make_stage
from runtime.planning.tiling import Region, Tiling, plan_tiles
from runtime.types import GraphSpec, Plan, Tier, TileSpan

HEAD_TILE = 0
"""The tile that the head runs: `Plan.edge_nodes[0]` is the head."""

MAX_TILES = 16
"""A grid of more is refused: overlap and messages eat what it wins long before, and what a node has to work out for a grid
grows with its square."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a value that crosses between the head and another node."""

    name: str  # of the value
    region: Region
    source: int  # the tile that has it; the head has all that was made before the chain

    @property
    def label(self) -> str:
        """What it is called on the wire: `conv1[12:13,0:56]`."""
        (top, bottom), (left, right) = self.region.rows, self.region.cols
        return f"{self.name}[{top}:{bottom},{left}:{right}]"


@dataclass(frozen=True, slots=True)
class Step:
    """One span of a chain."""

    tiling: Tiling
    takes: tuple[tuple[Piece, ...], ...]
    """By tile: what it needs and does not have. What comes from other nodes comes by way of the head."""
    gives: tuple[tuple[Piece, ...], ...]
    """By tile: what others take of it for the next step; after the last step its part of what the chain makes."""
    take_bytes: tuple[int, ...]
    """By tile: raw bytes of what it takes."""
    give_bytes: tuple[int, ...]
    keeps: frozenset[str]
    """Values that are still needed after it."""

    def is_early(self, tile: int) -> bool:
        """Whether all that a tile takes is the head's: it can be sent before other tiles of the step before are back."""
        return all(piece.source == HEAD_TILE for piece in self.takes[tile])


@dataclass(frozen=True, slots=True)
class Chain:
    """Spans without a gap between them, on as many tiles. One span alone is a chain, too."""

    stage: Stage  # what it needs and makes as a whole
    steps: tuple[Step, ...]

    @property
    def spans(self) -> tuple[TileSpan, ...]:
        """The spans, in order."""
        return tuple(step.tiling.span for step in self.steps)

    @property
    def num_tiles(self) -> int:
        """Tiles of every span."""
        return len(self.steps[0].tiling.tiles)


@dataclass(frozen=True, slots=True)
class Part:
    """Some layers of a stage, which run one after the other: as one segment, or tile by tile."""

    stage: Stage
    chain: Chain | None = None
    first: int = 0  # index of the chain's first span in `Plan.tiles`


def find_chains(spans: Sequence[TileSpan]) -> tuple[tuple[TileSpan, ...], ...]:
    """Put spans together that follow each other without a gap, on as many tiles."""
    chains: list[list[TileSpan]] = []
    for span in spans:
        last = chains[-1][-1] if chains else None
        if last is not None and last.stop == span.start and last.num_tiles == span.num_tiles:
            chains[-1].append(span)
        else:
            chains.append([span])
    return tuple(map(tuple, chains))


def plan_chain(graph: GraphSpec, spans: Sequence[TileSpan]) -> Chain:
    """Work out what every tile of a chain is given and gives, span by span; cached per graph and spans.

    Args:
        graph: the model.
        spans: one of `find_chains`.

    Raises:
        PlanError: when a span is not tileable in this graph, lines do not cut every output, or spans are no chain.
    """
    return _plan_chain(ById(graph), tuple(spans))


@lru_cache(maxsize=1024)
def _plan_chain(by_id: ById, spans: tuple[TileSpan, ...]) -> Chain:
    if len(find_chains(spans)) != 1:
        raise PlanError(
            f"expected spans that follow each other without a gap, on as many tiles, got "
            f"{[span.describe() for span in spans]}; see find_chains"
        )
    graph = by_id.spec
    tilings = [plan_tiles(graph, span) for span in spans]
    stage = make_stage(graph, Tier.EDGE, range(spans[0].start, spans[-1].stop))
    held: list[dict[str, Region]] = [{} for _ in tilings[0].tiles]
    shares: dict[str, tuple[Region, ...]] = {}
    takes = [_take(tiling, held, shares) for tiling in tilings]
    makes = [tuple(Piece(name, shares[name][tile], tile) for name in stage.makes) for tile in range(len(held))]
    steps = []
    for index, tiling in enumerate(tilings):
        gives = _find_gives(takes[index + 1]) if index + 1 < len(tilings) else tuple(makes)
        later = {name for other in tilings[index + 1 :] for name in other.stage.needs}
        take_bytes, give_bytes = (_count_bytes(graph, pieces) for pieces in (takes[index], gives))
        steps.append(Step(tiling, takes[index], gives, take_bytes, give_bytes, frozenset(later.union(stage.makes))))
    return Chain(stage, tuple(steps))


def _take(
    tiling: Tiling, held: list[dict[str, Region]], shares: dict[str, tuple[Region, ...]]
) -> tuple[tuple[Piece, ...], ...]:
    """What every tile needs and does not have; note what it has behind this step."""
    takes = []
    for index, tile in enumerate(tiling.tiles):
        pieces: list[Piece] = []
        for name, region in tile.inputs.items():
            if name not in shares and index == HEAD_TILE:
                continue  # it has the whole of what was made before the chain
            own = held[index].get(name)
            for strip in subtract(region, own):
                pieces += _find_owners(name, strip, shares)
            held[index][name] = widen(own, region)
        takes.append(tuple(pieces))
    for name in tiling.stage.makes:
        shares[name] = tuple(tile.outputs[name] for tile in tiling.tiles)
        for own_regions, region in zip(held, shares[name], strict=True):
            own_regions[name] = region
    return tuple(takes)


def _find_owners(name: str, strip: Region, shares: Mapping[str, tuple[Region, ...]]) -> list[Piece]:
    """Who has what of a rectangle."""
    if name not in shares:
        return [Piece(name, strip, HEAD_TILE)]
    parts = [(tile, intersect(strip, share)) for tile, share in enumerate(shares[name])]
    return [Piece(name, part, tile) for tile, part in parts if part is not None]


def _find_gives(takes: Sequence[Sequence[Piece]]) -> tuple[tuple[Piece, ...], ...]:
    """What each tile gives, if the tiles take this."""
    pieces = dict.fromkeys(piece for taken in takes for piece in taken)
    return tuple(tuple(piece for piece in pieces if piece.source == tile) for tile in range(len(takes)))


def _count_bytes(graph: GraphSpec, by_tile: Sequence[Sequence[Piece]]) -> tuple[int, ...]:
    per_position = {value.name: value.tensor.nbytes // math.prod(value.tensor.shape[2:]) for value in graph.values}
    return tuple(sum(per_position[piece.name] * piece.region.area for piece in pieces) for pieces in by_tile)


def intersect(first: Region, second: Region) -> Region | None:
    """The rectangle that two have in common; None where they have none."""
    rows = max(first.rows[0], second.rows[0]), min(first.rows[1], second.rows[1])
    cols = max(first.cols[0], second.cols[0]), min(first.cols[1], second.cols[1])
    return Region(rows, cols) if rows[0] < rows[1] and cols[0] < cols[1] else None


def subtract(region: Region, inner: Region | None) -> list[Region]:
    """What a rectangle has beyond another one: up to four rectangles, no position twice."""
    common = None if inner is None else intersect(region, inner)
    if common is None:
        return [region]
    (top, bottom), (left, right) = common.rows, common.cols
    around = (
        Region((region.rows[0], top), region.cols),
        Region((bottom, region.rows[1]), region.cols),
        Region(common.rows, (region.cols[0], left)),
        Region(common.rows, (right, region.cols[1])),
    )
    return [part for part in around if part.area]


def widen(own: Region | None, region: Region) -> Region:
    """What is kept of a value of which one rectangle was there and another is needed: the second if it holds the first."""
    return region if own is None or intersect(own, region) == own else own


# --- a stage with chains ------------------------------------------------------------------------------------------------


def find_parts(graph: GraphSpec, plan: Plan, input_kind: str) -> tuple[Part, ...]:
    """The parts of the edge's share under a plan, in the order in which they run; cached per graph, plan and kind.

    Raises:
        PlanError: as `plan_parts`.
    """
    return _parts(ById(graph), find_route(graph, plan, input_kind).edge, plan.tiles)


@lru_cache(maxsize=256)
def _parts(graph: ById, stage: Stage, spans: tuple[TileSpan, ...]) -> tuple[Part, ...]:
    return plan_parts(graph.spec, stage, spans)


def plan_parts(graph: GraphSpec, stage: Stage, spans: Iterable[TileSpan]) -> tuple[Part, ...]:
    """Split a stage into what runs before, in, between and after its tiled spans.

    Args:
        graph: the model.
        stage: layers of one tier.
        spans: ascending, inside the stage.

    Returns:
        Parts in the order in which they run; each needs what the parts before it make, or the stage needs.

    Raises:
        PlanError: when a span is not tileable, not inside the stage, or overlaps the one before it.
    """
    parts: list[Part] = []
    done = first = 0
    for chain in find_chains(_check_order(stage, spans)):
        before = [layer for layer in stage.layers if done <= layer < chain[0].start]
        if before:
            parts.append(Part(make_stage(graph, stage.tier, before)))
        planned = plan_chain(graph, chain)
        parts.append(Part(planned.stage, planned, first))
        done, first = chain[-1].stop, first + len(chain)
    after = [layer for layer in stage.layers if layer >= done]
    if after:
        parts.append(Part(make_stage(graph, stage.tier, after)))
    return tuple(parts)


def _check_order(stage: Stage, spans: Iterable[TileSpan]) -> list[TileSpan]:
    own, done, checked = frozenset(stage.layers), 0, []
    for span in spans:
        if span.start < done or not own.issuperset(range(span.start, span.stop)):
            raise PlanError(
                f"expected tiled spans in ascending order, inside the layers {_describe(stage.layers)} of "
                f"{stage.tier.label}, got [{span.start}, {span.stop}); move it or give those layers to the edge"
            )
        done = span.stop
        checked.append(span)
    return checked


def _describe(layers: Sequence[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "(none)"
