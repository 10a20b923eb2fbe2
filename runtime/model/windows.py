"""Which operations work on maps region by region, and which positions of their inputs each position reads.

Read off the operation and the shapes that tracing saw, never off a model's name. Whatever is not known to be local
(pooling to a fixed size, means, attention, reshapes, resizing, padding as an operation of its own) ends a tileable span.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from runtime.model.kinds import find_kind, mixes_positions
from runtime.model.layers import op_flops
from runtime.model.observe import Seen, bind
from runtime.model.program import Op
from runtime.types import SpatialOp, Window

CONVOLUTIONS = frozenset({"conv2d", "convolution"})
POOLS = frozenset({"max_pool2d", "max_pool2d_with_indices", "avg_pool2d"})

_CHANNEL_DIM = 1
_ALONG_CHANNELS = frozenset({"cat", "concat", "chunk", "split", "split_with_sizes", "slice"})
_PER_CHANNEL = frozenset({"batch_norm", "_native_batch_norm_legit_no_training", "prelu"})  # with 1-D constants
_COPIES = frozenset({"clone", "contiguous", "alias", "detach", "to", "_to_copy"})
_FIRST_RESULT_ONLY = frozenset({"max_pool2d_with_indices", "_native_batch_norm_legit_no_training"})

SeenMap = Mapping[str, Seen | tuple[Seen | None, ...]]


def find_spatial(ops: Iterable[Op], seen: SeenMap, constants: Mapping[str, torch.Tensor]) -> tuple[SpatialOp, ...]:
    """Describe a layer's operations for tiling; empty where one of them cannot be made region by region."""
    reader = _Reader(seen, constants)
    found: list[SpatialOp] = []
    for op in ops:
        spatial = reader.read(op)
        if spatial is None:
            return ()
        found.append(spatial)
    return tuple(found)


def arguments(op: Op) -> dict[str, Any]:
    """Arguments of an operation by the names in its schema, defaults filled in."""
    return {argument.name: value for argument, value in bind(op)}


def pair(value: Any) -> tuple[int, int]:
    """Numbers for rows and columns from what a schema allows: one number, one in a list, or two."""
    numbers = [value] if isinstance(value, int) else list(value)
    return (numbers[0], numbers[-1])


def find_windows(op: Op, kernel: tuple[int, ...]) -> tuple[Window, Window]:
    """Windows of a convolution or pooling whose kernel has these rows and columns."""
    named = arguments(op)
    stride = pair(named["stride"] or kernel)  # pooling: an empty list means the kernel's size
    dilation = pair(named.get("dilation", 1))
    if isinstance(named["padding"], str):
        # As torch splits an odd total: the smaller half before the first position.
        total = [d * (k - 1) if named["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = (total[0] // 2, total[1] // 2)
    else:
        padding = pair(named["padding"])
    rows, cols = (Window(kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return rows, cols


class _Reader:
    """Describes operations one by one; results of several tensors count as one map while they are taken apart."""

    def __init__(self, seen: SeenMap, constants: Mapping[str, torch.Tensor]) -> None:
        self.seen = seen
        self.constants = constants
        self._first_only: set[str] = set()

    def read(self, op: Op) -> SpatialOp | None:
        """Describe one operation; None where it is not known to be local."""
        name = op.op_name.rstrip("_")
        size = self._size(op.name)
        reads = tuple(read for read in op.reads if read not in self.constants)
        sizes = [self._size(read) for read in reads]
        if size is None or any(item is None for item in sizes) or not reads:
            return None
        windows = self._windows(op, name)
        if windows is None:
            return None
        if windows == (Window(), Window()) and not _broadcasts([item for item in sizes if item], size):
            return None
        if name in _FIRST_RESULT_ONLY and isinstance(self.seen[op.name], tuple):
            self._first_only.add(op.name)
        weight_bytes = self.constants[op.reads[1]].nbytes if name in CONVOLUTIONS else 0
        return SpatialOp(op.name, reads, size, windows, op_flops(op, self._shape), weight_bytes)

    def _windows(self, op: Op, name: str) -> tuple[Window, Window] | None:
        if name in CONVOLUTIONS or name in POOLS:
            return self._sliding(op, name)
        is_local = (
            (op.target is operator.getitem and (op.args[0].name not in self._first_only or op.args[1] == 0))
            or (name in _ALONG_CHANNELS and arguments(op)["dim"] in (_CHANNEL_DIM, _CHANNEL_DIM - 4))
            or name in _COPIES
            or (name in _PER_CHANNEL and arguments(op).get("training") is not True)
            or (find_kind(op) in ("activation", "elementwise") and not mixes_positions(op) and self._is_uniform(op))
        )
        return (Window(), Window()) if is_local else None

    def _sliding(self, op: Op, name: str) -> tuple[Window, Window] | None:
        named = arguments(op)
        if named.get("transposed") is True:
            return None
        if name in CONVOLUTIONS:
            weight = self._shape(op.reads[1])
            if weight is None or op.reads[1] not in self.constants:
                return None
            kernel: tuple[int, ...] = weight[2:]
        else:
            kernel = pair(named["kernel_size"])
        windows = find_windows(op, kernel)
        # A position that reads nothing but padding would ask for an empty region of the input.
        is_real = all(window.padding < window.extent for window in windows)
        return windows if is_real else None

    def _is_uniform(self, op: Op) -> bool:
        """Tell whether the constants that an operation reads are the same at every position."""
        shapes = [tuple(self.constants[name].shape) for name in op.reads if name in self.constants]
        return all(length == 1 for shape in shapes for length in shape[-2:])

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.constants:
            return tuple(self.constants[name].shape)
        seen = self.seen.get(name)
        return seen.shape if isinstance(seen, Seen) else None

    def _size(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of a map; of a tuple, those that its maps share."""
        seen = self.seen.get(name)
        items = seen if isinstance(seen, tuple) else (seen,)
        sizes = {item.shape[2:] for item in items if item is not None and len(item.shape) == 4}
        others = [item for item in items if item is None or (len(item.shape) != 4 and item.shape != (0,))]
        if len(sizes) != 1 or others:
            return None
        rows, cols = sizes.pop()
        return rows, cols


def _broadcasts(sizes: list[tuple[int, int]], size: tuple[int, int]) -> bool:
    """Tell whether maps of these sizes give one of that size position by position."""
    return all(own in (1, made) for item in sizes for own, made in zip(item, size, strict=True))
