"""A model as layers and the tensors between them, traced by torch.export.

The steps, one file each: `program` reads the exported model, `observe` runs it once and folds constants, `aliasing` makes
in-place writes explicit, `layers` groups operations. Here they become a `LayerGraph` with two fingerprints: `graph_id` of
the layers, shapes and preprocessing, `model_id` of these and the weights.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from runtime.errors import ModelError, TensorMismatch
from runtime.model.aliasing import find_flow
from runtime.model.inputs import IMAGE_VALUE, decode, encoded_value, normalise
from runtime.model.layers import Layer, group_layers
from runtime.model.observe import Entangled, Observation, Seen, observe
from runtime.model.outputs import Leaf, dump_tree, load_tree
from runtime.model.program import WAY_OUT, Op, Program, Ref, export, find_refs, read_program
from runtime.model.windows import find_spatial
from runtime.model.zoo import Model
from runtime.types import GraphSpec, LayerSpec, TensorSpec, ValueSpec

logger = logging.getLogger(__name__)

TYPICAL_ENCODED_BYTES = 100_000
"""Bytes of a camera's JPEG where none has been seen: half a megapixel at quality 90. Guess."""


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """A traced model: its layers as the planner sees them, and the operations and tensors that run them."""

    spec: GraphSpec
    model_id: str
    device: torch.device
    layers: tuple[Layer, ...]
    constants: Mapping[str, torch.Tensor]  # parameters, buffers and what was computed of them alone
    constant_parameters: Mapping[str, frozenset[str]]  # constant -> paths of the parameters it is made of
    seen: Mapping[str, Seen]  # layout of every tensor in the whole model, the input stage's excluded
    memory: Mapping[str, int]  # see `aliasing`
    lineage: Mapping[str, frozenset[str]]

    @property
    def num_layers(self) -> int:
        """Number of layers, the input stage included."""
        return self.spec.num_layers

    @property
    def parameter_names(self) -> frozenset[str]:
        """Paths of the parameters that the layers read."""
        return frozenset().union(*self.constant_parameters.values())


@torch.inference_mode(False)
def trace(model: Model) -> LayerGraph:
    """Trace a model into layers.

    Raises:
        ModelError: when it cannot be traced; names the layer and the way out.
    """
    if not isinstance(model, Model):
        raise ModelError(f"expected a model from runtime.load_model, got {type(model).__name__}; call load_model first")
    if model.module.training:
        raise ModelError("expected a model in eval mode, got one in train mode; call module.eval() in its factory")
    exported = export(model.module, model.example)
    try:
        builder = _Builder(model, read_program(exported))
    except Entangled as reason:
        # It writes to views of memory that is read again: torch can rewrite that without in-place operations.
        logger.info("%s is split in its functional form: %s", model.spec, reason)
        try:
            builder = _Builder(model, read_program(exported.run_decompositions({})))
        except Entangled as error:
            raise ModelError(f"{error}, also in torch's functional form; {WAY_OUT}") from error
    _compare_with_module(model, builder.observed.results)
    return builder.build()


def _compare_with_module(model: Model, results: Sequence[torch.Tensor]) -> None:
    """Warn where the exported graph does not give the module's own bits, so that no cut of it could."""
    with torch.no_grad():
        whole = pytree.tree_leaves(model.module(model.example.clone()))
    pairs = zip([leaf for leaf in whole if isinstance(leaf, torch.Tensor)], results, strict=True)
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        logger.warning(
            "%s: torch.export's graph gives other bits than the module (another kernel, or state); "
            "all plans agree with the graph, none with the module",
            model.spec,
        )


