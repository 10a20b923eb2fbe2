"""The K plans that a planner and a learnt policy choose among: fixed per problem, in one order, whatever the state.

A candidate is (i, j, head, tiles, codec). Over a stated sample of conditions (rates, round trips, k and q) every split
of every head is weighed, for one request and for a stream of requests at a share of what the best split can take. The
plans that are best somewhere form the pool, each also with its edge share in tiles where there are edge nodes for them,
and a greedy cover keeps those with which the mean regret to the best falls fastest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from runtime.errors import PlanError
from runtime.planning.arrays import BoolArray, FloatArray, StateArrays
from runtime.planning.conditions import Conditions, sample_conditions
from runtime.planning.cost import predict, predict_total
from runtime.planning.grids import tiled_plans
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import PlanCosts, compile_plan, compile_splits
from runtime.planning.scan import Family, Split, find_limits, list_families, make_plan, scan, scan_stream
from runtime.planning.stream import bottleneck_s, stream_s
from runtime.types import Plan

NUM_CANDIDATES = 32
"""K: candidates of every problem, padded where a model has fewer that are worth having."""

NUM_CONDITIONS = 512
"""Conditions that the pool is drawn from. Guess: twice as many leave the regret where it is (see the test)."""

NUM_STREAMS = 256
"""Conditions, others than those, under which requests come in a stream. Guess."""

UTILISATIONS_FRAC = (0.5, 0.8, 0.95, 0.99)
"""How busy the split that keeps up best is in these, by turns. Near 1 only the longest stage counts, as for DADS under
heavy load. Guess."""

_MOST_REGRET = 10.0
"""A plan that does not keep up with a stream at all counts as so many times the best one."""

_LEAST_GAIN = 1e-4
"""A plan that lowers the mean of ln(regret) by less is not worth a place. Guess."""

_DOWN_COST = 1e9
"""Seconds: beyond any latency."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """K plans, their rows, and which of the K places are filled."""

    plans: tuple[Plan, ...]  # (K,) places beyond `num_plans` repeat the first plan
    costs: PlanCosts  # K rows
    num_plans: int
    down_cost: FloatArray  # (N, K) large for every node that a plan needs
    link_cost: FloatArray  # (L, K) the same for every link from a head to a node that runs tiles for it
    padding_cost: FloatArray  # (K,) larger still in the padding
    index: dict[Plan, int]
    pool_size: int
    """Splits that were best under some condition, and these in tiles, before the greedy cover."""
    regret: float
    """Mean of (best of these / best of all splits and of these in tiles) - 1 over the conditions, for one request."""
    stream_regret: float
    """The same for streams of requests."""

    def mask(self, state: StateArrays) -> BoolArray:
        """Which candidates may be chosen, shape (B, K): the legal ones whose nodes are all up, and connected for tiles.

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
        if self.costs.tiles is not None:
            penalty += np.isnan(state.rtt_s) @ self.link_cost  # a node knows no round trip to where it is not connected
        return penalty


@lru_cache(maxsize=64)
def candidates(problem: PlanningProblem) -> Candidates:
    """Choose the candidates of a problem; cached per problem.

    Raises:
        PlanError: when no split is legal.
    """
    families = tuple(list_families(problem))
    kept = list(dict.fromkeys(_always(problem, families)))
    single, stream = sample_conditions(problem, NUM_CONDITIONS), sample_conditions(problem, NUM_STREAMS, NUM_CONDITIONS)
    best_s, splits = scan(problem, families, single)
    rate_hz, best_in_stream_s, more = scan_stream(
        problem, families, stream, np.resize(UTILISATIONS_FRAC, NUM_STREAMS), _least_bottleneck_s(problem, kept, stream)
    )
    if not kept and not splits:
        raise PlanError(
            "no split of this model is legal here: the constraints, the device's model and the nodes that have "
            "described themselves leave no place for some layer; allow another tier or start another node"
        )
    plans, costs = _compile_pool(problem, kept, list(dict.fromkeys(splits + more)))
    alone_s = predict_total(costs, single.readings, single.state)
    streamed_s = stream_s(predict(costs, stream.readings, stream.state), rate_hz)
    regret = np.concatenate([_regret(alone_s, best_s), _regret(streamed_s, best_in_stream_s)])
    chosen = _cover(regret, len(kept))
    left = regret[:, chosen].min(axis=1) - 1.0
    rows = np.array(chosen + [chosen[0]] * (NUM_CANDIDATES - len(chosen)), dtype=np.intp)
    picked = tuple(plans[row] for row in rows)
    return Candidates(
        plans=picked,
        costs=costs.take(rows),
        num_plans=len(chosen),
        down_cost=costs.full("needs")[rows].T * _DOWN_COST,
        link_cost=costs.full("needs_links")[rows].T * _DOWN_COST,
        padding_cost=np.where(np.arange(NUM_CANDIDATES) < len(chosen), 0.0, _DOWN_COST**2),
        index={plan: index for index, plan in enumerate(picked[: len(chosen)])},
        pool_size=len(plans),
        regret=float(left[:NUM_CONDITIONS].mean()),
        stream_regret=float(left[NUM_CONDITIONS:].mean()),
    )


