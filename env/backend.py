"""One episode at a time, whichever way it is carried out: in the twin, or on the real runtime.

The same site, scenario and seed are the same world in both, and the planner's latencies in the twin are the reference of
both. A plan is any legal one, so every rule of `runtime.planning` can decide, and not only among the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from env.reward import EXCESS_WEIGHT, reward_terms
from env.scenario import Scenario
from env.site import Site
from env.spaces import Observation, blank_observations, put_features
from env.traces import FloatArray
from env.twin import OUTCOMES, Twin
from env.world import World
from runtime.errors import ConfigError
from runtime.planning.arrays import StateArrays, decode_state
from runtime.planning.features import FeatureEncoder, Features
from runtime.planning.problem import Policy
from runtime.planning.rows import PlanCosts, compile_plan
from runtime.types import LatencyBreakdown, Plan, SystemState

Seed: TypeAlias = int | Sequence[int]

_LANE = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended."""

    number: int  # of its arrival in the episode: step `number` decided on it
    plan: Plan  # as it was decided
    latency_s: float  # inf: never answered
    deadline_s: float
    reference_s: float  # the planner's latency for it in the twin
    term: float  # what it adds to the reward
    outcome: str  # remote, device, local (completed by the device instead of as planned), failed
    uplink_bytes: float  # what the plan has the device send, coded where the newest reading made that pay
    backbone_bytes: float  # what the plan has enter or leave the cloud
    latency: LatencyBreakdown | None = None  # where its time went, as the runtime measured it; the twin keeps no book

    @property
    def counted_s(self) -> float:
        """Latency as rewards count it: a request that was late or never answered counts as its deadline."""
        return min(self.latency_s, self.deadline_s)

    @property
    def is_missed(self) -> bool:
        """Whether it was later than its deadline, or never answered."""
        return not self.latency_s <= self.deadline_s


class Backend(Protocol):
    """Carries out one episode at a time. Calls come in the order start, then (state, observation, step) repeatedly."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where episodes can take place; a policy for one is built for its `problem`."""

    @property
    def num_requests(self) -> int:
        """Steps of an episode."""

    @property
    def reference_s(self) -> FloatArray:
        """The planner's latency in the twin for every request of this episode, shape (num_requests,)."""

    @property
    def time_s(self) -> float:
        """Instant of the request at hand on the world's clock."""

    @property
    def paused_s(self) -> float:
        """By how much the last step came later than the next request, and the world's clock was set back."""

    def start(self, site: int, scenario: Scenario, seed: Seed) -> None:
        """Start an episode and go on to its first request. The same arguments give the same world in every backend."""

    def state(self) -> SystemState:
        """What the device knows as the request at hand comes."""

    def observation(self) -> Observation:
        """The same, encoded for a learner."""

    def step(self, plan: Plan) -> tuple[bool, list[Ended]]:
        """Run the request at hand under any legal plan, and go on to the next.

        Returns:
            Whether the episode is over: all its requests have ended, and the one now at hand is only there to be seen.
            And the requests that ended meanwhile.

        Raises:
            PlanError: for a plan that is not legal; the request is still at hand.
            OffcutError: the machinery has failed, and with it the episode.
        """

    def replace(self) -> None:
        """Give up whatever an episode that failed has left; the next one starts anew."""

    def close(self) -> None:
        """End the backend; it cannot be used any more."""


