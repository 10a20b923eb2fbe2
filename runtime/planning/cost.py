"""What a plan is expected to cost in a given state."""

import math

from runtime.planning.problem import PlanningProblem, find_route
from runtime.types import DEVICE_NODE, GraphSpec, LatencyBreakdown, LinkState, NodeState, Plan, SystemState, Tier


def sum_layers(layer_s: tuple[float, ...], layers: tuple[int, ...]) -> float:
    """Idle seconds of some layers on one node."""
    return math.fsum(layer_s[i] for i in layers)


def value_bytes(graph: GraphSpec, names: tuple[str, ...], input_bytes: int) -> int:
    """Raw bytes of the named values; an encoded input counts as what the request really brings."""
    wanted = set(names)
    sized = sum(v.tensor.nbytes for v in graph.values if v.name in wanted and v.is_sized)
    has_encoded = any(v.name in wanted and not v.is_sized for v in graph.values)
    return sized + (input_bytes if has_encoded else 0)


def estimate(problem: PlanningProblem, plan: Plan, state: SystemState) -> LatencyBreakdown:
    """Predict one plan's latency from the last readings: bandwidth, load factor k and queue delay q.

    A reading that is missing makes the part it belongs to NaN, and with it the total.
    """
    route = find_route(problem.graph, plan, problem.input_kind)
    names = _node_names(problem, plan)
    compute: dict[str, float] = {}
    queueing = state.device_backlog_s if route.device.layers else 0.0
    fixed = 0.0
    for tier in route.tiers:
        layers = route.stage(tier).layers
        profile = problem.profile.nodes.get(names[tier])
        node = state.node(names[tier])
        if layers:
            idle_s = math.nan if profile is None else sum_layers(profile.layer_s, layers)
            compute[names[tier]] = idle_s * _load_factor(tier, node)
            queueing += _queue_delay(tier, node)
        if profile is not None and tier is not Tier.DEVICE:
            fixed += profile.fixed_s
    transfer = _transfers(problem, plan, state, names)
    total = sum(compute.values()) + sum(transfer.values()) + queueing + fixed
    return LatencyBreakdown(
        compute_s=compute,
        codec_s=0.0,
        transfer_s=transfer,
        queueing_s=queueing,
        decision_s=0.0,
        other_s=fixed,
        total_s=total,
        source="estimated",
    )


def _node_names(problem: PlanningProblem, plan: Plan) -> dict[Tier, str]:
    cloud = problem.deployment.cloud
    return {
        Tier.DEVICE: DEVICE_NODE,
        Tier.EDGE: plan.head or "",
        Tier.CLOUD: "" if cloud is None else cloud.name,
    }


def _load_factor(tier: Tier, node: NodeState | None) -> float:
    if tier is Tier.DEVICE:
        return 1.0
    return math.nan if node is None else node.load_factor


def _queue_delay(tier: Tier, node: NodeState | None) -> float:
    if tier is Tier.DEVICE:
        return 0.0
    return math.nan if node is None else node.queue_delay_s


def _transfers(problem: PlanningProblem, plan: Plan, state: SystemState, names: dict[Tier, str]) -> dict[str, float]:
    """Seconds on every directed link the request and its result take."""
    route = find_route(problem.graph, plan, problem.input_kind)
    transfer: dict[str, float] = {}
    for hop, crossing in enumerate(route.up):
        near, far = route.tiers[hop], route.tiers[hop + 1]
        up_bytes = value_bytes(problem.graph, crossing, state.input_bytes)
        made_beyond = {name for tier in route.tiers[hop + 1 :] for name in route.stage(tier).makes}
        down = tuple(name for name in problem.graph.outputs if name in made_beyond)
        down_bytes = value_bytes(problem.graph, down, 0)
        for source, target, nbytes in ((near, far, up_bytes), (far, near, down_bytes)):
            link = state.link(names[source], names[target])
            transfer[f"{names[source]}>{names[target]}"] = _transfer_s(nbytes, link)
    return transfer


def _transfer_s(nbytes: int, link: LinkState | None) -> float:
    if link is None or not link.samples:
        return math.nan
    return nbytes * 8.0 / link.samples[0].bandwidth_bps + link.rtt_s / 2.0
