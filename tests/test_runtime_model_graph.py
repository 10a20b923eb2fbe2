"""runtime.model.graph: layers, values and fingerprints of a traced model, and what is said of one that cannot be."""

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.errors import ModelError, ProtocolError, TensorMismatch
from runtime.model.graph import LayerGraph, trace, unflatten_outputs
from runtime.model.inputs import admit
from runtime.model.kinds import count_flops, find_kind
from runtime.model.outputs import Leaf, dump_tree, load_tree
from runtime.model.segment import SegmentCache, run_local
from runtime.model.zoo import Model, load_model
from runtime.types import GraphSpec, Plan
from tests.splitting import cut_plan, run_plan, same_bits, same_output


def trace_module(module: nn.Module, shape: tuple[int, ...] = (1, 3, 8, 8)) -> LayerGraph:
    torch.manual_seed(0)
    return trace(Model("test", module.eval(), torch.randn(shape), None, shape[0], "factory"))


def check_all_cuts(module: nn.Module, shape: tuple[int, ...] = (1, 3, 8, 8)) -> LayerGraph:
    """Trace a module and run it with every cut: bits and plain values as the module gives them."""
    graph = trace_module(module, shape)
    x = torch.randn(shape)
    with torch.no_grad():
        whole = module(x.clone())
    admitted = admit(graph.spec, x)
    for i in range(graph.num_layers + 1):
        assert same_output(run_plan(graph, SegmentCache(graph), cut_plan(graph.num_layers, i), admitted), whole)
    return graph


class Function(nn.Module):
    """A module of one convolution and a function after it."""

    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self.conv(x))


@pytest.fixture(scope="module")
def residual() -> LayerGraph:
    return trace(load_model("tests.models:residual"))


# --- layers and values ------------------------------------------------------------------------------------------------


def test_cheap_followers_join_the_layer_that_feeds_them() -> None:
    graph = trace(load_model("tests.models:chain"))
    assert [layer.name for layer in graph.spec.layers] == ["stem", "pool", "body", "mean", "hidden", "head"]
    assert [layer.kind for layer in graph.spec.layers] == ["conv", "pool", "conv", "pool", "linear", "linear"]


def test_a_residual_add_joins_the_later_of_its_feeders(residual: LayerGraph) -> None:
    second = next(layer for layer in residual.layers if layer.name == "second")
    assert [op.op_name for op in second.ops] == ["conv2d", "add_", "relu_"]


def test_concat_is_a_layer_and_tuples_never_cross() -> None:
    graph = trace(load_model("tests.models:branching"))
    kinds = {layer.name: layer.kind for layer in graph.spec.layers}
    assert kinds["cat"] == "concat"
    assert kinds["chunk"] == "view"
    assert {"getitem", "getitem_1"} <= {value.name for value in graph.spec.values}
    assert all(name in graph.seen for value in graph.spec.values for name in [value.name])


@pytest.mark.parametrize("name", ["chain", "chain_image", "residual", "branching", "views", "reordered"])
def test_layers_are_in_topological_order_and_values_say_who_reads_them(name: str) -> None:
    spec = trace(load_model(f"tests.models:{name}")).spec
    for value in spec.values:
        assert all(consumer > value.producer for consumer in value.consumers)
        assert list(value.consumers) == [i for i, layer in enumerate(spec.layers) if value.name in layer.inputs]
        assert value.producer < 0 or value.name in spec.layers[value.producer].outputs
    assert len({value.name for value in spec.values}) == len(spec.values)
    assert len({layer.name for layer in spec.layers}) == spec.num_layers
    assert {value.name for value in spec.values if value.is_output} == set(spec.outputs)


def test_an_image_model_starts_with_the_input_stage() -> None:
    spec = trace(load_model("tests.models:chain_image", batch_size=2)).spec
    assert [layer.kind for layer in spec.layers[:2]] == ["decode", "normalise"]
    assert spec.layers[0].inputs == ("input.encoded.0", "input.encoded.1")
    assert spec.layers[0].outputs == spec.layers[1].inputs == ("input.image",)
    values = {value.name: value for value in spec.values}
    assert not values["input.encoded.0"].is_sized
    assert values["input.image"].tensor.shape == (2, 32, 32, 3)
    assert values[spec.layers[1].outputs[0]].tensor.shape == (2, 3, 32, 32)


