"""The K plans that a planner and a learnt policy choose among: fixed per problem, in one order, whatever the state.

A candidate is (i, j, head, tiles, codec). Over a stated sample of conditions (rates, round trips, k and q) every split
of every head is weighed; the plans that are best somewhere form the pool, and a greedy cover keeps those with which the
mean regret to the best split falls fastest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from runtime.errors import PlanError
from runtime.planning.arrays import BoolArray, FloatArray, IntArray, StateArrays, blank_states, take_rows
from runtime.planning.cost import predict_total
from runtime.planning.estimators import MIN_BANDWIDTH_BPS, ReadingsArrays
from runtime.planning.problem import PlanningProblem, private_layers
from runtime.planning.rows import CutTables, PlanCosts, compile_plan, compile_splits, layout_of, tier_names
from runtime.types import LOSSY_CODECS, Plan, Tier

NUM_CANDIDATES = 32
"""K: candidates of every problem, padded where a model has fewer that are worth having."""

NUM_CONDITIONS = 512
"""Conditions that the pool is drawn from. Guess: twice as many leave the regret where it is (see the test)."""

_DOWN_COST = 1e9
"""Seconds: beyond any latency."""

_CHUNK = 16
"""Conditions weighed at once: keeps arrays over all splits within a few megabytes."""


@dataclass(frozen=True, slots=True)
class ConditionRange:
    """What conditions the candidates are made for; each range is sampled evenly in its logarithm. Guess."""

    bandwidth_bps: tuple[float, float] = (0.25e6, 1e9)
    """From a bad cellular uplink to a wired network."""
    rtt_s: tuple[float, float] = (0.0005, 0.1)
    load_factor: tuple[float, float] = (1.0, 16.0)
    queue_delay_s: tuple[float, float] = (0.0005, 1.0)
    backlog_s: tuple[float, float] = (0.0005, 1.0)
    """Of the device."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """K plans, their rows, and which of the K places are filled."""

    plans: tuple[Plan, ...]  # (K,) places beyond `num_plans` repeat the first plan
    costs: PlanCosts  # K rows
    num_plans: int
    down_cost: FloatArray  # (N, K) large for every node that a plan needs
    padding_cost: FloatArray  # (K,) larger still in the padding
    index: dict[Plan, int]
    pool_size: int
    """Splits that were best under some condition, before the greedy cover."""
    regret: float
    """Mean of (best of these / best of all splits) - 1 over the conditions."""

    def mask(self, state: StateArrays) -> BoolArray:
        """Which candidates may be chosen, shape (B, K): the legal ones whose nodes are all up.

        Where there is none, because the device holds no model and no node is up, the legal ones that need the fewest
        nodes that are down.
        """
        penalty = self.penalty(state)
        mask: BoolArray = penalty <= penalty.min(axis=1, keepdims=True)
        return mask

    def penalty(self, state: StateArrays) -> FloatArray:
        """What to add to the candidates' costs so that a minimum obeys `mask`, shape (B, K): 0 where it allows."""
        down = 1.0 - state.is_up
        penalty: FloatArray = down @ self.down_cost + self.padding_cost
        return penalty


@dataclass(frozen=True, slots=True)
class _Family:
    """Splits that share a head and a codec; without a head the edge runs nothing."""

    head: str | None
    codec: str
    tables: CutTables


@lru_cache(maxsize=64)
def candidates(problem: PlanningProblem) -> Candidates:
    """Choose the candidates of a problem; cached per problem.

    Raises:
        PlanError: when no split is legal.
    """
    families = tuple(_families(problem))
    conditions = sample_conditions(problem)
    kept = list(dict.fromkeys(_always(problem, families)))
    best_s, splits = _scan(problem, families, conditions)
    if not kept and not splits:
        raise PlanError(
            "no split of this model is legal here: the constraints, the device's model and the nodes that have "
            "described themselves leave no place for some layer; allow another tier or start another node"
        )
    plans, costs = _compile_pool(problem, kept, splits)
    totals = predict_total(costs, conditions.readings, conditions.state)
    chosen, regret = _cover(totals / np.minimum(best_s, totals.min(axis=1))[:, None], len(kept))
    rows = np.array(chosen + [chosen[0]] * (NUM_CANDIDATES - len(chosen)), dtype=np.intp)
    picked = tuple(plans[row] for row in rows)
    return Candidates(
        plans=picked,
        costs=costs.take(rows),
        num_plans=len(chosen),
        down_cost=costs.full("needs")[rows].T * _DOWN_COST,
        padding_cost=np.where(np.arange(NUM_CANDIDATES) < len(chosen), 0.0, _DOWN_COST**2),
        index={plan: index for index, plan in enumerate(picked[: len(chosen)])},
        pool_size=len(plans),
        regret=regret,
    )


