"""Running some of a graph's layers: an interpreted list of instructions, built in milliseconds.

Two promises, whatever the cut.

The tensors that go in are never changed: an in-place operation writes to its target only where no one outside, and
nothing later inside, can see that memory; elsewhere it writes to a copy.

The tensors that come out have the bits that the whole model gives them: every operation reads what it reads there, with
the same strides and alignment, because kernels choose their order of summation by these. What comes over the wire has
lost gaps and alignment, so inputs are put back into the layout that tracing saw.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from runtime.errors import PlanError, TensorMismatch
from runtime.model.graph import LayerGraph, unflatten_outputs
from runtime.model.inputs import admit
from runtime.model.layout import copy_to, place
from runtime.model.observe import written
from runtime.model.program import Op, Ref, find_refs, map_refs
from runtime.planning.problem import Stage, check_monotone, find_route
from runtime.types import Plan, ValueSpec

CACHED_SEGMENTS = 128
"""Segments kept per graph: more than the plans any policy has to choose from."""

Step = Callable[[list[Any]], None]


class Stopped(Exception):  # noqa: N818 - not an error: its caller asked for it
    """A run was stopped between two layers because `should_stop` said so."""


class Segment:
    """Layers that run together on one node.

    Attributes:
        layers: their indices, ascending.
        needs: names of the values it must be given.
        makes: names of the values it hands on.
        parameter_names: paths of the parameters that it reads.
        build_s: seconds that building took.
        first_run_s: seconds of the first run; None before it.
    """

    def __init__(self, graph: LayerGraph, stage: Stage) -> None:
        start_s = time.perf_counter()
        self.layers = stage.layers
        self.needs = stage.needs
        self.makes = stage.makes
        self._device = graph.device
        builder = _Builder(graph, stage)
        self._steps = builder.build()
        self._num_slots = len(builder.slots)
        self._inputs = [(builder.slots[name], spec, graph.seen.get(name)) for name, spec in builder.needs.items()]
        self._outputs = [(name, builder.slots[name]) for name in stage.makes]
        self.parameter_names = frozenset().union(*(graph.constant_parameters[name] for name in builder.constants))
        self.first_run_s: float | None = None
        self.build_s = time.perf_counter() - start_s

    def run(
        self,
        values: Mapping[str, torch.Tensor],
        *,
        should_stop: Callable[[], bool] | None = None,
        layer_s: MutableSequence[float] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run the layers.

        Args:
            values: tensors by name, all of `needs` among them; on any device; never changed.
            should_stop: asked before every layer.
            layer_s: takes the seconds of each layer that runs, at the layer's index.

        Returns:
            The values in `makes`, on the graph's device. They may share memory with `values`.

        Raises:
            TensorMismatch: when a value is missing or has another shape or dtype than the graph says.
            InputError: when an encoded image cannot be decoded.
            Stopped: when `should_stop` said so.
        """
        return self.run_timed(values, should_stop=should_stop, layer_s=layer_s)[0]

    def run_timed(
        self,
        values: Mapping[str, torch.Tensor],
        *,
        should_stop: Callable[[], bool] | None = None,
        layer_s: MutableSequence[float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Run the layers as `run` does, and measure the seconds by `clock` until the results are there."""
        start_s = clock()
        slots: list[Any] = [None] * self._num_slots
        for slot, spec, seen in self._inputs:
            tensor = self._check(spec, values)
            # Files and pixels belong to the input stage, which runs where they are.
            slots[slot] = tensor if seen is None else place(tensor.to(self._device), seen)
        with torch.no_grad():
            for layer, steps in self._steps:
                if should_stop is not None and should_stop():
                    raise Stopped(f"stopped before layer {layer}")
                layer_start_s = clock()
                for step in steps:
                    step(slots)
                if layer_s is not None:
                    self._synchronise()
                    layer_s[layer] = clock() - layer_start_s
        self._synchronise()
        seconds = clock() - start_s
        if self.first_run_s is None:
            self.first_run_s = seconds
        return {name: slots[slot] for name, slot in self._outputs}, seconds

    def check(self, values: Mapping[str, torch.Tensor]) -> None:
        """Check what a run would be given, without running anything.

        Raises:
            TensorMismatch: when a value is missing or has another shape or dtype than the graph says.
        """
        for _, spec, _ in self._inputs:
            self._check(spec, values)

    def _check(self, spec: ValueSpec, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tensor = values.get(spec.name)
        if tensor is None:
            raise TensorMismatch(f"expected the values {list(self.needs)}, got {sorted(values)}: no {spec.name}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        is_fit = tuple(tensor.shape) == spec.tensor.shape if spec.is_sized else tensor.dim() == 1
        if not is_fit or dtype != spec.tensor.dtype:
            shape = spec.tensor.shape if spec.is_sized else "(any,)"
            raise TensorMismatch(
                f"expected {spec.name} to be {spec.tensor.dtype} of shape {shape}, got {dtype} of shape "
                f"{tuple(tensor.shape)}; sender and receiver do not run the same graph"
            )
        return tensor.detach()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# --- building -----------------------------------------------------------------------------------------------------------


class _Builder:
    """Turns the layers of one stage into steps over a list of slots."""

    def __init__(self, graph: LayerGraph, stage: Stage) -> None:
        self.graph = graph
        self.stage = stage
        self.ops = [(layer, op) for layer in stage.layers for op in graph.layers[layer].ops]
        read = dict.fromkeys(name for _, op in self.ops for name in op.reads)
        self.constants = [name for name in read if name in graph.constants]
        specs = {value.name: value for value in graph.spec.values}
        self.needs = {name: specs[name] for name in stage.needs}
        self.slots = {name: slot for slot, name in enumerate([*stage.needs, *(op.name for _, op in self.ops)])}

    def build(self) -> list[tuple[int, list[Step]]]:
        """Make the steps of every layer."""
        frees = self._find_last_reads()
        unsafe = self._find_unsafe_writes()
        layers: dict[int, list[Step]] = {layer: [] for layer in self.stage.layers}
        for (layer, op), ends in zip(self.ops, frees, strict=True):
            if op.name in unsafe:
                copy, op = self._write_to_copy(op, unsafe[op.name])
                layers[layer].append(self._make_step(copy, []))
                ends.append(self.slots[copy.name])
            layers[layer].append(self._make_step(op, ends))
        return list(layers.items())

    def _find_last_reads(self) -> list[list[int]]:
        """Slots that each operation may empty after it: their values are read no more."""
        kept = {self.slots[name] for name in self.stage.makes}
        frees: list[list[int]] = []
        for _, op in reversed(self.ops):
            ends = {self.slots[name] for name in (op.name, *op.reads) if name in self.slots} - kept
            kept |= ends
            frees.append(sorted(ends))
        return frees[::-1]

    def _find_unsafe_writes(self) -> dict[str, str]:
        """In-place operations that may not write here, and what they would write to.

        One may write when no name that shares the target's memory comes from outside, and none that lacks its effect
        is read later or handed on.
        """
        memory, lineage = self.graph.memory, self.graph.lineage
        outside = {memory.get(name) for name in (*self.stage.needs, *self.graph.constants)}
        later: dict[int | None, set[str]] = {}  # memory -> names read after the operation, or handed on
        for name in self.stage.makes:
            later.setdefault(memory.get(name), set()).add(name)
        unsafe = {}
        for _, op in reversed(self.ops):
            for target in written(op):
                shared = memory[target]
                is_seen = any(op.name not in lineage.get(name, ()) for name in later.get(shared, ()))
                if is_seen or shared in outside:
                    unsafe[op.name] = target
            for name in op.reads:
                later.setdefault(memory.get(name), set()).add(name)
        return unsafe

    def _write_to_copy(self, op: Op, target: str) -> tuple[Op, Op]:
        """Split an in-place operation in two: copy the target, layout included; write to the copy.

        Not its functional twin: that may give the result other strides or, by promotion, another dtype.
        """
        copy = Op(f"{op.name}.target", partial(copy_to, seen=self.graph.seen[target]), (Ref(target),), {}, op.module)
        self.slots[copy.name] = len(self.slots)
        args, kwargs = map_refs((op.args, op.kwargs), lambda ref: Ref(copy.name) if ref.name == target else ref)
        return copy, Op(op.name, op.target, args, kwargs, op.module)

    def _make_step(self, op: Op, frees: list[int]) -> Step:
        """Compile one operation: constants are filled in now, other tensors when it runs."""
        constants, slots = self.graph.constants, self.slots

        def fill_constant(ref: Ref) -> Any:
            return constants.get(ref.name, ref)

        args = list(map_refs(op.args, fill_constant))
        kwargs = map_refs(op.kwargs, fill_constant)
        direct = [(i, slots[arg.name]) for i, arg in enumerate(args) if isinstance(arg, Ref)]
        nested = [(i, arg) for i, arg in enumerate(args) if not isinstance(arg, Ref) and any(find_refs(arg))]
        if any(find_refs(kwargs)):
            return _make_general_step(op.target, tuple(args), kwargs, slots, slots[op.name], frees)
        target, out = op.target, slots[op.name]

        def step(values: list[Any]) -> None:
            call = args.copy()
            for position, slot in direct:
                call[position] = values[slot]
            for position, template in nested:
                call[position] = map_refs(template, lambda ref: values[slots[ref.name]])
            values[out] = target(*call, **kwargs)
            for slot in frees:
                values[slot] = None

        return step


def _make_general_step(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    slots: Mapping[str, int],
    out: int,
    frees: list[int],
) -> Step:
    def step(values: list[Any]) -> None:
        call, named = map_refs((args, kwargs), lambda ref: values[slots[ref.name]])
        values[out] = target(*call, **named)
        for slot in frees:
            values[slot] = None

    return step


# --- the cache, and every tier in one process ---------------------------------------------------------------------------


class SegmentCache:
    """Segments of one graph, built when first asked for. Safe for threads."""

    def __init__(self, graph: LayerGraph) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._segments: OrderedDict[tuple[tuple[int, ...], tuple[str, ...]], Segment] = OrderedDict()

    def get(self, stage: Stage) -> Segment:
        """The segment that runs a stage."""
        key = (stage.layers, stage.makes)
        with self._lock:
            segment = self._segments.get(key)
            if segment is None:
                segment = self._segments[key] = Segment(self._graph, stage)
                if len(self._segments) > CACHED_SEGMENTS:
                    self._segments.popitem(last=False)
            self._segments.move_to_end(key)
        return segment


def run_local(graph: LayerGraph, plan: Plan, x: Any) -> Any:
    """Run a plan with every tier in this process; each gets exactly the tensors that would cross to it.

    Args:
        graph: the traced model.
        plan: which tier runs which layer; the nodes it names do not matter here.
        x: a request's input, as `inputs.admit` takes it.

    Returns:
        What the model returns.

    Raises:
        InputError: when the model cannot take the input.
        PlanError: when the plan does not fit the graph, or data would flow back towards the device.
    """
    if not isinstance(graph, LayerGraph):
        raise PlanError(f"expected the graph that runtime.trace returns, got {type(graph).__name__}")
    admitted = admit(graph.spec, x)
    check_monotone(graph.spec, plan, graph.spec.entry(admitted.kind))
    route = find_route(graph.spec, replace(plan, edge_nodes=plan.edge_nodes or ("edge",)), admitted.kind)
    values: dict[str, torch.Tensor] = dict(admitted.values)
    outputs: dict[str, torch.Tensor] = {}
    for tier, crossing in zip(route.tiers, (*route.up, ()), strict=True):
        stage = route.stage(tier)
        values |= Segment(graph, stage).run({name: values[name] for name in stage.needs})
        outputs |= {name: values[name] for name in stage.makes if name in graph.spec.outputs}
        values = {name: values[name] for name in crossing}
    return unflatten_outputs(graph.spec, outputs)
