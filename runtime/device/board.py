"""The device's notice board: what was last heard of every node and link, read as a `SystemState`."""

import math
import threading
from collections import deque
from dataclasses import dataclass, field, replace

from runtime.types import DEVICE_NODE, LinkSample, LinkState, NodeState, Plan, SystemState, Tier
from runtime.wire.link import from_report
from runtime.wire.messages import LinkReport, Status

RECENT = 8
"""How many prediction errors and arrivals are remembered."""

MAX_LOAD_FACTOR = 1e6
MAX_TOLD_S = 1e6
MAX_BANDWIDTH_BPS = 1e15
MAX_COUNT = 2**53
"""What a node may tell at most: beyond, and below 0, a reading is unknown, and a count is clipped. Arithmetic on what
remains stays finite."""


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What the state says of the request at hand."""

    input_kind: str
    input_bytes: int
    deadline_s: float
    device_backlog_s: float
    uplink_backlog_bytes: int


@dataclass
class Board:
    """Written by the client's loop, read by whoever plans; a reading's age grows while it hangs here.

    Args:
        tiers: tier of every node of the deployment, by name, in its order.
    """

    tiers: dict[str, Tier]
    plan_in_force: Plan | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _nodes: dict[str, tuple[float, NodeState]] = field(default_factory=dict)
    _links: dict[tuple[str, str], tuple[float, LinkState]] = field(default_factory=dict)
    _direct: dict[str, bool] = field(default_factory=dict)
    _errors: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def set_up(self, name: str, *, is_up: bool) -> None:
        """Note whether the device itself reaches a node."""
        with self._lock:
            self._direct[name] = is_up

    def set_link(self, link: LinkState, now_s: float) -> None:
        """Note what the device measured of one of its own links."""
        with self._lock:
            self._links[(link.source, link.target)] = (now_s, link)

    def hear(self, name: str, status: Status, now_s: float) -> None:
        """Note a node's status, and what it says of the nodes behind it."""
        with self._lock:
            self._note(name, status.state, now_s)
            for index, report in enumerate(status.links):
                self._note_link(name, DEVICE_NODE if index == 0 else report.target, report, now_s)
            for peer in status.peers:
                self._note(peer.state.name, peer.state, now_s)
                for report in peer.links[:1]:
                    self._note_link(peer.state.name, name, report, now_s)

    def _note_link(self, source: str, target: str, report: LinkReport, now_s: float) -> None:
        """Keep what a node measured of a link between nodes of the deployment."""
        if source in self.tiers and (target in self.tiers or target == DEVICE_NODE):
            link = _credible_link(from_report(report, source))
            self._links[(source, target)] = (now_s, replace(link, target=target))

    def hear_reply(self, name: str, state: NodeState, now_s: float) -> None:
        """Note the load that a node told with an answer."""
        with self._lock:
            self._note(name, state, now_s)

    def _note(self, name: str, state: NodeState, now_s: float) -> None:
        """Keep the fresher of two reports: a node may be heard directly and through the head."""
        if name not in self.tiers:
            return
        state = _credible_node(state)
        known = self._nodes.get(name)
        if known is None or now_s - known[0] + known[1].age_s >= state.age_s:
            self._nodes[name] = (now_s, replace(state, name=name))

    def rtt_s(self) -> float:
        """Longest known round trip of a link from the device, 0 when none is known."""
        with self._lock:
            known = (link.rtt_s for (source, _), (_, link) in self._links.items() if source == DEVICE_NODE)
            return max((rtt_s for rtt_s in known if math.isfinite(rtt_s)), default=0.0)

    def arrived(self, now_s: float) -> None:
        """Note a request, for the rate."""
        with self._lock:
            self._arrivals.append(now_s)

    def ended(self, plan: Plan, error: float) -> None:
        """Note a plan that was carried out and how far its prediction was off (measured / predicted - 1)."""
        with self._lock:
            self.plan_in_force = plan
            if math.isfinite(error):
                self._errors.appendleft(error)

    def state(self, facts: RequestFacts, now_s: float) -> SystemState:
        """Read everything at this instant, ages included."""
        with self._lock:
            nodes = tuple(self._node(name, tier, now_s) for name, tier in self.tiers.items())
            links = tuple(_age_link(link, now_s - at_s) for at_s, link in self._links.values())
            return SystemState(
                nodes=nodes,
                links=links,
                device_backlog_s=facts.device_backlog_s,
                uplink_backlog_bytes=facts.uplink_backlog_bytes,
                request_rate_hz=self._rate_hz(),
                recent_errors=tuple(self._errors),
                plan_in_force=self.plan_in_force,
                input_kind=facts.input_kind,
                input_bytes=facts.input_bytes,
                deadline_s=facts.deadline_s,
            )

    def _node(self, name: str, tier: Tier, now_s: float) -> NodeState:
        is_up = self._direct.get(name, False)
        entry = self._nodes.get(name)
        if entry is None:
            return NodeState(name=name, tier=tier, is_up=is_up)
        at_s, state = entry
        return replace(state, tier=tier, is_up=is_up and state.is_up, age_s=state.age_s + now_s - at_s)

    def _rate_hz(self) -> float:
        if len(self._arrivals) < 2 or self._arrivals[-1] <= self._arrivals[0]:
            return math.nan
        return (len(self._arrivals) - 1) / (self._arrivals[-1] - self._arrivals[0])


def _age_link(link: LinkState, age_s: float) -> LinkState:
    return replace(link, samples=tuple(LinkSample(s.age_s + age_s, s.bandwidth_bps) for s in link.samples))


def _credible(value: float, most: float) -> float:
    """A reading from 0 to `most` as it is, anything else as unknown."""
    return value if 0.0 <= value <= most else math.nan


def _count(value: int) -> int:
    return min(max(value, 0), MAX_COUNT)


def _credible_node(state: NodeState) -> NodeState:
    """What may be believed of a node's report, which comes from outside; of unknown age is infinitely old."""
    return replace(
        state,
        load_factor=_credible(state.load_factor, MAX_LOAD_FACTOR),
        queue_delay_s=_credible(state.queue_delay_s, MAX_TOLD_S),
        queue_length=_count(state.queue_length),
        utilisation_frac=_credible(state.utilisation_frac, MAX_LOAD_FACTOR),
        age_s=state.age_s if 0.0 <= state.age_s <= MAX_TOLD_S else math.inf,
    )


def _credible_link(link: LinkState) -> LinkState:
    """What may be believed of a link's report, which comes from outside."""
    return replace(
        link,
        samples=tuple(
            s for s in link.samples if 0.0 <= s.age_s <= MAX_TOLD_S and 0.0 < s.bandwidth_bps <= MAX_BANDWIDTH_BPS
        ),
        mean_bandwidth_bps=_credible(link.mean_bandwidth_bps, MAX_BANDWIDTH_BPS),
        rtt_s=_credible(link.rtt_s, MAX_TOLD_S),
        backlog_bytes=_count(link.backlog_bytes),
    )
