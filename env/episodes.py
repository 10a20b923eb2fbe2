"""Episodes on the twin: lanes with a site, a world and the planner's latencies in it; what environments are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from env.draw import hash_seed
from env.reward import EXCESS_WEIGHT, reward_terms
from env.scenario import Scenario
from env.site import Site
from env.spaces import Observation
from env.traces import FloatArray
from env.twin import BoolArray, IntArray, Twin
from runtime.planning.features import find_slots


@dataclass(frozen=True, slots=True)
class Completed:
    """Requests that ended in a step, side by side."""

    lane: IntArray  # (M,) place among the lanes that were stepped
    number: IntArray  # (M,) of the arrival in the episode: step `number` decided on it
    latency_s: FloatArray  # (M,) inf: never answered
    term: FloatArray  # (M,) what each adds to the reward
    outcome: IntArray  # (M,) code in `env.twin.OUTCOMES`
    deadline_s: FloatArray  # (M,)
    reference_s: FloatArray  # (M,) the planner's latency

    def __len__(self) -> int:
        """How many."""
        return len(self.lane)


def pick_episode(seed: Sequence[int], num_sites: int, num_scenarios: int) -> tuple[int, int]:
    """Draw an episode's site and scenario."""
    site, scenario = hash_seed(seed, (_PICK,)).generate_state(2).tolist()
    return site % num_sites, scenario % num_scenarios


class Episodes:
    """Lanes side by side, each in an episode of its own.

    Which site and scenario an episode has follows from its seed, as everything else does, unless `start` is told.
    Behind the lanes there may be forks, to see what other decisions would bring (`fork`).
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scenarios: Sequence[Scenario],
        *,
        num_lanes: int,
        num_requests: int,
        excess_weight: float = EXCESS_WEIGHT,
        num_forks: int = 0,
    ) -> None:
        """Make the lanes and room for forks; `start` puts episodes into lanes."""
        self.sites, self.scenarios = tuple(sites), tuple(scenarios)
        self.num_requests, self.excess_weight = num_requests, excess_weight
        num_all = num_lanes + num_forks
        self._twin = Twin(num_lanes, num_requests + 1, num_forks=num_forks)
        self._num_plans = np.array([site.candidates.num_plans for site in self.sites])
        self._scale_s = np.array([find_slots(site.problem, site.candidates).reference_s for site in self.sites])
        self._site_of = np.zeros(num_all, dtype=np.int64)
        self._scenario_of = np.zeros(num_all, dtype=np.int64)
        self._reference_s = np.zeros((num_all, num_requests + 1))
        self._number = np.zeros(num_all, dtype=np.int64)

    def start(
        self, lanes: IntArray, seeds: Sequence[Sequence[int]], places: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Start an episode in each of some lanes, and work out what the planner makes of it.

        Args:
            lanes: which.
            seeds: one each.
            places: index of the site and of the scenario of each; None draws them from the seeds.
        """
        num_sites, num_scenarios = len(self.sites), len(self.scenarios)
        picked = [pick_episode(seed, num_sites, num_scenarios) for seed in seeds] if places is None else places
        for lane, seed, (site, scenario) in zip(lanes.tolist(), seeds, picked, strict=True):
            self._site_of[lane], self._scenario_of[lane] = site, scenario
            world = self.scenarios[scenario].world(self.sites[site], seed, self.num_requests + 1)
            self._twin.load(lane, self.sites[site], world)
        self._reference_s[lanes] = self._twin.start(lanes)
        self._number[lanes] = 0

    def step(self, lanes: IntArray, actions: IntArray) -> tuple[FloatArray, BoolArray, Completed]:
        """Decide on the request at hand in each of some lanes.

        Returns:
            Rewards, where the episode is over, and the requests that ended.
        """
        rows = np.where(actions < self._num_plans[self._site_of[lanes]], actions, 0)  # padding repeats the first plan
        is_over, (place, number) = self._twin.step(lanes, rows)
        self._number[lanes] += 1
        completed = replace(self.outcomes(lanes[place], number.copy()), lane=place.copy())
        rewards = np.zeros(len(lanes))
        rewards += np.bincount(place, weights=completed.term, minlength=len(lanes))
        return rewards, is_over, completed

    def fork(self, lanes: IntArray) -> IntArray:
        """Copy episodes as they stand, any of them, also one several times; what was forked before is forgotten.

        Returns:
            Numbers of the forks, shape (lanes,): `step` and `finish` take them as they take lanes, and `observations`
            has rows for them once they are stepped. Nothing that happens in a fork happens in its lane.

        Raises:
            ConfigError: when there is no room for so many.
        """
        forks = self._twin.fork(lanes)
        for array in (self._site_of, self._scenario_of, self._number, self._reference_s):
            array[forks] = array[lanes]
        return forks

    def finish(self, lanes: IntArray) -> None:
        """Go on until all that was decided on has ended; nothing more is asked in these lanes."""
        self._twin.finish(lanes)

    def outcomes(self, lanes: IntArray, numbers: IntArray) -> Completed:
        """What became of requests that have ended, side by side."""
        latency_s, deadline_s, outcome = self._twin.requests(lanes, numbers)
        reference_s, scale_s = self._reference_s[lanes, numbers], self._scale_s[self._site_of[lanes]]
        terms = reward_terms(latency_s, deadline_s, reference_s, scale_s, self.excess_weight)
        return Completed(lanes, numbers, latency_s, terms, outcome, deadline_s, reference_s)

    def number(self, lanes: IntArray) -> IntArray:
        """Number of the request at hand in each of some lanes."""
        numbers: IntArray = self._number[lanes]
        return numbers

    @property
    def observations(self) -> Observation:
        """What every lane's device knows at its request at hand, forks last; changes with the next step, unless given away."""
        return self._twin.seen._asdict()

    def give_observations(self) -> None:
        """Leave the observations to whoever has them: what is seen next is written into new arrays.

        What the new ones hold of a lane means nothing until it is started or stepped.
        """
        self._twin.give_seen()

    def describe(self, lane: int) -> dict[str, object]:
        """What an episode is: its site, its scenario, and the instant it stands at."""
        return {
            "site": self.sites[self._site_of[lane]].name,
            "scenario": self.scenarios[self._scenario_of[lane]].kind,
            "time_s": self._twin.now_s(lane),
        }

    def reference_s(self, lane: int) -> FloatArray:
        """The planner's latency for every request of the lane's episode."""
        return self._reference_s[lane, : self.num_requests].copy()

    def deadline_s(self, lane: int) -> FloatArray:
        """Deadline of every request of the lane's episode."""
        return self._twin.deadline_s(np.array(lane), np.arange(self.num_requests))

    def scale_s(self, lane: int) -> float:
        """The best latency of the lane's site on idle nodes at nominal rates."""
        return float(self._scale_s[self._site_of[lane]])


_PICK = 99
