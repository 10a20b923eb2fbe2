"""One real run of the program: shapes, shared memory, and everything that does not depend on the input.

What does not depend on the input (masks, position tables, transposed weights) is computed here once and becomes a
constant. Shared memory is observed, not guessed: dropout returns its own input in eval mode, `contiguous` sometimes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from runtime.errors import ModelError
from runtime.model.program import WAY_OUT, Op, Program, Ref, find_refs, map_refs

SHAPE_ONLY = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
"""Operations that read nothing of their tensor but its shape: their result is a constant."""


class Entangled(Exception):  # noqa: N818 - a turn in the road, not an error: `trace` goes on with a functional graph
    """The program writes to memory that it also reads under another name, so its order cannot be relaxed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the run showed of one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: int  # equal for tensors that share memory

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Equal for tensors that are the same view of the same memory."""
        return (self.storage, self.offset, self.shape, self.stride, self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What one run showed."""

    ops: tuple[Op, ...]  # those that depend on the input, in order; numbers that constants gave are literals
    outputs: tuple[Any, ...]  # flat: `Ref`s and literals
    seen: Mapping[str, Seen | tuple[Seen | None, ...]]  # a tuple for operations that return several tensors
    constants: Mapping[str, torch.Tensor]  # what `ops` and `outputs` read that does not depend on the input
    sources: Mapping[str, frozenset[str]]  # constant -> names in `Program.state` it is made of
    results: tuple[torch.Tensor, ...]  # the output tensors of this run


def observe(program: Program, example: torch.Tensor) -> Observation:
    """Run a program once.

    Raises:
        Entangled: when constants are written in an order that matters.
        ModelError: when an operation is random, keeps state or makes Python numbers of the input.
    """
    run = _Run(program, example)
    with torch.no_grad():
        for index, op in enumerate(program.ops):
            run.step(index, op)
        outputs = tuple(map_refs(program.outputs, run.copy_out))
    results = tuple(run.values[ref.name] for ref in find_refs(outputs))
    return Observation(tuple(run.ops), outputs, run.seen, run.constants, run.sources, results)


