"""A site small enough to work out by hand, and a world in which nothing changes."""

import numpy as np

from env.draw import MAX_STEPS
from env.site import Site
from env.world import NUM_PATHS, Background, World, paths_of
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.planning.problem import PlanningProblem
from runtime.types import (
    Constraints,
    GraphSpec,
    LayerSpec,
    ModelProfile,
    NodeProfile,
    TensorSpec,
    Tier,
    ValueSpec,
)

DEVICE_S, EDGE_S, CLOUD_S = (0.1, 0.2, 0.3), (0.05, 0.1, 0.15), (0.04, 0.04, 0.04)
INPUT_BYTES, CUT_BYTES, RESULT_BYTES = 125_000, 62_500, 1_250
UP_BPS, DOWN_BPS, BACKBONE_BPS = 10e6, 50e6, 100e6
EDGE_RTT_S, CLOUD_RTT_S, BACKBONE_RTT_S = 0.02, 0.2, 0.05


def toy_site(*, device_has_model: bool = True) -> Site:
    """Three layers in a chain; one edge node, one cloud; nothing that packs, no fixed costs."""
    values = (
        ValueSpec("input", -1, (0,), TensorSpec((INPUT_BYTES,), "uint8", 1)),
        ValueSpec("a", 0, (1,), TensorSpec((CUT_BYTES,), "uint8", 1)),
        ValueSpec("b", 1, (2,), TensorSpec((CUT_BYTES,), "uint8", 1)),
        ValueSpec("out", 2, (), TensorSpec((RESULT_BYTES,), "uint8", 1), is_output=True),
    )
    layers = tuple(
        LayerSpec(f"layer{at}", "conv", (values[at].name,), (values[at + 1].name,)) for at in range(len(values) - 1)
    )
    graph = GraphSpec("toy", layers, values, ("out",), "null", 1, 0, None)
    nodes = {
        name: NodeProfile(layer_s, 1e9, 1e9)
        for name, layer_s in (("device", DEVICE_S), ("edge0", EDGE_S), ("cloud", CLOUD_S))
    }
    constraints = Constraints(deadline_s=20.0, device_has_model=device_has_model)
    deployment = Deployment(
        model=ModelConfig(spec="tests:toy", input_kind="tensor"),
        nodes=(
            NodeConfig(name="edge0", tier=Tier.EDGE, address="tcp://127.0.0.1:7001"),
            NodeConfig(name="cloud", tier=Tier.CLOUD, address="tcp://127.0.0.1:7003"),
        ),
        constraints=constraints,
    )
    return Site("toy", PlanningProblem(ModelProfile(graph, nodes), deployment, constraints, "tensor"))


def still_world(
    site: Site,
    arrivals_s: list[float],
    *,
    deadline_s: float = 20.0,
    background: dict[int, tuple[list[float], list[float]]] | None = None,
) -> World:
    """Constant rates, no noise; the last arrival is only seen."""
    slots = site.candidates.costs.layout
    count, num_nodes = len(arrivals_s), len(slots.nodes)
    rate_bps, rtt_s = np.full((NUM_PATHS, MAX_STEPS), DOWN_BPS), np.full((NUM_PATHS, MAX_STEPS), EDGE_RTT_S)
    rate_bps[4], rtt_s[3], rtt_s[4] = BACKBONE_BPS, CLOUD_RTT_S, BACKBONE_RTT_S
    jobs = {} if background is None else background
    none: tuple[list[float], list[float]] = ([], [])
    return World(
        rate_bps=rate_bps,
        rtt_s=rtt_s,
        path=paths_of(slots, "cloud"),
        scale=np.array([UP_BPS / DOWN_BPS if source == "device" else 1.0 for source, _ in slots.links]),
        contention=np.ones((num_nodes, MAX_STEPS)),
        is_down=np.zeros((num_nodes, MAX_STEPS), dtype=np.bool_),
        background=tuple(Background(*map(np.array, jobs.get(node, none))) for node in range(num_nodes)),
        shift=np.zeros(1, dtype=np.intp),
        arrivals_s=np.array([arrivals_s]),
        input_bytes=np.full((1, count), float(INPUT_BYTES)),
        deadline_s=np.full((1, count), deadline_s),
        noise=np.ones((1, count, 3)),
        is_warm=np.ones(site.candidates.costs.num_plans, dtype=np.bool_),
    )
