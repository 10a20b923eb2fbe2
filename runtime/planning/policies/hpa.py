"""HPA's labels: every layer of one topology on a tier, by a walk over graph layers, and their local update.

References:
    As in `runtime.planning.policies.d3`.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np

from runtime.planning.arrays import FloatArray, IntArray
from runtime.planning.estimators import Readings
from runtime.planning.weights import Weigher, Workload
from runtime.types import Plan, SystemState

_EFFORT = 4
"""A local update that labels each layer more often than this on average gives way to a full run. Guess; rarely met."""

_FORBIDDEN_S = 1e4
"""What a layer counts on a tier where it may not run, in the look-ahead: far above any real layer, and small enough that
sums stay exact to a nanosecond."""

_TIERS = np.arange(3)[:, None]
_HOPS = np.arange(2)[:, None]


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
        made_at = np.where(work.producers < 0, -1, self.depth[work.producers])
        last_read_at = np.maximum.reduceat(self.depth[work.read_layers], work.read_offsets)
        pairs = sorted({(value, int(self.depth[j])) for value, readers in enumerate(self.readers) for j in readers})
        self._read_values = np.array([value for value, _ in pairs], dtype=np.intp)
        # Where the two hops' and the three tiers' sums lie when one call makes them all.
        self._edges_at = _repeat(np.concatenate([made_at, last_read_at]) + 1, 2, self.num_depths + 1)
        self._reads_at = _repeat(np.array([depth for _, depth in pairs], dtype=np.intp), 2, self.num_depths)
        self._layers_at = _repeat(self.depth, 3, self.num_depths)
        order = np.argsort(work.read_layers, kind="stable")  # pairs of a value and its reader, by reader
        self.pair_layers, self.pair_values = work.read_layers[order], work.read_values[order]
        self.pair_layers_at = _repeat(self.pair_layers, 2, n)
        self.pair_values_at = _repeat(self.pair_values, 2, len(work.producers))
        self.readers_in_order, self.pair_offsets = np.unique(self.pair_layers, return_index=True)

    def _find_siblings(self, j: int) -> list[int]:
        """SIS: layers whose inputs all are inputs of layer j."""
        own = set(self.inputs[j])
        near = {other for value in own for other in self.readers[value]} - {j}
        return sorted(other for other in near if own.issuperset(self.inputs[other]))

    def crossing_s(self, up_s: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Price every boundary between graph layers on both hops.

        Args:
            up_s: seconds of every value over each hop, shape (2, num_values).

        Returns:
            Seconds of all values that are live in front of each graph layer, and of those among them that it does not
            read itself; each of shape (2, num_depths).
        """
        num = self.num_depths
        edges = np.concatenate([up_s, -up_s], axis=1).ravel()
        steps = np.bincount(self._edges_at, edges, minlength=2 * (num + 1)).reshape(2, -1)
        live: FloatArray = steps.cumsum(axis=1)[:, :num]
        read = np.bincount(self._reads_at, up_s.take(self._read_values, axis=1).ravel(), minlength=2 * num)
        return live, np.maximum(live - read.reshape(2, -1), 0.0)

    def by_depth(self, seconds: FloatArray) -> FloatArray:
        """Sum over the layers of each graph layer, shape (3, num_layers) to (3, num_depths)."""
        sums = np.bincount(self._layers_at, seconds.ravel(), minlength=3 * self.num_depths)
        by_depth: FloatArray = sums.astype(np.float64, copy=False)  # as it is already; the annotation says otherwise
        return by_depth.reshape(3, -1)

    def share(self, by_depth: FloatArray) -> FloatArray:
        """Give every layer one part in the width of its graph layer, shape (any, num_depths) to (any, num_layers)."""
        shares: FloatArray = (by_depth / self.width).take(self.depth, axis=1)
        return shares


def _repeat(places: IntArray, times: int, apart: int) -> IntArray:
    """The same places in each of `times` rows that are `apart` long."""
    repeated: IntArray = (places + apart * np.arange(times)[:, None]).ravel()
    return repeated


