"""The exact least-cost assignment of layers to ordered tiers, as one s-t minimum cut.

For every boundary h between two tiers and every layer i there is a vertex b[h][i]; it lies on the far side of the cut
when layer i runs beyond boundary h:

    s -> b[T-2][i] : seconds on the last tier        b[h][i] -> b[h+1][i] : inf   (beyond a boundary only after the last)
    b[h][i] -> b[h-1][i] : seconds on tier h         b[h][j] -> b[h][i] : inf     (a reader j never before its source i)
    b[0][i] -> t : seconds on the device             b[h][i] -> m, m -> b[h][j] : transfer seconds, inf

A value read by several layers gets a helper vertex m, so that it is paid once; where every reader lies before one of
them, that one stands for all. What a hop costs once, or a tier that is used at all, has a helper of its own.

References:
    Hu et al., "Dynamic Adaptive DNN Surgery for Inference Acceleration on the Edge" (DADS), INFOCOM 2019: the two-tier
    construction with helper vertices. As reconstructed.
    Differs: no hand-backs (the inf edges from reader to source); any number of ordered tiers; costs paid once.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from runtime.planning.arrays import FloatArray
from runtime.planning.weights import Costs, Labels, Workload

_FULL = 2**29
"""Integer that the cost of a known assignment is scaled to: fine enough for 1e-6, and sums stay within 32 bits."""

_INFINITE = 2**30


class OrderedCut:
    """The cut of one workload over a number of tiers; vertices and edges are made once, capacities per state."""

    def __init__(self, work: Workload, num_tiers: int) -> None:
        """Lay out vertices and edges.

        Args:
            work: the request; layers before its entry stay out.
            num_tiers: 2 or more.
        """
        self._work = work
        self._num_tiers = num_tiers
        n, first = work.num_layers, work.entry
        hops = range(num_tiers - 1)
        edges = _Edges()
        vertex = [{i: edges.vertex() for i in range(first, n)} for _ in hops]
        infinite = edges.cost()
        layer = [[edges.cost() for _ in range(first, n)] for _ in range(num_tiers)]
        up = [[edges.cost() for _ in work.consumers] for _ in hops]
        back = [[edges.cost() for _ in work.output_producers] for _ in hops]
        once = [edges.cost() for _ in hops]
        device_once = edges.cost()
        last = num_tiers - 2
        for i in range(first, n):
            edges.add(_SOURCE, vertex[last][i], layer[-1][i - first])
            edges.add(vertex[0][i], _SINK, layer[0][i - first])
            for h in hops[1:]:
                edges.add(vertex[h][i], vertex[h - 1][i], layer[h][i - first])
                edges.add(vertex[h - 1][i], vertex[h][i], infinite)
        latest = _latest_readers(work)
        for h in hops:
            at = {-1: _SOURCE, **vertex[h]}
            for v, (producer, readers) in enumerate(zip(work.producers.tolist(), work.consumers, strict=True)):
                edges.add_fork(at[producer], [at[j] for j in latest[v]], up[h][v], infinite)
                for j in readers if producer >= 0 else ():
                    edges.add(at[j], at[producer], infinite)
            for o, producer in enumerate(work.output_producers.tolist()):
                edges.add(_SOURCE, at[producer], back[h][o])
            edges.add_fork(_SOURCE, [at[i] for i in _ends(work)], once[h], infinite)
        edges.add_join([vertex[0][i] for i in _starts(work)], _SINK, device_once, infinite)
        self._edges = edges.freeze()

    def solve(self, costs: Costs, bound_s: float) -> Labels:
        """Find the least-cost labels.

        The queue delays of the device and of the last tier are paid once where the tier is used; those of tiers in
        between are left out, because no cut can tell them: the caller adds them.

        Args:
            costs: of a topology with as many tiers as the cut.
            bound_s: cost of any assignment that is known; it sets the scale.

        Returns:
            Labels of shape (num_layers,), layers before the entry 0.
        """
        first = self._work.entry
        once = [*costs.hop_s]
        once[-1] += costs.queue_s[-1]
        seconds = np.concatenate(
            (
                [np.inf],
                costs.layer_s[:, first:].ravel(),
                costs.up_s.ravel(),
                costs.result_s.ravel(),
                once,
                costs.queue_s[:1],
            )
        )
        near = self._edges.near_side(seconds, bound_s)
        beyond = ~near[2 : 2 + (self._num_tiers - 1) * (self._work.num_layers - first)].reshape(self._num_tiers - 1, -1)
        labels = np.zeros(self._work.num_layers, dtype=np.intp)
        labels[first:] = beyond.sum(axis=0)
        return labels


_SOURCE, _SINK = 0, 1


class _Edges:
    """Edges while they are collected; each is given by the index of its cost."""

    def __init__(self) -> None:
        self._num_vertices = 2
        self._num_costs = 0
        self._parts: dict[tuple[int, int], list[int]] = {}

    def vertex(self) -> int:
        self._num_vertices += 1
        return self._num_vertices - 1

    def cost(self) -> int:
        self._num_costs += 1
        return self._num_costs - 1

    def add(self, source: int, target: int, cost: int) -> None:
        """Add an edge; several between the same vertices add up."""
        self._parts.setdefault((source, target), []).append(cost)

    def add_fork(self, source: int, targets: Sequence[int], cost: int, infinite: int) -> None:
        """Pay `cost` once when any target is beyond the cut and the source is not."""
        if len(targets) == 1:
            self.add(source, targets[0], cost)
            return
        helper = self.vertex()
        self.add(source, helper, cost)
        for target in targets:
            self.add(helper, target, infinite)

    def add_join(self, sources: Sequence[int], target: int, cost: int, infinite: int) -> None:
        """Pay `cost` once when any source is not beyond the cut and the target is."""
        if len(sources) == 1:
            self.add(sources[0], target, cost)
            return
        helper = self.vertex()
        self.add(helper, target, cost)
        for source in sources:
            self.add(source, helper, infinite)

    def freeze(self) -> "_Network":
        ends = sorted(self._parts)
        slots = [slot for slot, end in enumerate(ends) for _ in self._parts[end]]
        costs = [cost for end in ends for cost in self._parts[end]]
        rows = np.array([row for row, _ in ends])
        return _Network(
            self._num_vertices,
            np.searchsorted(rows, np.arange(self._num_vertices + 1)).astype(np.int32),
            np.array([column for _, column in ends], dtype=np.int32),
            np.array(slots, dtype=np.intp),
            np.array(costs, dtype=np.intp),
        )


class _Network:
    """Frozen edges in row order."""

    def __init__(
        self,
        num_vertices: int,
        row_starts: np.ndarray[tuple[int], np.dtype[np.int32]],
        columns: np.ndarray[tuple[int], np.dtype[np.int32]],
        slots: np.ndarray[tuple[int], np.dtype[np.intp]],
        costs: np.ndarray[tuple[int], np.dtype[np.intp]],
    ) -> None:
        self._shape = (num_vertices, num_vertices)
        self._row_starts = row_starts
        self._columns = columns
        self._slots = slots
        self._costs = costs

    def near_side(self, seconds: FloatArray, bound_s: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Cut, and tell which vertices stay with the source; `seconds` by cost index."""
        weights = np.bincount(self._slots, seconds[self._costs], minlength=len(self._columns))
        # No cut that is worth having has an edge above the bound, so what is above it may as well be infinite.
        scaled = np.minimum(np.rint(weights * (_FULL / max(bound_s, 1e-12))), _INFINITE)
        capacities = csr_array((scaled.astype(np.int32), self._columns, self._row_starts), shape=self._shape)
        residual = capacities - maximum_flow(capacities, _SOURCE, _SINK).flow
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, _SOURCE, return_predecessors=False)
        near = np.zeros(self._shape[0], dtype=np.bool_)
        near[reached] = True
        return near


def _latest_readers(work: Workload) -> list[list[int]]:
    """Find for every value the readers that no other reader of it depends on."""
    before = [0] * work.num_layers  # bit i: layer i lies before
    for producer, readers in sorted(zip(work.producers.tolist(), work.consumers, strict=True)):
        if producer >= 0:
            for j in readers:
                before[j] |= before[producer] | 1 << producer
    return [[j for j in readers if not any(before[other] >> j & 1 for other in readers)] for readers in work.consumers]


def _starts(work: Workload) -> list[int]:
    """Layers that read only what is at hand on the device."""
    fed = {
        j for producer, readers in zip(work.producers, work.consumers, strict=True) if producer >= 0 for j in readers
    }
    return [i for i in range(work.entry, work.num_layers) if i not in fed]


def _ends(work: Workload) -> list[int]:
    """Layers whose outputs no layer reads."""
    read = set(work.producers.tolist())
    return [i for i in range(work.entry, work.num_layers) if i not in read]
