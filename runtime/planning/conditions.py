"""Conditions that plans are compared under: a stated sample of rates, round trips, k, q and backlogs."""

from dataclasses import dataclass, replace

import numpy as np

from runtime.planning.arrays import FloatArray, StateArrays, blank_states, take_rows
from runtime.planning.estimators import MIN_BANDWIDTH_BPS, ReadingsArrays
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import layout_of


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
class Conditions:
    """What `predict` needs, for many states at once."""

    state: StateArrays
    readings: ReadingsArrays

    def take(self, rows: slice) -> "Conditions":
        """Pick some."""
        return Conditions(take_rows(self.state, rows), take_rows(self.readings, rows))


def sample_conditions(problem: PlanningProblem, count: int, first: int = 0) -> Conditions:
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