class Partition:
    """The labels of one topology, always in three tiers: one that the topology lacks costs infinity."""

    def __init__(self, graph: LabelGraph, weigher: Weigher) -> None:
        self.topology = weigher.topology
        self.num_touched = 0  # layers labelled by the last run or update
        self.predicted_s = math.inf  # of the labels, under the costs they were made with
        self._weigher = weigher
        self._graph = graph
        self._tiers = np.array(self.topology.tiers)
        self._own_of = np.searchsorted(self._tiers, np.arange(3)).astype(np.intp)
        self._no_s = np.full((3, graph.work.num_layers), np.inf)
        self._labels = [0] * graph.work.num_layers
        self._take_labels()

    def weigh(self, state: SystemState, readings: Readings) -> None:
        """Take in new costs; the labels stay."""
        work = self._graph.work
        costs = self._weigher.weigh(state, readings, has_queues=False)
        layer_s = self._no_s.copy()
        layer_s[self._tiers] = costs.layer_s
        up_s = np.zeros((2, len(work.producers)))
        hop_s = np.zeros((2, 1))
        for hop, far in enumerate(costs.tiers[1:]):  # straight to the cloud: all is paid on the first hop
            up_s[hop] = costs.up_s[hop]
            hop_s[hop] = costs.hop_s[hop]
            for producer, back_s in zip(work.output_producers, costs.result_s[hop], strict=True):
                layer_s[far:, producer] += back_s
        live, beside = self._graph.crossing_s(up_s)
        ahead = self._look_ahead(layer_s, live + hop_s)
        shares = self._graph.share(np.concatenate([ahead, beside + hop_s]))
        self._costs, self._layer_s, self._up_s = costs, layer_s, up_s
        self._whole_s, self._beside_s = layer_s + shares[:3], shares[3:]

    def _look_ahead(self, layer_s: FloatArray, crossing_s: FloatArray) -> FloatArray:
        """Least seconds from behind each graph layer to the end, by tier, if graph layers stay together.

        Tier by tier inwards: stay to the end, or up to the boundary where going over is cheapest.

        Args:
            layer_s: seconds of every layer, shape (3, num_layers).
            crossing_s: seconds of moving over each hop in front of each graph layer, shape (2, num_depths).

        Returns:
            Seconds of shape (3, num_depths).
        """
        finite_s = np.minimum(layer_s, _FORBIDDEN_S)  # sums of infinities cannot be subtracted
        # From each graph layer to the end on one tier. Backwards, as all below: the end comes first.
        to_end = self._graph.by_depth(finite_s)[:, ::-1].cumsum(axis=1)
        crossing_s = crossing_s[:, ::-1]
        ahead = np.zeros(to_end.shape)
        least = to_end[2]
        ahead[2, 1:] = least[:-1]
        for tier in (1, 0):
            switch = crossing_s[tier] + least - to_end[tier]  # in front of each graph layer, against staying
            least = to_end[tier] + np.minimum(np.minimum.accumulate(switch), 0.0)
            ahead[tier, 1:] = least[:-1]
        return ahead[:, ::-1]

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
        self.predicted_s = self._costs.total_s(self._own, self._own_spans)

    def update(self) -> None:
        """Label again what the new costs make wrong, and what follows from it."""
        graph = self._graph
        self.num_touched = 0
        has_moved = False
        queue = [graph.rank[j] for j in self._find_wrong()]
        if queue:
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
                has_moved = True
                self._labels[j] = best
                moved = [j, *self._move_siblings(j)]
                for follower in (follower for i in moved for follower in graph.followers[i]):
                    heapq.heappush(queue, graph.rank[follower])
        if has_moved:
            self._take_labels()
        self.predicted_s = self._costs.total_s(self._own, self._own_spans)

    def _take_lists(self) -> None:
        """Give the walk rows of plain numbers: several times faster there than arrays, and views copy nothing."""
        self._whole: list[Sequence[float]] = [row.data for row in self._whole_s]
        self._up: list[Sequence[float]] = [row.data for row in self._up_s]
        self._beside: list[Sequence[float]] = [row.data for row in self._beside_s]

    def _take_labels(self) -> None:
        self._array = np.array(self._labels, dtype=np.intp)
        self._made, read = self._graph.work.spans(self._array)
        self._own = self._own_of[self._array]  # as the topology counts its tiers
        self._own_spans = self._own_of[self._made], self._own_of[read]
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
        whole = self._whole
        best, least = low, whole[low][j] + (to_edge_s if low else 0.0)
        if low == 0:
            edge = whole[1][j] + to_edge_s
            if edge < least:
                best, least = 1, edge
        return 2 if whole[2][j] + to_edge_s + to_cloud_s < least else best

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
            if 0 <= labels[i] < tier and self._layer_s[tier, i] < self._layer_s[labels[i], i]:
                after = [labels[k] for k in self._graph.followers[i]]
                if all(label < 0 or label >= tier for label in after):
                    labels[i] = tier
                    moved.append(i)
        return moved

    def _find_wrong(self) -> list[int]:
        """Layers whose cheapest tier is another than their label: `_best` for all at once."""
        graph, labels = self._graph, self._array
        work, layers, values = graph.work, graph.pair_layers, graph.pair_values
        made_of = self._made[values]
        low = np.zeros(work.num_layers, dtype=np.intp)
        low[graph.readers_in_order] = np.maximum.reduceat(made_of, graph.pair_offsets)
        is_beyond = labels[layers] > _HOPS
        readers_beyond = np.bincount(graph.pair_values_at, is_beyond.ravel(), minlength=2 * len(self._made)).reshape(
            2, -1
        )
        is_alone = readers_beyond.take(values, axis=1) == is_beyond
        pays = self._up_s.take(values, axis=1) * (is_alone & (made_of <= _HOPS))
        moved_s = np.bincount(graph.pair_layers_at, pays.ravel(), minlength=2 * work.num_layers).reshape(2, -1)
        to_edge_s, to_cloud_s = moved_s + self._beside_s * (low <= _HOPS)
        seconds = self._whole_s.copy()
        seconds[1:] += to_edge_s
        seconds[2] += to_cloud_s
        seconds[low > _TIERS] = np.inf
        wrong = seconds.argmin(axis=0) != labels
        wrong[: work.entry] = False
        found: list[int] = np.flatnonzero(wrong).tolist()
        return found

    def price(self, state: SystemState, readings: Readings) -> float:
        """Predict the seconds of the labels in another state."""
        return self._weigher.weigh(state, readings, has_queues=False).total_s(self._own, self._own_spans)

    def make_plan(self) -> Plan:
        """Turn the labels into a plan, once."""
        if self._plan is None:
            self._plan = self._graph.work.make_plan(self._own, self.topology)
        return self._plan