class _Builder:
    """Puts together what the steps found."""

    def __init__(self, model: Model, program: Program) -> None:
        self.model = model
        self.program = program
        self.observed = observe(program, model.example)
        self.flow = find_flow(self.observed)
        self.layers = group_layers(self.flow, self.observed.seen, self.observed.constants, program.input)

    def build(self) -> LayerGraph:
        """Make the graph and its fingerprints."""
        stage = _stage_layers(self.model, self.program.input)
        layers = (*stage, *self.layers)
        values = self._values(layers, len(stage))
        spec = self._spec(layers, values, len(stage))
        return LayerGraph(
            spec=spec,
            model_id=self._model_id(spec.graph_id),
            device=self.model.example.device,
            layers=layers,
            constants=self.observed.constants,
            constant_parameters=self._constant_parameters(),
            seen={name: seen for name, seen in self.observed.seen.items() if isinstance(seen, Seen)},
            memory=self.flow.memory,
            lineage=self.flow.lineage,
        )

    def _spec(self, layers: tuple[Layer, ...], values: tuple[ValueSpec, ...], num_stage_layers: int) -> GraphSpec:
        names = tuple(output.name for output in self.flow.outputs if isinstance(output, Ref))
        leaves = iter(range(len(names)))
        flat = [Leaf(next(leaves)) if isinstance(output, Ref) else output for output in self.flow.outputs]
        tree = dump_tree(pytree.tree_unflatten(flat, self.program.out_spec))
        spec = GraphSpec(
            graph_id="",
            layers=self._layer_specs(layers, values),
            values=values,
            outputs=names,
            output_tree=tree,
            batch_size=self.model.batch_size,
            num_stage_layers=num_stage_layers,
            preprocessing=self.model.preprocessing,
        )
        return replace(spec, graph_id=_graph_id(spec, layers, self.observed))

    def _layer_specs(self, layers: Iterable[Layer], values: Iterable[ValueSpec]) -> tuple[LayerSpec, ...]:
        constants = self.observed.constants
        listed = {value.name for value in values}
        specs = []
        for layer in layers:
            made = [op.name for op in layer.ops]
            inputs = dict.fromkeys(name for op in layer.ops for name in op.reads if name in listed and name not in made)
            outputs = tuple(name for name in made if name in listed)
            weights = dict.fromkeys(name for op in layer.ops for name in op.reads if name in constants)
            specs.append(
                LayerSpec(
                    layer.name,
                    layer.kind,
                    tuple(inputs),
                    outputs,
                    flops=layer.flops,
                    weight_bytes=sum(constants[name].nbytes for name in weights),
                    window=layer.window,
                    groups=layer.groups,
                    num_ops=len(layer.ops),
                    spatial=find_spatial(layer.ops, self.observed.seen, constants),
                )
            )
        return tuple(specs)

    def _values(self, layers: tuple[Layer, ...], num_stage_layers: int) -> tuple[ValueSpec, ...]:
        """Specs of every tensor that a request brings, that another layer reads, or that is an output."""
        producers = {op.name: index for index, layer in enumerate(layers) for op in layer.ops}
        consumers: dict[str, dict[int, None]] = {}
        for index, layer in enumerate(layers):
            for op in layer.ops:
                for name in op.reads:
                    consumers.setdefault(name, {})[index] = None
        if self.program.input not in consumers:
            raise ModelError("the model's output does not depend on its input: there is nothing to split")
        outputs = {ref.name for ref in find_refs(self.flow.outputs)}
        values = []
        for name in dict.fromkeys((*consumers, *producers)):
            producer = producers.get(name, -1)
            readers = tuple(index for index in consumers.get(name, ()) if index != producer)
            if name not in self.observed.constants and (readers or name in outputs):
                tensor = self._tensor_spec(name)
                is_sized = num_stage_layers == 0 or producer >= 0
                values.append(ValueSpec(name, producer, readers, tensor, name in outputs, is_sized))
        return tuple(sorted(values, key=lambda value: value.producer))

    def _tensor_spec(self, name: str) -> TensorSpec:
        seen = self.observed.seen.get(name)
        if isinstance(seen, Seen):
            return TensorSpec(seen.shape, str(seen.dtype).removeprefix("torch."), seen.dtype.itemsize)
        picture = self.model.preprocessing
        if name == IMAGE_VALUE and picture is not None:
            return TensorSpec((self.model.batch_size, picture.height, picture.width, 3), "uint8", 1)
        return TensorSpec((TYPICAL_ENCODED_BYTES,), "uint8", 1)

    def _constant_parameters(self) -> dict[str, frozenset[str]]:
        """Paths of the parameters each constant is made of; a shared one under the name the model lists it by."""
        listed = {parameter.data_ptr(): path for path, parameter in self.model.module.named_parameters()}
        parameters = dict(self.model.module.named_parameters(remove_duplicate=False))
        paths = {
            name: listed[parameters[path].data_ptr()]
            for name, path in self.program.state_paths.items()
            if path in parameters
        }
        return {
            name: frozenset(paths[source] for source in self.observed.sources[name] if source in paths)
            for name in self.observed.constants
        }

    def _model_id(self, graph_id: str) -> str:
        """Fingerprint of the graph, the library's release and every tensor that the layers' constants are made of."""
        digest = hashlib.sha256(f"{graph_id} {torch.__version__.split('+')[0]}".encode())
        used = frozenset().union(*(self.observed.sources[name] for name in self.observed.constants))
        for name in sorted(used, key=lambda name: self.program.state_paths[name]):
            tensor = self.program.state[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(f"{self.program.state_paths[name]} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _stage_layers(model: Model, input_name: str) -> tuple[Layer, ...]:
    """The input stage as layers: decode, normalise."""
    picture = model.preprocessing
    if picture is None:
        return ()
    encoded = tuple(Ref(encoded_value(index)) for index in range(model.batch_size))
    pixels = float(model.batch_size * picture.height * picture.width * 3)
    decoding = Op(IMAGE_VALUE, partial(decode, picture), encoded, {})
    scaling = Op(input_name, partial(normalise, picture), (Ref(IMAGE_VALUE),), {"device": model.example.device})
    return (Layer("decode", "decode", (decoding,), pixels), Layer("normalise", "normalise", (scaling,), pixels))


def _graph_id(spec: GraphSpec, layers: Iterable[Layer], observed: Observation) -> str:
    """Fingerprint of operations, arguments, shapes, dtypes and preprocessing; of no weight, device or process."""
    model_layers = tuple(layers)[spec.num_stage_layers :]
    content = {
        "ops": [[[op.name, str(op.target), _plain(op.args), _plain(op.kwargs)] for op in x.ops] for x in model_layers],
        "values": [[value.name, value.tensor.shape, value.tensor.dtype] for value in spec.values],
        "constants": [[name, tuple(t.shape), str(t.dtype)] for name, t in sorted(observed.constants.items())],
        "outputs": [spec.outputs, spec.output_tree],
        "input": [spec.batch_size, spec.num_stage_layers, repr(spec.preprocessing)],
    }
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _plain(argument: Any) -> Any:
    """Text of an operation's argument that is the same in every process and on every device."""
    if isinstance(argument, (list, tuple)):
        return [_plain(item) for item in argument]
    if isinstance(argument, Mapping):
        return {str(key): _plain(item) for key, item in argument.items()}
    if isinstance(argument, slice):
        return ["slice", _plain((argument.start, argument.stop, argument.step))]
    if isinstance(argument, torch.device):
        return "device"
    return argument.code if isinstance(argument, fx.GraphModule) else repr(argument)


def unflatten_outputs(spec: GraphSpec, values: Mapping[str, torch.Tensor]) -> Any:
    """Rebuild what the model returns from its output tensors.

    Args:
        spec: the graph.
        values: tensors by name, all of `spec.outputs` among them.

    Raises:
        TensorMismatch: when an output is missing.
        ProtocolError: when the graph's output tree is malformed.
    """
    missing = [name for name in spec.outputs if name not in values]
    if missing:
        raise TensorMismatch(f"expected the outputs {list(spec.outputs)}, got none for {missing}")
    return load_tree(spec.output_tree, [values[name] for name in spec.outputs])