def test_the_graph_survives_the_wire(residual: LayerGraph) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(residual.spec), type=GraphSpec) == residual.spec


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 16, 2, stride=2)
        self.linear = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.depthwise(self.conv(x))))
        tokens = self.linear(x.flatten(2).transpose(1, 2)).unflatten(2, (2, 6)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
        scores = mixed @ tokens.transpose(-1, -2)
        return torch.einsum("b ... i j, b...jk -> b...ik", scores, tokens)


def test_flops_are_those_that_torch_counts() -> None:
    module, shape = Counted(), (2, 4, 8, 8)
    graph = trace_module(module, shape)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(torch.randn(shape))
    exact = {"conv", "linear", "matmul", "attention"}

    def shape_of(name: str) -> tuple[int, ...]:
        return graph.seen[name].shape

    ours = sum(
        count_flops(op, shape_of, shape_of(op.name))
        for layer in graph.layers
        for op in layer.ops
        if find_kind(op) in exact
    )
    assert ours == counter.get_total_flops()
    kinds = [layer.kind for layer in graph.spec.layers if layer.kind != "view"]
    assert kinds == ["conv", "depthwise_conv", "conv", "linear", "attention", "matmul", "matmul"]


# --- constants --------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A mask that is written piece by piece and does not depend on the input, as in Swin; a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = x.new_zeros((8, 8))
        mask[2:, :4].fill_(1.0)
        mask[:, 6:] = 2.0
        return self.conv(x).masked_fill(mask == 1.0, -1.0) + self.table.t().exp()[:, None]


def test_what_does_not_depend_on_the_input_is_no_layer_and_counts_its_parameters() -> None:
    graph = check_all_cuts(Masked())
    assert [layer.name for layer in graph.spec.layers] == ["conv"]
    assert graph.parameter_names == {"conv.weight", "conv.bias", "table"}


def test_a_shared_parameter_has_the_name_the_model_lists_it_by() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    module = Tied()
    assert check_all_cuts(module).parameter_names == {name for name, _ in module.named_parameters()}


# --- in-place operations ----------------------------------------------------------------------------------------------


def test_a_model_that_writes_to_its_input_leaves_the_callers_alone() -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.sub_(0.5)) + x.mean()

    graph = check_all_cuts(Greedy())
    x = torch.randn(1, 3, 8, 8)
    before = x.clone()
    run_local(graph, Plan.split(graph.num_layers, 0, 1), x)
    assert same_bits(x, before)


