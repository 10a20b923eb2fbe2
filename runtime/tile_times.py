"""Timing the kernels that tiles take: every tileable stretch of a graph as one tile that is the whole map."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from runtime.model.graph import LayerGraph
from runtime.model.kernels import is_packable
from runtime.model.tiles import TileSegment, slice_inputs
from runtime.planning.tiling import TileableSpan, find_spans, plan_tiles
from runtime.types import TileSpan


def find_timed(graph: LayerGraph) -> tuple[TileableSpan, ...]:
    """The tileable stretches whose tiles take other kernels than the whole model does."""
    seen = graph.seen.values()
    return find_spans(graph.spec) if any(is_packable(each.dtype, graph.device) for each in seen) else ()


class TileTimer:
    """One stretch as one tile, and the least seconds it was seen to take."""

    def __init__(self, graph: LayerGraph, stretch: TileableSpan, values: Mapping[str, torch.Tensor]) -> None:
        """Build the tile.

        Args:
            graph: the model.
            stretch: which layers.
            values: of one run of the whole model.
        """
        tiling = plan_tiles(graph.spec, TileSpan(stretch.start, stretch.stop, (), ()))
        self.layers = tiling.stage.layers
        self.least_s = math.inf
        self._tile = TileSegment(graph, tiling, 0)
        self._given = slice_inputs(values, tiling.tiles[0].inputs)
        self._layer_s = [math.inf] * graph.num_layers
        self._tile.run(self._given)

    def run(self, clock: Callable[[], float]) -> None:
        """Time it once more."""
        now_s = [math.inf] * len(self._layer_s)
        self.least_s = min(self.least_s, self._tile.run_timed(self._given, layer_s=now_s, clock=clock)[1])
        self._layer_s = list(map(min, self._layer_s, now_s))

    def seconds(self) -> dict[int, float]:
        """Seconds by layer; they add up to the whole run."""
        scale = self.least_s / math.fsum(self._layer_s[layer] for layer in self.layers)
        return {layer: scale * self._layer_s[layer] for layer in self.layers}


def with_tiles(layer_s: Sequence[float], timers: Iterable[TileTimer]) -> tuple[float, ...]:
    """Layer times with those of tiles' kernels where they were measured; empty where none was."""
    found: dict[int, float] = {}
    for timer in timers:
        found |= timer.seconds()
    return tuple(found.get(layer, seconds) for layer, seconds in enumerate(layer_s)) if found else ()
