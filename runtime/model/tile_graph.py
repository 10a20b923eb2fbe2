"""A tile as a graph: a span's layers on one rectangle of every map.

Operations whose padding lies inside the map lose it, what is read in a smaller region than it was made in is cropped,
every shape and layout is the region's.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch.nn import functional

from runtime.model.fusion import Fusion, find_fusions, fold_norm
from runtime.model.graph import LayerGraph
from runtime.model.kernels import is_packable, pack_convolution
from runtime.model.layout import dense_strides
from runtime.model.observe import Seen
from runtime.model.program import Op, Ref, map_refs
from runtime.model.windows import CONVOLUTIONS, POOLS, arguments, pair
from runtime.planning.tiling import OpTile, Region, Tile, Tiling
from runtime.types import GraphSpec, SpatialOp, TensorSpec, Window


def crop(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """A view of a rectangle of a map."""
    return tensor[:, :, slice(*region.rows), slice(*region.cols)]


def make_tile_graph(graph: LayerGraph, tiling: Tiling, tile: Tile) -> LayerGraph:
    """The graph in which the span's layers work on one tile; its other layers are those of the whole."""
    writer = _Writer(graph, tile)
    layers = list(graph.layers)
    for index in tiling.stage.layers:
        layers[index] = replace(layers[index], ops=tuple(writer.write_layer(index)))
    return replace(
        graph,
        spec=_tile_spec(graph.spec, tile),
        layers=tuple(layers),
        seen={**graph.seen, **writer.seen},
        memory={**graph.memory, **writer.memory},
        lineage={**graph.lineage, **writer.lineage},
    )


def _tile_spec(spec: GraphSpec, tile: Tile) -> GraphSpec:
    regions = {**{name: op.makes for name, op in tile.ops.items()}, **tile.inputs}
    values = []
    for value in spec.values:
        if value.name in regions:
            shape = (*value.tensor.shape[:2], *regions[value.name].size)
            value = replace(value, tensor=TensorSpec(shape, value.tensor.dtype, value.tensor.itemsize))
        values.append(value)
    return replace(spec, values=tuple(values))


