"""Bounds that know what will happen: the twin is asked before each decision.

They see the true future of everything that does not depend on decisions, and the state that their own decisions led to.
"""

from dataclasses import dataclass

import numpy as np

from env.reward import EXCESS_WEIGHT
from env.traces import FloatArray
from env.twin import IntArray, Twin

HORIZON = 8
"""Requests that a rollout looks ahead. Guess: what one request holds is free again well before."""

WIDTH = 6
"""Candidates that a rollout tries beside the one it improves on: the best for the request at hand."""


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """Picks the candidate under which the request at hand will really be fastest.

    Greedy: it knows the future but not what its own choice does to later requests, so it is no lower bound.
    """

    twin: Twin
    num_plans: int

    def choose(self, lanes: IntArray) -> IntArray:
        """Pick a candidate for every lane, shape (lanes,)."""
        choice: IntArray = self.weigh(lanes).argmin(axis=1)
        return choice

    def weigh(self, lanes: IntArray) -> FloatArray:
        """True latency of the request at hand under every candidate, shape (lanes, plans)."""
        rows = np.tile(np.arange(self.num_plans), len(lanes))
        looked_s = self.twin.look(np.repeat(lanes, self.num_plans), rows[:, None]).reshape(len(lanes), -1)
        counted_s: FloatArray = np.minimum(looked_s, self.twin.known("deadline_s", lanes)[:, None])
        return counted_s


@dataclass(frozen=True, slots=True)
class Rollout:
    """Improves on an episode's choices one by one, each by what it does to this request and the next `horizon`.

    Those that follow choose as in the episode that is improved on. What counts is the reward without its cap: the sum
    of ln(latency) and a tenth of latency / scale. What a choice does to earlier requests that are under way (whose
    uploads may wait for it) does not count, so a second pass may undo what a first one won.

    References:
        Bertsekas, "Rollout, Policy Iteration, and Distributed Reinforcement Learning" (2020): one step of policy
        improvement over a base policy, by simulation. Differs: the simulation is the true future, so the base policy
        is a sequence of choices, and only the choices that are best for the request at hand are tried.
    """

    twin: Twin
    scale_s: float
    base: IntArray
    """Row of every request of every lane, shape (lanes of the twin, requests)."""
    horizon: int = HORIZON
    width: int = WIDTH

    def choose(self, lanes: IntArray, number: int, num_plans: int) -> IntArray:
        """Pick a candidate for request `number` of every lane, shape (lanes,)."""
        width = min(self.width, num_plans)
        best = Clairvoyant(self.twin, num_plans).weigh(lanes).argsort(axis=1, kind="stable")[:, :width]
        tried = np.concatenate([self.base[lanes, number][:, None], best], axis=1)
        width = tried.shape[1]
        rows = np.repeat(self.base[lanes, number : number + 1 + self.horizon], width, axis=0)
        rows[:, 0] = tried.ravel()
        counted_s = self.twin.look(np.repeat(lanes, width), rows).reshape(len(lanes), width, -1)
        deadline_s = self.twin.known("deadline_s", lanes)[:, None, None]
        counted_s = np.minimum(counted_s, deadline_s)  # NaN stays
        cost = np.nansum(np.log(counted_s) + EXCESS_WEIGHT * counted_s / self.scale_s, axis=2)
        choice: IntArray = tried[np.arange(len(lanes)), cost.argmin(axis=1)]
        return choice
