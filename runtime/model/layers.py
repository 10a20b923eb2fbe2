"""Which operations form a layer: the smallest unit a plan can place.

An operation starts a layer unless it is cheap and the only reader of what feeds it: batch norm, activation, reshape and
residual add then cost no extra cut. The list of layers stays in topological order, because an operation joins only the
last of the layers it reads from.
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from runtime.errors import ModelError
from runtime.model.aliasing import Flow
from runtime.model.kinds import count_flops, find_kind, is_cheap, is_depthwise
from runtime.model.observe import Seen, bind, describe
from runtime.model.program import Op, Ref, find_refs


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Operations that always run together, in order."""

    name: str
    kind: str
    ops: tuple[Op, ...]
    flops: float
    window: tuple[int, ...] = ()
    groups: int = 1


def group_layers(
    flow: Flow,
    seen: Mapping[str, Seen | tuple[Seen | None, ...]],
    constants: Collection[str],
    input_name: str,
) -> tuple[Layer, ...]:
    """Group operations into layers.

    Raises:
        ModelError: when an operation reads several tensors as one value, which no plan could send.
    """
    readers = Counter(name for op in flow.ops for name in op.reads)
    readers.update(ref.name for ref in find_refs(flow.outputs))
    home = {input_name: -1}
    members: list[list[Op]] = []
    for op in flow.ops:
        reads = [name for name in op.reads if name not in constants]
        index = _find_home(op, reads, home, readers, seen)
        if index is None:
            index = len(members)
            members.append([])
        members[index].append(op)
        home[op.name] = index
    return _describe_layers(members, seen)


def _find_home(
    op: Op,
    reads: list[str],
    home: Mapping[str, int],
    readers: Mapping[str, int],
    seen: Mapping[str, Seen | tuple[Seen | None, ...]],
) -> int | None:
    """Index of the layer that an operation joins; None: it starts one."""
    if any(isinstance(seen[name], tuple) for name in reads):
        if op.target is not operator.getitem:
            raise ModelError(f"{describe(op)} reads a tuple of tensors as one value, which no plan could send")
        return home[reads[0]]
    if not reads or not is_cheap(op):
        return None
    last = max(home[name] for name in reads)
    feeding = [name for name in reads if home[name] == last]
    return last if last >= 0 and all(readers[name] == 1 for name in feeding) else None


def _describe_layers(
    members: Iterable[list[Op]], seen: Mapping[str, Seen | tuple[Seen | None, ...]]
) -> tuple[Layer, ...]:
    def shape_of(name: str) -> tuple[int, ...] | None:
        item = seen.get(name)
        return item.shape if isinstance(item, Seen) else None

    names: set[str] = set()
    layers = []
    for ops in members:
        main = next((op for op in ops if find_kind(op) != "view"), ops[0])
        kind = "depthwise_conv" if is_depthwise(main, shape_of) else find_kind(main)
        flops = sum(op_flops(op, shape_of) for op in ops)
        window, groups = _find_window(main, shape_of)
        layers.append(Layer(_unique_name(main, names), kind, tuple(ops), flops, window, groups))
    return tuple(layers)


def _find_window(op: Op, shape_of: Callable[[str], tuple[int, ...] | None]) -> tuple[tuple[int, ...], int]:
    """Kernel size and groups of a convolution or a pooling; nothing and 1 for other operations."""
    options = {argument.name: value for argument, value in bind(op)}
    weight = options.get("weight")
    if find_kind(op) == "conv" and isinstance(weight, Ref):
        return (shape_of(weight.name) or ())[2:], int(options.get("groups") or 1)
    size = options.get("kernel_size", ())
    return (tuple(size) if isinstance(size, (list, tuple)) else (int(size),)), 1


def op_flops(op: Op, shape_of: Callable[[str], tuple[int, ...] | None]) -> float:
    """FLOPs of an operation; none for views and for what returns several tensors."""
    result = shape_of(op.name)
    return 0.0 if result is None or find_kind(op) == "view" else count_flops(op, shape_of, result)


def _unique_name(op: Op, taken: set[str]) -> str:
    """Path of the module that made the layer, made unique by the operation's name where several share it."""
    for name in (op.module, f"{op.module}.{op.op_name}".lstrip("."), f"{op.module}.{op.name}".lstrip(".")):
        if name and name not in taken:
            taken.add(name)
            return name
    taken.add(op.name)
    return op.name