def _cover(regret: FloatArray, num_kept: int) -> tuple[list[int], float]:
    """Keep the first `num_kept` columns, then add greedily what lowers the mean of the rows' least regret most.

    Args:
        regret: plan / best of all splits, shape (conditions, plans).
        num_kept: columns that stay in any case.

    Returns:
        Columns in ascending order of their first place, and the mean regret that is left.
    """
    chosen = list(range(min(num_kept, NUM_CANDIDATES)))
    log_regret = np.log(np.maximum(regret, 1.0))
    least = log_regret[:, chosen].min(axis=1) if chosen else np.full(len(regret), np.inf)
    while len(chosen) < min(NUM_CANDIDATES, regret.shape[1]):
        means = np.minimum(log_regret, least[:, None]).mean(axis=0)
        means[chosen] = np.inf
        best = int(means.argmin())
        if means[best] >= least.mean():
            break
        chosen.append(best)
        least = np.minimum(least, log_regret[:, best])
    return chosen, float(np.expm1(least).mean())


# --- which splits are legal -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Limits:
    first_i: int  # least layers on the device
    last_i: int
    can_edge: bool
    can_cloud: bool


def _limits(problem: PlanningProblem) -> _Limits:
    """Bounds of i and tiers that may be used, from the constraints and from who has a profile."""
    graph, limits = problem.graph, problem.constraints
    entry, num_layers = problem.entry, graph.num_layers
    kept = [layer for layer in private_layers(graph) if layer >= entry] if limits.private_input else []
    first_i = max(kept) + 1 if kept else entry
    has_device = Tier.DEVICE in limits.allowed_tiers and limits.device_has_model
    has_device = has_device and tier_names(problem, None)[Tier.DEVICE] in problem.profile.nodes
    cloud = problem.deployment.cloud
    return _Limits(
        first_i=first_i,
        last_i=num_layers if has_device else entry,
        can_edge=Tier.EDGE in limits.allowed_tiers,
        can_cloud=Tier.CLOUD in limits.allowed_tiers and cloud is not None and cloud.name in problem.profile.nodes,
    )


def _families(problem: PlanningProblem) -> Iterator[_Family]:
    codecs = ("auto",) if problem.constraints.lossless_only else ("auto", *LOSSY_CODECS)
    limits = _limits(problem)
    heads: list[str | None] = [node.name for node in problem.deployment.edges if node.name in problem.profile.nodes]
    for codec in codecs:
        tables = CutTables.of(problem, codec)
        for head in [None, *heads] if limits.can_edge else [None]:
            yield _Family(head, codec, tables)


def _always(problem: PlanningProblem, families: Sequence[_Family]) -> Iterator[Plan]:
    """Candidates whatever they cost: device-only, cloud-only (the input as it came), edge-only per head."""
    limits, num_layers, entry = _limits(problem), problem.graph.num_layers, problem.entry
    if limits.first_i <= limits.last_i == num_layers:
        yield Plan.split(num_layers, num_layers, num_layers)
    if limits.first_i > entry:
        return
    for family in families:
        if family.codec != "auto":
            continue
        if family.head is not None:
            yield _make_plan(problem, family, entry, num_layers)
        elif limits.can_cloud:
            yield _make_plan(problem, family, entry, entry)


def _make_plan(problem: PlanningProblem, family: _Family, i: int, j: int) -> Plan:
    """Make a split, its layers before the entry on the device as `check_plan` leaves them."""
    num_layers, entry = problem.graph.num_layers, problem.entry
    nodes = () if family.head is None else (family.head,)
    tiers = (Tier.DEVICE,) * max(i, entry) + (Tier.EDGE,) * (j - i) + (Tier.CLOUD,) * (num_layers - j)
    return Plan(tiers, nodes, codec=family.codec)


# --- which splits are best somewhere ----------------------------------------------------------------------------------

_Split: TypeAlias = tuple[_Family, int, int]