class TwinBackend:
    """Episodes in the twin.

    Args:
        sites: where episodes can take place.
        num_requests: steps of an episode.
    """

    def __init__(self, sites: Sequence[Site], *, num_requests: int) -> None:
        self._sites = tuple(sites)
        self._num_requests = num_requests
        self._twin = Twin(1, num_requests + 1)
        self._books = [Book(site) for site in self._sites]
        self._book = self._books[0]
        self._reference_s = np.zeros(num_requests)
        self._sent: list[Sent] = []
        self._others: tuple[Policy, ...] = ()
        self._is_running = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where episodes can take place."""
        return self._sites

    @property
    def num_requests(self) -> int:
        """Steps of an episode."""
        return self._num_requests

    @property
    def reference_s(self) -> FloatArray:
        """The planner's latency for every request of this episode."""
        return self._reference_s.copy()

    @property
    def time_s(self) -> float:
        """Instant of the request at hand."""
        return self._twin.now_s(0)

    def start(self, site: int, scenario: Scenario, seed: Seed) -> None:
        """Start an episode and go on to its first request."""
        self.start_world(site, scenario.world(self._sites[site], seed, self._num_requests + 1))

    paused_s = 0.0
    """Its clock waits for every decision."""

    def start_world(self, site: int, world: World, others: Sequence[Policy] = ()) -> None:
        """Start an episode in a world at hand, of `num_requests` + 1 requests or fewer.

        Args:
            site: number of the site.
            world: what happens.
            others: who decides for each of the other devices; nobody: the planner, as compiled.

        Raises:
            ConfigError: for too many or too few requests, or policies for some of the other devices only.
        """
        if others and len(others) != len(world.shift) - 1:
            raise ConfigError(f"expected a policy for each of {len(world.shift) - 1} other devices, got {len(others)}")
        if not 2 <= world.num_requests <= self._num_requests + 1:
            raise ConfigError(f"expected a world of 2 to {self._num_requests + 1} requests, got {world.num_requests}")
        self._book = self._books[site]
        self._twin.load(0, self._book.site, world)
        self._reference_s = self._twin.start(_LANE)[0, : world.num_requests - 1].copy()
        self._sent, self._others = [], tuple(others)
        if others:
            self._twin.begin(_LANE, is_asking=True)
        self._ask_others(is_over=False)

    def state(self) -> SystemState:
        """What the device knows as the request at hand comes."""
        site, row = self._book.site, int(self._twin.known("current", _LANE)[0])
        return decode_state(
            self._book.encoder.layout,
            self._arrays(),
            0,
            tiers=self._book.tiers,
            plan_in_force=None if row < 0 else self._twin.plan_of(0, row),
            input_kind=site.problem.input_kind,
        )

    def observation(self) -> Observation:
        """The same, encoded for a learner."""
        return {name: rows[0].copy() for name, rows in self._twin.seen._asdict().items()}

    def step(self, plan: Plan) -> tuple[bool, list[Ended]]:
        """Run the request at hand under any legal plan, and go on to the next.

        Raises:
            PlanError: for a plan that is not legal.
            ConfigError: when no episode is running.
        """
        if not self._is_running:
            raise ConfigError("expected a running episode, got none: call start() first, and after an episode's end")
        row = self._twin.add_plan(0, plan)
        self._sent.append(self._book.send(plan, self._arrays()))
        is_over, ended = self._go_on(row)
        is_over, more = self._ask_others(is_over)
        return is_over, ended + more

    def _ask_others(self, is_over: bool) -> tuple[bool, list[Ended]]:
        """Let other devices decide on their requests until one of the agent's is at hand; what fails ends the episode."""
        ended: list[Ended] = []
        self._is_running = False
        while not is_over and (turn := self._twin.turn(0)) != 0:
            plan = self._others[turn - 1].plan(self.state())
            is_over, more = self._go_on(self._twin.add_plan(0, plan))
            ended += more
        self._is_running = not is_over
        return is_over, ended

    def _go_on(self, row: int) -> tuple[bool, list[Ended]]:
        """Start the request at hand under the plan of a row; gives which of the agent's requests ended before the next."""
        is_over, (_, numbers) = self._twin.step(_LANE, np.array([row]))
        latency_s, deadline_s, outcomes = self._twin.requests(np.zeros_like(numbers), numbers)
        ended = [
            self._book.end(number, self._sent[number], latency, deadline, self._reference_s[number], OUTCOMES[code])
            for number, latency, deadline, code in zip(
                numbers.tolist(), latency_s.tolist(), deadline_s.tolist(), outcomes.tolist(), strict=True
            )
        ]
        return bool(is_over[0]), ended

    def replace(self) -> None:
        """End the episode."""
        self._is_running = False

    def close(self) -> None:
        """Nothing is held."""
        self._is_running = False

    def _arrays(self) -> StateArrays:
        return self._twin.state_arrays(self._book.site, _LANE)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request under way: its plan, and what that has it send."""

    plan: Plan
    uplink_bytes: float
    backbone_bytes: float


class Book:
    """What both backends work out alike for a site: observations, bytes and terms."""

    def __init__(self, site: Site, excess_weight: float = EXCESS_WEIGHT) -> None:
        self.site, self.excess_weight = site, excess_weight
        self.encoder = FeatureEncoder(site.problem)
        self.tiers = {node.name: node.tier for node in site.problem.deployment.nodes}
        self._scale_s = np.array([self.encoder.reference_s])

    def observe(self, features: Features) -> Observation:
        """Lay one state's features out as an observation."""
        rows = blank_observations(1)
        put_features(rows, _LANE, features)
        return {name: row[0] for name, row in rows.items()}

    def send(self, plan: Plan, state: StateArrays) -> Sent:
        """Work out what a plan sends in a state (batch 1): each sender's newest reading decides on coding."""
        costs, cloud = self._costs(plan), self.site.problem.deployment.cloud
        sent = sent_bytes(costs, state)[0]
        backbone = sent @ backbone_hops(costs, None if cloud is None else cloud.name)[0]
        return Sent(plan, float(sent[0]), float(backbone))

    def _costs(self, plan: Plan) -> PlanCosts:
        row = self.site.candidates.index.get(plan)
        if row is None:
            return compile_plan(self.site.problem, plan)
        return self.site.candidates.costs.take(np.array([row]))

    def end(
        self,
        number: int,
        sent: Sent,
        latency_s: float,
        deadline_s: float,
        reference_s: float,
        outcome: str,
        latency: LatencyBreakdown | None = None,
    ) -> Ended:
        """Note the end of a request."""
        ours, deadline, reference = (np.array([value]) for value in (latency_s, deadline_s, reference_s))
        term = float(reward_terms(ours, deadline, reference, self._scale_s, self.excess_weight)[0])
        return Ended(
            number=number,
            plan=sent.plan,
            latency_s=latency_s,
            deadline_s=deadline_s,
            reference_s=float(reference_s),
            term=term,
            outcome=outcome,
            uplink_bytes=sent.uplink_bytes,
            backbone_bytes=sent.backbone_bytes,
            latency=latency,
        )


def sent_bytes(costs: PlanCosts, state: StateArrays) -> FloatArray:
    """Bytes of every hop, shape (B, H), of a plan for each state: a sender chooses the codec by its newest sample."""
    link, saved_bytes = costs.full("link"), costs.full("saved_bytes")
    newest_bps = np.take_along_axis(state.bandwidth_bps[..., 0], link, axis=1)
    is_coded = saved_bytes * 8.0 / newest_bps > costs.full("coding_s")  # False where nothing is known
    is_relayed = costs.full("is_relayed")[:, None]
    is_coded[:, 1::2] = np.where(is_relayed, is_coded[:, 0::2], is_coded[:, 1::2])
    plain_bytes = costs.full("plain_bytes") + costs.full("has_input") * state.input_bytes[:, None]
    sent: FloatArray = (plain_bytes - saved_bytes * is_coded) * costs.full("has_hop")
    return sent


def backbone_hops(costs: PlanCosts, cloud: str | None) -> FloatArray:
    """1 for every hop that enters or leaves the cloud, shape (B, H)."""
    ends = [cloud is not None and cloud in link for link in costs.layout.links]
    hops: FloatArray = np.array(ends, dtype=np.float64)[costs.full("link")] * costs.full("has_hop")
    return hops
