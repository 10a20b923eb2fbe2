"""Linear splits: layers `[0, p)` on the device and the rest on one server, every p priced in one O(n) scan."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.planning.estimators import Estimator, Readings
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import CutTables
from runtime.planning.weights import (
    LastResort,
    Topology,
    Workload,
    codec_s_per_byte,
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
        tables, profiles = CutTables.of(work.problem, "auto"), work.problem.profile.nodes
        device, far = profiles.get(DEVICE_NODE), profiles.get(server.nodes[1])
        device_s, server_s = work.idle_s(DEVICE_NODE), work.idle_s(server.nodes[1])
        self.name = server.nodes[1]
        self._first = first
        self._prefix_s = np.concatenate(([0.0], np.cumsum(device_s)))[first:stop]  # of layers [0, p)
        self._suffix_s = np.concatenate((np.cumsum(server_s[::-1])[::-1], [0.0]))[first:stop]  # of layers [p, n)
        self._up_bits, self._up_coded_bits = tables.up[:2, first:stop] * 8.0
        self._up_codec_s = tables.up[3, first:stop] * codec_s_per_byte(device, far)
        self._back_bits, self._back_coded_bits = tables.down[:2, first:stop] * 8.0
        self._back_codec_s = tables.down[3, first:stop] * codec_s_per_byte(far, device)
        self._num_encoded = int(np.count_nonzero(tables.up[4, first:stop]))
        self._message_s = 0.0 if far is None else 2.0 * far.fixed_s  # out and back

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
        down_s_per_bit = 1.0 / readings.rate_bps(self.name, DEVICE_NODE)
        seconds = np.minimum(self._up_bits * up_s_per_bit, self._up_coded_bits * up_s_per_bit + self._up_codec_s)
        seconds += np.minimum(
            self._back_bits * down_s_per_bit, self._back_coded_bits * down_s_per_bit + self._back_codec_s
        )
        seconds += self._suffix_s * k
        seconds += self._prefix_s
        if self._num_encoded:
            seconds[: self._num_encoded] += state.input_bytes * 8.0 * up_s_per_bit
        index = len(seconds) - 1 - int(seconds[::-1].argmin())
        out_s, back_s = readings.round_trip_s(DEVICE_NODE, self.name), readings.round_trip_s(self.name, DEVICE_NODE)
        return float(seconds[index]) + (out_s + back_s) / 2 + self._message_s + q, self._first + index


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
