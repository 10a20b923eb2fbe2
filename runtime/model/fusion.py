"""A convolution and what follows it position by position, as one: batch norm in its weights, an activation in its kernel.

For tiles alone: rounding differs from the whole model's, as it does with `runtime.model.kernels`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from runtime.model.kernels import PLAIN, After
from runtime.model.program import Op, Ref
from runtime.model.windows import CONVOLUTIONS, arguments


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """What a convolution takes in."""

    name: str  # of the last result: the convolution's own, where it takes in nothing
    followers: tuple[str, ...] = ()
    norm: Op | None = None
    after: After = field(default=PLAIN)


def find_fusions(
    ops: Sequence[Op], outputs: Collection[str], constants: Mapping[str, torch.Tensor]
) -> dict[str, Fusion]:
    """Find what the convolutions of a layer can take in: a batch norm, an activation, or one behind the other.

    Args:
        ops: of the layer.
        outputs: names that others may read.
        constants: of the graph.

    Returns:
        By the convolution's name, where it takes in anything: only results that nobody else reads.
    """
    readers: dict[str, list[Op]] = {}
    for op in ops:
        for name in op.reads:
            readers.setdefault(name, []).append(op)
    fusions = {}
    for op in ops:
        if op.op_name in CONVOLUTIONS:
            fusion = Fusion(op.name)
            while fusion.name not in outputs and len(readers.get(fusion.name, ())) == 1:
                longer = _take_in(fusion, readers[fusion.name][0], constants)
                if longer is None:
                    break
                fusion = longer
            if fusion.followers:
                fusions[op.name] = fusion
    return fusions


def _take_in(fusion: Fusion, op: Op, constants: Mapping[str, torch.Tensor]) -> Fusion | None:
    """The same with one more operation; None where it cannot be taken in."""
    if op.args[:1] != (Ref(fusion.name),) or fusion.after != PLAIN:
        return None
    followers, kind = (*fusion.followers, op.name), op.op_name.rstrip("_")
    if kind == "batch_norm" and fusion.norm is None and constants.keys() >= set(op.reads[1:]):
        return Fusion(op.name, followers, op)
    if kind == "relu":
        return Fusion(op.name, followers, fusion.norm, ("relu", (), ""))
    if kind == "leaky_relu":
        return Fusion(op.name, followers, fusion.norm, ("leaky_relu", (float(arguments(op)["negative_slope"]),), ""))
    return None


def fold_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: Op, constants: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution that does what it and the batch norm behind it did; in double precision."""
    named = arguments(norm)

    def read(key: str, default: float) -> torch.Tensor:
        ref = named[key]
        return torch.tensor(default, dtype=torch.float64) if ref is None else constants[ref.name].double()

    scale = (read("running_var", 1.0) + float(named["eps"])).rsqrt() * read("weight", 1.0)
    shift = (0.0 if bias is None else bias.double()) - read("running_mean", 0.0)
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), (shift * scale + read("bias", 0.0)).to(weight.dtype)
