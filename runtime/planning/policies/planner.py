"""The planner: of the K candidates, the one with the least predicted latency."""

from dataclasses import dataclass

import numpy as np

from runtime.planning.arrays import FloatArray, IntArray, StateArrays, encode_states
from runtime.planning.candidates import Candidates, candidates
from runtime.planning.cost import PARTS, predict, predict_total
from runtime.planning.estimators import ReadingsArrays, TunedSettings, tuned_arrays
from runtime.planning.problem import PlanningProblem
from runtime.types import Plan, SystemState

DEFAULT_PRICE = 0.25
"""Price of occupancy under `planner-priced`. Searched on training seeds (env/README.md, settings of the rules); 0.5 would be
the wait that one request causes later ones where the load is light."""

_OCCUPYING = [PARTS.index(name) for name in ("device", "edge", "uplink")]


@dataclass(frozen=True, slots=True)
class PlannerPolicy:
    """Picks the candidate with the least predicted latency, plus a price on what it occupies.

    A request that holds the device, the uplink or the head for S seconds delays those that come meanwhile: at a request
    rate r, some r S of them by S / 2. So occupancy costs `price * min(r S, 1) * S` each; price 0 looks at this request
    alone. An unknown rate counts as 0.
    """

    candidates: Candidates
    settings: TunedSettings
    price: float = 0.0
    is_stateful: bool = False

    def plan(self, state: SystemState) -> Plan:
        """Pick the plan for one state: `choose` with batch 1."""
        choice = int(self.choose(encode_states(self.candidates.costs.layout, (state,)))[0])
        return self.candidates.plans[choice]

    def choose(self, state: StateArrays) -> IntArray:
        """Pick a candidate's index for every state of a batch, shape (B,)."""
        cost_s = self.weigh(state, tuned_arrays(state, self.settings))
        choice: IntArray = (cost_s + self.candidates.penalty(state)).argmin(axis=1)
        return choice

    def weigh(self, state: StateArrays, readings: ReadingsArrays) -> FloatArray:
        """Predicted latency plus price of every candidate, shape (B, K), seconds."""
        if self.price == 0.0:
            return predict_total(self.candidates.costs, readings, state)
        parts = predict(self.candidates.costs, readings, state)
        held_s = parts[..., _OCCUPYING]
        rate_hz = np.fmax(state.request_rate_hz, 0.0)[:, None, None]
        cost_s: FloatArray = parts.sum(axis=-1) + self.price * (np.minimum(rate_hz * held_s, 1.0) * held_s).sum(axis=-1)
        return cost_s

    def reset(self) -> None:
        """Nothing to forget."""


def build_planner(problem: PlanningProblem) -> PlannerPolicy:
    """Build the planner without a price.

    Raises:
        PlanError: when no split is legal.
    """
    return PlannerPolicy(candidates(problem), TunedSettings())


def build_priced(problem: PlanningProblem) -> PlannerPolicy:
    """Build the planner with `DEFAULT_PRICE`.

    Raises:
        PlanError: when no split is legal.
    """
    return PlannerPolicy(candidates(problem), TunedSettings(), DEFAULT_PRICE)
