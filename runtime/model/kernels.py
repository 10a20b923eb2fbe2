"""Convolutions with weights that are laid out once, for kernels that read maps with channels innermost.

For tiles alone: such kernels round in another way than the whole model's, which lay their weights out anew at every call.
A tile spares a node half of the map, but never a weight, so that cost would count twice; and with channels innermost a
strip of rows is one piece of memory.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

After: TypeAlias = tuple[str, tuple[float, ...], str]
"""What a kernel does to each of its results before it writes it: name, numbers, algorithm, as torch names them."""

PLAIN: After = ("none", (), "")


def is_packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `pack_convolution` takes weights of this kind here."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def pack_convolution(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int],
    after: After = PLAIN,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the function that convolves maps of one shape with a weight.

    Args:
        weight: where `is_packable`.
        bias: or None.
        stride: rows, columns; likewise `padding` and `dilation`.
        padding: the same before and after.
        dilation: distance between the positions that one result reads.
        groups: of channels.
        shape: of the maps. It decides which kernel runs, and that how weights lie: with other maps they would be laid
            out anew at every call, which may take many times as long as the convolution.
        after: an activation.

    Returns:
        A function of maps (batch, channels, rows, columns), channels innermost in what it takes and gives.
    """
    window = (list(padding), list(stride), list(dilation), groups)
    plain = weight.detach().to_mkldnn()
    # What torch.compile uses for frozen weights; torch has no other name for it.
    lay_out: Callable[..., torch.Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight
    convolve: Callable[..., torch.Tensor] = torch.ops.mkldnn._convolution_pointwise.default
    packed = lay_out(plain, *window, list(shape))
    name, numbers, algorithm = after
    last: tuple[str, list[Any], str] = (name, list(numbers), algorithm)

    def run(maps: torch.Tensor) -> torch.Tensor:
        return convolve(maps, packed, bias, *window, *last)

    return run
