"""HPA's labels: every layer of one topology on a tier, by a walk over graph layers, and their local update.

References:
    As in `runtime.planning.policies.d3`.
"""

import heapq
import math

import numpy as np

from runtime.planning.arrays import FloatArray
from runtime.planning.estimators import Readings
from runtime.planning.weights import Weigher, Workload
from runtime.types import Plan, SystemState

_EFFORT = 4
"""A local update that labels each layer more often than this on average gives way to a full run. Guess; rarely met."""

_FORBIDDEN_S = 1e4
"""What a layer counts on a tier where it may not run, in the look-ahead: far above any real layer, and small enough that
sums stay exact to a nanosecond."""


class LabelGraph:
    """What HPA needs of a workload, as plain lists; the same for every topology."""

    def __init__(self, work: Workload) -> None:
        n = work.num_layers
        self.work = work
        self.inputs: list[list[int]] = [[] for _ in range(n)]  # indices of values
        self.readers = [list(readers) for readers in work.consumers]
        self.producers: list[int] = work.producers.tolist()
        self.followers: list[list[int]] = [[] for _ in range(n)]
        for value, readers in enumerate(self.readers):
            for j in readers:
                self.inputs[j].append(value)
            if self.producers[value] >= 0:
                self.followers[self.producers[value]] += readers
        self.sources = [sorted({self.producers[v] for v in values} - {-1}) for values in self.inputs]
        distance = [0] * n
        for j in range(work.entry, n):
            distance[j] = 1 + max((distance[i] for i in self.sources[j]), default=0)
        self.order = sorted(range(work.entry, n), key=lambda j: (distance[j], j))
        self.rank = [0] * n
        for rank, j in enumerate(self.order):
            self.rank[j] = rank
        self.siblings = [self._find_siblings(j) for j in range(n)]
        self.depth = np.maximum(np.array(distance, dtype=np.intp) - 1, 0)  # graph layer of every layer, from 0
        self.num_depths = int(self.depth.max()) + 1
        self.width = np.bincount(self.depth[work.entry :], minlength=self.num_depths)
        self._made_at = np.where(work.producers < 0, -1, self.depth[work.producers])
        self._last_read_at = np.maximum.reduceat(self.depth[work.read_layers], work.read_offsets)
        pairs = sorted({(value, int(self.depth[j])) for value, readers in enumerate(self.readers) for j in readers})
        self._read_values = np.array([value for value, _ in pairs], dtype=np.intp)
        self._read_depths = np.array([depth for _, depth in pairs], dtype=np.intp)

    def _find_siblings(self, j: int) -> list[int]:
        """SIS: layers whose inputs all are inputs of layer j."""
        own = set(self.inputs[j])
        near = {other for value in own for other in self.readers[value]} - {j}
        return sorted(other for other in near if own.issuperset(self.inputs[other]))

    def crossing_s(self, up_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Price every boundary between graph layers on one hop.

        Returns:
            Seconds of all values that are live in front of each graph layer, and of those among them that it does not
            read itself; each of shape (num_depths,).
        """
        num = self.num_depths
        begins = np.bincount(self._made_at + 1, up_s, minlength=num + 1)
        ends = np.bincount(self._last_read_at + 1, up_s, minlength=num + 1)
        live = np.cumsum(begins - ends)[:num]
        read = np.bincount(self._read_depths, up_s[self._read_values], minlength=num)
        return live, np.maximum(live - read, 0.0)


class Partition:
    """The labels of one topology, always in three tiers: one that the topology lacks costs infinity."""

    def __init__(self, graph: LabelGraph, weigher: Weigher) -> None:
        self.topology = weigher.topology
        self.num_touched = 0  # layers labelled by the last run or update
        self.predicted_s = math.inf  # of the labels, under the costs they were made with
        self._weigher = weigher
        self._graph = graph
        self._tiers = np.array(self.topology.tiers)
        self._labels = [0] * graph.work.num_layers
        self._take_labels()

    def weigh(self, state: SystemState, readings: Readings) -> None:
        """Take in new costs; the labels stay."""
        work = self._graph.work
        costs = self._weigher.weigh(state, readings, has_queues=False)
        layer_s = np.full((3, work.num_layers), np.inf)
        layer_s[self._tiers] = costs.layer_s
        up_s = np.zeros((2, len(work.producers)))
        hop_s = [0.0, 0.0]
        for hop, far in enumerate(costs.tiers[1:]):  # straight to the cloud: all is paid on the first hop
            up_s[hop] = costs.up_s[hop]
            hop_s[hop] = costs.hop_s[hop]
            for producer, back_s in zip(work.output_producers, costs.result_s[hop], strict=True):
                layer_s[far:, producer] += back_s
        self._costs, self._layer_s, self._up_s = costs, layer_s, up_s
        crossings = [self._graph.crossing_s(row) for row in up_s]
        self._ahead_s = self._look_ahead([live + once for (live, _), once in zip(crossings, hop_s, strict=True)])
        beside = [(beside + once) / self._graph.width for (_, beside), once in zip(crossings, hop_s, strict=True)]
        self._beside_s = np.array(beside)[:, self._graph.depth]

    def _look_ahead(self, crossing_s: list[FloatArray]) -> FloatArray:
        """Least seconds from each layer's graph layer to the end, by tier, if graph layers stay together.

        Tier by tier inwards: stay to the end, or up to the boundary where going over is cheapest. A layer's share is
        one part in the width of its graph layer.

        Args:
            crossing_s: seconds of moving over each hop in front of each graph layer.

        Returns:
            Seconds of shape (3, num_layers).
        """
        depth, num_depths = self._graph.depth, self._graph.num_depths
        finite_s = np.minimum(self._layer_s, _FORBIDDEN_S)  # sums of infinities cannot be subtracted
        ahead = np.zeros((3, num_depths))
        beyond = None
        for tier in (2, 1, 0):
            by_depth = np.bincount(depth, finite_s[tier], minlength=num_depths)
            to_end = np.cumsum(by_depth[::-1])[::-1]  # seconds from each graph layer to the end on this tier
            if beyond is None:
                least = to_end
            else:
                switch = crossing_s[tier] + beyond - to_end  # in front of each graph layer, against staying
                least = to_end + np.minimum(np.minimum.accumulate(switch[::-1])[::-1], 0.0)
            ahead[tier, :-1] = least[1:]
            beyond = least
        shares: FloatArray = (ahead / self._graph.width)[:, depth]
        return shares

    def run(self) -> None:
        """HPA: label every layer, in the order of the longest distance from the input."""
        entry, n = self._graph.work.entry, self._graph.work.num_layers
        self._take_lists()
        self._labels = [0] * entry + [-1] * (n - entry)
        for j in self._graph.order:
            self._labels[j] = self._best(j)
            self._move_siblings(j)
        self.num_touched = n - entry
        self._take_labels()
        self.predicted_s = self._costs.total_s(self._own)

    def update(self) -> None:
        """Label again what the new costs make wrong, and what follows from it."""
        graph = self._graph
        self.num_touched = 0
        queue = [graph.rank[j] for j in self._find_wrong()]
        if not queue:
            self.predicted_s = self._costs.total_s(self._own)
            return
        self._take_lists()
        heapq.heapify(queue)
        limit = _EFFORT * len(graph.order)
        while queue:
            rank = heapq.heappop(queue)
            if queue and queue[0] == rank:
                continue
            j = graph.order[rank]
            self.num_touched += 1
            if self.num_touched > limit:
                self.run()
                return
            best = self._best(j)
            if best != self._labels[j]:
                self._labels[j] = best
                moved = [j, *self._move_siblings(j)]
                for follower in (follower for i in moved for follower in graph.followers[i]):
                    heapq.heappush(queue, graph.rank[follower])
        self._take_labels()
        self.predicted_s = self._costs.total_s(self._own)

    def _take_lists(self) -> None:
        """Copy what the walk reads layer by layer: lists are several times faster there than arrays."""
        self._seconds: list[list[float]] = self._layer_s.tolist()
        self._up: list[list[float]] = self._up_s.tolist()
        self._ahead: list[list[float]] = self._ahead_s.tolist()
        self._beside: list[list[float]] = self._beside_s.tolist()

    def _take_labels(self) -> None:
        self._array = np.array(self._labels, dtype=np.intp)
        self._own = np.searchsorted(self._tiers, self._array).astype(np.intp)  # as the topology counts its tiers
        self._plan: Plan | None = None

    def _best(self, j: int) -> int:
        """Cheapest tier of one layer, given the labels before it; on a tie, the one nearer to the device."""
        graph, labels = self._graph, self._labels
        low = 0
        for i in graph.sources[j]:
            low = max(low, labels[i])
        if low == 2:
            return 2
        to_edge_s = self._beside[0][j] if low == 0 else 0.0
        to_cloud_s = self._beside[1][j]
        for value in graph.inputs[j]:
            there = self._reach(value, j)
            if there == 0:
                to_edge_s += self._up[0][value]
            if there <= 1:
                to_cloud_s += self._up[1][value]
        seconds, ahead = self._seconds, self._ahead
        best, least = low, seconds[low][j] + ahead[low][j] + (to_edge_s if low else 0.0)
        if low == 0:
            edge = seconds[1][j] + to_edge_s + ahead[1][j]
            if edge < least:
                best, least = 1, edge
        return 2 if seconds[2][j] + to_edge_s + to_cloud_s + ahead[2][j] < least else best

    def _reach(self, value: int, j: int) -> int:
        """Last tier that a value has been brought to, layer j apart."""
        labels, readers, producer = self._labels, self._graph.readers[value], self._graph.producers[value]
        there = labels[producer] if producer >= 0 else 0
        if len(readers) > 1:
            for other in readers:
                if other != j and labels[other] > there:
                    there = labels[other]
        return there

    def _move_siblings(self, j: int) -> list[int]:
        """SIS: layers that find their inputs on layer j's tier follow it there where they are faster."""
        labels, tier, moved = self._labels, self._labels[j], []
        for i in self._graph.siblings[j]:
            if 0 <= labels[i] < tier and self._seconds[tier][i] < self._seconds[labels[i]][i]:
                after = [labels[k] for k in self._graph.followers[i]]
                if all(label < 0 or label >= tier for label in after):
                    labels[i] = tier
                    moved.append(i)
        return moved

    def _find_wrong(self) -> list[int]:
        """Layers whose cheapest tier is another than their label: `_best` for all at once."""
        work, labels = self._graph.work, self._array
        layers, values, n = work.read_layers, work.read_values, work.num_layers
        made, _ = work.spans(labels)
        made_of = made[values]
        low = np.zeros(n, dtype=np.intp)
        np.maximum.at(low, layers, made_of)
        seconds = self._layer_s + self._ahead_s
        for hop in range(2):
            is_beyond = labels[layers] > hop
            others = np.bincount(values, is_beyond, minlength=len(made))[values] - is_beyond
            pays = (made_of <= hop) & (others == 0)
            moved_s = np.bincount(layers, self._up_s[hop][values] * pays, minlength=n)
            seconds[hop + 1 :] += moved_s + self._beside_s[hop] * (low <= hop)
        seconds[np.arange(3)[:, None] < low] = np.inf
        wrong = seconds.argmin(axis=0) != labels
        wrong[: work.entry] = False
        found: list[int] = np.flatnonzero(wrong).tolist()
        return found

    def price(self, state: SystemState, readings: Readings) -> float:
        """Predict the seconds of the labels in another state."""
        return self._weigher.weigh(state, readings, has_queues=False).total_s(self._own)

    def make_plan(self) -> Plan:
        """Turn the labels into a plan, once."""
        if self._plan is None:
            self._plan = self._graph.work.make_plan(self._own, self.topology)
        return self._plan
