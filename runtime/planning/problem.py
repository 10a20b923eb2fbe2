"""What a policy is built for, what a plan makes each tier do, and the one place where a plan's legality is checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from runtime.deployment import Deployment
from runtime.errors import PlanError
from runtime.types import (
    CODECS,
    LOSSY_CODECS,
    Constraints,
    GraphSpec,
    ModelProfile,
    NodeProfile,
    Plan,
    SystemState,
    Tier,
)


@dataclass(frozen=True, slots=True, eq=False)
class PlanningProblem:
    """One model, one input kind, one deployment, one set of constraints: a policy is built for exactly this.

    Compared and hashed by identity, so that what is worked out for a problem can be cached under it.
    """

    profile: ModelProfile
    deployment: Deployment
    constraints: Constraints
    input_kind: str
    average_edge: NodeProfile | None = None
    """Choose the spans of tiles as if every edge node were this one, and only cut them as the nodes there are want it.
    The choice is then the same for any nodes, and made once. None: it is made for these nodes, which takes seconds for
    networks of hundreds of layers."""

    @property
    def graph(self) -> GraphSpec:
        """The model's layers and values."""
        return self.profile.graph

    @property
    def entry(self) -> int:
        """First layer that a request of this problem runs."""
        return self.graph.entry(self.input_kind)


class Policy(Protocol):
    """A rule that picks a plan. A stateful one has `is_stateful = True` and `reset` forgets what it has seen."""

    @property
    def is_stateful(self) -> bool:
        """Whether earlier states change what it answers."""

    def plan(self, state: SystemState) -> Plan:
        """Pick a plan for the request that `state` describes."""

    def reset(self) -> None:
        """Forget everything seen so far."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The share of one tier: its layers, the values it must be given, the values it must hand on."""

    tier: Tier
    layers: tuple[int, ...]  # ascending
    needs: tuple[str, ...]  # made elsewhere, read here
    makes: tuple[str, ...]  # made here, read by a later tier or an output of the model


@dataclass(frozen=True, slots=True)
class Route:
    """What a plan makes of a request: a stage per tier, and the values that cross each hop.

    `up` holds one entry per hop outwards (device to next node, then head to cloud), `outputs` the model outputs made
    on each tier, which travel back the same way.
    """

    device: Stage
    edge: Stage
    cloud: Stage
    tiers: tuple[Tier, ...]  # tiers visited, the device first
    up: tuple[tuple[str, ...], ...]  # (len(tiers) - 1,)

    def stage(self, tier: Tier) -> Stage:
        """The stage of one tier."""
        return (self.device, self.edge, self.cloud)[tier]


def normalise(plan: Plan, entry: int) -> Plan:
    """Put the layers before the request's entry on the device: they cost and move nothing."""
    if all(tier is Tier.DEVICE for tier in plan.tiers[:entry]):
        return plan
    return replace(plan, tiers=(Tier.DEVICE,) * entry + plan.tiers[entry:])


def make_stage(graph: GraphSpec, tier: Tier, layers: Iterable[int]) -> Stage:
    """Find what a set of layers needs from outside and what of it is needed outside."""
    own = frozenset(layers)
    ordered = tuple(sorted(own))
    needs: list[str] = []
    makes: list[str] = []
    for value in graph.values:
        read_here = any(c in own for c in value.consumers)
        if value.producer in own:
            if value.is_output or any(c not in own for c in value.consumers):
                makes.append(value.name)
        elif read_here:
            needs.append(value.name)
    return Stage(tier=tier, layers=ordered, needs=tuple(needs), makes=tuple(makes))


@lru_cache(maxsize=1024)
def _route(graph: "ById", plan: Plan, entry: int) -> Route:
    spec = graph.spec
    plan = normalise(plan, entry)
    layers: dict[Tier, list[int]] = {tier: [] for tier in Tier}
    for index in range(entry, spec.num_layers):
        layers[plan.tiers[index]].append(index)
    stages = [make_stage(spec, tier, layers[tier]) for tier in Tier]
    tiers = [Tier.DEVICE]
    beyond = bool(layers[Tier.EDGE] or layers[Tier.CLOUD])
    if plan.head is not None and beyond:
        tiers.append(Tier.EDGE)
    if layers[Tier.CLOUD]:
        tiers.append(Tier.CLOUD)
    up = tuple(_crossing(spec, plan, entry, tier) for tier in tiers[:-1])
    return Route(device=stages[0], edge=stages[1], cloud=stages[2], tiers=tuple(tiers), up=up)


def _crossing(spec: GraphSpec, plan: Plan, entry: int, tier: Tier) -> tuple[str, ...]:
    """Values at hand on `tier` or before it that a later tier reads: each is sent once."""
    names = []
    for value in spec.values:
        made = Tier.DEVICE if value.producer < entry else plan.tiers[value.producer]
        if made <= tier and any(c >= entry and plan.tiers[c] > tier for c in value.consumers):
            names.append(value.name)
    return tuple(names)


