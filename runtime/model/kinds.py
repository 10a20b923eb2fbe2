"""What an operation is: its kind for the regressions, whether it is cheap enough to join a layer, its FLOPs."""

import math
from collections.abc import Callable, Sequence

import torch

from runtime.model.program import Op, find_refs

Shape = tuple[int, ...]

KIND_NAMES: dict[str, str] = {
    "conv": "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    "linear": "linear",
    "matmul": "matmul mm bmm addmm baddbmm mv dot einsum",
    "attention": "scaled_dot_product_attention _native_multi_head_attention",
    "pool": "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d adaptive_max_pool2d "
    "mean sum amax max",
    "norm": "batch_norm _native_batch_norm_legit_no_training native_batch_norm layer_norm native_layer_norm group_norm "
    "native_group_norm instance_norm rms_norm linalg_vector_norm",
    "activation": "relu relu6 gelu silu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu selu celu mish softplus "
    "prelu glu softmax _softmax log_softmax clamp clamp_min",
    "elementwise": "dropout alpha_dropout feature_dropout",
    "concat": "cat concat stack hstack vstack",
    "resize": "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa",
    "copy": "pad constant_pad_nd reflection_pad2d replication_pad2d roll flip clone repeat repeat_interleave index "
    "index_select gather slice_scatter select_scatter",
    "view": "view reshape _unsafe_view flatten unflatten permute transpose t unsqueeze squeeze select slice expand "
    "expand_as view_as chunk split split_with_sizes unbind contiguous alias detach to _to_copy type_as movedim getitem",
}
_KINDS = {name: kind for kind, names in KIND_NAMES.items() for name in names.split()}

_MIXING_ACTIVATIONS = frozenset({"softmax", "_softmax", "log_softmax", "glu"})
_CHEAP_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
_CHEAP_KINDS = frozenset({"activation", "elementwise", "view"})


def find_kind(op: Op) -> str:
    """Kind of an operation, by which regressions group: `conv`, `linear`, ..., `other` where no table knows it."""
    name = op.op_name.rstrip("_")
    kind = _KINDS.get(name)
    if kind is not None:
        return kind
    if isinstance(op.target, torch._ops.OpOverload):
        if torch.Tag.pointwise in op.target.tags:
            return "elementwise"
        if op.target.is_view:
            return "view"
    return "other"


def is_cheap(op: Op) -> bool:
    """Tell whether an operation joins the layer that feeds it: element-wise, a view, or an eval-mode batch norm."""
    is_norm = op.op_name.rstrip("_") in _CHEAP_NORMS
    return is_norm or (find_kind(op) in _CHEAP_KINDS and not mixes_positions(op))


def mixes_positions(op: Op) -> bool:
    """Tell whether an activation mixes the positions or channels of its input."""
    return op.op_name.rstrip("_") in _MIXING_ACTIVATIONS


def makes_fresh_memory(op: Op) -> bool:
    """Tell whether the result is new memory whatever the strides of the arguments; in doubt it is not."""
    return find_kind(op) not in ("view", "other")


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def count_flops(op: Op, shape_of: Callable[[str], Shape | None], result: Shape) -> float:
    """FLOPs of an operation: two per multiply-add, exact for conv, linear, matmul and attention; else its elements."""
    counter = _COUNTERS.get(find_kind(op))
    shapes = [shape_of(ref.name) for ref in find_refs(op.args)]
    if counter is not None and all(shape is not None for shape in shapes):
        return float(counter(op, [shape for shape in shapes if shape is not None], result))
    return float(math.prod(result))


def _count_conv(op: Op, shapes: Sequence[Shape], result: Shape) -> int:
    source, weight = shapes[0], shapes[1]
    is_transposed = "transpose" in op.op_name or (op.op_name.endswith("convolution") and op.args[6] is True)
    per_element = 2 * math.prod(weight[1:])  # weight: (out, in / groups, *kernel), or (in, out / groups, *kernel)
    return per_element * math.prod(source if is_transposed else result)


def _count_linear(_op: Op, shapes: Sequence[Shape], result: Shape) -> int:
    return 2 * math.prod(result) * shapes[0][-1]


def _count_matmul(op: Op, shapes: Sequence[Shape], result: Shape) -> int:
    if op.op_name == "einsum":
        return 2 * _count_einsum(op.args[0], shapes)
    first = shapes[1] if op.op_name in ("addmm", "baddbmm") else shapes[0]
    return 2 * math.prod(result) * first[-1]


def _count_einsum(equation: str, shapes: Sequence[Shape]) -> int:
    sizes: dict[str, int] = {}
    for letters, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=True):
        # An ellipsis stands for the leading dimensions that the letters leave over.
        named = letters.replace("...", "")
        rest = len(shape) - len(named)
        sizes.update(zip(named, shape[rest:], strict=True))
        sizes["..."] = max(sizes.get("...", 1), math.prod(shape[:rest]))
    return math.prod(sizes.values())


def _count_attention(_op: Op, shapes: Sequence[Shape], _result: Shape) -> int:
    query, key, value = shapes[:3]  # (..., length, width)
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_COUNTERS: dict[str, Callable[[Op, Sequence[Shape], Shape], int]] = {
    "conv": _count_conv,
    "linear": _count_linear,
    "matmul": _count_matmul,
    "attention": _count_attention,
}


def is_depthwise(op: Op, shape_of: Callable[[str], Shape | None]) -> bool:
    """Tell whether a convolution sees one channel at a time: its cost per FLOP is another one."""
    weight = shape_of(op.reads[1]) if len(op.reads) > 1 else None
    return find_kind(op) == "conv" and weight is not None and len(weight) > 2 and weight[1] == 1 and weight[0] > 1
