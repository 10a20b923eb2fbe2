"""Playing policies in the same worlds: all lanes at once where a policy can, else one episode after the other."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from agent.compare.contestants import CLAIRVOYANT, ROLLOUT, Contestant
from agent.compare.statistics import FloatArray
from agent.frozen import FrozenPolicy
from env.backend import Backend, Ended, TwinBackend, backbone_hops, sent_bytes
from env.lookahead import Clairvoyant, Rollout
from env.scenario import Scenario
from env.site import Site
from env.twin import OUTCOMES, IntArray, Twin
from runtime.planning.arrays import StateArrays
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import FeatureEncoder
from runtime.planning.policies.guard import GuardedPolicy
from runtime.planning.policies.planner import PlannerPolicy
from runtime.planning.problem import Policy

Seed = tuple[int, int]

NUM_TIMED = 16
"""Decisions of a batched policy that are also made one by one, to be timed. Guess: enough for a median."""


@dataclass(frozen=True, slots=True)
class Episode:
    """What a policy made of one world. R: requests."""

    policy: str
    scenario: str
    model: str
    site: int
    seed: int
    scale_s: float  # best latency of the site on idle nodes at nominal rates
    latency_s: FloatArray  # (R,) inf: never answered
    deadline_s: FloatArray  # (R,)
    outcome: npt.NDArray[np.int8]  # (R,) code in `env.twin.OUTCOMES`
    uplink_bytes: float  # mean
    backbone_bytes: float  # mean
    num_switches: int  # requests under another plan than the one before
    decision_s: float  # median
    reasons: dict[str, int] = field(default_factory=dict)  # how often a guard took the fallback's plan, by reason

    @property
    def relative(self) -> FloatArray:
        """Latencies over the scale; a request that was never answered counts as its deadline."""
        answered_s: FloatArray = np.where(np.isfinite(self.latency_s), self.latency_s, self.deadline_s)
        return answered_s / self.scale_s

    @property
    def missed_frac(self) -> float:
        """Share of the requests that were late or never answered."""
        return float((~(self.latency_s <= self.deadline_s)).mean())


class Ground:
    """One site under one scenario: worlds drawn once, in which every policy plays."""

    def __init__(
        self, site: Site, number: int, scenario: Scenario, label: str, seeds: Sequence[Seed], count: int
    ) -> None:
        self.site, self.number, self.label, self.seeds = site, number, label, tuple(seeds)
        self.num_requests = count
        self.scale_s = FeatureEncoder(site.problem).reference_s
        self._worlds = [scenario.world(site, seed, count + 1) for seed in seeds]
        self._twin = Twin(len(seeds), count + 1)
        self._lanes = np.arange(len(seeds))
        for lane, world in enumerate(self._worlds):
            self._twin.load(lane, site, world)
        self._single = TwinBackend((site,), num_requests=count)
        self._greedy: IntArray | None = None

    def play(self, contestant: Contestant, *, is_batched: bool = True, self_play: bool = False) -> list[Episode]:
        """Play every world with one policy; the result is the same batched or not.

        Args:
            contestant: who plays.
            is_batched: decide for all worlds at once where the policy can.
            self_play: let other devices that share the edge decide by the policy too, each for itself.

        Raises:
            PlanError: when no plan of the rule is legal at the site.
        """
        if contestant.spec is None:
            return self._play_bound(contestant.name)
        policy = contestant.build(self.site.problem)
        is_shared = self_play and any(len(world.shift) > 1 for world in self._worlds)
        choose = self._chooser(policy) if is_batched and not is_shared else None
        if choose is not None:
            return self._play_lanes(contestant.name, choose, self._time(policy))
        episodes = []
        for lane, world in enumerate(self._worlds):
            others = contestant.build_others(self.site.problem, world) if is_shared else []
            episodes.append(self._play_one(contestant.name, policy, lane, others))
        return episodes

    # --- batched -------------------------------------------------------------------------------------------------------

    def _chooser(self, policy: Policy) -> Callable[[int, StateArrays], IntArray] | None:
        """How a policy decides for all lanes at once; None where it cannot."""
        if isinstance(policy, PlannerPolicy):
            return lambda number, state: policy.choose(state)
        if isinstance(policy, FrozenPolicy):
            return lambda number, state: policy.choose(state, self._current())
        return None

    def _current(self) -> IntArray:
        current: IntArray = self._twin.known("current", self._lanes)
        return np.where(current < NUM_CANDIDATES, current, -1)

    def _play_bound(self, name: str) -> list[Episode]:
        num_plans = self.site.candidates.num_plans
        greedy = Clairvoyant(self._twin, num_plans)
        rows = np.zeros((len(self._lanes), self.num_requests), dtype=np.int64)

        def choose_greedy(number: int, state: StateArrays) -> IntArray:
            rows[:, number] = greedy.choose(self._lanes)
            return rows[:, number]

        if name == CLAIRVOYANT or self._greedy is None:
            episodes = self._play_lanes(CLAIRVOYANT, choose_greedy, np.nan)
            self._greedy = rows
        if name == ROLLOUT:
            rollout = Rollout(self._twin, self.scale_s, self._greedy)
            episodes = self._play_lanes(ROLLOUT, lambda n, state: rollout.choose(self._lanes, n, num_plans), np.nan)
        return episodes

    def _play_lanes(
        self, name: str, choose: Callable[[int, StateArrays], IntArray], decision_s: float
    ) -> list[Episode]:
        lanes, count, costs = self._lanes, self.num_requests, self.site.candidates.costs
        rows = np.zeros((len(lanes), count), dtype=np.int64)
        sent = np.zeros((2, len(lanes)))
        self._twin.begin(lanes)
        for number in range(count):
            state = self._twin.state_arrays(self.site, lanes)
            rows[:, number] = choose(number, state)
            chosen = costs.take(rows[:, number])
            nbytes = sent_bytes(chosen, state)
            sent[0] += nbytes[:, 0]
            sent[1] += (nbytes * backbone_hops(chosen, self._cloud)).sum(axis=1)
            self._twin.step(lanes, rows[:, number])
        latency_s, deadline_s, outcome = self._twin.requests(
            np.repeat(lanes, count), np.tile(np.arange(count), len(lanes))
        )
        shape = (len(lanes), count)
        switches = (np.diff(rows, axis=1) != 0).sum(axis=1)
        return [
            Episode(
                policy=name,
                scenario=self.label,
                model=self.site.name,
                site=self.number,
                seed=self.seeds[lane][0],
                scale_s=self.scale_s,
                latency_s=latency_s.reshape(shape)[lane].copy(),
                deadline_s=deadline_s.reshape(shape)[lane].copy(),
                outcome=outcome.reshape(shape)[lane].astype(np.int8),
                uplink_bytes=float(sent[0, lane]) / count,
                backbone_bytes=float(sent[1, lane]) / count,
                num_switches=int(switches[lane]),
                decision_s=decision_s,
            )
            for lane in range(len(lanes))
        ]

    @property
    def _cloud(self) -> str | None:
        cloud = self.site.problem.deployment.cloud
        return None if cloud is None else cloud.name

    def _time(self, policy: Policy) -> float:
        """Median of a few decisions of the first world, one by one, as a device makes them."""
        self._single.start_world(0, self._worlds[0])
        times_s = []
        for _ in range(min(NUM_TIMED, self.num_requests)):
            state = self._single.state()
            began_s = time.perf_counter()
            plan = policy.plan(state)
            times_s.append(time.perf_counter() - began_s)
            self._single.step(plan)
        return float(np.median(times_s))

    # --- one by one ----------------------------------------------------------------------------------------------------

    def _play_one(self, name: str, policy: Policy, lane: int, others: Sequence[Policy]) -> Episode:
        self._single.start_world(0, self._worlds[lane], others)
        return play_episode(
            self._single, policy, Place(name, self.label, self.site.name, self.number, self.seeds[lane])
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Who plays where."""

    policy: str
    scenario: str
    model: str
    site: int
    seed: Seed


