"""LoADPart: the split point that is best under this moment's bandwidth and server load.

References:
    Liu, Zheng, Li, Guo, "LoADPart: Load-Aware Dynamic Partition of Deep Neural Networks for Edge Offloading", ICDCS
    2022: one scan over the topological order, with a prefix sum of device times and a suffix sum of server times that
    the load factor k multiplies. As reconstructed; q, added once, is from a load-aware offloader of the same kind.
    Differs: layer times come from measured profiles, not from regressions; the round trip and fixed seconds per message
    are added, and values count with their expected lossless ratio; the server is the edge node that is predicted best,
    or the cloud where no edge node is allowed, there or up; the watcher that resets k sits on the node
    (`runtime.node.load`); here a reading that has gone stale decays towards an idle server, and no request is sent
    merely to ask: nodes tell their load unasked. The partition cache keeps plan objects here and segments on the nodes.
"""

import math

from runtime.planning.estimators import Estimator, Readings, last_value
from runtime.planning.problem import PlanningProblem
from runtime.planning.splits import SplitRule
from runtime.types import SystemState

STALE_AFTER_S = 5.0
"""Age from which k and q are no longer believed as they are. Guess: the node's own window, ten status periods."""

DECAY_S = 5.0
"""After that, k - 1 and q fall to 1/e in this time. Guess: as long again as the window."""


def build_loadpart(problem: PlanningProblem, estimator: Estimator = last_value) -> SplitRule:
    """Build the rule.

    Raises:
        PlanError: when no plan at all is legal.
    """
    return SplitRule.build(problem, estimator, read_decayed_load)


def read_decayed_load(state: SystemState, readings: Readings, name: str) -> tuple[float, float]:
    """Give (k, q) of a node, decayed towards an idle one when they are stale."""
    k, q = readings.k(name), readings.q(name)
    node = state.node(name)
    age_s = math.inf if node is None else node.age_s
    if age_s <= STALE_AFTER_S:
        return k, q
    trust = math.exp((STALE_AFTER_S - age_s) / DECAY_S) if age_s < math.inf else 0.0  # NaN counts as never heard
    return 1.0 + (k - 1.0) * trust, q * trust
