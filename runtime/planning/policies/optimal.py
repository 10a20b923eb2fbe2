"""The exact optimum of the cost model, over every topology: what the other rules are measured against.

References:
    Ours: one s-t minimum cut per topology (`runtime.planning.mincut`), in the manner of DADS (Hu et al., 2019).
"""

import math
from dataclasses import dataclass

from runtime.planning.estimators import Estimator, last_value
from runtime.planning.mincut import OrderedCut
from runtime.planning.problem import PlanningProblem
from runtime.planning.weights import Costs, Labels, LastResort, Weigher, Workload, find_topologies
from runtime.types import Plan, SystemState


@dataclass(slots=True)
class OptimalPolicy:
    """Answers the plan without tiles that is predicted fastest of all.

    With an edge node everything goes through it; without one the device - cloud link is used. The least of the minimum
    cuts is the optimum. The queue delay of a middle tier cannot be part of a cut, nor that a mere relay
    does not code anew what it passes on: so each three-tier cut is compared with the one that runs nothing in between.
    The uplink's backlog counts in full, though a device that computes meanwhile waits less.
    """

    work: Workload
    weighers: tuple[Weigher, ...]
    cuts: dict[int, OrderedCut]  # by number of tiers
    last_resort: LastResort
    estimator: Estimator
    has_queues: bool
    is_stateful: bool = False

    def plan(self, state: SystemState) -> Plan:
        """Cut every topology in reach."""
        return self.solve(state)[0]

    def solve(self, state: SystemState) -> tuple[Plan, float]:
        """Give the plan and its predicted seconds, which are infinite when nothing can be predicted."""
        readings = self.estimator(state)
        best_s, best = math.inf, None
        for weigher in self.weighers:
            if not weigher.topology.is_usable(state):
                continue
            costs = weigher.weigh(state, readings, has_queues=self.has_queues)
            labels, seconds = self._cut(costs)
            if seconds < best_s:
                best_s, best = seconds, self.work.make_plan(labels, weigher.topology)
            if len(costs.tiers) == 3:
                labels, seconds = self._cut(weigher.weigh(state, readings, has_queues=self.has_queues, is_relay=True))
                if seconds < best_s:
                    best_s, best = seconds, self.work.make_plan(labels * 2, weigher.topology)
        if best is None:
            plan = self.last_resort.plan(state)
            return plan, best_s
        return best, best_s

    def _cut(self, costs: Costs) -> tuple[Labels, float]:
        """Solve one topology; the answer is never worse than the plans that use one tier."""
        labels = min((costs.uniform(label) for label in range(len(costs.tiers))), key=costs.total_s)
        seconds = costs.total_s(labels)
        if math.isinf(seconds):
            return labels, seconds
        cut = self.cuts[len(costs.tiers)].solve(costs, seconds)
        cut_s = costs.total_s(cut)
        return (cut, cut_s) if cut_s < seconds else (labels, seconds)

    def reset(self) -> None:
        """Nothing to forget."""


def build_optimal(
    problem: PlanningProblem, estimator: Estimator = last_value, *, has_queues: bool = True
) -> OptimalPolicy:
    """Build the exact rule.

    Args:
        problem: what it is for.
        estimator: gives rates, round trips, k and q.
        has_queues: False leaves queue delays and backlogs out of what is optimised.

    Raises:
        PlanError: when no plan at all is legal.
    """
    work, topologies = Workload.of(problem), find_topologies(problem)
    sizes = {len(topology.tiers) for topology in topologies}
    cuts = {size: OrderedCut(work, size) for size in sizes | ({2} if 3 in sizes else set())}
    weighers = tuple(Weigher(work, topology) for topology in topologies)
    return OptimalPolicy(work, weighers, cuts, LastResort(work, topologies), estimator, has_queues)