def windows(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping windows arrive without overlap, and then `flatten` is a view of them, not a copy."""
    y = y.unfold(3, 4, 2)
    return y.flatten(1).mul_(2.0), y.amax((3, 4))


@pytest.mark.parametrize(
    "function",
    [
        windows,
        lambda y: y.add_(torch.ones(8, dtype=torch.float64)).mul(2) + y,  # a twin would promote to float64
        lambda y: (y.transpose(2, 3).relu_().mean((2, 3)), y.amax((2, 3))),  # a view of it is read again
        lambda y: y.squeeze_(0).sum(0),  # changes the shape in place
        lambda y: (y[:, 1:].clamp_(min=0.0).mean((1, 2)), functional.conv2d(y, torch.ones(2, 4, 1, 1))),  # a part of it
        lambda y: y.new_zeros(y.shape).copy_(y).relu_(),  # writes the input into a constant
        lambda y: functional.relu(y.expand(1, 4, 8, 8)).cumsum(3).transpose(1, 3).mul_(3).sum((1, 2)),
    ],
    ids=["windows", "promotes", "view", "squeeze", "part", "into_constant", "strides"],
)
def test_writes_in_place_keep_their_meaning_at_every_cut(function: Callable[[torch.Tensor], object]) -> None:
    check_all_cuts(Function(function))


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_outputs_of_any_tree_come_back_with_their_plain_values() -> None:
    graph = check_all_cuts(Function(lambda y: {"a": y.relu(), 2: [y, (None, 3, "x")], "n": {}}))
    x = torch.randn(1, 3, 8, 8)
    made = run_local(graph, Plan.split(graph.num_layers, 1, 1), x)
    assert list(made) == ["a", 2, "n"]
    assert made[2][1] == (None, 3, "x")


def test_outputs_that_are_the_input_or_a_constant_are_made_by_a_layer() -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x, self.scale, x.relu(), x

    graph = check_all_cuts(Passing())
    assert all(value.producer >= 0 for value in graph.spec.values if value.is_output)


def test_a_missing_output_is_named(residual: LayerGraph) -> None:
    with pytest.raises(TensorMismatch, match="linear"):
        unflatten_outputs(residual.spec, {})


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
trees = st.recursive(
    plain | st.just(Leaf),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(tree=trees)
def test_a_tree_comes_back_from_json_as_it_was(tree: object) -> None:
    leaves: list[object] = []

    def number(node: object) -> object:
        if node is Leaf:
            leaves.append(object())
            return Leaf(len(leaves) - 1)
        if isinstance(node, dict):
            return {key: number(item) for key, item in node.items()}
        return type(node)(map(number, node)) if isinstance(node, (list, tuple)) else node

    def fill(node: object) -> object:
        if isinstance(node, Leaf):
            return leaves[node.index]
        if isinstance(node, dict):
            return {key: fill(item) for key, item in node.items()}
        return type(node)(map(fill, node)) if isinstance(node, (list, tuple)) else node

    numbered = number(tree)
    assert load_tree(dump_tree(numbered), leaves) == fill(numbered)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "{}",
        '{"leaf":5}',
        '{"leaf":-1}',
        '{"leaf":"x"}',
        '{"dict":[[[],{"value":1}]]}',
        '{"named":["a b",["c"]],"items":[{"value":1}]}',
        '{"named":["P",["x"]],"items":[]}',
        '{"list":' * 5000,
    ],
    ids=range(10),
)
def test_a_tree_that_we_did_not_write_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        load_tree(text, [torch.ones(1)])


# --- models that cannot be traced -------------------------------------------------------------------------------------


class Stubborn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 3, 1), inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, 0.5)  # training=True is the default


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Holder(Stubborn()), r"layer blocks\.1 \(Stubborn\), line \d+ of test_runtime_model_graph.py: .*factory"),
        (Holder(Noisy()), r"blocks\.1 \(dropout\) is random also in eval mode.*training=self.training"),
        (Holder(Counting()), r"blocks\.1 \(add_\) writes to .*calls.*state"),
        (TwoInputs(), r"takes one tensor, got one that takes x, mask; wrap it in a factory"),
        (Constant(), "does not depend on its input"),
    ],
    ids=["control_flow", "random", "stateful", "two_inputs", "constant"],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_an_untraceable_model_gets_an_error_that_names_the_layer_and_the_way_out(
    module: nn.Module, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        trace_module(module)


def test_a_model_in_train_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="eval mode"):
        trace(Model("test", nn.Linear(3, 3), torch.ones(1, 3), None, 1, "factory"))


def test_an_output_that_is_no_container_of_tensors_is_refused() -> None:
    with pytest.raises(ModelError, match=r"dicts, lists or tuples, got a range|cannot trace"):
        trace_module(Function(lambda y: {"y": y, "r": range(3)}))


def test_a_graph_that_gives_other_bits_than_the_module_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Fickle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if torch.compiler.is_compiling() else x + 2

    with caplog.at_level(logging.WARNING, logger="runtime.model.graph"):
        trace_module(Fickle())
    assert "other bits than the module" in caplog.text


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_graph_ids_follow_the_graph_and_model_ids_also_the_weights() -> None:
    base = trace(load_model("tests.models:chain_image", weights="seeded"))
    again = trace(load_model("tests.models:chain_image", weights="seeded"))
    reseeded = trace(load_model("tests.models:chain_image", weights="seeded", seed=1))
    batched = trace(load_model("tests.models:chain_image", weights="seeded", batch_size=2))
    plain_input = trace(load_model("tests.models:chain", weights="seeded"))
    assert (base.spec.graph_id, base.model_id) == (again.spec.graph_id, again.model_id)
    assert base.spec == again.spec
    assert reseeded.spec.graph_id == base.spec.graph_id
    assert reseeded.model_id != base.model_id
    assert len({graph.spec.graph_id for graph in (base, batched, plain_input)}) == 3


def test_a_graph_id_knows_the_arguments_of_operations() -> None:
    ids = {trace_module(Function(lambda y, k=k: functional.leaky_relu(y, k))).spec.graph_id for k in (0.1, 0.2)}
    assert len(ids) == 2


def test_preprocessing_changes_the_graph_id() -> None:
    model = load_model("tests.models:chain_image")
    assert model.preprocessing is not None
    other = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, resize=40))
    assert trace(model).spec.graph_id != trace(other).spec.graph_id


def test_processes_with_other_thread_counts_agree_on_every_fingerprint() -> None:
    code = (
        "from runtime.model.zoo import load_model; from runtime.model.graph import trace; "
        "g = trace(load_model('tests.models:chain_image', weights='seeded')); print(g.spec.graph_id, g.model_id)"
    )

    def start(threads: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)}
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)

    processes = [start(threads) for threads in (1, 2)]
    told = {process.communicate(timeout=100)[0] for process in processes}
    assert len(told) == 1
    graph = trace(load_model("tests.models:chain_image", weights="seeded"))
    assert told == {f"{graph.spec.graph_id} {graph.model_id}\n"}
