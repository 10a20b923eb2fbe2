"""The exported model as a flat list of operations, and what to say when a model cannot be exported.

Nothing here looks at values: `observe.py` runs the program once, `aliasing.py` makes it free of order, `layers.py`
groups it.
"""

import contextlib
import inspect
import io
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from runtime.errors import ModelError

logger = logging.getLogger(__name__)

WAY_OUT = (
    "wrap the model in a factory (package.module:factory) that replaces or leaves out this part, for example with "
    "torch.where in place of `if tensor:`"
)


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands in an operation's arguments for a tensor: another operation's result, the input, or a constant."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One operation. Its arguments are literals, `Ref`s, or lists, tuples, dicts and slices of them."""

    name: str  # of its result
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str = ""  # path of the module that called it

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors it reads, each once, in order of appearance."""
        return tuple(dict.fromkeys(ref.name for ref in find_refs((self.args, self.kwargs))))

    @property
    def op_name(self) -> str:
        """Name without library and overload: `conv2d`, `add_`, `getitem`."""
        if isinstance(self.target, torch._ops.OpOverload):
            return str(self.target.overloadpacket.__name__)
        return str(getattr(self.target, "__name__", type(self.target).__name__))


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Operations in the order the model runs them, the tensors it holds, and what it returns."""

    input: str
    ops: tuple[Op, ...]
    state: Mapping[str, torch.Tensor]  # parameters, buffers and literals by name in `ops`
    state_paths: Mapping[str, str]  # the same names -> path in the model
    outputs: tuple[Any, ...]  # flat: `Ref`s and literals
    out_spec: Any  # torch.utils._pytree.TreeSpec that `outputs` unflatten into


def find_refs(template: Any) -> Iterator[Ref]:
    """Walk the `Ref`s of an argument template in order."""
    if isinstance(template, Ref):
        yield template
    elif isinstance(template, (list, tuple)):
        for item in template:
            yield from find_refs(item)
    elif isinstance(template, Mapping):
        for item in template.values():
            yield from find_refs(item)
    elif isinstance(template, slice):
        yield from find_refs((template.start, template.stop, template.step))


def map_refs(template: Any, function: Callable[[Ref], Any]) -> Any:
    """Copy an argument template with every `Ref` replaced by what `function` gives for it."""
    if isinstance(template, Ref):
        return function(template)
    if isinstance(template, (list, tuple)):
        items = [map_refs(item, function) for item in template]
        return items if isinstance(template, list) else tuple(items)
    if isinstance(template, Mapping):
        return {key: map_refs(item, function) for key, item in template.items()}
    if isinstance(template, slice):
        return slice(*(map_refs(item, function) for item in (template.start, template.stop, template.step)))
    return template


# --- export ---------------------------------------------------------------------------------------------------------


def export(module: nn.Module, example: torch.Tensor) -> ExportedProgram:
    """Export a model for inputs of the example's shape.

    Raises:
        ModelError: naming the layer where it failed and the way out.
    """
    _check_signature(module)
    try:
        with torch.no_grad(), _quiet_torch():
            return torch.export.export(module, (example,), strict=False)
    except Exception as error:
        where = _find_layer(module, error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"torch.export cannot trace this model: {where}: {reason}; {WAY_OUT}") from error


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep what torch.export prints and logs on failure, a page of its internals, out of the user's terminal."""
    torch_logger = logging.getLogger("torch")
    handlers, printed = torch_logger.handlers, io.StringIO()
    torch_logger.handlers = [logging.StreamHandler(printed)]
    try:
        with contextlib.redirect_stderr(printed):
            yield
    finally:
        torch_logger.handlers = handlers
        if printed.getvalue():
            logger.debug("torch.export said: %s", printed.getvalue())


def _check_signature(module: nn.Module) -> None:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind in positional]
    if len(required) > 1:
        raise ModelError(
            f"expected a model that takes one tensor, got one that takes {', '.join(required)}; wrap it in a factory "
            "(package.module:factory) whose forward takes one tensor and makes the others"
        )


def _find_layer(module: nn.Module, error: BaseException | None) -> str:
    """Name the innermost module of the model that was in its forward when an error was raised, with the source line."""
    paths = {id(child): path for path, child in module.named_modules()}
    where = f"layer (root) ({type(module).__name__})"
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            frame, owner = trace.tb_frame, trace.tb_frame.f_locals.get("self")
            is_call = frame.f_code.co_name in ("_wrapped_call_impl", "_call_impl")  # torch's own way into forward
            if isinstance(owner, nn.Module) and id(owner) in paths and not is_call:
                path = paths[id(owner)] or "(root)"
                file = frame.f_code.co_filename.rsplit("/", 1)[-1]
                where = f"layer {path} ({type(owner).__name__}), line {trace.tb_lineno} of {file}"
            trace = trace.tb_next
        error = error.__cause__
    return where


