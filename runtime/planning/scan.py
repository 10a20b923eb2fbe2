"""All splits at once: which are legal, and which are best under given conditions, for one request or for a stream.

A split is (family, i, j): device `[0, i)`, head `[i, j)`, cloud from `j` on; a family shares head and codec.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from runtime.planning.arrays import BoolArray, FloatArray, IntArray
from runtime.planning.conditions import Conditions
from runtime.planning.cost import PARTS, predict, predict_total, total_s
from runtime.planning.problem import PlanningProblem, private_layers
from runtime.planning.rows import CutTables, compile_splits, tier_names
from runtime.planning.stream import HELD_PARTS, held_s, wait_s
from runtime.types import LOSSY_CODECS, Plan, Tier

_CHUNK = 16
"""Conditions weighed at once: keeps arrays over all splits within a few megabytes."""


@dataclass(frozen=True, slots=True)
class Family:
    """Splits that share a head and a codec; without a head the edge runs nothing."""

    head: str | None
    codec: str
    tables: CutTables


@dataclass(frozen=True, slots=True)
class Limits:
    """Which splits are legal: bounds of i, and the tiers beyond the device."""

    first_i: int  # least layers on the device
    last_i: int
    can_edge: bool
    can_cloud: bool


def find_limits(problem: PlanningProblem) -> Limits:
    """Bounds of i and tiers that may be used, from the constraints and from who has a profile."""
    graph, limits = problem.graph, problem.constraints
    entry, num_layers = problem.entry, graph.num_layers
    kept = [layer for layer in private_layers(graph) if layer >= entry] if limits.private_input else []
    first_i = max(kept) + 1 if kept else entry
    has_device = Tier.DEVICE in limits.allowed_tiers and limits.device_has_model
    has_device = has_device and tier_names(problem, None)[Tier.DEVICE] in problem.profile.nodes
    cloud = problem.deployment.cloud
    return Limits(
        first_i=first_i,
        last_i=num_layers if has_device else entry,
        can_edge=Tier.EDGE in limits.allowed_tiers,
        can_cloud=Tier.CLOUD in limits.allowed_tiers and cloud is not None and cloud.name in problem.profile.nodes,
    )


def list_families(problem: PlanningProblem) -> Iterator[Family]:
    """Every head, and none, under every codec that the constraints allow."""
    codecs = ("auto",) if problem.constraints.lossless_only else ("auto", *LOSSY_CODECS)
    limits = find_limits(problem)
    heads: list[str | None] = [node.name for node in problem.deployment.edges if node.name in problem.profile.nodes]
    for codec in codecs:
        tables = CutTables.of(problem, codec)
        for head in [None, *heads] if limits.can_edge else [None]:
            yield Family(head, codec, tables)


def make_plan(problem: PlanningProblem, family: Family, i: int, j: int) -> Plan:
    """Make a split, its layers before the entry on the device as `check_plan` leaves them."""
    num_layers, entry = problem.graph.num_layers, problem.entry
    nodes = () if family.head is None else (family.head,)
    tiers = (Tier.DEVICE,) * max(i, entry) + (Tier.EDGE,) * (j - i) + (Tier.CLOUD,) * (num_layers - j)
    return Plan(tiers, nodes, codec=family.codec)


# --- which splits are best somewhere ----------------------------------------------------------------------------------

Split: TypeAlias = tuple[Family, int, int]


def scan(
    problem: PlanningProblem, families: Sequence[Family], conditions: Conditions
) -> tuple[FloatArray, list[Split]]:
    """Find the best of all splits under every condition.

    Returns:
        Its seconds, shape (conditions,), inf where there is none, and the distinct splits that were best somewhere.
    """
    limits, num_layers = find_limits(problem), problem.graph.num_layers
    cuts = np.arange(limits.first_i, min(limits.last_i, num_layers - 1) + 1)
    count = len(conditions.state.input_bytes)
    best_s = np.full(count, np.inf)
    best = np.zeros((count, 3), dtype=np.intp)
    for number, family in enumerate(families):
        for part in range(0, count, _CHUNK) if len(cuts) else ():
            rows = slice(part, part + _CHUNK)
            for seconds, i, j in _best_of_family(problem, family, cuts, limits, conditions.take(rows)):
                is_better = seconds < best_s[rows]
                best_s[rows] = np.where(is_better, seconds, best_s[rows])
                found = np.stack([np.full_like(i, number), i, j], axis=1)
                best[rows] = np.where(is_better[:, None], found, best[rows])
    distinct = np.unique(best[np.isfinite(best_s)], axis=0)
    return best_s, [(families[number], int(i), int(j)) for number, i, j in distinct]


def _best_of_family(
    problem: PlanningProblem, family: Family, cuts: IntArray, limits: Limits, conditions: Conditions
) -> Iterator[tuple[FloatArray, IntArray, IntArray]]:
    """Yield (seconds, i, j) of the best split per condition: straight to the cloud, through the head, on the head.

    What the cloud costs beyond j does not depend on i: T(i, j) = T(i, n) + T(e, j) - T(e, n) for e <= i < j. So 2 n
    rows tell all n * n / 2 splits, and one minimum from the right over j pairs them.
    """
    num_layers, entry = problem.graph.num_layers, problem.entry
    end = np.full_like(cuts, num_layers)

    def seconds(i: IntArray, j: IntArray) -> FloatArray:
        costs = compile_splits(problem, family.tables, i, j, family.head)
        return predict_total(costs, conditions.readings, conditions.state)

    if limits.can_cloud:
        straight = seconds(cuts, cuts)
        at = straight.argmin(axis=1)
        yield _pick(straight, at), cuts[at], cuts[at]
    if family.head is None:
        return
    on_head = seconds(cuts, end)
    first, last = np.array([entry]), np.array([num_layers])
    beyond = np.arange(entry + 1, num_layers + 1)  # j
    extra = np.zeros((len(on_head), len(beyond)))  # T(e, j) - T(e, n)
    if limits.can_cloud and len(beyond) > 1:
        extra[:, :-1] = seconds(np.full(len(beyond) - 1, entry), beyond[:-1]) - seconds(first, last)
    elif not limits.can_cloud:
        extra[:, :-1] = np.inf
    least = np.minimum.accumulate(extra[:, ::-1], axis=1)[:, ::-1]  # [:, c - entry]: over j > c
    both = on_head + least[:, cuts - entry]
    at = both.argmin(axis=1)
    i = cuts[at]
    j = beyond[np.where(beyond > i[:, None], extra, np.inf).argmin(axis=1)]
    yield _pick(both, at), i, j


def _pick(values: FloatArray, at: IntArray) -> FloatArray:
    return np.take_along_axis(values, at[:, None], axis=1)[:, 0]


# --- which splits are best in a stream of requests --------------------------------------------------------------------

_CUTS = 64
"""Cuts between which streams choose, at most: with n cuts n * n / 2 splits are weighed one by one. Guess: a share of the
work by which a stage then is off its balance that no profile tells."""

_PAIRS = 2**18
"""Splits times conditions weighed at once: an array of two megabytes."""


@dataclass(frozen=True, slots=True)
class _Stages:
    """A family's splits under some conditions. B: conditions, I: cuts i, J: cuts j; seconds.

    Latency is `near_s + far_s`; what is held before the head and beyond it depends on one cut each, and the head holds
    `head_from_s - head_beyond_s`. Without a head J is 1 and stands for j = i.
    """

    i: IntArray  # (I,)
    j: IntArray  # (J,)
    near_s: FloatArray  # (B, I)
    far_s: FloatArray  # (B, J)
    near_held_s: FloatArray  # (B, I, resources)
    far_held_s: FloatArray  # (B, J, resources)
    head_from_s: FloatArray  # (B, I) of the layers from i on
    head_beyond_s: FloatArray  # (B, J) of the layers from j on

    @property
    def head_s(self) -> FloatArray:
        """What the head holds, shape (B, I, J)."""
        head: FloatArray = np.maximum(self.head_from_s[:, :, None] - self.head_beyond_s[:, None, :], 0.0)
        return head

    @property
    def is_split(self) -> BoolArray:
        """Which pairs of cuts are splits of their own, shape (I, J)."""
        is_split: BoolArray = (self.j > self.i[:, None]) | (self.j < 0)
        return is_split

    def bottleneck_s(self) -> FloatArray:
        """Longest stage of the split that keeps up best, shape (B,)."""
        near, far = self.near_held_s.max(axis=-1), self.far_held_s.max(axis=-1)
        longest = np.maximum(np.maximum(near[:, :, None], far[:, None, :]), self.head_s)
        least: FloatArray = np.where(self.is_split, longest, np.inf).min(axis=(1, 2))
        return least

    def find_best(self, rate_hz: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """Least latency in a stream at the rates (B,), with its cuts i and j, each of shape (B,)."""
        rate = rate_hz[:, None, None]
        near = self.near_s + wait_s(self.near_held_s, rate).sum(axis=-1)
        far = self.far_s + wait_s(self.far_held_s, rate).sum(axis=-1)
        seconds = near[:, :, None] + far[:, None, :] + wait_s(self.head_s, rate)
        flat = np.where(self.is_split, seconds, np.inf).reshape(len(rate_hz), -1)
        at = flat.argmin(axis=1)
        i, j = self.i[at // len(self.j)], self.j[at % len(self.j)]
        return _pick(flat, at), i, np.where(j < 0, i, j)


def scan_stream(
    problem: PlanningProblem,
    families: Sequence[Family],
    conditions: Conditions,
    utilisation_frac: FloatArray,
    bound_s: FloatArray,
) -> tuple[FloatArray, FloatArray, list[Split]]:
    """Find the best split in a stream of requests under every condition, between at most `_CUTS` cuts.

    Requests come at the rate at which the split that keeps up best is busy for a share of the time: near 1 this is
    what DADS looks for under heavy load.

    Args:
        problem: whose splits.
        families: heads and codecs.
        conditions: loads and rates.
        utilisation_frac: that share under every condition, shape (B,), below 1.
        bound_s: longest stage of plans that are no splits of a family, shape (B,); inf where there is none.

    Returns:
        The rates, Hz, shape (B,); the best split's seconds, inf where there is none; the distinct splits that were best.
    """
    count = len(bound_s)
    rate_hz, best_s = np.zeros(count), np.full(count, np.inf)
    found: set[tuple[int, int, int]] = set()
    cuts = [_spread_cuts(problem, family) for family in families]
    step = max(_PAIRS // max((len(some) ** 2 for some in cuts), default=1), 1)
    for part in range(0, count, step):
        rows = slice(part, part + step)
        stages = [
            (number, stage)
            for number, family in enumerate(families)
            for stage in _list_stages(problem, family, cuts[number], conditions.take(rows))
        ]
        shortest = np.min([bound_s[rows], *(stage.bottleneck_s() for _, stage in stages)], axis=0)
        rate_hz[rows] = utilisation_frac[rows] / np.maximum(shortest, _SHORTEST_S)
        best = [(number, *stage.find_best(rate_hz[rows])) for number, stage in stages]
        for row in range(len(shortest)):
            seconds, number, i, j = min(
                ((b[1][row], b[0], int(b[2][row]), int(b[3][row])) for b in best), default=_NO_SPLIT
            )
            best_s[part + row] = seconds
            if seconds < np.inf:
                found.add((number, i, j))
    return rate_hz, best_s, [(families[number], i, j) for number, i, j in sorted(found)]


_SHORTEST_S = 1e-9
_NO_SPLIT = (np.inf, 0, 0, 0)


def _spread_cuts(problem: PlanningProblem, family: Family) -> IntArray:
    """All cuts but the last where they are few; else the first, and in every share of the work that with the fewest bytes."""
    if problem.graph.num_layers - problem.entry <= _CUTS:
        return np.arange(problem.entry, problem.graph.num_layers)
    layer_s = np.array([node.layer_s for node in problem.profile.nodes.values()])
    shares = layer_s.sum(axis=0)[problem.entry :]
    done = np.concatenate([[0.0], np.cumsum(shares)[:-1]]) / max(shares.sum(), _SHORTEST_S)
    share = np.minimum((done * _CUTS).astype(np.intp), _CUTS - 1)
    sent_bytes = family.tables.up[1, problem.entry : -1]
    order = np.lexsort((sent_bytes, share))
    cuts = problem.entry + order[np.concatenate([[True], np.diff(share[order]) > 0])]
    return np.unique(np.append(cuts, find_limits(problem).first_i))


def _list_stages(problem: PlanningProblem, family: Family, cuts: IntArray, conditions: Conditions) -> Iterator[_Stages]:
    """Work out the stages straight to the cloud, and through the head, from the rows of one cut each (`_best_of_family`)."""
    limits, num_layers, entry = find_limits(problem), problem.graph.num_layers, problem.entry
    beyond = cuts[(cuts > entry) & (cuts < num_layers)]
    cuts = cuts[(cuts >= limits.first_i) & (cuts <= min(limits.last_i, num_layers - 1))]
    if not len(cuts):
        return

    def parts(i: IntArray, j: IntArray) -> FloatArray:
        costs = compile_splits(problem, family.tables, i, j, family.head)
        return predict(costs, conditions.readings, conditions.state)

    count = len(conditions.state.input_bytes)
    if limits.can_cloud:
        straight = parts(cuts, cuts)
        nothing = np.zeros((count, 1))
        held = held_s(straight)
        yield _Stages(
            cuts, _NO_J, total_s(straight), nothing, held, nothing[..., None], np.zeros((count, len(cuts))), nothing
        )
    if family.head is None:
        return
    on_head, whole = parts(cuts, np.full_like(cuts, num_layers)), parts(np.array([entry]), np.array([num_layers]))
    j, far = np.array([num_layers]), whole
    if limits.can_cloud and len(beyond):
        j = np.append(beyond, num_layers)
        far = np.concatenate([parts(np.full_like(beyond, entry), beyond), whole], axis=1)
    yield _Stages(
        i=cuts,
        j=j,
        near_s=total_s(on_head),
        far_s=total_s(far) - total_s(whole),
        near_held_s=held_s(on_head)[..., _NEAR],
        far_held_s=held_s(far)[..., _FAR],
        head_from_s=on_head[..., _EDGE],
        head_beyond_s=whole[..., _EDGE] - far[..., _EDGE],
    )


_NO_J = np.array([-1])
_EDGE = PARTS.index("edge")
_NEAR = [HELD_PARTS.index(name) for name in ("device", "uplink")]
_FAR = [HELD_PARTS.index(name) for name in ("backbone_up", "cloud")]
