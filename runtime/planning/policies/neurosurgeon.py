"""Neurosurgeon: the best of all split points of a chain, with or without the server's load level K.

References:
    Kang et al., "Neurosurgeon: Collaborative Intelligence Between the Cloud and Mobile Edge", ASPLOS 2017: latency at
    every layer boundary j, `sum_{i<=j} TM_i + D_j / B + sum_{i>j} TC_i(K)`, of which the least is taken. As
    reconstructed.
    Differs: on a graph that is no chain, a boundary is a place in the topological order, and every value that is live
    there crosses, not only the last output; the round trip, fixed seconds per message and the way back of the result
    are added; layer times come from the profile; the energy objective is left out; K is a factor on every layer, as
    LoADPart measures it, not an input of the regressions. The server is the edge node that is predicted best, or the
    cloud where no edge node is allowed, there or up.
"""

from runtime.planning.estimators import Estimator, Readings, last_value
from runtime.planning.problem import PlanningProblem
from runtime.planning.splits import SplitRule
from runtime.types import SystemState


def _idle(state: SystemState, readings: Readings, name: str) -> tuple[float, float]:
    del state, readings, name
    return 1.0, 0.0


def _loaded(state: SystemState, readings: Readings, name: str) -> tuple[float, float]:
    del state
    return readings.k(name), 0.0


def build_neurosurgeon(problem: PlanningProblem, estimator: Estimator = last_value) -> SplitRule:
    """Build the rule without K: the server counts as idle.

    Raises:
        PlanError: when no plan at all is legal.
    """
    return SplitRule.build(problem, estimator, _idle)


def build_neurosurgeon_k(problem: PlanningProblem, estimator: Estimator = last_value) -> SplitRule:
    """Build the rule with K: the server's last load factor multiplies its layer times.

    Raises:
        PlanError: when no plan at all is legal.
    """
    return SplitRule.build(problem, estimator, _loaded)
