"""How well each node of a deployment keeps to the profile that it took of itself: segments run over a live session."""

import math
from dataclasses import dataclass
from typing import Any

from runtime.device.session import Session
from runtime.errors import OffcutError, PlanError
from runtime.planning.cost import sum_layers
from runtime.types import NodeProfile, Plan, Tier

REPEATS = 3
"""Requests per segment; the fastest counts. The first also builds the segment."""

PARTS = 4
"""Segments start and stop at quarters of the layers."""

DEADLINE_S = 60.0
"""Far away, so that the device does not finish a request itself."""


@dataclass(frozen=True, slots=True)
class NodeSegment:
    """Layers `[start, stop)` on one node: what its profile says, and what it took."""

    start: int
    stop: int
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """One node: its own profile, the segments run on it, and what went wrong where nothing could be measured."""

    name: str
    tier: str
    profile: NodeProfile | None
    segments: tuple[NodeSegment, ...]
    problem: str = ""


def measure_nodes(session: Session, x: Any) -> tuple[NodeTimes, ...]:
    """Ask every node for its profile, and time segments on it.

    Nodes profile themselves when they start; nobody else can time their layers one by one. What a session can see is the
    compute time that a node reports for its share of a plan, so plans that give it a spread of segments are run with `x`.

    Args:
        session: of the deployment.
        x: an input, as `Session.infer` takes it.
    """
    profiles = session.problem(session.deployment.model.input_kind).profile.nodes
    found = []
    for node in session.deployment.nodes:
        profile = profiles.get(node.name)
        if profile is None:
            problem = "not up, or it has not described itself"
            found.append(NodeTimes(node.name, node.tier.label, None, (), problem))
            continue
        plans = _edge_plans(session, node.name) if node.tier is Tier.EDGE else _cloud_plans(session)
        segments, problem = _run_plans(session, x, node.name, node.tier, profile, plans)
        found.append(NodeTimes(node.name, node.tier.label, profile, segments, problem))
    return tuple(found)


def _edge_plans(session: Session, name: str) -> list[Plan]:
    n = session.graph.num_layers
    borders = [round(n * part / PARTS) for part in range(PARTS + 1)]
    pairs = [(i, j) for i in borders for j in borders if i < j]
    return [Plan.split(n, i, j, edge_nodes=(name,)) for i, j in pairs]


def _cloud_plans(session: Session) -> list[Plan]:
    n = session.graph.num_layers
    return [Plan.split(n, i, i) for i in (round(n * part / PARTS) for part in range(PARTS))]


def _run_plans(
    session: Session, x: Any, name: str, tier: Tier, profile: NodeProfile, plans: list[Plan]
) -> tuple[tuple[NodeSegment, ...], str]:
    segments, problem = [], ""
    for plan in plans:
        layers = tuple(i for i, at in enumerate(plan.tiers) if at is tier)
        try:
            seconds = min(_run(session, x, plan, name) for _ in range(REPEATS))
        except PlanError:
            continue  # not legal here: private input, no cloud, a device without the model
        except OffcutError as error:
            problem = str(error)
            break
        if math.isfinite(seconds):
            segments.append(NodeSegment(layers[0], layers[-1] + 1, sum_layers(profile.layer_s, layers), seconds))
    return tuple(segments), problem or ("" if segments else "it answered no plan that is legal here")


def _run(session: Session, x: Any, plan: Plan, name: str) -> float:
    """Compute seconds of one request on a node; inf when the device finished it itself."""
    latency = session.infer(x, plan=plan, deadline_s=DEADLINE_S).latency
    return math.inf if latency is None else latency.compute_s.get(name, math.inf)