class _Run:
    def __init__(self, program: Program, example: torch.Tensor) -> None:
        self.program = program
        self.values: dict[str, Any] = {}
        self.seen: dict[str, Seen | tuple[Seen | None, ...]] = {}
        self.literals: dict[str, Any] = {}
        self.ops: list[Op] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.sources: dict[str, frozenset[str]] = {}  # its keys are what does not depend on the input
        self._num_storages = 0
        self._read_storages: set[int] = set()  # of constants that `ops` have read
        self._state_storages: set[int] = set()
        self._last_use = _find_last_use(program)
        self.values[program.input] = example.detach().clone()
        self.seen[program.input] = self._describe(self.values[program.input], {})
        owners: dict[int, int] = {}  # address -> storage
        for name, tensor in program.state.items():
            self.values[name] = tensor
            self.seen[name] = described = self._describe(tensor, owners)
            owners[_address(tensor)] = described.storage
            self._state_storages.add(described.storage)
            self.sources[name] = frozenset((name,))

    def resolve(self, ref: Ref) -> Any:
        """Replace a reference to a number by the number."""
        return self.literals.get(ref.name, ref)

    def publish(self, name: str) -> None:
        """Keep a constant that an operation on the input reads."""
        if name in self.sources:
            self.constants[name] = self.values[name]
            self._read_storages.add(self._storage(name))

    def step(self, index: int, op: Op) -> None:
        """Run one operation and note what it made."""
        op = Op(op.name, op.target, map_refs(op.args, self.resolve), map_refs(op.kwargs, self.resolve), op.module)
        is_constant = op.op_name in SHAPE_ONLY or all(name in self.sources for name in op.reads)
        _check_random(op)
        self._check_writes(op, is_constant)
        if not is_constant:
            for name in op.reads:
                self.publish(name)
        self._note(op, self._call(op), is_constant)
        for name in self._last_use.get(index, ()):
            if name not in self.constants:
                self.values.pop(name, None)

    def copy_out(self, ref: Ref) -> Any:
        """What stands for an output: a copy where it is the input or a constant, so that a layer makes every output."""
        if ref.name in self.literals or not (ref.name == self.program.input or ref.name in self.sources):
            return self.resolve(ref)
        op = Op(f"{ref.name}_output", torch.ops.aten.clone.default, (ref,), {})
        if op.name not in self.values:
            self.publish(ref.name)
            self._note(op, self._call(op), is_constant=False)
        return Ref(op.name)

    def _call(self, op: Op) -> Any:
        tensors = [value for name in op.reads if isinstance(value := self.values[name], torch.Tensor)]
        versions = [_version(tensor) for tensor in tensors]
        args, kwargs = map_refs((op.args, op.kwargs), lambda ref: self.values[ref.name])
        try:
            result = op.target(*args, **kwargs)
        except Exception as error:
            raise ModelError(f"{describe(op)} fails on the example input: {error}; {WAY_OUT}") from error
        if not written(op) and versions != [_version(tensor) for tensor in tensors]:
            raise Entangled(f"{describe(op)} changes its input without saying so")
        return result

    def _note(self, op: Op, result: Any, is_constant: bool) -> None:
        owners = self._owners(op)
        if isinstance(result, torch.Tensor):
            self.seen[op.name] = self._describe(result, owners)
        elif isinstance(result, (list, tuple)):
            items = [self._describe(x, owners) if isinstance(x, torch.Tensor) else None for x in result]
            self.seen[op.name] = tuple(items)
        elif is_constant:
            self.literals[op.name] = result
            return
        elif result is not None:
            raise ModelError(
                f"{describe(op)} makes a Python {type(result).__name__} of the input, which no plan could send; {WAY_OUT}"
            )
        self.values[op.name] = result
        if not is_constant:
            self.ops.append(op)
            return
        reads = () if op.op_name in SHAPE_ONLY else op.reads
        self.sources[op.name] = frozenset().union(*(self.sources[name] for name in reads))

    def _check_writes(self, op: Op, is_constant: bool) -> None:
        for name in written(op):
            storage = self._storage(name)
            if storage in self._state_storages:
                raise ModelError(
                    f"{describe(op)} writes to {self.program.state_paths.get(name, name)}: a model that keeps state "
                    f"between requests cannot be split; {WAY_OUT}"
                )
            if not is_constant and name in self.sources:
                raise Entangled(f"{describe(op)} writes what depends on the input into a constant")
            if is_constant and storage in self._read_storages:
                raise Entangled(f"{describe(op)} changes a constant that was read before")

    def _owners(self, op: Op) -> dict[int, int]:
        """Storages that a result of this operation may share, by address."""
        found = {}
        for name in op.reads:
            value, seen = self.values[name], self.seen[name]
            values, seens = (value, seen) if isinstance(seen, tuple) else ((value,), (seen,))
            for tensor, item in zip(values, seens, strict=True):
                if item is not None:
                    found[_address(tensor)] = item.storage
        return found

    def _describe(self, tensor: torch.Tensor, owners: Mapping[int, int]) -> Seen:
        storage = owners.get(_address(tensor)) if tensor.numel() else None
        if storage is None:
            storage = self._num_storages
            self._num_storages += 1
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return Seen(shape, stride, int(tensor.storage_offset()), tensor.dtype, storage)

    def _storage(self, name: str) -> int:
        seen = self.seen[name]
        assert isinstance(seen, Seen), f"{name} is not one tensor"
        return seen.storage


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor's memory was written; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _find_last_use(program: Program) -> dict[int, list[str]]:
    """Names that are read for the last time, by index of the operation that reads them."""
    last: dict[str, int] = {}
    for index, op in enumerate(program.ops):
        last.update(dict.fromkeys(op.reads, index))
    kept = {ref.name for ref in find_refs(program.outputs)} | set(program.state)
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            ends.setdefault(index, []).append(name)
    return ends


# --- what an operation's schema says ----------------------------------------------------------------------------------


def bind(op: Op) -> Iterator[tuple[torch._C.Argument, Any]]:
    """Pair the arguments of an operation's schema with what it is called with; nothing for one without a schema."""
    if isinstance(op.target, torch._ops.OpOverload):
        for index, argument in enumerate(op.target._schema.arguments):
            default = argument.default_value
            yield argument, op.args[index] if index < len(op.args) else op.kwargs.get(argument.name, default)


def written(op: Op) -> tuple[str, ...]:
    """Names of the tensors that an operation changes, as its schema says."""
    names = []
    for argument, value in bind(op):
        if argument.alias_info is not None and argument.alias_info.is_write:
            names += [ref.name for ref in find_refs(value)]
    return tuple(names)


def describe(op: Op) -> str:
    """Name an operation for a message."""
    return f"layer {op.module or '(root)'} ({op.op_name})"


def _check_random(op: Op) -> None:
    if not isinstance(op.target, torch._ops.OpOverload):
        return
    if torch.Tag.nondeterministic_seeded not in op.target.tags:
        return
    options = {argument.name: value for argument, value in bind(op)}
    is_off = options.get("train", options.get("training")) is False
    if not is_off and options.get("dropout_p", options.get("p")) != 0:
        raise ModelError(
            f"{describe(op)} is random also in eval mode, so no two runs would agree; call it with "
            "training=self.training, or wrap the model in a factory (package.module:factory) that leaves it out"
        )