# --- reading the exported graph ---------------------------------------------------------------------------------------


def read_program(exported: ExportedProgram) -> Program:
    """Read an exported model as a `Program`.

    Raises:
        ModelError: when it has more or fewer than one tensor input.
    """
    graph_module = exported.module(check_guards=False)
    reader = _Reader(graph_module)
    reader.read(graph_module.graph)
    if len(reader.inputs) != 1:
        raise ModelError(
            f"expected a model with one tensor input, got {len(reader.inputs)} ({', '.join(reader.inputs)}); wrap it "
            "in a factory (package.module:factory) whose forward takes one tensor"
        )
    return Program(
        input=reader.inputs[0],
        ops=tuple(reader.ops),
        state=reader.state,
        state_paths=reader.state_paths,
        outputs=tuple(reader.outputs),
        out_spec=exported.call_spec.out_spec,
    )


class _Reader:
    """Turns fx nodes into operations; sub-graphs that only switch gradients or autocast off are read in line."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.inputs: list[str] = []
        self.ops: list[Op] = []
        self.state: dict[str, torch.Tensor] = {}
        self.state_paths: dict[str, str] = {}
        self.outputs: list[Any] = []

    def read(self, graph: fx.Graph) -> None:
        """Read the model's own graph."""
        known: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.inputs.append(node.name)
                known[node] = Ref(node.name)
            elif node.op == "output":
                self.outputs = list(_resolve(node.args[0], known))
            else:
                self._read_node(node, known, self.owner, "")

    def _read_node(self, node: fx.Node, known: dict[fx.Node, Any], owner: nn.Module, prefix: str) -> None:
        if node.op == "get_attr":
            known[node] = self._read_attribute(node, owner, prefix)
            return
        if node.op != "call_function" or _is_assertion(node):
            return
        args, kwargs = _resolve(node.args, known), _resolve(node.kwargs, known)
        inlined = _inlined(node.target, args)
        if inlined is not None:
            known[node] = self._read_inline(*inlined, prefix=f"{prefix}{node.name}_")
        elif node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            known[node] = args[0][args[1]]
        else:
            name = prefix + node.name
            assert callable(node.target)
            self.ops.append(Op(name, node.target, args, kwargs, _module_path(node)))
            known[node] = Ref(name)

    def _read_attribute(self, node: fx.Node, owner: nn.Module, prefix: str) -> Any:
        path = str(node.target)
        value = operator.attrgetter(path)(owner)
        if not isinstance(value, torch.Tensor):
            return value  # a sub-graph or another object that an operation takes
        name = prefix + node.name
        self.state[name] = value.detach()
        self.state_paths[name] = path
        return Ref(name)

    def _read_inline(self, body: fx.GraphModule, args: tuple[Any, ...], prefix: str) -> Any:
        known: dict[fx.Node, Any] = {}
        given = iter(args)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "output":
                return _resolve(node.args[0], known)
            else:
                self._read_node(node, known, body, prefix)
        return None


def _resolve(template: Any, known: Mapping[fx.Node, Any]) -> Any:
    """Copy fx arguments as plain Python with nodes replaced; fx's immutable lists and dicts become ordinary ones."""
    if isinstance(template, fx.Node):
        return known[template]
    if isinstance(template, (list, tuple)):
        items = [_resolve(item, known) for item in template]
        return items if isinstance(template, list) else tuple(items)
    if isinstance(template, Mapping):
        return {key: _resolve(item, known) for key, item in template.items()}
    if isinstance(template, slice):
        return slice(*(_resolve(item, known) for item in (template.start, template.stop, template.step)))
    return template


def _is_assertion(node: fx.Node) -> bool:
    """Tell whether a node only checks something that holds for the shapes the graph was made for."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__.startswith("_assert")


def _inlined(target: Any, args: tuple[Any, ...]) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """Body and arguments of a sub-graph that changes nothing here: we never record gradients."""
    name = getattr(target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":  # (enabled, body, *args)
        return args[1], args[2:]
    if name == "wrap_with_autocast" and args[2] is False:  # (device, dtype, enabled, cache, body, *args)
        return args[4], args[5:]
    return None


def _module_path(node: fx.Node) -> str:
    """Path of the innermost module whose call made this node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix("L['self']").removeprefix(".")
