"""Putting a tensor into the memory layout that the whole model has it in: strides, gaps and alignment."""

from collections.abc import Sequence

import torch

from runtime.model.observe import Seen

ALIGNMENT_BYTES = 64
"""torch's own allocations start at multiples of this; elsewhere some kernels take another path, with other bits."""


def place(tensor: torch.Tensor, seen: Seen) -> torch.Tensor:
    """The tensor itself where its layout is the one seen, else a view or a copy that has it."""
    if not tensor.numel():
        return tensor
    if tensor.stride() != seen.stride:
        pairs = zip(tensor.shape, tensor.stride(), seen.stride, strict=True)
        if any(size > 1 and own != wanted for size, own, wanted in pairs):
            return copy_to(tensor, seen)
        tensor = tensor.as_strided(tensor.shape, seen.stride)  # strides of dimensions of size 1 are free to choose
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == _start_bytes(seen) else copy_to(tensor, seen)


def copy_to(tensor: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Copy a tensor into memory of its own in the layout seen; densely where that overlaps itself (windows)."""
    # A dimension of stride 0 holds one copy of the same numbers.
    sizes = [1 if stride == 0 else size for size, stride in zip(seen.shape, seen.stride, strict=True)]
    extent = 1
    for stride, size in sorted(zip(seen.stride, sizes, strict=True)):
        if size > 1 and stride < extent:
            return tensor.clone(memory_format=torch.contiguous_format)
        extent += stride * (size - 1)
    start = _start_bytes(seen) // tensor.element_size()
    memory = torch.empty(start + extent, dtype=tensor.dtype, device=tensor.device)
    copy = memory.as_strided(sizes, seen.stride, start)
    copy.copy_(tensor[tuple(slice(0, size) for size in sizes)])
    return copy.expand(seen.shape)


def _start_bytes(seen: Seen) -> int:
    """Where the first element lies within its block of `ALIGNMENT_BYTES`."""
    return seen.offset * seen.dtype.itemsize % ALIGNMENT_BYTES


def dense_strides(order: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor without gaps that keeps the order of dimensions of one with these strides and sizes."""
    outermost_first = sorted(range(len(shape)), key=lambda dim: (-order[dim], -sizes[dim]))
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(outermost_first):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)
