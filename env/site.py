"""A site: one model on one device and its nodes, compiled once, where many episodes take place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from env.ranges import Range, Ranges
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.planning.candidates import Candidates, candidates
from runtime.planning.problem import PlanningProblem
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    GraphSpec,
    LayerSpec,
    ModelProfile,
    NodeProfile,
    TensorSpec,
    Tier,
    ValueSpec,
)


@dataclass(frozen=True, eq=False)
class Site:
    """A planning problem with its candidates; what an environment needs to know of model and machines."""

    name: str
    problem: PlanningProblem
    ranges: Ranges = field(default_factory=Ranges)
    candidates: Candidates = field(init=False)
    """The K plans that are chosen among."""

    def __post_init__(self) -> None:
        """Choose the candidates.

        Raises:
            PlanError: when no split of the problem is legal.
        """
        object.__setattr__(self, "candidates", candidates(self.problem))

    @property
    def num_edges(self) -> int:
        """Edge nodes."""
        return len(self.problem.deployment.edges)

    def model_s(self, name: str) -> float:
        """Idle seconds of the whole model, from the entry on, on one node."""
        return self._model_s[name]

    @cached_property
    def _model_s(self) -> dict[str, float]:
        entry, nodes = self.problem.entry, self.problem.profile.nodes
        return {name: float(np.sum(node.layer_s[entry:])) for name, node in nodes.items()}

    @cached_property
    def typical_bytes(self) -> float:
        """Bytes of a typical request's input."""
        graph = self.problem.graph
        read = (v for v in graph.values if v.producer < self.problem.entry)
        crossing = (v for v in read if any(c >= self.problem.entry for c in v.consumers))
        return float(max(sum(v.tensor.nbytes for v in crossing), 1))


def make_site(
    name: str,
    graph: GraphSpec,
    machine: NodeProfile,
    rng: np.random.Generator,
    *,
    ratios: Mapping[str, float] | None = None,
    input_kind: str = "encoded",
    ranges: Ranges | None = None,
    constraints: Constraints | None = None,
) -> Site:
    """Draw the machines of a site around one measured profile.

    Args:
        name: of the site, for tables.
        graph: the model.
        machine: its profile on the machine it was measured on.
        rng: draws node speeds and the number of edge nodes.
        ratios: expected raw / coded bytes by value name.
        input_kind: what requests bring.
        ranges: what to draw from.
        constraints: what plans must respect.

    Raises:
        PlanError: when no split is legal.
    """
    ranges = Ranges() if ranges is None else ranges
    num_edges = int(rng.integers(ranges.num_edges[0], ranges.num_edges[1] + 1))
    slow = {DEVICE_NODE: log_uniform(rng, ranges.slow_device)}
    slow |= {f"edge{n}": log_uniform(rng, ranges.slow_edge) for n in range(num_edges)}
    slow["cloud"] = log_uniform(rng, ranges.slow_cloud)
    nodes = {node: scale_profile(machine, factor) for node, factor in slow.items()}
    limits = Constraints() if constraints is None else constraints
    deployment = Deployment(
        model=ModelConfig(spec=name if ":" in name else f"profile:{name}", input_kind=input_kind),
        nodes=tuple(_node(node, 7001 + 2 * at) for at, node in enumerate(list(slow)[1:])),
        constraints=limits,
    )
    profile = ModelProfile(graph, nodes, dict(ratios or {}))
    average = scale_profile(machine, math.sqrt(ranges.slow_edge[0] * ranges.slow_edge[1]))
    return Site(name, PlanningProblem(profile, deployment, limits, input_kind, average), ranges)


def _node(name: str, port: int) -> NodeConfig:
    tier = Tier.CLOUD if name == "cloud" else Tier.EDGE
    return NodeConfig(name=name, tier=tier, address=f"tcp://127.0.0.1:{port}")


def scale_profile(machine: NodeProfile, slow_down: float) -> NodeProfile:
    """Make the profile of a machine that is slower by a factor in everything."""
    return NodeProfile(
        layer_s=tuple(slow_down * seconds for seconds in machine.layer_s),
        encode_bytes_per_s=machine.encode_bytes_per_s / slow_down,
        decode_bytes_per_s=machine.decode_bytes_per_s / slow_down,
        fixed_s=machine.fixed_s,
    )


def log_uniform(rng: np.random.Generator, bounds: Range) -> float:
    """Draw evenly in the logarithm."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def random_model(rng: np.random.Generator) -> tuple[GraphSpec, NodeProfile, dict[str, float]]:
    """Make up a model: a chain of layers whose maps shrink and whose work is spread as in convolutional networks.

    For randomising the domain beyond the measured models, and for tests. Ranges are guesses that span the shipped
    profiles: 8 to 40 layers, 2 to 200 ms on one thread, an input of 150 KB.
    """
    num_layers = int(rng.integers(8, 41))
    total_s = log_uniform(rng, (0.002, 0.2))
    share = rng.gamma(1.0, size=num_layers) * np.linspace(1.5, 0.5, num_layers) + 1e-3
    layer_s = total_s * share / share.sum()
    first_bytes = 150_528 * 4 * log_uniform(rng, (0.5, 6.0))
    slope = rng.uniform(0.8, 1.1, size=num_layers).cumprod() * np.linspace(1.0, rng.uniform(0.005, 0.1), num_layers)
    sizes = np.maximum(first_bytes * slope / 4, 250).astype(int)
    sizes[-1] = 1000
    values = [ValueSpec("input", -1, (0,), TensorSpec((40_000,), "uint8", 1), is_sized=False)]
    values += [ValueSpec("image", 0, (1,), TensorSpec((150_528,), "uint8", 1))]
    layers = [LayerSpec("decode", "decode", ("input",), ("image",))]
    for at in range(num_layers):
        name, source = f"v{at}", values[-1].name
        is_last = at == num_layers - 1
        readers = () if is_last else (at + 2,)
        values.append(ValueSpec(name, at + 1, readers, TensorSpec((int(sizes[at]),), "float32", 4), is_output=is_last))
        layers.append(LayerSpec(f"conv{at}", "conv", (source,), (name,)))
    graph = GraphSpec(
        graph_id=f"random{rng.integers(2**62):x}",
        layers=tuple(layers),
        values=tuple(values),
        outputs=(values[-1].name,),
        output_tree="null",
        batch_size=1,
        num_stage_layers=1,
        preprocessing=None,
    )
    machine = NodeProfile((0.002, *map(float, layer_s)), 1.5e9, 2.5e9, 2e-4)
    return graph, machine, {v.name: float(rng.uniform(1.0, 2.2)) for v in values[2:]}
