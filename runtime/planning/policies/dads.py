"""DADS: a two-tier minimum cut; for the sum of all stages under light load, for the slowest stage under heavy load.

References:
    Hu, Bao, Wang, Lui, "Dynamic Adaptive DNN Surgery for Inference Acceleration on the Edge", INFOCOM 2019: DSL, one
    s-t minimum cut with helper vertices, minimises the delay of one inference under light load; DSH minimises the
    longest of the stages device, transfer and server, so maximises throughput, within a factor of 3, under heavy load;
    light is where the slowest stage of DSL's plan keeps up with the frames. As reconstructed.
    Differs: hand-backs from server to device are forbidden; round trip, fixed seconds per message and the result's way
    back count towards the delay (not towards the stages, which they do not occupy); DSH is a search over weighted
    cuts: the cut of equal weights alone already is within a factor of 3, because no stage is longer than the sum
    of all, which is at most 3 times the longest stage of any other plan. The `-k` variants multiply the server's layer
    times by its load factor (and -light adds its queue delay), which the paper's idle cloud does not need. The server
    is the edge node that is predicted best, or the cloud where no edge node is allowed, there or up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from runtime.planning.arrays import FloatArray
from runtime.planning.estimators import Estimator, last_value
from runtime.planning.mincut import OrderedCut
from runtime.planning.problem import PlanningProblem
from runtime.planning.splits import find_servers, usable_servers
from runtime.planning.weights import Costs, Labels, LastResort, Topology, Weigher, Workload
from runtime.types import Plan, SystemState

_ROUNDS = 6
"""Weighted cuts that DSH tries. Guess: more found next to nothing better on random graphs."""

_STEP = 0.7
"""How strongly a stage that is longer than the others gains weight from round to round. Guess."""

Rule = Callable[[OrderedCut, Costs, float], tuple[Labels, float, bool]]
"""Gives the labels for one server, the seconds by which servers are compared, and whether these are of heavy load; the
number it is given is the frame rate, Hz."""


@dataclass(slots=True)
class DadsPolicy:
    """Cuts towards every server in reach and answers the best by the rule's own measure."""

    work: Workload
    servers: tuple[Topology, ...]
    weighers: tuple[Weigher, ...]
    cut: OrderedCut
    last_resort: LastResort
    estimator: Estimator
    rule: Rule
    uses_load: bool
    is_stateful: bool = False

    def plan(self, state: SystemState) -> Plan:
        """Cut."""
        readings = self.estimator(state)
        best: Plan | None = None
        best_value = (True, math.inf)
        for index in usable_servers(self.servers, state):
            costs = self.weighers[index].weigh(state, readings, has_load=self.uses_load, has_queues=False)
            if self.uses_load:
                costs = replace(costs, queue_s=(0.0, readings.q(self.servers[index].nodes[1])))
            labels, seconds, is_heavy = self.rule(self.cut, costs, state.request_rate_hz)
            if seconds < math.inf and (is_heavy, seconds) < best_value:  # a server that keeps up comes first
                best, best_value = self.work.make_plan(labels, self.servers[index]), (is_heavy, seconds)
        return self.last_resort.plan(state) if best is None else best

    def reset(self) -> None:
        """Nothing to forget."""


def solve_light(cut: OrderedCut, costs: Costs, rate_hz: float = math.nan) -> tuple[Labels, float, bool]:
    """DSL: the labels of least delay, and that delay."""
    del rate_hz
    near, far = costs.uniform(0), costs.uniform(1)
    labels = min((near, far), key=costs.total_s)
    bound_s = costs.total_s(labels)
    if math.isinf(bound_s):
        return labels, bound_s, False
    found = cut.solve(costs, bound_s)
    found_s = costs.total_s(found)
    return (found, found_s, False) if found_s < bound_s else (labels, bound_s, False)


def solve_heavy(cut: OrderedCut, costs: Costs, rate_hz: float = math.nan) -> tuple[Labels, float, bool]:
    """DSH: the labels whose longest stage is the shortest found, and that stage.

    A cut that weighs the stages by w (w >= 0, sum 1) costs at most the longest stage of the best plan, so the largest
    cost of any round is a lower bound, at which the search may stop.
    """
    del rate_hz
    only_stages = replace(costs, hop_s=(0.0,), queue_s=(0.0, 0.0))
    candidates = [costs.uniform(0), costs.uniform(1)]
    best, best_s = min(((c, _longest_s(only_stages, c)) for c in candidates), key=lambda pair: pair[1])
    if math.isinf(best_s):
        return best, best_s, True
    weights = np.full(3, 1 / 3)
    for _ in range(_ROUNDS):
        device, transfer, server = weights
        weighted = replace(
            only_stages,
            layer_s=only_stages.layer_s * np.array([[device], [server]]),
            up_s=only_stages.up_s * transfer,
            result_s=only_stages.result_s * 0.0,
        )
        labels = cut.solve(weighted, weighted.total_s(best))
        stages = stage_s(only_stages, labels)
        if stages.max() < best_s:
            best, best_s = labels, float(stages.max())
        if weighted.total_s(labels) >= best_s * 0.99:
            break
        weights = weights * np.exp(_STEP * (stages / max(stages.max(), 1e-12) - 1.0))
        weights = np.maximum(weights / weights.sum(), 1e-3)
        weights /= weights.sum()
    return best, best_s, True


def solve_by_load(cut: OrderedCut, costs: Costs, rate_hz: float) -> tuple[Labels, float, bool]:
    """Take DSL's labels where their longest stage keeps up with the frames, else DSH's."""
    light, light_s, _ = solve_light(cut, costs)
    if math.isinf(light_s) or not rate_hz > 0 or _longest_s(costs, light) <= 1.0 / rate_hz:
        return light, light_s, False
    return solve_heavy(cut, costs)


def stage_s(costs: Costs, labels: Labels) -> FloatArray:
    """Seconds that one request occupies device, uplink and server, shape (3,)."""
    first = costs.work.entry
    active = labels[first:]
    seconds = costs.layer_s[active, np.arange(first, costs.work.num_layers)]
    made, read = costs.work.spans(labels)
    transfer_s = costs.up_s[0][(made == 0) & (read > 0)].sum()
    return np.array([seconds[active == 0].sum(), transfer_s, seconds[active > 0].sum()])


def _longest_s(costs: Costs, labels: Labels) -> float:
    return float(stage_s(costs, labels).max())


def _builder(rule: Rule, *, uses_load: bool) -> Callable[[PlanningProblem, Estimator], DadsPolicy]:
    def build(problem: PlanningProblem, estimator: Estimator = last_value) -> DadsPolicy:
        work, servers = Workload.of(problem), find_servers(problem)
        weighers = tuple(Weigher(work, server) for server in servers)
        last_resort = LastResort(work, servers)
        return DadsPolicy(work, servers, weighers, OrderedCut(work, 2), last_resort, estimator, rule, uses_load)

    return build


build_light = _builder(solve_light, uses_load=False)
build_light_k = _builder(solve_light, uses_load=True)
build_heavy = _builder(solve_heavy, uses_load=False)
build_heavy_k = _builder(solve_heavy, uses_load=True)
build_by_load = _builder(solve_by_load, uses_load=False)
build_by_load_k = _builder(solve_by_load, uses_load=True)