def _scan(
    problem: PlanningProblem, families: Sequence[_Family], conditions: "Conditions"
) -> tuple[FloatArray, list[_Split]]:
    """Find the best of all splits under every condition.

    Returns:
        Its seconds, shape (conditions,), inf where there is none, and the distinct splits that were best somewhere.
    """
    limits, num_layers = _limits(problem), problem.graph.num_layers
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
    problem: PlanningProblem, family: _Family, cuts: IntArray, limits: _Limits, conditions: "Conditions"
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


def _compile_pool(
    problem: PlanningProblem, kept: Sequence[Plan], splits: Sequence[_Split]
) -> tuple[list[Plan], PlanCosts]:
    """Make plans and rows: those kept in any case first, then the other splits, grouped by path."""
    plans = list(kept)
    parts = [compile_plan(problem, plan) for plan in kept]
    groups: dict[tuple[int, bool], list[_Split]] = {}
    for split in splits:
        plan = _make_plan(problem, *split)
        if plan not in plans[: len(kept)]:
            groups.setdefault((id(split[0]), split[2] < problem.graph.num_layers), []).append(split)
    for group in groups.values():
        family = group[0][0]
        i, j = np.array([split[1] for split in group]), np.array([split[2] for split in group])
        parts.append(compile_splits(problem, family.tables, i, j, family.head))
        plans += [_make_plan(problem, *split) for split in group]
    return plans, PlanCosts.stack(parts)


# --- conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What `predict` needs, for many states at once."""

    state: StateArrays
    readings: ReadingsArrays

    def take(self, rows: slice) -> "Conditions":
        """Pick some."""
        return Conditions(take_rows(self.state, rows), take_rows(self.readings, rows))


def sample_conditions(problem: PlanningProblem, count: int = NUM_CONDITIONS, first: int = 0) -> Conditions:
    """Spread conditions over `ConditionRange` by an additive recurrence, the same in every run.

    Of every four, in one all nodes are idle, in one none has a queue, in one a node is as good as gone (its links
    crawl), and in one the device has a backlog. A k of the device above 1 stands for a price on its time: what a rule
    that looks ahead may want to save must be among the candidates.

    Args:
        problem: whose nodes and links vary.
        count: how many.
        first: where in the recurrence to start; others give other conditions.

    References:
        Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018): steps are powers of 1 / x, where x
        solves x^(d + 1) = x + 1 in d dimensions.
    """
    layout, ranges = layout_of(problem), ConditionRange()
    num_links, num_nodes = len(layout.links), len(layout.nodes)
    point = _spread(count, 2 * num_links + 2 * num_nodes + 2, first)
    # Both directions of a link share a rate: results are small, so a second one would only thin the sample.
    pair = np.minimum(np.arange(num_links), layout.reverse)
    bandwidth = _between(ranges.bandwidth_bps, point[:, :num_links])[:, pair]
    rtt = _between(ranges.rtt_s, point[:, num_links : 2 * num_links])[:, pair]
    load = point[:, 2 * num_links :]
    load_factor = _between(ranges.load_factor, load[:, :num_nodes])
    delay_s = _between(ranges.queue_delay_s, load[:, num_nodes : 2 * num_nodes])
    turn = np.arange(first, first + count) % 4
    load_factor[turn == 0] = 1.0
    delay_s[(turn == 0) | (turn == 1)] = 0.0
    gone = np.where(turn == 2, 1 + (load[:, -2] * (num_nodes - 1)).astype(np.intp), -1)
    ends = np.array([[layout.node_slot.get(name, -2) for name in link] for link in layout.links])
    bandwidth = np.where((gone[:, None, None] == ends).any(axis=-1), MIN_BANDWIDTH_BPS, bandwidth)
    backlog_s = np.where(turn == 3, _between(ranges.backlog_s, load[:, -1]), 0.0)
    delay_s[:, 0] = 0.0
    input_bytes = float(sum(v.tensor.nbytes for v in problem.graph.values if not v.is_sized))
    state = blank_states(layout, count)
    state = replace(state, device_backlog_s=backlog_s, input_bytes=np.full(count, input_bytes))
    return Conditions(state, ReadingsArrays(bandwidth, rtt, load_factor, delay_s))


def _spread(count: int, dimensions: int, first: int) -> FloatArray:
    """Points in the unit cube, shape (count, dimensions)."""
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    points: FloatArray = (0.5 + np.arange(first + 1, first + count + 1)[:, None] * steps) % 1.0
    return points


def _between(bounds: tuple[float, float], point: FloatArray) -> FloatArray:
    low, high = np.log(bounds)
    values: FloatArray = np.exp(low + point * (high - low))
    return values
