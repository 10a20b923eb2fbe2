"""The arithmetic the published rules share: seconds per layer and tier, seconds per value and hop.

    total(labels) = sum of layer seconds, idle seconds times k
                  + per hop that is crossed: values that cross, each once; round trip and messages; result on its way back
                  + queue delay of every tier that runs a layer, once

A label is an index into the tiers of one topology, 0 being the device. What is not allowed costs infinity.
"""

import itertools
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.errors import PlanError
from runtime.planning.arrays import FloatArray, IntArray
from runtime.planning.estimators import Readings
from runtime.planning.problem import PlanningProblem, private_layers
from runtime.types import DEVICE_NODE, Plan, SystemState, Tier

Labels: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes that a request may visit, outwards from the device; with a head everything goes through it."""

    tiers: tuple[Tier, ...]  # (num_tiers,), the device first
    nodes: tuple[str, ...]  # (num_tiers,)

    @property
    def head(self) -> str | None:
        """The edge node, if there is one."""
        return self.nodes[1] if self.tiers[1] is Tier.EDGE else None

    def is_usable(self, state: SystemState) -> bool:
        """Whether the first node after the device is up: without it nothing beyond is reached."""
        return is_up(state, self.nodes[1])


def is_up(state: SystemState, name: str) -> bool:
    """Whether a node is known and up; the device always is."""
    if name == DEVICE_NODE:
        return True
    node = state.node(name)
    return node is not None and node.is_up


def find_topologies(problem: PlanningProblem) -> tuple[Topology, ...]:
    """List what a problem allows: one topology per edge node, in the deployment's order, then device - cloud.

    Empty when only the device is allowed or there.

    Raises:
        PlanError: when no plan at all is legal.
    """
    allowed = problem.constraints.allowed_tiers
    cloud = problem.deployment.cloud if Tier.CLOUD in allowed else None
    edges = problem.deployment.edges if Tier.EDGE in allowed else ()
    found = []
    for edge in edges:
        tiers, nodes = (Tier.DEVICE, Tier.EDGE), (DEVICE_NODE, edge.name)
        beyond = () if cloud is None else (cloud.name,)
        found.append(Topology((*tiers, *(Tier.CLOUD,) * len(beyond)), (*nodes, *beyond)))
    if cloud is not None:
        found.append(Topology((Tier.DEVICE, Tier.CLOUD), (DEVICE_NODE, cloud.name)))
    if not has_device(problem):
        if not found:
            raise PlanError(
                "no plan is legal: the device may run no layer, and no edge or cloud node that the constraints allow "
                "is in the deployment; add a node, or allow the device"
            )
        if pinned_layers(problem):
            raise PlanError(
                "no plan is legal: private_input keeps the first layers on the device, which may run none "
                "(allowed_tiers, device_has_model); allow the device, or drop private_input"
            )
    return tuple(found)


def has_device(problem: PlanningProblem) -> bool:
    """Whether the device may run layers."""
    return problem.constraints.device_has_model and Tier.DEVICE in problem.constraints.allowed_tiers


def pinned_layers(problem: PlanningProblem) -> tuple[int, ...]:
    """Layers from the entry on that must stay on the device: the private ones, and those they depend on."""
    if not problem.constraints.private_input:
        return ()
    pinned = set(private_layers(problem.graph))
    for value in sorted(problem.graph.values, key=lambda value: value.producer, reverse=True):
        if pinned.intersection(value.consumers):
            pinned.add(value.producer)
    return tuple(sorted(i for i in pinned if i >= problem.entry))


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What a request of one problem moves, as arrays; nothing here depends on the state.

    V: values, R: pairs of a value and a layer that reads it, O: outputs.
    """

    problem: PlanningProblem
    entry: int
    num_layers: int
    producers: IntArray  # (V,) -1 for what is at hand on the device
    consumers: tuple[tuple[int, ...], ...]  # (V,) ascending, at least one each
    bits: FloatArray  # (V,) expected on the wire; 0 for the encoded input, whose size the request brings
    encoded: int  # index of the encoded input, -1 when no such value moves
    output_producers: IntArray  # (O,)
    output_bits: FloatArray  # (O,)
    read_layers: IntArray  # (R,) the consumers, one value after another
    read_values: IntArray  # (R,) the value each of them reads
    read_offsets: IntArray  # (V,) where each value's consumers begin

    @classmethod
    def of(cls, problem: PlanningProblem) -> "Workload":
        """Collect the values that a request of this problem may move."""
        entry, ratios = problem.entry, problem.profile.lossless_ratio
        producers: list[int] = []
        consumers: list[tuple[int, ...]] = []
        bits: list[float] = []
        outputs: list[tuple[int, float]] = []
        encoded = -1
        for value in problem.graph.values:
            wire_bits = value.tensor.nbytes * 8.0 / max(ratios.get(value.name, 1.0), 1.0)
            readers = tuple(c for c in value.consumers if c >= entry)
            if value.is_output and value.producer >= entry:
                outputs.append((value.producer, wire_bits))
            if not readers:
                continue
            if not value.is_sized:
                encoded, wire_bits = len(bits), 0.0
            producers.append(value.producer if value.producer >= entry else -1)
            consumers.append(readers)
            bits.append(wire_bits)
        lengths = [len(readers) for readers in consumers]
        return cls(
            problem=problem,
            entry=entry,
            num_layers=problem.graph.num_layers,
            producers=np.array(producers, dtype=np.intp),
            consumers=tuple(consumers),
            bits=np.array(bits),
            encoded=encoded,
            output_producers=np.array([producer for producer, _ in outputs], dtype=np.intp),
            output_bits=np.array([wire_bits for _, wire_bits in outputs]),
            read_layers=np.array([c for readers in consumers for c in readers], dtype=np.intp),
            read_values=np.repeat(np.arange(len(lengths)), lengths),
            read_offsets=np.cumsum([0, *lengths[:-1]], dtype=np.intp),
        )

    def moved_bits(self, state: SystemState) -> FloatArray:
        """Expected bits of every value for this request, shape (V,)."""
        if self.encoded < 0:
            return self.bits
        bits = self.bits.copy()
        bits[self.encoded] = state.input_bytes * 8.0
        return bits

    def spans(self, labels: Labels) -> tuple[Labels, Labels]:
        """Find for every value the label where it is made and the last one where it is read, each of shape (V,)."""
        made = np.where(self.producers < 0, 0, labels[self.producers])
        return made, np.maximum.reduceat(labels[self.read_layers], self.read_offsets)

    def idle_s(self, node: str) -> FloatArray:
        """Idle seconds per layer on one node, 0 before the entry, infinite where the profile does not know them."""
        profile = self.problem.profile.nodes.get(node)
        if profile is None:
            seconds = np.full(self.num_layers, np.inf)
        else:
            seconds = np.array(profile.layer_s, dtype=np.float64)
            seconds[np.isnan(seconds)] = np.inf
        seconds[: self.entry] = 0.0
        return seconds

    def fixed_s(self, node: str) -> float:
        """Fixed seconds per message on one node."""
        profile = self.problem.profile.nodes.get(node)
        return 0.0 if profile is None else profile.fixed_s

    def make_plan(self, labels: Labels, topology: Topology) -> Plan:
        """Turn labels into a plan; one that stays on the device names no edge node."""
        tiers = tuple(topology.tiers[label] for label in labels.tolist())
        is_local = not labels.any()
        return Plan(tiers, () if is_local or topology.head is None else (topology.head,))


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """What one topology costs in one state. T: tiers, V: values, O: outputs."""

    work: Workload
    tiers: tuple[Tier, ...]  # (T,) what the labels mean
    layer_s: FloatArray  # (T, num_layers) idle seconds times k; inf where a layer may not run
    up_s: FloatArray  # (T - 1, V) seconds of a value outwards over each hop
    result_s: FloatArray  # (T - 1, O) seconds of an output back over each hop
    hop_s: tuple[float, ...]  # (T - 1,) what crossing a hop costs beside: round trip, messages, uplink backlog
    queue_s: tuple[float, ...]  # (T,) queue delay where a tier runs any layer

    def total_s(self, labels: Labels) -> float:
        """Predict the latency of one assignment, shape (num_layers,); layers before the entry must be labelled 0."""
        active = labels[self.work.entry :]
        total = float(self.layer_s[active, np.arange(self.work.entry, self.work.num_layers)].sum())
        made, read = self.work.spans(labels)
        last = int(active.max())
        for hop in range(last):
            total += float(self.up_s[hop][(made <= hop) & (read > hop)].sum()) + self.hop_s[hop]
            total += float(self.result_s[hop][labels[self.work.output_producers] > hop].sum())
        return total + math.fsum(self.queue_s[label] for label in set(active.tolist()))

    def uniform(self, label: int) -> Labels:
        """Label every layer alike, but for those that only the device may run."""
        labels = np.where(np.isinf(self.layer_s[label]) & np.isfinite(self.layer_s[0]), 0, label)
        labels[: self.work.entry] = 0
        return labels

    def without_middle(self) -> "Costs":
        """Leave out the tier between the device and the last one: it only passes on what crosses."""
        return Costs(
            self.work,
            (self.tiers[0], self.tiers[-1]),
            self.layer_s[[0, -1]],
            self.up_s.sum(axis=0, keepdims=True),
            self.result_s.sum(axis=0, keepdims=True),
            (sum(self.hop_s),),
            (self.queue_s[0], self.queue_s[-1]),
        )


