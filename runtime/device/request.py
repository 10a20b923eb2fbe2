"""One request on its way: what the device holds of it, where it stands, and where its time went."""

import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from runtime.device.telemetry import Opinion
from runtime.errors import OffcutError
from runtime.planning.problem import Route
from runtime.types import DEVICE_NODE, LatencyBreakdown, Plan, SystemState
from runtime.wire.messages import Hop

PROTECTION_FACTOR = 1.5
"""Local completion starts when the deadline is this many predicted local remainders away."""

HAND_OVER_S = 0.01
HAND_OVER_FRAC = 0.1
"""Kept free besides for waking two threads on a busy machine: the lesser of these seconds and this share of the
deadline. Guess."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request ended: its output values and its story."""

    values: Mapping[str, torch.Tensor]
    latency: LatencyBreakdown
    outcome: str  # remote, device (the plan needed no node), local (the device finished it instead)
    reason: str  # why it did not go as planned: the device finished it, or another node; empty otherwise


@dataclass(eq=False)
class Request:
    """Everything the device knows of one request. Changed by the client's loop thread only."""

    number: int
    input_kind: str
    values: dict[str, torch.Tensor]  # the input, and what the device has made of it
    plan: Plan
    route: Route
    state: SystemState
    predicted: LatencyBreakdown
    policy: str
    arrived_at_s: float
    deadline_at_s: float
    is_protected: bool
    decision_s: float
    future: "Future[Answer]" = field(default_factory=Future)
    shadow: "Future[Opinion] | None" = None  # what the policy that is watched would have done
    is_stage_done: bool = False
    is_local: bool = False
    is_remote: bool = False  # sent to `target` and still hoped for
    target: str = ""
    tried: set[str] = field(default_factory=set)
    reason: str = ""
    local_error: OffcutError | None = None  # why the device could not finish it
    sent_at_s: float = math.nan
    device_queue_s: float = 0.0
    device_compute_s: float = 0.0
    codec_s: float = 0.0
    upload_s: float = 0.0
    upload_wait_s: float = 0.0

    @property
    def remaining_layers(self) -> tuple[int, ...]:
        """Layers that the device would still have to run to answer by itself."""
        beyond = self.route.edge.layers + self.route.cloud.layers
        own = () if self.is_stage_done else self.route.device.layers
        return tuple(sorted(own + beyond))

    def is_in_time(self, latency: LatencyBreakdown) -> bool:
        """Tell whether an answer with this latency held the deadline."""
        return self.arrived_at_s + latency.total_s <= self.deadline_at_s

    def protect_at_s(self, remainder_s: float, backlog_s: float) -> float:
        """When the device must start to finish the request itself.

        Args:
            remainder_s: predicted idle seconds of `remaining_layers` on the device.
            backlog_s: predicted seconds until the device is free for it.
        """
        hand_over_s = min(HAND_OVER_S, HAND_OVER_FRAC * self.state.deadline_s)
        return self.deadline_at_s - PROTECTION_FACTOR * remainder_s - backlog_s - hand_over_s


def local_breakdown(request: Request, now_s: float) -> LatencyBreakdown:
    """Where the time of a request went that the device answered itself; waiting for others is `other_s`."""
    total_s = now_s - request.arrived_at_s
    known_s = request.device_compute_s + request.codec_s + request.device_queue_s + request.decision_s
    return LatencyBreakdown(
        compute_s={DEVICE_NODE: request.device_compute_s},
        codec_s=request.codec_s,
        transfer_s={},
        queueing_s=request.device_queue_s,
        decision_s=request.decision_s,
        other_s=total_s - known_s,
        total_s=total_s,
    )


def remote_breakdown(
    request: Request, hops: tuple[Hop, ...], names: tuple[str, ...], received_at_s: float, now_s: float
) -> LatencyBreakdown:
    """Where the time of a request went that came back from the nodes.

    Uploads are measured by receipt; the way back is what remains of the time between sending and receiving after the
    node's own residence, for which no clock of another machine is read. What a head waits for tiles of other edge
    nodes counts as its computing.

    Args:
        request: the request.
        hops: what each node said, nearest first.
        names: the deployment's names of those nodes.
        received_at_s: when the result was here.
        now_s: when it was decoded.
    """
    compute = {DEVICE_NODE: request.device_compute_s} if request.device_compute_s else {}
    transfer: dict[str, float] = {}
    near, upload_s = DEVICE_NODE, request.upload_s
    outside_s = received_at_s - request.sent_at_s - request.upload_wait_s
    for hop, name in zip(hops, names, strict=True):
        compute[name] = hop.compute_s + hop.tiles_s
        # Where clocks cannot be compared, an acknowledgement may have been slower than the tensors: both ways together
        # are known better than one.
        both_ways_s = max(outside_s - hop.residence_s, 0.0)
        transfer[f"{near}>{name}"] = min(upload_s, both_ways_s)
        transfer[f"{name}>{near}"] = both_ways_s - min(upload_s, both_ways_s)
        outside_s = hop.residence_s - hop.queue_s - compute[name] - hop.codec_s
        near, upload_s = name, hop.upload_s
    codec_s = request.codec_s + math.fsum(hop.codec_s for hop in hops) + (now_s - received_at_s)
    queueing_s = request.device_queue_s + request.upload_wait_s + math.fsum(hop.queue_s for hop in hops)
    total_s = now_s - request.arrived_at_s
    known_s = sum(compute.values()) + sum(transfer.values()) + codec_s + queueing_s + request.decision_s
    return LatencyBreakdown(
        compute_s=compute,
        codec_s=codec_s,
        transfer_s=transfer,
        queueing_s=queueing_s,
        decision_s=request.decision_s,
        other_s=total_s - known_s,
        total_s=total_s,
    )
