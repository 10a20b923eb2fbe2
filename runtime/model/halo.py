"""The tiles of a chain of spans from step to step: each keeps its part of every map and is given borders of others.

What goes where is worked out in `runtime.planning.chains`; here are the tensors.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from runtime.errors import TensorMismatch
from runtime.model.graph import LayerGraph
from runtime.model.layout import dense_strides
from runtime.model.tile_graph import crop
from runtime.model.tiles import TileSegment
from runtime.planning.chains import HEAD_TILE, Chain, Piece, Step, intersect, plan_chain, widen
from runtime.planning.tiling import Region
from runtime.types import TileSpan

Pieces = Mapping[str, torch.Tensor]
"""Tensors by `Piece.label`."""


class TileState:
    """What one tile of a chain has: a rectangle of each value that it still needs. Not safe for threads.

    Args:
        graph: the traced model.
        tile: which.
        values: whole maps that were made before the chain; the tile of the head has them.
    """

    def __init__(self, graph: LayerGraph, tile: int, values: Mapping[str, torch.Tensor] | None = None) -> None:
        self.tile = tile
        self._graph = graph
        self._has: dict[str, tuple[Region, torch.Tensor]] = {}
        for name, value in (values or {}).items():
            rows, cols = value.shape[2:]
            self._has[name] = Region((0, rows), (0, cols)), value

    @property
    def names(self) -> tuple[str, ...]:
        """The values of which something is kept."""
        return tuple(self._has)

    def take(self, step: Step, pieces: Pieces) -> dict[str, torch.Tensor]:
        """Put together what this tile's share of a step reads.

        Args:
            step: which; the one behind those taken so far.
            pieces: at least `step.takes[tile]`, in any memory order.

        Returns:
            The inputs of the tile, by name of the value. Nothing that was given is changed when they are used.

        Raises:
            TensorMismatch: when a piece is missing or has another shape or dtype than the graph says.
        """
        taken: dict[str, list[Piece]] = {}
        for piece in step.takes[self.tile]:
            check_piece(self._graph, piece, pieces.get(piece.label))
            taken.setdefault(piece.name, []).append(piece)
        inputs = {}
        for name, region in step.tiling.tiles[self.tile].inputs.items():
            own = self._has.get(name)
            inputs[name] = value = self._join(own, region, taken.get(name, ()), pieces)
            if widen(None if own is None else own[0], region) == region:
                self._has[name] = region, value
        return inputs

    def _join(
        self, own: tuple[Region, torch.Tensor] | None, region: Region, taken: Sequence[Piece], pieces: Pieces
    ) -> torch.Tensor:
        """A rectangle of a value, of what is here and what came."""
        if own is None:
            return pieces[taken[0].label]  # it is made before the chain, so the head had all of it
        if not taken:
            return crop(own[1], region.within(own[0]))
        shape = (*own[1].shape[:2], *region.size)
        strides = dense_strides(own[1].stride(), own[1].shape, shape)
        value = torch.empty_strided(shape, strides, dtype=own[1].dtype, device=self._graph.device)
        _copy_common(value, region, own[1], own[0])
        for piece in taken:
            _copy_common(value, region, pieces[piece.label], piece.region)
        return value

    def keep(self, step: Step, made: Mapping[str, torch.Tensor]) -> None:
        """Take what this tile made in a step, and forget what is needed no more."""
        outputs = step.tiling.tiles[self.tile].outputs
        for name, value in made.items():
            self._has[name] = outputs[name], value
        for name in [name for name in self._has if name not in step.keeps]:
            del self._has[name]

    def give(self, pieces: Iterable[Piece]) -> dict[str, torch.Tensor]:
        """Cut pieces out: views, by label."""
        given = {}
        for piece in pieces:
            region, value = self._has[piece.name]
            given[piece.label] = crop(value, piece.region.within(region))
        return given


def _copy_common(value: torch.Tensor, region: Region, part: torch.Tensor, inside: Region) -> None:
    """Copy what a part of a map has of a rectangle into it."""
    common = intersect(region, inside)
    if common is not None:
        crop(value, common.within(region)).copy_(crop(part, common.within(inside)))


def check_piece(graph: LayerGraph, piece: Piece, tensor: torch.Tensor | None) -> None:
    """Check a piece that another node may have made.

    Raises:
        TensorMismatch: when it is missing or has another shape or dtype than its region.
    """
    seen = graph.seen[piece.name]
    shape = (*seen.shape[:2], *piece.region.size)
    if tensor is None or tensor.shape != shape or tensor.dtype != seen.dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise TensorMismatch(
            f"expected {piece.label} of tile {piece.source} as {seen.dtype} of shape {shape}, got {got}"
        )


def assemble(graph: LayerGraph, chain: Chain, parts: Sequence[Pieces]) -> dict[str, torch.Tensor]:
    """Put together what the tiles of a chain made.

    Args:
        graph: the traced model.
        chain: the spans.
        parts: by tile, the pieces that it gives after the last step.

    Returns:
        What the chain makes, on the graph's device, in the memory order of the first part.

    Raises:
        TensorMismatch: when a part is missing or has another shape or dtype than its region.
    """
    if len(parts) != chain.num_tiles:
        raise TensorMismatch(f"expected the outputs of {chain.num_tiles} tiles, got {len(parts)}")
    tensors = {value.name: value.tensor for value in graph.spec.values}
    whole: dict[str, torch.Tensor] = {}
    for pieces, part in zip(chain.steps[-1].gives, parts, strict=True):
        for piece in pieces:
            tensor = part.get(piece.label)
            check_piece(graph, piece, tensor)
            assert tensor is not None
            if piece.name not in whole:
                shape = tensors[piece.name].shape
                strides = dense_strides(tensor.stride(), tensor.shape, shape)
                whole[piece.name] = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=graph.device)
            crop(whole[piece.name], piece.region).copy_(tensor)
    return whole


def run_tiled(
    graph: LayerGraph, spans: Sequence[TileSpan], values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run a chain of spans tile by tile in this process; each tile gets exactly the pieces that would cross to it.

    Args:
        graph: the traced model.
        spans: each begins where the one before it stops, on as many tiles.
        values: what the chain needs, by name; more does no harm.

    Returns:
        What the chain makes.

    Raises:
        PlanError: when the graph has no such span or the lines do not cut it.
        TensorMismatch: when a value is missing or does not fit.
    """
    chain = plan_chain(graph.spec, spans)
    missing = [name for name in chain.stage.needs if name not in values]
    if missing:
        raise TensorMismatch(f"expected the values {list(chain.stage.needs)}, got {sorted(values)}: no {missing[0]}")
    given = {name: values[name] for name in chain.stage.needs}
    states = [TileState(graph, tile, given if tile == HEAD_TILE else None) for tile in range(chain.num_tiles)]
    for step in chain.steps:
        inputs = []
        for state in states:
            pieces: dict[str, torch.Tensor] = {}
            for piece in step.takes[state.tile]:
                pieces |= states[piece.source].give([piece])
            inputs.append(state.take(step, pieces))
        for state, own in zip(states, inputs, strict=True):
            state.keep(step, TileSegment(graph, step.tiling, state.tile).run(own))
    last = chain.steps[-1]
    return assemble(graph, chain, [state.give(last.gives[state.tile]) for state in states])
