"""Graphs, profiles and deployments written by hand, for tests that need no torch."""

import dataclasses

import numpy as np

from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.planning.problem import PlanningProblem
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    GraphSpec,
    LayerSpec,
    ModelProfile,
    NodeProfile,
    NodeState,
    Preprocessing,
    SystemState,
    TensorSpec,
    Tier,
    ValueSpec,
)

IMAGE = Preprocessing(8, 8, 8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_graph(reads: list[tuple[int, ...]], *, nbytes: int = 400, has_stage: bool = False) -> GraphSpec:
    """A graph whose layer i reads the layers in `reads[i]` (-1: the model's input); the last layer is the output.

    With a stage two layers, decode and normalise, stand before them, and the indices in `reads` still count the
    model's own layers.
    """
    shift = 2 if has_stage else 0
    consumers: dict[int, list[int]] = {}
    for layer, sources in enumerate(reads):
        for source in sources:
            consumers.setdefault(source, []).append(layer + shift)
    tensor = TensorSpec((nbytes // 4,), "float32", 4)
    values = [ValueSpec("x", shift - 1, tuple(consumers.get(-1, ())), tensor)]
    layers = [
        LayerSpec(f"layer{i}", "conv", tuple(_value(s) for s in sources), (f"v{i}",)) for i, sources in enumerate(reads)
    ]
    for i in range(len(reads)):
        values.append(
            ValueSpec(f"v{i}", i + shift, tuple(sorted(set(consumers.get(i, ())))), tensor, i == len(reads) - 1)
        )
    if has_stage:
        picture = TensorSpec((1, 8, 8, 3), "uint8", 1)
        file = ValueSpec("input.encoded.0", -1, (0,), TensorSpec((100,), "uint8", 1), is_sized=False)
        values = [file, ValueSpec("input.image", 0, (1,), picture), *values]
        layers = [
            LayerSpec("decode", "decode", ("input.encoded.0",), ("input.image",)),
            LayerSpec("normalise", "normalise", ("input.image",), ("x",)),
            *layers,
        ]
    return GraphSpec(
        graph_id=f"test-{reads}-{has_stage}-{nbytes}",
        layers=tuple(layers),
        values=tuple(values),
        outputs=(f"v{len(reads) - 1}",),
        output_tree="",
        batch_size=1,
        num_stage_layers=shift,
        preprocessing=IMAGE if has_stage else None,
    )


def _value(source: int) -> str:
    return "x" if source < 0 else f"v{source}"


def chain(length: int, *, has_stage: bool = False) -> GraphSpec:
    """Layer i reads layer i - 1."""
    return make_graph([(i - 1,) for i in range(length)], has_stage=has_stage)


RESIDUAL = [(-1,), (0,), (1,), (0, 2), (3,)]
"""v0 skips over two layers into layer 3."""


def make_deployment(
    *,
    edges: int = 1,
    has_cloud: bool = True,
    constraints: Constraints | None = None,
    model: str = "tests.models:chain",
) -> Deployment:
    """Edge nodes edge0, edge1, ... and a cloud on loopback, at ports where nothing listens."""
    nodes = [NodeConfig(name=f"edge{i}", tier=Tier.EDGE, address=f"tcp://127.0.0.1:{11 + 2 * i}") for i in range(edges)]
    if has_cloud:
        nodes.append(NodeConfig(name="cloud", tier=Tier.CLOUD, address="tcp://127.0.0.1:9"))
    return Deployment(
        model=ModelConfig(spec=model, input_kind="tensor"), nodes=tuple(nodes), constraints=constraints or Constraints()
    )


def make_problem(
    graph: GraphSpec,
    *,
    edges: int = 1,
    has_cloud: bool = True,
    constraints: Constraints | None = None,
    input_kind: str = "tensor",
    layer_s: float = 0.01,
) -> PlanningProblem:
    """A problem in which every node needs `layer_s` for every layer."""
    deployment = make_deployment(edges=edges, has_cloud=has_cloud, constraints=constraints)
    profile = NodeProfile((layer_s,) * graph.num_layers, 1e9, 1e9)
    nodes = dict.fromkeys((DEVICE_NODE, *(node.name for node in deployment.nodes)), profile)
    return PlanningProblem(ModelProfile(graph, nodes), deployment, deployment.constraints, input_kind)


def make_state(problem: PlanningProblem, *, down: tuple[str, ...] = (), **changes: object) -> SystemState:
    """A state in which every node is idle and nothing was measured of the links."""
    nodes = tuple(
        NodeState(node.name, node.tier, node.name not in down, 1.0, 0.0, 0, 0.0, 0.0)
        for node in problem.deployment.nodes
    )
    fields: dict[str, object] = {
        "nodes": nodes,
        "links": (),
        "device_backlog_s": 0.0,
        "uplink_backlog_bytes": 0,
        "request_rate_hz": float("nan"),
        "recent_errors": (),
        "plan_in_force": None,
        "input_kind": problem.input_kind,
        "input_bytes": 100,
        "deadline_s": 1.0,
    }
    return SystemState(**{**fields, **changes})  # type: ignore[arg-type]


SPEED = {"device": 1.0, "edge0": 0.2, "edge1": 0.1, "cloud": 0.02}


def varied(
    seed: int, *, edges: int = 1, constraints: Constraints | None = None, kind: str = "tensor"
) -> PlanningProblem:
    """A DAG of 12 layers with skips, tensors that shrink and grow, and nodes of different speed."""
    draw = np.random.default_rng(seed)
    graph = make_graph(
        [(-1,), *((i - 1, max(i - 3, 0)) if i % 4 == 3 else (i - 1,) for i in range(1, 12))], has_stage=True
    )
    sizes = (10 ** draw.uniform(2.5, 5.5, len(graph.values))).astype(int)
    values = tuple(
        dataclasses.replace(value, tensor=TensorSpec((int(size),), "float32", 4)) if value.producer >= 2 else value
        for value, size in zip(graph.values, sizes, strict=True)
    )
    graph = dataclasses.replace(graph, values=values, graph_id=f"varied{seed}")
    problem = make_problem(graph, edges=edges, constraints=constraints, input_kind=kind)
    work_s = draw.gamma(1.0, 0.02, graph.num_layers)
    nodes = {
        name: NodeProfile(tuple(work_s * SPEED[name] * draw.uniform(0.5, 2.0, len(work_s))), 5e8, 1e9, 0.0005)
        for name in problem.profile.nodes
    }
    ratios = {value.name: float(draw.choice([1.0, 1.8])) for value in values}
    return dataclasses.replace(problem, profile=ModelProfile(graph, nodes, ratios))
