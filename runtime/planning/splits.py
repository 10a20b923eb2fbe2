"""Linear splits: layers `[0, p)` on the device and the rest on one server, every p priced in one O(n) scan."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.planning.arrays import FloatArray
from runtime.planning.estimators import Estimator, Readings
from runtime.planning.problem import PlanningProblem
from runtime.planning.weights import (
    LastResort,
    Topology,
    Workload,
    find_topologies,
    has_device,
    is_up,
    pinned_layers,
)
from runtime.types import DEVICE_NODE, Plan, SystemState


def find_servers(problem: PlanningProblem) -> tuple[Topology, ...]:
    """List the servers of a two-tier rule, without a third tier behind them: the edge nodes, then the cloud.

    The server is an edge node; the cloud, over its own link, serves where no edge node is allowed, there or up.

    Raises:
        PlanError: when no plan at all is legal.
    """
    found = find_topologies(problem)
    return tuple(Topology(topology.tiers[:2], topology.nodes[:2]) for topology in found)


def usable_servers(servers: tuple[Topology, ...], state: SystemState) -> list[int]:
    """Indices of the servers to choose from: every edge node that is up; the cloud when none is."""
    up = [index for index, server in enumerate(servers) if is_up(state, server.nodes[1])]
    edges = [index for index in up if servers[index].head is not None]
    return edges or up


class SplitScan:
    """Prices every split point towards one server. What does not depend on the state is summed once."""

    def __init__(self, work: Workload, server: Topology) -> None:
        """Sum layer times from the front and from the back, and the live bits at every split point.

        Args:
            work: the request.
            server: the device and the server.
        """
        n, first = work.num_layers, max((work.entry, *(i + 1 for i in pinned_layers(work.problem))))
        stop = max(n, first + 1) if has_device(work.problem) else first + 1
        self.name = server.nodes[1]
        self._work = work
        self._first = first
        device_s, server_s = work.idle_s(DEVICE_NODE), work.idle_s(self.name)
        self._prefix_s = np.concatenate(([0.0], np.cumsum(device_s)))[first:stop]  # of layers [0, p)
        self._suffix_s = np.concatenate((np.cumsum(server_s[::-1])[::-1], [0.0]))[first:stop]  # of layers [p, n)
        self._live_bits = _live_bits(work)[first:stop]
        back = np.zeros(n + 1)
        for producer, bits in zip(work.output_producers, work.output_bits, strict=True):
            back[: producer + 1] += bits
        self._back_bits = back[first:stop]
        self._num_encoded = 0 if work.encoded < 0 else max(work.consumers[work.encoded][-1] + 1 - first, 0)
        self._fixed_s = work.fixed_s(self.name)

    def best(self, state: SystemState, readings: Readings, k: float, q: float) -> tuple[float, int]:
        """Find the best split point with at least one layer on the server; on a tie, more layers on the device.

        Args:
            state: gives the input's bytes.
            readings: rates and round trips.
            k: load factor of the server.
            q: queue delay of the server, seconds.

        Returns:
            Predicted seconds, and the split point p.
        """
        up_s_per_bit = 1.0 / readings.rate_bps(DEVICE_NODE, self.name)
        seconds = self._suffix_s * k
        seconds += self._live_bits * up_s_per_bit
        seconds += self._back_bits * (1.0 / readings.rate_bps(self.name, DEVICE_NODE))
        seconds += self._prefix_s
        if self._num_encoded:
            seconds[: self._num_encoded] += state.input_bytes * 8.0 * up_s_per_bit
        index = len(seconds) - 1 - int(seconds[::-1].argmin())
        extra_s = readings.round_trip_s(DEVICE_NODE, self.name) + self._fixed_s + q
        return float(seconds[index]) + extra_s, self._first + index


def _live_bits(work: Workload) -> FloatArray:
    """Bits that cross each split point, each value once, the encoded input left out; shape (num_layers + 1,)."""
    steps = np.zeros(work.num_layers + 2)
    for producer, readers, bits in zip(work.producers.tolist(), work.consumers, work.bits.tolist(), strict=True):
        steps[producer + 1] += bits
        steps[readers[-1] + 1] -= bits
    live: FloatArray = np.maximum(np.cumsum(steps)[:-1], 0.0)
    return live


LoadReader = Callable[[SystemState, Readings, str], tuple[float, float]]
"""What a rule believes of a server's load: (k, q)."""


@dataclass(slots=True)
class SplitRule:
    """Answers the split point that is predicted fastest, over every server in reach, or all on the device."""

    work: Workload
    servers: tuple[Topology, ...]
    scans: tuple[SplitScan, ...]
    last_resort: LastResort
    local_s: float  # predicted device-only seconds; inf where the device may run no layer
    estimator: Estimator
    read_load: LoadReader
    _plans: dict[tuple[int, int], Plan] = field(default_factory=dict)  # by server and split point
    is_stateful: bool = False

    @classmethod
    def build(cls, problem: PlanningProblem, estimator: Estimator, read_load: LoadReader) -> "SplitRule":
        """Build the rule.

        Args:
            problem: what it is for.
            estimator: gives rates and round trips.
            read_load: gives k and q of a server.

        Raises:
            PlanError: when no plan at all is legal.
        """
        work, servers = Workload.of(problem), find_servers(problem)
        local_s = float(work.idle_s(DEVICE_NODE).sum()) if has_device(problem) else math.inf
        scans = tuple(SplitScan(work, server) for server in servers)
        return cls(work, servers, scans, LastResort(work, servers), local_s, estimator, read_load)

    def plan(self, state: SystemState) -> Plan:
        """Scan every split point."""
        readings = self.estimator(state)
        best_s, chosen = self.local_s, (-1, self.work.num_layers)
        for index in usable_servers(self.servers, state):
            scan = self.scans[index]
            k, q = self.read_load(state, readings, scan.name)
            seconds, point = scan.best(state, readings, k, q)
            if seconds < best_s:
                best_s, chosen = seconds, (index, point)
        if not best_s < math.inf:
            return self.last_resort.plan(state)
        plan = self._plans.get(chosen)
        if plan is None:
            plan = self._plans[chosen] = self._make(*chosen)
        return plan

    def _make(self, index: int, point: int) -> Plan:
        """Make a plan once: the same split is the same object ever after (LoADPart's partition cache)."""
        num_layers = self.work.num_layers
        if index < 0:
            return Plan.split(num_layers, num_layers, num_layers)
        head = self.servers[index].head
        if head is None:
            return Plan.split(num_layers, point, point)
        return Plan.split(num_layers, point, num_layers, edge_nodes=(head,))

    def reset(self) -> None:
        """Nothing to forget: the kept plans are the same whatever was seen."""
