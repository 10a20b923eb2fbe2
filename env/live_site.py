"""Sites of the real runtime: a model as this machine runs it, and how much slower than it every node pretends to be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from env.ranges import Range, Ranges
from env.site import Site, log_uniform
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import load_local
from runtime.errors import ConfigError
from runtime.node.emulation import Emulator
from runtime.node.hosted import HostedModel
from runtime.planning.problem import PlanningProblem
from runtime.presets import LinkConfig, LinkEmulation, NodeEmulation
from runtime.profiles.shipped import shipped_ratios, shipped_specs
from runtime.types import DEVICE_NODE, Constraints, ModelProfile, Tier
from runtime.wire.codec import AutoCodec

COMPUTE_SLOW_DOWN = 3.0
"""A node that is at least so many times slower than this machine computes; a faster one replays: its computing would
not end before its service time does, with the device, other nodes and relays on the same cores."""

EDGE_S = 0.03
"""The whole model takes an edge node at least so long: below, hand-overs between processes would be most of it. Guess."""


@dataclass(frozen=True, eq=False)
class LiveSite:
    """A site, and what it takes to start it on this machine."""

    site: Site
    deployment: Deployment
    """As `Cluster.from_deployment` takes it: every link from and to the device, and to the cloud, is emulated."""
    local: HostedModel
    """The device's model, loaded once for all sessions."""


def make_live_sites(
    models: Sequence[str] | None = None,
    *,
    num_edges: int = 1,
    input_kind: str | None = None,
    slow_down: Mapping[str, float] | None = None,
    seed: int = 0,
    ranges: Ranges | None = None,
    constraints: Constraints | None = None,
) -> tuple[LiveSite, ...]:
    """Load and profile models on this machine, and draw how fast their nodes pretend to be.

    Speeds are drawn as for the twin's sites and then slowed by one factor for all nodes of a site, so that the slowest
    of edge nodes is no faster than `COMPUTE_SLOW_DOWN` and needs at least `EDGE_S` for the whole model. Nodes that are
    faster than that even so, as clouds are, replay.

    Args:
        models: specs as `runtime.load_model` takes them; None takes every model whose profile ships.
        num_edges: edge nodes of each.
        input_kind: what requests bring; None: encoded images where the model has an input stage, else tensors.
        slow_down: by node, instead of what is drawn; nothing is scaled then.
        seed: of the speeds.
        ranges: what to draw from.
        constraints: what plans must respect.

    Raises:
        ConfigError: when there is no model.
        ModelError: when a model cannot be loaded.
        PlanError: when no plan is legal.
    """
    specs = shipped_specs() if models is None else tuple(models)
    if not specs:
        raise ConfigError("expected at least one model, got none")
    ranges = Ranges() if ranges is None else ranges
    out = []
    for at, spec in enumerate(specs):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(at,)))
        out.append(_make_site(spec, num_edges, input_kind, slow_down, rng, ranges, constraints or Constraints()))
    return tuple(out)


def _make_site(
    spec: str,
    num_edges: int,
    input_kind: str | None,
    slow_down: Mapping[str, float] | None,
    rng: np.random.Generator,
    ranges: Ranges,
    constraints: Constraints,
) -> LiveSite:
    edges = tuple(f"edge{n}" for n in range(num_edges))
    bare = Deployment(
        model=ModelConfig(spec=spec),
        nodes=tuple(_node(name, 7001 + 2 * at) for at, name in enumerate((*edges, "cloud"))),
    )
    machine = load_local(bare, AutoCodec())
    whole_s = sum(machine.profile.layer_s)
    slow = _draw(edges, whole_s, rng, ranges) if slow_down is None else dict(slow_down)
    if slow.keys() != {DEVICE_NODE, *edges, "cloud"}:
        raise ConfigError(f"expected slow_down of {[DEVICE_NODE, *edges, 'cloud']}, got {sorted(slow)}")
    emulate = {name: _emulation(factor) for name, factor in slow.items()}
    spec_of = machine.graph.spec
    kind = input_kind or ("encoded" if spec_of.num_stage_layers else "tensor")
    deployment = Deployment(
        model=ModelConfig(spec=spec, input_kind=kind),
        nodes=tuple(replace(node, emulate=emulate[node.name]) for node in bare.nodes),
        constraints=constraints,
        links=tuple(LinkConfig(between=ends, emulate=LinkEmulation()) for ends in _links(edges)),
        device_emulate=emulate[DEVICE_NODE],
    )
    profiles = {name: Emulator(emulation).pretend(machine.profile) for name, emulation in emulate.items()}
    profile = ModelProfile(spec_of, profiles, shipped_ratios(spec, spec_of.graph_id))
    local = (
        load_local(deployment, AutoCodec())
        if emulate[DEVICE_NODE].is_replay
        else replace(machine, profile=profiles[DEVICE_NODE], emulator=Emulator(emulate[DEVICE_NODE]))
    )
    return LiveSite(Site(spec, PlanningProblem(profile, deployment, constraints, kind), ranges), deployment, local)


def _draw(edges: tuple[str, ...], whole_s: float, rng: np.random.Generator, ranges: Ranges) -> dict[str, float]:
    bounds: dict[str, Range] = {DEVICE_NODE: ranges.slow_device, **dict.fromkeys(edges, ranges.slow_edge)}
    bounds["cloud"] = ranges.slow_cloud
    slow = {name: log_uniform(rng, range_) for name, range_ in bounds.items()}
    fastest = min((slow[name] for name in edges), default=slow["cloud"])
    scale = max(COMPUTE_SLOW_DOWN, EDGE_S / whole_s) / fastest
    return {name: max(scale, 1.0) * factor for name, factor in slow.items()}


def _emulation(slow_down: float) -> NodeEmulation:
    return NodeEmulation(slow_down=slow_down, mode="compute" if slow_down >= COMPUTE_SLOW_DOWN else "replay")


def _node(name: str, port: int) -> NodeConfig:
    tier = Tier.CLOUD if name == "cloud" else Tier.EDGE
    return NodeConfig(name=name, tier=tier, address=f"tcp://127.0.0.1:{port}")


def _links(edges: tuple[str, ...]) -> list[tuple[str, str]]:
    """Links that a world shapes; those between edge nodes are as fast as the machine."""
    return [*((DEVICE_NODE, end) for end in (*edges, "cloud")), *((edge, "cloud") for edge in edges)]
