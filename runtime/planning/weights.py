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
from runtime.types import DEVICE_NODE, NodeProfile, Plan, SystemState, Tier, ValueSpec

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
    active: IntArray  # (num_layers - entry,) the layers from the entry on
    producers: IntArray  # (V,) -1 for what is at hand on the device
    consumers: tuple[tuple[int, ...], ...]  # (V,) ascending, at least one each
    moves: FloatArray  # (3, V) plain bits, coded bits, bytes through the codec; 0 for the encoded input
    encoded: int  # index of the encoded input, -1 when no such value moves
    output_producers: IntArray  # (O,)
    returns: FloatArray  # (3, O) the same of the outputs
    read_layers: IntArray  # (R,) the consumers, one value after another
    read_values: IntArray  # (R,) the value each of them reads
    read_offsets: IntArray  # (V,) where each value's consumers begin

    @classmethod
    def of(cls, problem: PlanningProblem) -> "Workload":
        """Collect the values that a request of this problem may move."""
        entry = problem.entry
        producers: list[int] = []
        consumers: list[tuple[int, ...]] = []
        moves: list[tuple[float, float, float]] = []
        outputs: list[tuple[int, tuple[float, float, float]]] = []
        encoded = -1
        for value in problem.graph.values:
            sizes = _sizes(value, problem.profile.lossless_ratio.get(value.name, 1.0))
            readers = tuple(c for c in value.consumers if c >= entry)
            if value.is_output and value.producer >= entry:
                outputs.append((value.producer, sizes))
            if not readers:
                continue
            if not value.is_sized:
                encoded = len(moves)
            producers.append(value.producer if value.producer >= entry else -1)
            consumers.append(readers)
            moves.append(sizes)
        lengths = [len(readers) for readers in consumers]
        return cls(
            problem=problem,
            entry=entry,
            num_layers=problem.graph.num_layers,
            active=np.arange(entry, problem.graph.num_layers),
            producers=np.array(producers, dtype=np.intp),
            consumers=tuple(consumers),
            moves=np.array(moves).T,
            encoded=encoded,
            output_producers=np.array([producer for producer, _ in outputs], dtype=np.intp),
            returns=np.array([sizes for _, sizes in outputs]).reshape(-1, 3).T,
            read_layers=np.array([c for readers in consumers for c in readers], dtype=np.intp),
            read_values=np.repeat(np.arange(len(lengths)), lengths),
            read_offsets=np.cumsum([0, *lengths[:-1]], dtype=np.intp),
        )

    def all_moves(self, state: SystemState) -> FloatArray:
        """`moves` with the bytes that this request's encoded input really has, shape (3, V)."""
        if self.encoded < 0:
            return self.moves
        moves = self.moves.copy()
        moves[:2, self.encoded] = state.input_bytes * 8.0
        return moves

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

    def make_plan(self, labels: Labels, topology: Topology) -> Plan:
        """Turn labels into a plan; one that stays on the device names no edge node."""
        tiers = tuple(map(topology.tiers.__getitem__, labels.tolist()))
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

    def total_s(self, labels: Labels, spans: tuple[Labels, Labels] | None = None) -> float:
        """Predict the latency of one assignment.

        Args:
            labels: shape (num_layers,); 0 for layers before the entry.
            spans: what `Workload.spans` makes of the labels, where that is known.
        """
        active = labels[self.work.entry :]
        total = float(self.layer_s[active, self.work.active].sum())
        made, read = self.work.spans(labels) if spans is None else spans
        last = int(active.max())
        for hop in range(last):
            total += float(self.up_s[hop] @ ((made <= hop) & (read > hop))) + self.hop_s[hop]
            total += float(self.result_s[hop] @ (labels[self.work.output_producers] > hop))
        return total + math.fsum(q for label, q in enumerate(self.queue_s) if q and (active == label).any())

    def uniform(self, label: int) -> Labels:
        """Label every layer alike, but for those that only the device may run."""
        labels = np.where(np.isinf(self.layer_s[label]) & np.isfinite(self.layer_s[0]), 0, label)
        labels[: self.work.entry] = 0
        return labels


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
        profiles = [work.problem.profile.nodes.get(name) for name in topology.nodes]
        self._hops = [*itertools.pairwise(topology.nodes)]
        self._message_s = [0.0 if far is None else 2.0 * far.fixed_s for far in profiles[1:]]  # out and back
        ends = [*itertools.pairwise(profiles)]
        self._up_codec_s = np.array([codec_s_per_byte(near, far) for near, far in ends])
        self._down_codec_s = np.array([codec_s_per_byte(far, near) for near, far in ends])

    def weigh(
        self,
        state: SystemState,
        readings: Readings,
        *,
        has_load: bool = True,
        has_queues: bool = True,
        is_relay: bool = False,
    ) -> Costs:
        """Price every layer on every tier and every value on every hop.

        Args:
            state: gives who is up, the input's bytes and the backlogs.
            readings: rates, round trips, k and q.
            has_load: False takes every node as idle (k = 1).
            has_queues: False leaves out queue delays and backlogs.
            is_relay: True leaves out the middle tier, which then only passes on what crosses, as it came.
        """
        nodes = self.topology.nodes
        up_s_per_bit = np.array([1.0 / readings.rate_bps(a, b) for a, b in self._hops])
        down_s_per_bit = np.array([1.0 / readings.rate_bps(b, a) for a, b in self._hops])
        hop_s = [
            (readings.round_trip_s(a, b) + readings.round_trip_s(b, a)) / 2 + message_s
            for (a, b), message_s in zip(self._hops, self._message_s, strict=True)
        ]
        queue_s = [0.0] * len(nodes)
        if has_queues:
            queue_s = [state.device_backlog_s, *(readings.q(name) for name in nodes[1:])]
            backlogs = [state.uplink_backlog_bytes, *(_backlog_bytes(state, a, b) for a, b in self._hops[1:])]
            hop_s = [s + n * 8.0 * float(u) for s, n, u in zip(hop_s, backlogs, up_s_per_bit, strict=True)]
        tiers, layer_s = self.topology.tiers, self._layer_s(state, readings, has_load=has_load)
        up_codec_s, down_codec_s = self._up_codec_s, self._down_codec_s
        if is_relay:
            tiers, layer_s, queue_s = (tiers[0], tiers[-1]), layer_s[[0, -1]], [queue_s[0], queue_s[-1]]
            up_s_per_bit, down_s_per_bit, hop_s = up_s_per_bit.sum()[None], down_s_per_bit.sum()[None], [sum(hop_s)]
            up_codec_s, down_codec_s = up_codec_s[:1], down_codec_s[:1]
        return Costs(
            self.work,
            tiers,
            layer_s,
            _transfer_s(self.work.all_moves(state), up_s_per_bit, up_codec_s),
            _transfer_s(self.work.returns, down_s_per_bit, down_codec_s),
            tuple(hop_s),
            tuple(queue_s),
        )

    def _layer_s(self, state: SystemState, readings: Readings, *, has_load: bool) -> FloatArray:
        nodes = self.topology.nodes
        k = [1.0, *(readings.k(name) if has_load else 1.0 for name in nodes[1:])]
        factors = [factor if is_up(state, name) else math.inf for factor, name in zip(k, nodes, strict=True)]
        layer_s: FloatArray
        if math.inf not in factors:  # most often
            layer_s = self._idle_s * np.array(factors)[:, None]
            return layer_s
        with np.errstate(invalid="ignore"):  # 0 * inf on layers that take no time
            layer_s = self._idle_s * np.array(factors)[:, None]
        layer_s[np.isnan(layer_s)] = np.inf
        layer_s[:, : self.work.entry] = 0.0
        return layer_s