def _least_bottleneck_s(problem: PlanningProblem, plans: Sequence[Plan], conditions: Conditions) -> FloatArray:
    """Longest stage of the plan that keeps up best, shape (B,); inf without plans."""
    if not plans:
        return np.full(len(conditions.state.input_bytes), np.inf)
    costs = PlanCosts.stack([compile_plan(problem, plan) for plan in plans])
    least: FloatArray = bottleneck_s(predict(costs, conditions.readings, conditions.state)).min(axis=1)
    return least


def _regret(seconds: FloatArray, best_s: FloatArray) -> FloatArray:
    """Seconds over the best's, shape (conditions, plans), from 1 to `_MOST_REGRET`."""
    least_s = np.minimum(best_s, seconds.min(axis=1))[:, None]
    regret: FloatArray = np.clip(seconds / least_s, 1.0, _MOST_REGRET)
    return regret


def _cover(regret: FloatArray, num_kept: int) -> list[int]:
    """Keep the first `num_kept` columns, then add greedily what lowers the mean of the rows' least log regret most.

    Args:
        regret: plan / best of all splits, shape (conditions, plans), at least 1.
        num_kept: columns that stay in any case.

    Returns:
        Columns, in the order in which they were taken.
    """
    chosen = list(range(min(num_kept, NUM_CANDIDATES)))
    log_regret = np.log(regret)
    least = log_regret[:, chosen].min(axis=1) if chosen else np.full(len(regret), np.log(_MOST_REGRET))
    while len(chosen) < min(NUM_CANDIDATES, regret.shape[1]):
        means = np.minimum(log_regret, least[:, None]).mean(axis=0)
        means[chosen] = np.inf
        best = int(means.argmin())
        if chosen and means[best] > least.mean() - _LEAST_GAIN:
            break
        chosen.append(best)
        least = np.minimum(least, log_regret[:, best])
    return chosen


def _always(problem: PlanningProblem, families: Sequence[Family]) -> Iterator[Plan]:
    """Candidates whatever they cost: device-only, cloud-only (the input as it came), edge-only per head."""
    limits, num_layers, entry = find_limits(problem), problem.graph.num_layers, problem.entry
    if limits.first_i <= limits.last_i == num_layers:
        yield Plan.split(num_layers, num_layers, num_layers)
    if limits.first_i > entry:
        return
    for family in families:
        if family.codec != "auto":
            continue
        if family.head is not None:
            yield make_plan(problem, family, entry, num_layers)
        elif limits.can_cloud:
            yield make_plan(problem, family, entry, entry)


def _compile_pool(
    problem: PlanningProblem, kept: Sequence[Plan], splits: Sequence[Split]
) -> tuple[list[Plan], PlanCosts]:
    """Make plans and rows: those kept in any case first, then the other splits, grouped by path, then those in tiles."""
    plans = list(kept)
    parts = [compile_plan(problem, plan) for plan in kept]
    groups: dict[tuple[int, bool], list[Split]] = {}
    for split in splits:
        plan = make_plan(problem, *split)
        if plan not in plans[: len(kept)]:
            groups.setdefault((id(split[0]), split[2] < problem.graph.num_layers), []).append(split)
    for group in groups.values():
        family = group[0][0]
        i, j = np.array([split[1] for split in group]), np.array([split[2] for split in group])
        parts.append(compile_splits(problem, family.tables, i, j, family.head))
        plans += [make_plan(problem, *split) for split in group]
    tiled = list(dict.fromkeys(other for plan in plans for other in tiled_plans(problem, plan)))
    parts += [compile_plan(problem, plan) for plan in tiled]
    return plans + tiled, PlanCosts.stack(parts)
