"""From a program that writes in place to one where every name means one value, whatever the order.

After `y = relu_(x)` both names are the same memory, so a later read of `x` reads `y`: that is written down here. What is
left is a pure data flow, which can be grouped and cut freely. In-place operations stay in it, because they are cheap;
`segment.py` keeps one only where nobody else can see the memory, by the two tables made here:

- `memory`: names with an equal number may share memory (observed in one run, or allowed by an operation's schema);
- `lineage`: the in-place operations whose effect a name's content includes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from runtime.model.kinds import makes_fresh_memory
from runtime.model.observe import Entangled, Observation, Seen, bind, describe, written
from runtime.model.program import Op, Ref, find_refs, map_refs


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Operations on the input as a pure data flow."""

    ops: tuple[Op, ...]
    outputs: tuple[Any, ...]  # flat: `Ref`s and literals
    memory: Mapping[str, int]
    lineage: Mapping[str, frozenset[str]]


def find_flow(observed: Observation) -> Flow:
    """Write down what each read really reads, drop what no output needs, and find what may share memory.

    Raises:
        Entangled: when memory is written and then read under a name that is another view of it.
    """
    renamer = _Renamer(observed)
    ops = [renamer.step(op) for op in observed.ops]
    outputs = tuple(map_refs(observed.outputs, renamer.read))
    ops = _drop_dead(ops, outputs)
    memory, lineage = _trace_memory(ops, observed)
    return Flow(tuple(ops), outputs, memory, lineage)


class _Renamer:
    """Follows the program in order and keeps, for every name, what a read of it means now."""

    def __init__(self, observed: Observation) -> None:
        self.seen = observed.seen
        self._now: dict[str, str] = {}  # name -> the in-place result that it has become
        self._stale: dict[str, str] = {}  # name -> the operation that wrote to a part of it
        self._names: dict[int, list[str]] = {}  # storage -> names made so far
        later = {op.name for op in observed.ops}
        for name in observed.seen:
            if name not in later:
                self._register(name)

    def step(self, op: Op) -> Op:
        """Rewrite one operation's reads, then note what it writes."""
        op = Op(op.name, op.target, map_refs(op.args, self.read), map_refs(op.kwargs, self.read), op.module)
        targets = written(op)
        if targets:
            self._write(op, targets)
        self._register(op.name)
        return op

    def read(self, ref: Ref) -> Ref:
        """What a read of this name reads now."""
        name = self._now.get(ref.name, ref.name)
        if name in self._stale:
            raise Entangled(f"{self._stale[name]} writes to memory that is read again as {ref.name}")
        return Ref(name)

    def _register(self, name: str) -> None:
        for storage in _storages(self.seen.get(name)):
            self._names.setdefault(storage, []).append(name)

    def _write(self, op: Op, targets: tuple[str, ...]) -> None:
        result, target = self.seen.get(op.name), self.seen[targets[0]]
        if len(targets) > 1 or not isinstance(target, Seen) or not isinstance(result, Seen):
            raise Entangled(f"{describe(op)} writes to {len(targets)} tensors")
        if result.geometry != target.geometry:
            raise Entangled(f"{describe(op)} does not return the tensor it writes to")
        for name in self._names[target.storage]:
            seen = self.seen[name]
            if isinstance(seen, Seen) and seen.geometry == target.geometry:
                self._now[name] = op.name
            else:
                self._stale[name] = describe(op)


def _storages(seen: Seen | tuple[Seen | None, ...] | None) -> set[int]:
    items = seen if isinstance(seen, tuple) else (seen,)
    return {item.storage for item in items if item is not None}


def _drop_dead(ops: Iterable[Op], outputs: tuple[Any, ...]) -> list[Op]:
    """Keep the operations that an output needs, in order."""
    needed = {ref.name for ref in find_refs(outputs)}
    kept = []
    for op in reversed(list(ops)):
        if op.name in needed:
            needed.update(op.reads)
            kept.append(op)
    return kept[::-1]


def _trace_memory(ops: Iterable[Op], observed: Observation) -> tuple[dict[str, int], dict[str, frozenset[str]]]:
    """Find which names may share memory, and which in-place operations each one has seen."""
    groups = _Groups()
    for name, seen in observed.seen.items():
        for storage in _storages(seen):
            groups.join(name, storage)
    for op in ops:
        for name in _may_share(op):
            groups.join(op.name, name)
    lineage: dict[str, frozenset[str]] = {}
    for op in ops:
        own = groups.find(op.name)
        past = [lineage.get(name, frozenset()) for name in op.reads if groups.find(name) == own]
        lineage[op.name] = frozenset((op.name,) if written(op) else ()).union(*past)
    numbers: dict[Any, int] = {}
    return {name: numbers.setdefault(groups.find(name), len(numbers)) for name in observed.seen}, lineage


def _may_share(op: Op) -> list[str]:
    """Names of the arguments whose memory the result may share."""
    if not isinstance(op.target, torch._ops.OpOverload):
        return list(op.reads)
    if not makes_fresh_memory(op) and all(argument.alias_info is None for argument, _ in bind(op)):
        return list(op.reads)
    names = []
    for argument, value in bind(op):
        if argument.alias_info is not None:
            names += [ref.name for ref in find_refs(value)]
    return names


class _Groups:
    """Disjoint sets of hashable things."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        """Representative of the item's set."""
        root = item
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        self._parent[item] = root
        return root

    def join(self, first: Any, second: Any) -> None:
        """Make one set of two."""
        self._parent[self.find(first)] = self.find(second)