@dataclass(frozen=True, slots=True)
class ById:
    """A graph that hashes by its id, so that routes can be cached without hashing a whole graph each time."""

    spec: GraphSpec

    def __hash__(self) -> int:
        return hash(self.spec.graph_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and other.spec.graph_id == self.spec.graph_id


def find_route(graph: GraphSpec, plan: Plan, input_kind: str) -> Route:
    """Work out what each tier does under `plan` for a request of this kind; cached per graph, plan and kind.

    The plan must be legal (`check_monotone`).
    """
    return _route(ById(graph), plan, graph.entry(input_kind))


def check_monotone(graph: GraphSpec, plan: Plan, entry: int) -> None:
    """Check that a plan fits the graph: one tier per layer, never back towards the device along the data flow.

    Raises:
        PlanError: naming the two layers between which the data would flow back.
    """
    if len(plan.tiers) != graph.num_layers:
        raise PlanError(
            f"expected a tier for each of the {graph.num_layers} layers of the model, got {len(plan.tiers)}; "
            "build the plan with Plan.split(graph.num_layers, i, j)"
        )
    for value in graph.values:
        if value.producer < entry:
            continue
        source = plan.tiers[value.producer]
        for consumer in value.consumers:
            if plan.tiers[consumer] < source:
                made, read = graph.layers[value.producer].name, graph.layers[consumer].name
                raise PlanError(
                    f"layer {value.producer} ({made}) runs on {source.label} but layer {consumer} ({read}), which "
                    f"reads its output, on {plan.tiers[consumer].label}; data flows device -> edge -> cloud only, "
                    "so move the second layer outwards or the first one inwards"
                )


def check_plan(problem: PlanningProblem, plan: Plan, *, input_kind: str | None = None) -> Plan:
    """Check that a plan is legal for a problem's model, deployment and constraints.

    Args:
        problem: what the plan is for.
        plan: the plan to check.
        input_kind: kind of the request, if other than the problem's.

    Returns:
        The plan with the layers before the entry on the device.

    Raises:
        PlanError: saying which rule it breaks and what would be legal.
    """
    kind = problem.input_kind if input_kind is None else input_kind
    entry = problem.graph.entry(kind)
    if len(plan.tiers) == problem.graph.num_layers:
        plan = normalise(plan, entry)
    check_monotone(problem.graph, plan, entry)
    _check_nodes(problem.deployment, plan)
    _check_constraints(problem, plan, entry)
    _check_tiles(problem, plan, kind)
    return plan


def _check_tiles(problem: PlanningProblem, plan: Plan, input_kind: str) -> None:
    from runtime.planning.chains import (
        MAX_TILES,
        find_parts,
    )  # here, because it makes stages and so imports this module

    if plan.tiles and not problem.constraints.tiles:
        raise PlanError("the plan cuts layers into tiles, which the constraints rule out; set tiles = true")
    for span in plan.tiles:
        if not 2 <= span.num_tiles <= min(len(plan.edge_nodes), MAX_TILES):
            raise PlanError(
                f"expected 2 to {MAX_TILES} tiles for layers {span.start} to {span.stop}, and an edge node for each, got "
                f"{span.num_tiles} tiles on {plan.edge_nodes}; name more edge_nodes or use fewer lines"
            )
    if plan.tiles:
        find_parts(problem.graph, plan, input_kind)


def _check_nodes(deployment: Deployment, plan: Plan) -> None:
    tiers: Mapping[str, Tier] = {node.name: node.tier for node in deployment.nodes}
    edges = [name for name, tier in tiers.items() if tier is Tier.EDGE]
    for name in plan.edge_nodes:
        if tiers.get(name) is not Tier.EDGE:
            raise PlanError(f"expected edge_nodes among {edges}, got {name!r}; name an edge node of the deployment")
    if len(set(plan.edge_nodes)) != len(plan.edge_nodes):
        raise PlanError(f"expected every edge node once, got {plan.edge_nodes}")
    if plan.uses(Tier.EDGE) and not plan.edge_nodes:
        raise PlanError(
            f"the plan runs layers on the edge but names no edge node; pass edge_nodes=(NAME,) from {edges}"
        )
    if plan.uses(Tier.CLOUD) and Tier.CLOUD not in tiers.values():
        raise PlanError("the plan runs layers in the cloud but the deployment has no cloud node")


def _check_constraints(problem: PlanningProblem, plan: Plan, entry: int) -> None:
    limits = problem.constraints
    if plan.codec not in CODECS:
        raise PlanError(f"expected a codec among {CODECS}, got {plan.codec!r}")
    if limits.lossless_only and plan.codec in LOSSY_CODECS:
        raise PlanError(
            f"codec {plan.codec} loses precision and the constraints say lossless_only; "
            "use auto, raw or lossless, or set lossless_only = false"
        )
    for index in range(entry, len(plan.tiers)):
        tier = plan.tiers[index]
        if tier not in limits.allowed_tiers:
            allowed = ", ".join(t.label for t in limits.allowed_tiers)
            raise PlanError(f"layer {index} runs on {tier.label}, but the constraints allow only {allowed}")
    if limits.private_input:
        for index in private_layers(problem.graph):
            if index >= entry and plan.tiers[index] is not Tier.DEVICE:
                raise PlanError(
                    f"layer {index} ({problem.graph.layers[index].name}) reads the raw input, which the constraints "
                    f"keep on the device (private_input), but runs on {plan.tiers[index].label}"
                )
    if not limits.device_has_model:
        here = [i for i in range(entry, len(plan.tiers)) if plan.tiers[i] is Tier.DEVICE]
        if here:
            raise PlanError(
                f"layer {here[0]} runs on the device, which does not hold the model (device_has_model = false); "
                "put every layer on the edge or in the cloud"
            )


def private_layers(graph: GraphSpec) -> tuple[int, ...]:
    """Layers that private input keeps on the device: the input stage and every layer that reads the raw input."""
    stage = graph.num_stage_layers
    readers = {c for v in graph.values if v.producer < stage for c in v.consumers}
    return tuple(sorted(readers | set(range(stage))))
