"""What a policy sees, for one lane: `runtime.planning.features.FeatureEncoder` compiled. A test holds the two equal.

The table in `runtime.planning.features` says which columns there are, where, within which bounds, and which are shown as
logarithms; here is what is in them.
"""

import math
from typing import Any

import numpy as np

from env.kernel.compiled import compiled
from env.kernel.decide import NEVER_S, believe, nodes_down, predict
from env.kernel.layout import NODES, ROWS, SAMPLES, SHOWN_LINKS, SHOWN_NODES, Plans, State
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.cost import PARTS
from runtime.planning.features import (
    CANDIDATE_COLUMNS,
    CANDIDATE_FEATURES,
    CANDIDATE_HIGH,
    CANDIDATE_LOW,
    CONTEXT_FEATURES,
    CONTEXT_HIGH,
    CONTEXT_LOW,
    NUM_SHOWN,
    Feature,
)

Row = Any
"""One lane's part of an observation."""


def _starts(table: tuple[Feature, ...]) -> dict[str, int]:
    """First column of every row of a table."""
    starts, start = {}, 0
    for row in table:
        starts[row.name] = start
        start += len(row.columns)
    return starts


def _num_logs(table: tuple[Feature, ...]) -> int:
    """Columns that are shown as logarithms: they come first."""
    return sum(len(row.columns) for row in table if row.is_log)


_WIDTH = len(CANDIDATE_COLUMNS)
_CANDIDATE, _CONTEXT = _starts(CANDIDATE_FEATURES), _starts(CONTEXT_FEATURES)
_CANDIDATE_LOGS, _CONTEXT_LOGS = _num_logs(CANDIDATE_FEATURES), _num_logs(CONTEXT_FEATURES)
_LOW, _HIGH = CANDIDATE_LOW.astype(np.float32), CANDIDATE_HIGH.astype(np.float32)
_CONTEXT_LOW, _CONTEXT_HIGH = CONTEXT_LOW.astype(np.float32), CONTEXT_HIGH.astype(np.float32)

_TOTAL, _OVER_BEST, _PARTS = _CANDIDATE["total"], _CANDIDATE["over_best"], _CANDIDATE["parts"]
_HELD, _USES = _CANDIDATE["held"], _CANDIDATE["uses"]
_CURRENT, _WARM = _CANDIDATE["is_current"], _CANDIDATE["is_warm"]
_NUM_HELD = _USES - _HELD

_K, _Q, _LENGTH, _NODE_AGE = (_CONTEXT[name] for name in ("load_factor", "queue_delay", "queue_length", "node_age"))
_SAMPLE, _SAMPLE_AGE, _RATE = (_CONTEXT[name] for name in ("sample", "sample_age", "rate"))
_RTT, _BACKLOG, _ERRORS, _REQUEST = (_CONTEXT[name] for name in ("round_trip", "backlog", "errors", "request"))
_NODE_PRESENT, _NODE_UP, _BUSY = (_CONTEXT[name] for name in ("node_present", "node_up", "utilisation"))
_LINK_PRESENT = _CONTEXT["link_present"]

_FLOOR = np.float32(1e-3)
_PER_DECADE = np.float32(1.0 / np.log(10.0))
_MOST = 1e9


@compiled
def show(r: Plans, x: State, candidates: Row, context: Row, mask: Row) -> None:
    """Write what a policy sees of a state, and what the planner predicts of every plan (`State.total_s`)."""
    believe(r, x)
    best_s = _show_candidates(r, x, candidates, mask)
    for row in range(NUM_CANDIDATES):
        at = row * _WIDTH
        total_s = x.total_s[0 if r.padding[row] == 1 else row]
        candidates[at + _OVER_BEST] = _log(total_s / best_s)
        candidates[at + _CURRENT] = x.current == row
        for column in range(at, at + _WIDTH):
            low, high = _LOW[column - at], _HIGH[column - at]
            candidates[column] = min(max(candidates[column], low), high)
    for row in range(NUM_CANDIDATES, ROWS):
        x.total_s[row] = math.inf if r.padding[row] == 1 else predict(r, x, row)
    for column in range(len(context)):
        context[column] = 0.0
    _show_nodes(r, x, context)
    _show_links(r, x, context)
    _show_request(r, x, context)
    for column in range(len(context)):
        value = _log(context[column]) if column < _CONTEXT_LOGS else context[column]
        context[column] = min(max(value, _CONTEXT_LOW[column]), _CONTEXT_HIGH[column])


