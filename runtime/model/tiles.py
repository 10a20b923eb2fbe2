"""Running a span of layers tile by tile: the same operations on a region of every map.

A tile is a small graph of its own (`runtime.model.tile_graph`). So it runs as any segment does, with the same promises,
on a node that has nothing but the regions that it reads (`runtime.model.halo`).

Equal to the whole span within rounding, not bit for bit: kernels choose their order of summation by the shape. So other
kernels may be used too: see `runtime.model.kernels`.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableSequence

import torch

from runtime.model.graph import LayerGraph
from runtime.model.segment import Segment
from runtime.model.tile_graph import crop, make_tile_graph
from runtime.planning.tiling import Region, Tiling, plan_tiles
from runtime.types import TileSpan

CACHED_TILES = 256
"""Most tiles kept per graph."""

CACHED_PLANS = 4
"""Tiles are kept as long as their weights, which each has laid out for itself, are no more than this many times those of
the graph's convolutions: a plan has each once on a node, but for tiles that a head runs for others, and policies go back
and forth between a few plans. Guess."""


def slice_inputs(values: Mapping[str, torch.Tensor], regions: Mapping[str, Region]) -> dict[str, torch.Tensor]:
    """Cut regions out of whole maps, as views.

    Args:
        values: tensors by name, every name in `regions` among them; maps (batch, channels, rows, columns).
        regions: `Tile.inputs` or `Tile.outputs`.
    """
    return {name: crop(values[name], region) for name, region in regions.items()}


class TileSegment(Segment):
    """One tile of a span: a segment that takes the slices and makes this tile's part of every output."""

    def __init__(self, graph: LayerGraph, tiling: Tiling, index: int) -> None:
        tile = tiling.tiles[index]
        super().__init__(make_tile_graph(graph, tiling, tile), tiling.stage)
        self._crops = {}
        for name, region in tile.outputs.items():
            if region != tile.ops[name].makes:
                self._crops[name] = region.within(tile.ops[name].makes)

    def run_timed(
        self,
        values: Mapping[str, torch.Tensor],
        *,
        should_stop: Callable[[], bool] | None = None,
        layer_s: MutableSequence[float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Run the layers on this tile as `Segment.run_timed` does, and cut off what only the tile itself needed."""
        made, seconds = super().run_timed(values, should_stop=should_stop, layer_s=layer_s, clock=clock)
        return {name: crop(x, self._crops[name]) if name in self._crops else x for name, x in made.items()}, seconds


class TileCache:
    """Tiles of one graph, planned and built when first asked for. Safe for threads."""

    def __init__(self, graph: LayerGraph) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._tilings: OrderedDict[TileSpan, Tiling] = OrderedDict()
        self._tiles: OrderedDict[tuple[TileSpan, int], TileSegment] = OrderedDict()
        self._weight_bytes = [sum(op.weight_bytes for op in layer.spatial) for layer in graph.spec.layers]
        self._held_bytes = 0

    def tiling(self, span: TileSpan) -> Tiling:
        """The regions of a span's tiles.

        Raises:
            PlanError: when the graph has no such span or the lines do not cut it.
        """
        with self._lock:
            return self._tiling(span)

    def get(self, span: TileSpan, index: int) -> TileSegment:
        """The segment that runs one tile.

        Raises:
            PlanError: when the graph has no such span or the lines do not cut it.
        """
        with self._lock:
            tile = self._tiles.get((span, index))
            if tile is None:
                tile = self._tiles[span, index] = TileSegment(self._graph, self._tiling(span), index)
                self._held_bytes += self._weigh(span)
                self._trim()
            self._tiles.move_to_end((span, index))
        return tile

    def _tiling(self, span: TileSpan) -> Tiling:
        if span not in self._tilings:
            self._tilings[span] = plan_tiles(self._graph.spec, span)
            if len(self._tilings) > CACHED_TILES:
                self._tilings.popitem(last=False)
        return self._tilings[span]

    def _weigh(self, span: TileSpan) -> int:
        """Bytes of the weights that each tile of a span holds."""
        return sum(self._weight_bytes[span.start : span.stop])

    def _trim(self) -> None:
        """Forget what was used longest ago, but for the newest."""
        most_bytes = CACHED_PLANS * sum(self._weight_bytes)
        while len(self._tiles) > 1 and (self._held_bytes > most_bytes or len(self._tiles) > CACHED_TILES):
            (span, _), _ = self._tiles.popitem(last=False)
            self._held_bytes -= self._weigh(span)