def play_episode(backend: Backend, policy: Policy, place: Place) -> Episode:
    """Play an episode that was started, to its end."""
    policy.reset()
    before = Counter(policy.reasons) if isinstance(policy, GuardedPolicy) else Counter()
    ended: list[Ended] = []
    times_s = []
    is_over = False
    while not is_over:
        state = backend.state()
        began_s = time.perf_counter()
        plan = policy.plan(state)
        times_s.append(time.perf_counter() - began_s)
        is_over, more = backend.step(plan)
        ended += more
    ended.sort(key=lambda request: request.number)
    after = Counter(policy.reasons) if isinstance(policy, GuardedPolicy) else Counter()
    return Episode(
        policy=place.policy,
        scenario=place.scenario,
        model=place.model,
        site=place.site,
        seed=place.seed[0],
        scale_s=FeatureEncoder(backend.sites[0].problem).reference_s,
        latency_s=np.array([request.latency_s for request in ended]),
        deadline_s=np.array([request.deadline_s for request in ended]),
        outcome=np.array([OUTCOMES.index(request.outcome) for request in ended], dtype=np.int8),
        uplink_bytes=float(np.mean([request.uplink_bytes for request in ended])),
        backbone_bytes=float(np.mean([request.backbone_bytes for request in ended])),
        num_switches=sum(a.plan != b.plan for a, b in itertools.pairwise(ended)),
        decision_s=float(np.median(times_s)),
        reasons=dict(after - before),
    )