class _Writer:
    """Rewrites a span's operations for one tile, in order."""

    def __init__(self, graph: LayerGraph, tile: Tile) -> None:
        self.graph = graph
        self.tile = tile
        self.seen: dict[str, Seen] = {}
        self.memory: dict[str, int] = {}
        self.lineage: dict[str, frozenset[str]] = {}
        self._fresh = count(1 + max(graph.memory.values(), default=0))
        self._crops: dict[tuple[str, Region], str] = {}
        self._fusions: dict[str, Fusion] = {}
        for name, region in tile.inputs.items():
            self._note(name, name, region)

    def write_layer(self, index: int) -> list[Op]:
        """A layer's operations as this tile runs them."""
        own, spec = self.graph.layers[index].ops, self.graph.spec.layers[index]
        self._fusions = find_fusions(own, spec.outputs, self.graph.constants)
        taken_in: set[str] = set()
        ops: list[Op] = []
        for op, spatial in zip(own, spec.spatial, strict=True):
            if op.name not in taken_in:
                ops += self._write(op, spatial)
                taken_in.update(self._fusion(op).followers)
        return ops

    def _fusion(self, op: Op) -> Fusion:
        """What a convolution takes in, where its weights are laid out beforehand."""
        found = self._fusions.get(op.name)
        if found is None or not is_packable(self.graph.seen[op.name].dtype, self.graph.device):
            return Fusion(op.name)
        return found

    def _write(self, op: Op, spatial: SpatialOp) -> list[Op]:
        """One operation as this tile runs it: crops, padding, itself."""
        share = self.tile.ops[op.name]
        self._note(op.name, op.name, share.makes)
        ops: list[Op] = []
        names = {}
        for name, region in zip(spatial.reads, share.reads, strict=True):
            names[name] = self._crop(name, region, op, ops)
        args, kwargs = map_refs((op.args, op.kwargs), lambda ref: Ref(names.get(ref.name, ref.name)))
        cropped = Op(op.name, op.target, args, kwargs, op.module)
        kind = op.op_name
        if kind in CONVOLUTIONS or kind in POOLS:
            self._slide(cropped, spatial, share, ops)
        else:
            ops.append(cropped)
        return ops

    def _crop(self, name: str, region: Region, op: Op, ops: list[Op]) -> str:
        """Name of a map's region; made by an operation of its own where more of the map is there."""
        own = self.tile.inputs[name] if name in self.tile.inputs else self.tile.ops[name].makes
        if own == region:
            return name
        made = self._crops.get((name, region))
        if made is None:
            made = self._crops[name, region] = f"{name}.crop{len(self._crops)}"
            ops.append(Op(made, partial(_crop_all, region=region.within(own)), (Ref(name),), {}, op.module))
            self._note(made, name, region)
            if name in self.graph.memory:
                self.memory[made] = self.graph.memory[name]
            self.lineage[made] = self.graph.lineage.get(name, frozenset())
        return made

    def _slide(self, op: Op, spatial: SpatialOp, share: OpTile, ops: list[Op]) -> None:
        """A convolution or pooling with the padding that this tile has, side by side."""
        if op.op_name == "avg_pool2d":
            ops.append(self._average(op, spatial, share, ops))
            return
        top, bottom, left, right = share.pads
        both = [min(top, bottom), min(left, right)]  # what the operation's own padding can give, without a copy
        rest = [left - both[1], right - both[1], top - both[0], bottom - both[0]]
        named = arguments(op)
        value = -float("inf") if op.op_name.startswith("max_pool") else 0.0
        source = self._pad(op, rest, value, ops)
        if op.op_name.startswith("max_pool"):
            args: tuple[Any, ...] = (named["kernel_size"], named["stride"], both, named["dilation"], False)
            ops.append(Op(op.name, op.target, (source, *args), {}, op.module))
        else:
            ops.append(self._convolve(op, source, both, (rest[2] + rest[3], rest[0] + rest[1]), share))

    def _convolve(self, op: Op, source: Ref, padding: list[int], padded: tuple[int, int], share: OpTile) -> Op:
        """A convolution with its weights laid out beforehand, where that can be."""
        named, constants = arguments(op), self.graph.constants
        stride, dilation, groups = named["stride"], named["dilation"], named["groups"]
        weight, bias = constants[named["weight"].name], named["bias"]
        if not is_packable(weight.dtype, weight.device):
            args = (source, named["weight"], bias, stride, padding, dilation, groups)
            return Op(op.name, torch.ops.aten.conv2d.default, args, {}, op.module)
        batch, (rows, cols) = self.graph.seen[op.name].shape[0], share.reads[0].size
        shape = (batch, weight.shape[1] * groups, rows + padded[0], cols + padded[1])
        bias = None if bias is None else constants[bias.name]
        fusion = self._fusion(op)
        if fusion.norm is not None:
            weight, bias = fold_norm(weight, bias, fusion.norm, constants)
        target = pack_convolution(weight, bias, pair(stride), padding, pair(dilation), groups, shape, fusion.after)
        self._note(fusion.name, fusion.name, share.makes)
        return Op(fusion.name, target, (source,), {}, op.module)

    def _average(self, op: Op, spatial: SpatialOp, share: OpTile, ops: list[Op]) -> Op:
        """An average whose divisor counts what it counts in the whole map."""
        named = arguments(op)
        kernel, stride, divisor = named["kernel_size"], named["stride"], named["divisor_override"]
        if divisor is None and any(share.pads):
            lengths = self.graph.seen[spatial.reads[0]].shape[2:]
            rows, cols = (
                _count(window, made, length, counts_padding=named["count_include_pad"])
                for window, made, length in zip(
                    spatial.windows, (share.makes.rows, share.makes.cols), lengths, strict=True
                )
            )
            divisors = torch.outer(rows, cols).to(self.graph.seen[op.name].dtype).to(self.graph.device)
            target: Callable[..., Any] = partial(_divided_sum, kernel=pair(kernel), stride=stride, divisors=divisors)
            args: tuple[Any, ...] = ()
        else:
            target, args = op.target, (kernel, stride, 0, False, True, divisor)
        top, bottom, left, right = share.pads
        return Op(op.name, target, (self._pad(op, [left, right, top, bottom], 0.0, ops), *args), {}, op.module)

    def _pad(self, op: Op, sides: list[int], value: float, ops: list[Op]) -> Ref:
        """What an operation reads, padded: left, right, top, bottom."""
        source = op.args[0]
        assert isinstance(source, Ref)
        if not any(sides):
            return source
        name = f"{op.name}.padded"
        ops.append(Op(name, partial(functional.pad, pad=sides, value=value), (source,), {}, op.module))
        self.memory[name] = next(self._fresh)
        return Ref(name)

    def _note(self, name: str, like: str, region: Region) -> None:
        """Note the layout of a region: dense; channels innermost, or dimensions in their order in the whole map."""
        seen = self.graph.seen.get(like)
        if seen is not None:  # a tuple of maps has no layout of its own
            shape = (*seen.shape[:2], *region.size)
            is_packed = is_packable(seen.dtype, self.graph.device)
            order = _CHANNELS_INNERMOST if is_packed else seen.stride
            self.seen[name] = replace(seen, shape=shape, stride=dense_strides(order, seen.shape, shape), offset=0)


_CHANNELS_INNERMOST = (4, 1, 3, 2)
"""Strides of maps (batch, channels, rows, columns), as far as their order goes."""


def _count(window: Window, made: tuple[int, int], length: int, *, counts_padding: bool) -> torch.Tensor:
    """Positions that an average divides by along one axis: those it reads, and the padding where that counts."""
    border = window.padding if counts_padding else 0
    starts = [index * window.stride - window.padding for index in range(*made)]
    return torch.tensor([min(x + window.kernel, length + border) - max(x, -border) for x in starts])


def _crop_all(maps: torch.Tensor | Sequence[torch.Tensor], region: Region) -> torch.Tensor | list[torch.Tensor]:
    """Crop a map, or each of those that an operation returned together."""
    return crop(maps, region) if isinstance(maps, torch.Tensor) else [crop(x, region) for x in maps]


def _divided_sum(
    x: torch.Tensor, *, kernel: tuple[int, int], stride: Sequence[int], divisors: torch.Tensor
) -> torch.Tensor:
    return functional.avg_pool2d(x, kernel, list(stride) or None, divisor_override=1) / divisors
