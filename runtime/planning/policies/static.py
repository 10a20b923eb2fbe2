"""Rules that do not look at the network: one tier for everything, or one plan for ever."""

from dataclasses import dataclass

from runtime.errors import PlanError
from runtime.planning.problem import PlanningProblem, check_plan, private_layers
from runtime.types import Plan, SystemState, Tier


@dataclass(frozen=True, slots=True)
class FixedPolicy:
    """Always the same plan, whatever the state."""

    chosen: Plan
    is_stateful: bool = False

    def plan(self, state: SystemState) -> Plan:
        """Return the plan."""
        del state
        return self.chosen

    def reset(self) -> None:
        """Nothing to forget."""


@dataclass(frozen=True, slots=True)
class EdgeOnlyPolicy:
    """Everything on the first edge node that is up; on the first of all when none is."""

    plans: tuple[Plan, ...]  # one per edge node, in the deployment's order
    is_stateful: bool = False

    def plan(self, state: SystemState) -> Plan:
        """Return the plan for the first edge node that is up."""
        for plan in self.plans:
            node = state.node(plan.edge_nodes[0])
            if node is not None and node.is_up:
                return plan
        return self.plans[0]

    def reset(self) -> None:
        """Nothing to forget."""


def build_fixed(problem: PlanningProblem, plan: Plan) -> FixedPolicy:
    """Build the policy that always answers `plan`.

    Raises:
        PlanError: when the plan is not legal for the problem.
    """
    return FixedPolicy(check_plan(problem, plan))


def build_split(problem: PlanningProblem, i: int, j: int, edge: str | None) -> FixedPolicy:
    """Build `fixed` from split points: device `[0, i)`, edge `[i, j)`, cloud from `j` on.

    Args:
        problem: what the plan is for.
        i: first layer beyond the device.
        j: first layer of the cloud.
        edge: edge node to go through; None takes the first one when layers run on the edge, else no edge node.

    Raises:
        PlanError: when the plan is not legal for the problem.
    """
    num_layers = problem.graph.num_layers
    if not 0 <= i <= j <= num_layers:
        raise PlanError(
            f"expected split points 0 <= i <= j <= {num_layers}, got {i},{j}; the model has {num_layers} layers, the input stage included"
        )
    edges = problem.deployment.edges
    if edge is None and j > i and edges:
        edge = edges[0].name
    return build_fixed(problem, Plan.split(num_layers, i, j, edge_nodes=() if edge is None else (edge,)))


def _single_tier(problem: PlanningProblem, tier: Tier, edge_nodes: tuple[str, ...] = ()) -> Plan:
    """Put every layer on one tier, but for those that the constraints keep on the device."""
    graph = problem.graph
    tiers = [tier] * graph.num_layers
    keep = private_layers(graph) if problem.constraints.private_input else ()
    if keep and tier is not Tier.DEVICE:
        raise PlanError(
            f"{tier.label}-only cannot keep the raw input on the device (private_input = true); "
            "choose a policy that splits, or device-only"
        )
    return check_plan(problem, Plan(tiers=tuple(tiers), edge_nodes=edge_nodes))


def build_device_only(problem: PlanningProblem) -> FixedPolicy:
    """Build the policy that runs everything on the device."""
    return FixedPolicy(_single_tier(problem, Tier.DEVICE))


def build_cloud_only(problem: PlanningProblem) -> FixedPolicy:
    """Build the policy that sends the input to the cloud over the device - cloud link."""
    return FixedPolicy(_single_tier(problem, Tier.CLOUD))


def build_encoded_input_to_cloud(problem: PlanningProblem) -> FixedPolicy:
    """Build the policy that sends the JPEG or PNG to the cloud as the camera made it, decoding included.

    For many CNNs no inner cut is smaller than the file. It is `cloud-only`, but only for requests that bring a file.

    Raises:
        PlanError: when requests bring pixels or tensors, or the constraints forbid the plan.
    """
    if problem.input_kind != "encoded" or problem.graph.num_stage_layers == 0:
        raise PlanError(
            f"encoded-input-to-cloud needs requests that bring a JPEG or PNG file, these bring {problem.input_kind!r}; "
            "use cloud-only"
        )
    return build_cloud_only(problem)


def build_edge_only(problem: PlanningProblem) -> EdgeOnlyPolicy:
    """Build the policy that sends the input to an edge node.

    Raises:
        PlanError: when the deployment has no edge node or the constraints forbid it.
    """
    edges = problem.deployment.edges
    if not edges:
        raise PlanError("edge-only needs an edge node, the deployment has none; use device-only or cloud-only")
    return EdgeOnlyPolicy(tuple(_single_tier(problem, Tier.EDGE, (node.name,)) for node in edges))
