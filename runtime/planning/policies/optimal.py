"""The exact optimum of the cost model, over every topology: what the other rules are measured against.

References:
    Ours: one s-t minimum cut per topology (`runtime.planning.mincut`), in the manner of DADS (Hu et al., 2019).
"""

import math
from dataclasses import dataclass

import numpy as np

from runtime.planning.estimators import Estimator, last_value
from runtime.planning.mincut import OrderedCut
from runtime.planning.problem import PlanningProblem
from runtime.planning.weights import Costs, Labels, LastResort, Topology, Weigher, Workload, find_topologies
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
        best_s, best = math.inf, None
        for topology, costs in self._find_problems(state):
            labels, seconds = self._cut(costs)
            if seconds < best_s:
                labels = np.array([topology.tiers.index(tier) for tier in costs.tiers])[labels]
                best_s, best = seconds, self.work.make_plan(labels, topology)
        return (self.last_resort.plan(state) if best is None else best), best_s

    def _find_problems(self, state: SystemState) -> list[tuple[Topology, Costs]]:
        """Price every topology in reach, and every head as a mere relay, but for ways to the cloud that cannot win."""
        readings = self.estimator(state)
        problems: list[tuple[Topology, Costs]] = []
        to_cloud: list[tuple[Topology, Costs]] = []
        for weigher in self.weighers:
            topology = weigher.topology
            if not topology.is_usable(state):
                continue
            costs = weigher.weigh(state, readings, has_queues=self.has_queues)
            (to_cloud if topology.head is None else problems).append((topology, costs))
            if len(costs.tiers) == 3:
                relay = weigher.weigh(state, readings, has_queues=self.has_queues, is_relay=True)
                to_cloud.append((topology, relay))
        for index, (topology, costs) in enumerate(to_cloud):
            rivals = [(rank, other) for rank, (_, other) in enumerate(to_cloud) if rank != index]
            if not any(
                _is_faster(other, costs) and (rank < index or not _is_faster(costs, other)) for rank, other in rivals
            ):
                problems.append((topology, costs))
        return problems

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


def _is_faster(one: Costs, other: Costs) -> bool:
    """Whether one way to the same nodes takes no longer than another, whatever is sent."""
    return (
        one.hop_s <= other.hop_s
        and bool((one.up_s <= other.up_s).all())
        and bool((one.result_s <= other.result_s).all())
    )


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
