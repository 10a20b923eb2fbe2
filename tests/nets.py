"""Random networks of everything that can be tiled, as modules and as bare graphs, and random ways to cut them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn

from runtime.planning.tiling import TileableSpan, Tiling, find_sizes
from runtime.types import GraphSpec, LayerSpec, SpatialOp, TensorSpec, TileSpan, ValueSpec, Window

CHANNELS = 4

Step = tuple[str, tuple[int, ...]]
"""What to do to which of the maps so far: a kind, and numbers that it makes of what it will."""


class RandomNet(nn.Module):
    """Grows a list of maps; every step reads some of them and adds one. All of them reach the output."""

    def __init__(self, steps: list[Step], size: tuple[int, int], *, batch_norm: bool = True) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.calls: list[Callable[[list[torch.Tensor]], torch.Tensor]] = []
        self.sizes = [size]
        torch.manual_seed(0)
        for kind, numbers in [("conv", (0, 3, 3, 1, 1, 1, 1, 1, 0)), *steps]:
            self._add(kind, numbers)
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for call in self.calls:
            maps.append(call(maps))
        return self.head(sum((y.mean((2, 3)) for y in maps[1:]), torch.zeros(())))

    def _add(self, kind: str, numbers: tuple[int, ...]) -> None:
        a = numbers[0] % len(self.sizes) if self.calls else 0
        if kind in ("add", "add_", "cat", "swap", "gate"):
            a = max(a, 1)
            partners = [i for i in range(1, len(self.sizes)) if self.sizes[i] == self.sizes[a]]
            self._join(kind, a, partners[numbers[1] % len(partners)])
        elif kind in ("relu_", "norm", "scale"):
            self._follow(kind, max(a, 1) if self.calls else a)
        else:
            self._slide(kind, a, numbers)

    def _keep(self, part: nn.Module) -> nn.Module:
        self.parts.append(part)
        return part

    def _follow(self, kind: str, a: int) -> None:
        norm = self._keep(nn.BatchNorm2d(CHANNELS))
        with torch.no_grad():
            norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        scale = torch.linspace(0.5, 1.5, CHANNELS).view(1, CHANNELS, 1, 1)
        self.register_buffer(f"scale{len(self.calls)}", scale)
        name = f"scale{len(self.calls)}"
        calls: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
            "relu_": lambda maps: nn.functional.relu_(norm(maps[a]) - 0.1),
            "norm": lambda maps: nn.functional.silu(norm(maps[a])),
            "scale": lambda maps: maps[a] * getattr(self, name),
        }
        self.calls.append(calls[kind])
        self.sizes.append(self.sizes[a])

    def _join(self, kind: str, a: int, b: int) -> None:
        mix = self._keep(nn.Conv2d(2 * CHANNELS, CHANNELS, 1))
        calls: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
            "add": lambda maps: maps[a] + maps[b],
            "add_": lambda maps: (maps[a] * 0.5).add_(maps[b]).relu_(),
            "cat": lambda maps: mix(torch.cat([maps[a], maps[b]], 1)),
            "swap": lambda maps: torch.cat([maps[b].chunk(2, 1)[1], maps[a].chunk(2, 1)[0]], 1),
            "gate": lambda maps: maps[a] * torch.sigmoid(maps[b]),
        }
        self.calls.append(calls[kind])
        self.sizes.append(self.sizes[a])

    def _slide(self, kind: str, a: int, numbers: tuple[int, ...]) -> None:
        _, rows, cols, stride_rows, stride_cols, pad_rows, pad_cols, dilation, flag = numbers
        kernel, stride, dilation = (rows, cols), (stride_rows, stride_cols), 1 if kind == "avg" else dilation
        if kind == "conv":
            inside = 3 if a == 0 else CHANNELS
            groups = CHANNELS if a and flag % 3 == 0 else 1
            padding = (pad_rows % (dilation * (rows - 1) + 1), pad_cols % (dilation * (cols - 1) + 1))
            part: nn.Module = nn.Conv2d(inside, CHANNELS, kernel, stride, padding, dilation, groups)
        elif kind == "same":
            inside = 3 if a == 0 else CHANNELS
            part = nn.Conv2d(inside, CHANNELS, kernel, 1, "same", dilation)
        else:
            a = max(a, 1)
            padding = (min(pad_rows, rows // 2), min(pad_cols, cols // 2))
            part = (
                nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=flag % 2 == 1)
                if kind == "max"
                else nn.AvgPool2d(kernel, stride, padding, flag % 2 == 1, flag % 3 == 0, 5 if flag % 5 == 4 else None)
            )
        try:
            made = part(torch.zeros(1, 3 if a == 0 else CHANNELS, *self.sizes[a]))
        except RuntimeError:  # the map is too small for it
            return
        self._keep(part)
        self.calls.append(lambda maps: part(maps[a]))
        self.sizes.append((made.shape[2], made.shape[3]))


def steps() -> st.SearchStrategy[list[Step]]:
    """Steps of a random network."""
    small, side = st.integers(0, 20), st.integers(1, 7)
    sliding = st.tuples(
        st.sampled_from(["conv", "conv", "max", "avg", "same"]),
        st.tuples(
            small,
            side,
            side,
            st.integers(1, 3),
            st.integers(1, 3),
            st.integers(0, 5),
            st.integers(0, 5),
            st.integers(1, 2),
            small,
        ),
    )
    joining = st.tuples(
        st.sampled_from(["add", "add_", "cat", "swap", "gate", "relu_", "norm", "scale"]), st.tuples(small, small)
    )
    return st.lists(st.one_of(sliding, joining), min_size=3, max_size=9)


def taps(window: Window, position: int, length: int) -> set[int]:
    first = position * window.stride - window.padding
    return {x for k in range(window.kernel) if 0 <= (x := first + window.dilation * k) < length}


def follow(graph: GraphSpec, tiling: Tiling, tile: int, axis: int) -> dict[str, set[int]]:
    """Every position that a tile's outputs depend on, by name of the map."""
    span, outputs = tiling.span, tiling.tiles[tile].outputs
    ops = [op for layer in graph.layers[span.start : span.stop] for op in layer.spatial]
    sizes = find_sizes(graph, ops)
    need = {name: set(range(*(region.rows, region.cols)[axis])) for name, region in outputs.items()}
    for op in reversed(ops):
        for name in op.reads:
            window, length = op.windows[axis], sizes[name][axis]
            is_broadcast = length == 1 and window == Window()  # a gate: its one position is read for all
            found = {x for i in need[op.name] for x in taps(window, 0 if is_broadcast else i, length)}
            need[name] = need.get(name, set()) | found
    return need