def _sizes(value: ValueSpec, ratio: float) -> tuple[float, float, float]:
    """Plain bits, coded bits, bytes through the codec on each side."""
    if not value.is_sized:
        return 0.0, 0.0, 0.0
    bits = value.tensor.nbytes * 8.0
    return (bits, bits / ratio, bits / 8.0) if ratio > 1.0 else (bits, bits, 0.0)


def codec_s_per_byte(source: NodeProfile | None, target: NodeProfile | None) -> float:
    """Seconds per byte for coding on one side and decoding on the other."""
    encode = 0.0 if source is None else 1.0 / source.encode_bytes_per_s
    return encode + (0.0 if target is None else 1.0 / target.decode_bytes_per_s)


def _transfer_s(sizes: FloatArray, s_per_bit: FloatArray, codec_s: FloatArray) -> FloatArray:
    """Seconds of every value over every hop, plain or coded as is faster, shape (hops, values)."""
    plain_bits, coded_bits, codec_bytes = sizes
    coded_s = s_per_bit[:, None] * coded_bits + codec_s[:, None] * codec_bytes
    seconds: FloatArray = np.minimum(s_per_bit[:, None] * plain_bits, coded_s)
    return seconds


def _backlog_bytes(state: SystemState, source: str, target: str) -> int:
    link = state.link(source, target)
    return 0 if link is None else link.backlog_bytes


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
