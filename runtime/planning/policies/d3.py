"""D3: layers to three tiers by a walk over the graph (HPA), adjusted locally while it runs; the edge's share in tiles.

References:
    Zhang, Xiang, Zhang, Li, Zhu, Gu, "Dynamic DNN Decomposition for Lossless Synergistic Inference", 2021 (arXiv
    2101.05952): HPA labels layers in the order of their longest distance from the input, each with the cheapest tier
    not before its predecessors'; layers whose inputs another layer already brought to a tier may follow it there (SIS);
    at run time only what thresholds on layer time and link rate tell to has to be labelled again. As reconstructed.
    Differs: the look-ahead (unknown in the paper) is the cheapest continuation to the end if graph layers stay together,
    of which a layer bears its share: exact on chains, where a shorter one often loses to Neurosurgeon; a value counts
    once per hop however many layers read it; a local update looks for layers whose cheapest tier has changed, all at
    once, and walks on from these; all goes through the edge node or, in a topology of its own, straight to the cloud; every edge
    node is tried, and the cheapest topology by predicted total is answered; the load factor k stands for what the paper
    reads of a node's resources; round trips and the way back of the result count, queue delays do not. Thresholds,
    samples and dwell are guesses, counted in decisions, because a rule sees no clock. A node that goes down or comes
    back has everything labelled anew. VSM: with several edge nodes the edge's share is cut into tiles where that is
    predicted to pay, by `runtime.planning.grids`; HPA itself does not know of them, so it may leave to the cloud what
    tiles would make faster at the edge.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.planning.arrays import FloatArray, IntArray, encode_states
from runtime.planning.cost import predict_total
from runtime.planning.estimators import (
    ArrayEstimator,
    Estimator,
    Readings,
    last_value,
    last_value_arrays,
    tuned,
    tuned_arrays,
)
from runtime.planning.grids import tile_options, tiled_plans
from runtime.planning.policies.hpa import LabelGraph, Partition
from runtime.planning.policies.optimal import OptimalPolicy, build_optimal
from runtime.planning.problem import PlanningProblem, Policy
from runtime.planning.rows import PlanCosts, compile_plan
from runtime.planning.weights import LastResort, Topology, Weigher, Workload, find_topologies, is_up
from runtime.types import Plan, SystemState

THRESHOLD = 0.2
"""Relative change, against the reading at the last labelling, that counts. Guess."""

NUM_SAMPLES = 3
"""Decisions in a row that must see a change. Guess."""

MIN_DWELL = 5
"""Decisions between two labellings. Guess."""

_log = logging.getLogger(__name__)


class _Watch:
    """What is held to the thresholds: load factors, rates of links, the bytes of an encoded input."""

    def __init__(self, work: Workload, topologies: tuple[Topology, ...]) -> None:
        self._has_encoded = work.encoded >= 0
        self._nodes = [node.name for node in work.problem.deployment.nodes]
        hops = [itertools.pairwise(topology.nodes) for topology in topologies]
        self._links = list(dict.fromkeys(itertools.chain.from_iterable(hops)))
        first_link, last = len(self._nodes), len(self._nodes) + len(self._links)
        self.slots: dict[Topology, IntArray] = {}  # of what matters to each topology
        for topology in topologies:
            nodes = [self._nodes.index(name) for name in topology.nodes[1:]]
            links = [first_link + self._links.index(hop) for hop in itertools.pairwise(topology.nodes)]
            self.slots[topology] = np.array([*nodes, *links, last])

    def read(self, state: SystemState, readings: Readings) -> FloatArray:
        """Read them all."""
        factors = [readings.k(name) for name in self._nodes]
        rates = [readings.rate_bps(source, target) for source, target in self._links]
        return np.array([*factors, *rates, float(state.input_bytes) if self._has_encoded else 1.0])


@dataclass(slots=True)
class D3Policy:
    """HPA at first, local updates of its labels later; remembers its labels and the readings they were made with."""

    work: Workload
    partitions: tuple[Partition, ...]
    watch: _Watch
    last_resort: LastResort
    oracle: OptimalPolicy
    estimator: Estimator
    is_stateful: bool = True
    num_touched: int = 0
    """Layers that the last decision labelled; 0 when it kept its plan."""
    num_updates: int = 0
    """Local updates since the start or the last `reset`."""
    _plan: Plan | None = None
    _up: tuple[bool, ...] = ()
    _reference: FloatArray = field(default_factory=lambda: np.zeros(0))
    _streak: FloatArray = field(default_factory=lambda: np.zeros(0))
    _dwell: int = 0

    def plan(self, state: SystemState) -> Plan:
        """Keep the plan, or label again what the readings tell to."""
        readings = self.estimator(state)
        up = tuple(is_up(state, node.name) for node in self.work.problem.deployment.nodes)
        conditions = self.watch.read(state, readings)
        self.num_touched = 0
        if self._plan is None or up != self._up:
            self._up = up
            self._reference, self._streak = conditions, np.zeros(len(conditions))
            return self._label(state, readings, full=self.partitions, local=())
        self._dwell += 1
        is_out = np.abs(conditions - self._reference) > THRESHOLD * self._reference
        self._streak = np.where(is_out, self._streak + 1, 0)
        if self._dwell < MIN_DWELL or self._streak.max() < NUM_SAMPLES:
            return self._plan
        self.num_updates += 1
        affected = []
        for partition in self.partitions:
            own = self.watch.slots[partition.topology]
            if (self._streak[own] >= NUM_SAMPLES).any():
                affected.append(partition)
                self._reference[own] = conditions[own]
        self._streak = np.zeros(len(conditions))
        return self._label(state, readings, full=(), local=affected)

    def reset(self) -> None:
        """Forget the labels: the next decision labels everything."""
        self._plan = None
        self._up = ()
        self.num_updates = 0

    def gap_to_optimal_frac(self, state: SystemState) -> float:
        """Predicted latency of the plan in force over the least there is, minus 1; queue delays left out in both.

        NaN where no labels are in force.
        """
        chosen = [p for p in self.partitions if p.topology.is_usable(state) and p.make_plan() == self._plan]
        if not chosen:
            return math.nan
        seconds = chosen[0].price(state, self.estimator(state))
        return seconds / self.oracle.solve(state)[1] - 1.0

    def _label(
        self, state: SystemState, readings: Readings, *, full: Sequence[Partition], local: Sequence[Partition]
    ) -> Plan:
        """Run HPA on some topologies, the local update on others, and take the cheapest of all in reach."""
        best: Partition | None = None
        best_s = math.inf
        for partition in self.partitions:
            if not partition.topology.is_usable(state):
                continue
            if partition in full:
                partition.weigh(state, readings)
                partition.run()
            elif partition in local:
                partition.weigh(state, readings)
                partition.update()
            if partition in full or partition in local:
                self.num_touched += partition.num_touched
            if partition.predicted_s < best_s:
                best, best_s = partition, partition.predicted_s
        self._plan = self.last_resort.plan(state) if best is None else best.make_plan()
        self._dwell = 0
        if _log.isEnabledFor(logging.DEBUG):
            kind, gap_frac = "full run" if full else "local update", self.gap_to_optimal_frac(state)
            _log.debug("%s labelled %d layers: %.1f %% above the optimum", kind, self.num_touched, 100 * gap_frac)
        return self._plan


@dataclass(slots=True)
class TiledD3Policy:
    """HPA, its edge share in tiles where that is predicted to pay when the layers are labelled."""

    hpa: D3Policy
    array_estimator: ArrayEstimator
    is_stateful: bool = True
    _plan: Plan | None = None
    _up: tuple[bool, ...] = ()
    _choices: dict[Plan, tuple[tuple[Plan, ...], PlanCosts]] = field(default_factory=dict)

    def plan(self, state: SystemState) -> Plan:
        """Keep the plan, or label again what the readings tell to, and choose its tiles anew."""
        base = self.hpa.plan(state)
        up = tuple(is_up(state, node.name) for node in self.hpa.work.problem.deployment.nodes)
        if self._plan is None or self.hpa.num_touched or up != self._up:
            self._plan, self._up = self._choose(base, state), up
        return self._plan

    def _choose(self, base: Plan, state: SystemState) -> Plan:
        plans, costs = self._choices_of(base)
        arrays = encode_states(costs.layout, (state,))
        seconds = predict_total(costs, self.array_estimator(arrays), arrays)[0]
        missing = costs.full("needs") @ (1.0 - arrays.is_up[0])
        missing += costs.full("needs_links") @ np.isnan(arrays.rtt_s[0])  # edge nodes that do not know each other
        seconds = np.where((missing == 0.0) & np.isfinite(seconds), seconds, np.inf)
        return plans[int(seconds.argmin())]  # the first is the base

    def _choices_of(self, base: Plan) -> tuple[tuple[Plan, ...], PlanCosts]:
        known = self._choices.get(base)
        if known is None:
            problem = self.hpa.work.problem
            plans = (base, *tiled_plans(problem, base))
            known = self._choices[base] = plans, PlanCosts.stack([compile_plan(problem, plan) for plan in plans])
        return known

    def reset(self) -> None:
        """Forget the labels: the next decision labels everything."""
        self.hpa.reset()
        self._plan, self._up = None, ()


_ARRAYS: dict[Estimator, ArrayEstimator] = {last_value: last_value_arrays, tuned: tuned_arrays}


def build_d3(problem: PlanningProblem, estimator: Estimator = last_value) -> Policy:
    """Build D3's rule; the same as `build_hpa` where there are no edge nodes or layers for tiles.

    Raises:
        PlanError: when no plan at all is legal.
    """
    hpa = build_hpa(problem, estimator)
    if not any(tile_options(problem, node.name) for node in problem.deployment.edges):
        return hpa
    return TiledD3Policy(hpa, _ARRAYS[estimator])


def build_hpa(problem: PlanningProblem, estimator: Estimator = last_value) -> D3Policy:
    """Build D3's rule without tiles.

    Raises:
        PlanError: when no plan at all is legal.
    """
    work, topologies = Workload.of(problem), find_topologies(problem)
    graph = LabelGraph(work)
    partitions = tuple(Partition(graph, Weigher(work, topology)) for topology in topologies)
    oracle = build_optimal(problem, estimator, has_queues=False)
    watch = _Watch(work, topologies)
    return D3Policy(work, partitions, watch, LastResort(work, topologies), oracle, estimator)