# --- bare graphs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """Windows to choose from, and the sizes of the input."""

    kernel: int = 7
    stride: int = 3
    dilation: int = 2


ANY = Sides()


@st.composite
def spatial_graphs(draw: st.DrawFn, sides: Sides = ANY) -> GraphSpec:
    """A random graph of tileable layers; each reads one map through a window, or joins maps of one size."""
    shapes = {"x": (draw(st.integers(8, 40)), draw(st.integers(8, 40)))}
    layers: list[tuple[SpatialOp, tuple[str, ...]]] = []
    for index in range(draw(st.integers(1, 8))):
        name = f"v{index}"
        source = draw(st.sampled_from(sorted(shapes)))
        equal = sorted(other for other in shapes if shapes[other] == shapes[source] and other != source)
        if equal and draw(st.booleans()):
            op = SpatialOp(name, (source, draw(st.sampled_from(equal))), shapes[source], flops=10.0)
        else:
            windows, size = zip(*(draw(_windows(length, sides)) for length in shapes[source]), strict=True)
            op = SpatialOp(name, (source,), size, windows, flops=100.0 * size[0] * size[1])
        shapes[name] = op.size
        layers.append((op, op.reads))
    return spatial_graph(shapes["x"], [op for op, _ in layers])


@st.composite
def _windows(draw: st.DrawFn, length: int, sides: Sides) -> tuple[Window, int]:
    kernel, dilation = draw(st.integers(1, min(sides.kernel, length))), draw(st.integers(1, sides.dilation))
    extent = dilation * (kernel - 1) + 1
    padding = draw(st.integers(0, extent - 1))
    if length + 2 * padding < extent:
        kernel, dilation, padding, extent = 1, 1, 0, 1
    stride = draw(st.integers(1, sides.stride))
    return Window(kernel, stride, padding, dilation), (length + 2 * padding - extent) // stride + 1


def spatial_graph(size: tuple[int, int], ops: list[SpatialOp], *, channels: int = 4) -> GraphSpec:
    """A graph with one layer per operation; what nobody reads is an output."""
    consumers: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for name in op.reads:
            consumers.setdefault(name, []).append(index)

    def value(name: str, producer: int, shape: tuple[int, int]) -> ValueSpec:
        readers = tuple(sorted(set(consumers.get(name, ()))))
        return ValueSpec(name, producer, readers, TensorSpec((1, channels, *shape), "float32", 4), not readers)

    values = [value("x", -1, size), *(value(op.name, index, op.size) for index, op in enumerate(ops))]
    layers = tuple(LayerSpec(op.name, "conv", op.reads, (op.name,), op.flops, spatial=(op,)) for op in ops)
    outputs = tuple(x.name for x in values if x.is_output and x.producer >= 0)
    return GraphSpec(f"spatial-{size}-{ops}", layers, tuple(values), outputs, "", 1, 0, None)


@st.composite
def tile_spans(draw: st.DrawFn, graph: GraphSpec, stretch: TileableSpan, *, side: int = 3) -> TileSpan:
    """A random span inside a stretch, with uneven lines of up to `side` x `side` tiles. Not every one cuts all outputs."""
    stop = draw(st.sampled_from(stretch.stops))
    start = draw(st.sampled_from([start for start in stretch.starts if start < stop]))
    name = graph.layers[stop - 1].outputs[-1]
    _, _, rows, cols = next(value.tensor.shape for value in graph.values if value.name == name)
    lines = [
        tuple(sorted(draw(st.sets(st.integers(1, length - 1), max_size=side - 1)))) if length > 1 else ()
        for length in (rows, cols)
    ]
    return TileSpan(start, stop, lines[0], lines[1])