@compiled
def _log(value: float) -> float:
    """What is shown of a number that is at least 0."""
    return float(math.log(np.float32(value) + _FLOOR) * _PER_DECADE)


@compiled
def _show_candidates(r: Plans, x: State, candidates: Row, mask: Row) -> float:
    """Encode all but what needs the best of the totals; gives that."""
    rate_hz, per_s = x.request_rate_hz if x.request_rate_hz > 0.0 else 0.0, 1.0 / r.reference_s
    best_s, least_down = math.inf, NODES + 1
    for row in range(NUM_CANDIDATES):
        at = row * _WIDTH
        if r.padding[row] == 1:  # it repeats the first plan
            for column in range(_WIDTH):  # one by one: numba takes seconds to compile a slice
                candidates[at + column] = candidates[column]
            x.total_s[row] = math.inf
            continue
        x.total_s[row] = total_s = predict(r, x, row)
        candidates[at + _TOTAL] = _log(total_s * per_s)
        for part in range(len(PARTS)):
            candidates[at + _PARTS + part] = _log(x.parts[part] * per_s)
        for part in range(_NUM_HELD):
            candidates[at + _HELD + part] = x.parts[part] * rate_hz
        for tier in range(3):
            candidates[at + _USES + tier] = r.has_layers[row, tier]
        candidates[at + _WARM] = 0.5  # nodes do not tell which segments they hold
        down = nodes_down(r, x, row)
        if down < least_down:
            best_s, least_down = math.inf, down
        if down == least_down:
            best_s = min(best_s, total_s)
    for row in range(NUM_CANDIDATES):
        mask[row] = r.padding[row] == 0 and nodes_down(r, x, row) == least_down
    return best_s


@compiled
def _show_nodes(r: Plans, x: State, context: Row) -> None:
    for shown in range(SHOWN_NODES):
        node = r.shown_node[shown]
        if node < 0:
            continue
        k, q_s, busy_frac = x.load_factor[node], x.queue_delay_s[node], x.utilisation_frac[node]
        context[_K + shown] = k if k > 1.0 else 1.0
        context[_Q + shown] = (q_s if q_s > 0.0 else 0.0) / r.reference_s
        context[_LENGTH + shown] = 1.0 + x.queue_length[node]
        context[_NODE_AGE + shown] = min(x.node_age_s[node], NEVER_S)
        context[_NODE_PRESENT + shown] = 1.0
        context[_NODE_UP + shown] = x.is_up[node]
        context[_BUSY + shown] = busy_frac if busy_frac > 0.0 else 0.0


@compiled
def _show_links(r: Plans, x: State, context: Row) -> None:
    for shown in range(SHOWN_LINKS):
        link = r.shown_link[shown]
        if link < 0:
            continue
        input_s = r.reference_bytes * x.s_per_byte[link]
        for n in range(NUM_SHOWN):
            bps = x.bandwidth_bps[link, n]
            sample_s = input_s if math.isnan(bps) else r.reference_bytes * 8.0 / max(bps, 1.0)
            context[_SAMPLE + shown * NUM_SHOWN + n] = sample_s / r.reference_s
            context[_SAMPLE_AGE + shown * NUM_SHOWN + n] = x.sample_age_s[link, n]
        context[_RATE + shown] = input_s / r.reference_s
        context[_RTT + shown] = 2.0 * x.half_rtt_s[link] / r.reference_s
        context[_BACKLOG + shown] = x.backlog_bytes[link] * x.s_per_byte[link] / r.reference_s
        context[_LINK_PRESENT + shown] = 1.0


@compiled
def _show_request(r: Plans, x: State, context: Row) -> None:
    for n in range(SAMPLES):
        error = x.recent_errors[n]
        context[_ERRORS + n] = 1.0 if math.isnan(error) else max(error + 1.0, 0.0)
    rate_hz = x.request_rate_hz if x.request_rate_hz > 0.0 else 0.0
    context[_REQUEST] = min(x.device_backlog_s / r.reference_s, _MOST)
    context[_REQUEST + 1] = min(x.uplink_backlog_bytes / r.reference_bytes, _MOST)
    context[_REQUEST + 2] = min(rate_hz * r.reference_s, _MOST)
    context[_REQUEST + 3] = min(x.deadline_s / r.reference_s, _MOST)
    context[_REQUEST + 4] = min(x.input_bytes / r.reference_bytes, _MOST)