class Weigher:
    """Gives the costs of one topology; keeps what does not depend on the state."""

    def __init__(self, work: Workload, topology: Topology) -> None:
        """Collect idle times, and mark what may not run where.

        Args:
            work: the request.
            topology: where it may go.
        """
        self.work = work
        self.topology = topology
        self._idle_s = np.stack([work.idle_s(name) for name in topology.nodes])
        if not has_device(work.problem):
            self._idle_s[0, work.entry :] = np.inf
        self._idle_s[1:, list(pinned_layers(work.problem))] = np.inf
        self._fixed_s = [work.fixed_s(name) for name in topology.nodes]

    def weigh(self, state: SystemState, readings: Readings, *, has_load: bool = True, has_queues: bool = True) -> Costs:
        """Price every layer on every tier and every value on every hop.

        Args:
            state: gives who is up, the input's bytes and the backlogs.
            readings: rates, round trips, k and q.
            has_load: False takes every node as idle (k = 1).
            has_queues: False leaves out queue delays and backlogs.
        """
        nodes = self.topology.nodes
        k = [1.0, *(readings.k(name) if has_load else 1.0 for name in nodes[1:])]
        factors = [factor if is_up(state, name) else math.inf for factor, name in zip(k, nodes, strict=True)]
        factors = [factor if factor >= 1.0 else 1.0 for factor in factors]  # NaN: not known, taken as idle
        with np.errstate(invalid="ignore"):  # 0 * inf, before the entry and on free layers
            layer_s = self._idle_s * np.array(factors)[:, None]
        layer_s[np.isnan(layer_s)] = np.inf
        layer_s[:, : self.work.entry] = 0.0
        hops = [*itertools.pairwise(nodes)]
        up_s_per_bit = np.array([1.0 / readings.rate_bps(a, b) for a, b in hops])
        down_s_per_bit = np.array([1.0 / readings.rate_bps(b, a) for a, b in hops])
        hop_s = [readings.round_trip_s(a, b) + self._fixed_s[i + 1] for i, (a, b) in enumerate(hops)]
        queue_s = [0.0] * len(nodes)
        if has_queues:
            queue_s = [state.device_backlog_s, *(readings.q(name) for name in nodes[1:])]
            hop_s[0] += state.uplink_backlog_bytes * 8.0 * float(up_s_per_bit[0])
        return Costs(
            self.work,
            self.topology.tiers,
            layer_s,
            up_s_per_bit[:, None] * self.work.moved_bits(state),
            down_s_per_bit[:, None] * self.work.output_bits,
            tuple(0.0 if math.isnan(s) else s for s in hop_s),
            tuple(0.0 if math.isnan(s) else s for s in queue_s),
        )


class LastResort:
    """What a rule answers when it can predict nothing: device-only where that is legal, else a tier that is up."""

    def __init__(self, work: Workload, topologies: tuple[Topology, ...]) -> None:
        """Prepare the plans.

        Args:
            work: the request.
            topologies: where it may go, best first.
        """
        self._topologies = topologies
        self._plans = {}
        for topology in topologies:
            labels = np.ones(work.num_layers, dtype=np.intp)
            labels[: work.entry] = 0
            self._plans[topology] = work.make_plan(labels, topology)
        self._local = Plan((Tier.DEVICE,) * work.num_layers) if has_device(work.problem) else None

    def plan(self, state: SystemState) -> Plan:
        """Answer a legal plan."""
        if self._local is not None:
            return self._local
        usable = (topology for topology in self._topologies if topology.is_usable(state))
        return self._plans[next(usable, self._topologies[0])]
