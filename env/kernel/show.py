"""What a policy sees, for one lane: `runtime.planning.features.FeatureEncoder` compiled. A test holds the two equal.

The table in `runtime.planning.features` says which columns there are, where, within which bounds, and which are shown as
logarithms; here is what is in them.
"""

import math
from typing import Any

import numpy as np

from env.kernel.compiled import ZERO, compiled, wide
from env.kernel.decide import (
    NEVER_S,
    glance,
    newest_told,
    nodes_down,
    num_told,
    predict,
    request_rate_hz,
    total,
)
from env.kernel.layout import (
    BPS,
    DEADLINE,
    MEASURED,
    NODES,
    SAMPLES,
    SHOWN_LINKS,
    SHOWN_NODES,
    Lane,
    Plans,
    Requests,
    View,
    World,
)
from env.kernel.links import LAST_SAMPLE, server_of
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.cost import PARTS
from runtime.planning.features import (
    CANDIDATE_COLUMNS,
    CANDIDATE_FEATURES,
    CANDIDATE_HIGH,
    CANDIDATE_LOW,
    CONTEXT_COLUMNS,
    CONTEXT_FEATURES,
    CONTEXT_HIGH,
    CONTEXT_LOW,
    NUM_SHOWN,
    Feature,
)

Row = Any
"""One lane's part of an observation; of candidates a table, shape (K, columns)."""

Single = Any
"""A number in single precision."""


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


_WIDTH, _NUM_CONTEXT = len(CANDIDATE_COLUMNS), len(CONTEXT_COLUMNS)
_CANDIDATE, _CONTEXT = _starts(CANDIDATE_FEATURES), _starts(CONTEXT_FEATURES)
_CANDIDATE_LOGS, _CONTEXT_LOGS = _num_logs(CANDIDATE_FEATURES), _num_logs(CONTEXT_FEATURES)
_LOW, _HIGH = CANDIDATE_LOW.astype(np.float32), CANDIDATE_HIGH.astype(np.float32)
_CONTEXT_LOW, _CONTEXT_HIGH = CONTEXT_LOW.astype(np.float32), CONTEXT_HIGH.astype(np.float32)

_TOTAL, _OVER_BEST, _PARTS = _CANDIDATE["total"], _CANDIDATE["over_best"], _CANDIDATE["parts"]
_HELD, _USES = _CANDIDATE["held"], _CANDIDATE["uses"]
_CURRENT, _WARM = _CANDIDATE["is_current"], _CANDIDATE["is_warm"]
_NUM_HELD = _USES - _HELD
_HELD_LOW, _HELD_HIGH = float(CANDIDATE_LOW[_HELD]), float(CANDIDATE_HIGH[_HELD])

_K, _Q, _LENGTH, _NODE_AGE = (_CONTEXT[name] for name in ("load_factor", "queue_delay", "queue_length", "node_age"))
_SAMPLE, _SAMPLE_AGE, _RATE = (_CONTEXT[name] for name in ("sample", "sample_age", "rate"))
_RTT, _BACKLOG, _ERRORS, _REQUEST = (_CONTEXT[name] for name in ("round_trip", "backlog", "errors", "request"))
_NODE_PRESENT, _NODE_UP, _BUSY = (_CONTEXT[name] for name in ("node_present", "node_up", "utilisation"))
_LINK_PRESENT = _CONTEXT["link_present"]

_FLOOR = np.float32(1e-3)
_PER_OCTAVE = np.float32(np.log10(2.0))
_SERIES = tuple(np.float32(2.0 / (power * np.log(10.0))) for power in (1, 3, 5, 7, 9))
"""Of the logarithm to base 10 of (1 + s) / (1 - s), by powers of s; what is left out is less than 1e-9 at the ends."""

_ONE, _BELOW_ONE, _MANTISSA_BITS = np.float32(1.0), np.int32(np.float32(np.sqrt(0.5)).view(np.int32)), np.int32(23)
_MOST = 1e9


@compiled
def show(w: World, requests: Requests, r: Plans, s: Lane, v: View, candidates: Row, context: Row, mask: Row) -> None:
    """Write what client 0's policy sees at its next request, and what the planner predicts of every plan."""
    glance(w, requests, r, s, v, ZERO)
    rate_hz = request_rate_hz(requests, ZERO, s.clients[0].next_request)
    rate_hz = rate_hz if rate_hz > 0.0 else 0.0
    best_s = _show_candidates(r, s, v, rate_hz, candidates, mask)
    for row in range(NUM_CANDIDATES):
        if r.rows[row].padding == 1:  # it repeats the first plan
            for column in range(_WIDTH):  # one by one: numba takes seconds to compile a slice
                candidates[row, column] = candidates[0, column]
            s.predicted_total_s[row] = math.inf
        else:
            candidates[row, _OVER_BEST] = s.predicted_total_s[row] / best_s
            for column in range(_CANDIDATE_LOGS):
                candidates[row, column] = _clip(_log(candidates[row, column]), _LOW[column], _HIGH[column])
        candidates[row, _CURRENT] = s.clients[0].in_force == row
    for row in range(NUM_CANDIDATES, r.num_rows):
        s.predicted_total_s[row] = math.inf if r.rows[row].padding == 1 else total(predict(r, v, row))
    for column in range(len(context)):
        context[column] = 0.0
    _show_nodes(r, s, context)
    _show_links(w, r, s, v, context)
    _show_request(requests, r, s, v, rate_hz, context)
    for column in range(_CONTEXT_LOGS):
        context[column] = _clip(_log(context[column]), _CONTEXT_LOW[column], _CONTEXT_HIGH[column])
    for column in range(_CONTEXT_LOGS, _NUM_CONTEXT):
        context[column] = _clip(context[column], _CONTEXT_LOW[column], _CONTEXT_HIGH[column])


@compiled
def _log(value: Single) -> Single:
    """What is shown of a number that is at least 0.

    Nothing but arithmetic in single precision, so that loops over it take eight at a time: a library's function would be
    called for each.
    """
    bits = np.float32(value + _FLOOR).view(np.int32)
    octave = np.int32(np.int32(bits - _BELOW_ONE) >> _MANTISSA_BITS)
    rest = np.int32(bits - np.int32(octave << _MANTISSA_BITS)).view(np.float32)  # from sqrt(0.5) to sqrt(2)
    s = (rest - _ONE) / (rest + _ONE)
    a, b, c, d, e = _SERIES
    z = s * s
    return np.float32(octave) * _PER_OCTAVE + s * (a + z * (b + z * (c + z * (d + z * e))))


@compiled
def _clip(value: Single, low: Single, high: Single) -> Single:
    """Keep what is shown within the bounds of its column."""
    return min(max(value, low), high)


@compiled
def _show_candidates(r: Plans, s: Lane, v: View, rate_hz: float, candidates: Row, mask: Row) -> float:
    """Write the numbers, those before their logarithm, but what needs the best of the totals; gives that."""
    per_s = 1.0 / r.reference_s
    best_s, least_down = math.inf, NODES + 1
    for row in range(NUM_CANDIDATES):
        if r.rows[row].padding == 1:
            continue
        parts = predict(r, v, row)
        total_s = total(parts)
        s.predicted_total_s[row] = total_s
        candidates[row, _TOTAL] = total_s * per_s
        for part in range(len(PARTS)):
            candidates[row, _PARTS + part] = parts[part] * per_s
        for part in range(_NUM_HELD):
            candidates[row, _HELD + part] = min(max(parts[part] * rate_hz, _HELD_LOW), _HELD_HIGH)
        for tier in range(3):
            candidates[row, _USES + tier] = r.rows[row].has_layers[tier]
        candidates[row, _WARM] = 0.5  # nodes do not tell which segments they hold
        down = nodes_down(r, v, row)
        if down < least_down:
            best_s, least_down = math.inf, down
        if down == least_down:
            best_s = min(best_s, total_s)
    for row in range(NUM_CANDIDATES):
        mask[row] = r.rows[row].padding != 1 and nodes_down(r, v, row) == least_down
    return best_s


@compiled
def _show_nodes(r: Plans, s: Lane, context: Row) -> None:
    for shown in range(SHOWN_NODES):
        node = wide(r.shown_node[shown])
        if node < 0:
            continue
        context[_K + shown], context[_LENGTH + shown] = 1.0, 1.0
        context[_NODE_PRESENT + shown], context[_NODE_UP + shown] = 1.0, 1.0
        if node > 0:
            k, q_s, busy_frac = s.known[0, node].k, s.known[0, node].q_s, s.known[0, node].busy_frac
            context[_K + shown] = k if k > 1.0 else 1.0
            context[_Q + shown] = (q_s if q_s > 0.0 else 0.0) / r.reference_s
            context[_LENGTH + shown] = 1.0 + s.known[0, node].length
            context[_NODE_AGE + shown] = min(s.now_s - s.known[0, node].heard_s, NEVER_S)
            context[_NODE_UP + shown] = s.known[0, node].is_up
            context[_BUSY + shown] = busy_frac if busy_frac > 0.0 else 0.0


@compiled
def _show_links(w: World, r: Plans, s: Lane, v: View, context: Row) -> None:
    for shown in range(SHOWN_LINKS):
        link = wide(r.shown_link[shown])
        if link < 0:
            continue
        source, server = wide(r.link_source[link]), server_of(r, ZERO, link)
        input_s = r.reference_bytes * v.s_per_byte[link]
        newest = newest_told(w, s, server, s.now_s if source == 0 else s.known[0, source].heard_s)
        known = num_told(s, server, newest)
        for n in range(NUM_SHOWN):
            k = (newest - min(n, max(known - 1, 0))) & LAST_SAMPLE
            bps = w.meters.sample[server, k, BPS]
            sample_s = r.reference_bytes * 8.0 / max(bps, 1.0) if known > 0 else input_s
            age_s = s.now_s - w.meters.sample[server, k, MEASURED] if n < known else NEVER_S
            context[_SAMPLE + shown * NUM_SHOWN + n] = sample_s / r.reference_s
            context[_SAMPLE_AGE + shown * NUM_SHOWN + n] = age_s
        context[_RATE + shown] = input_s / r.reference_s
        context[_RTT + shown] = 2.0 * v.half_rtt_s[link] / r.reference_s
        context[_BACKLOG + shown] = v.backlog_bytes[link] * v.s_per_byte[link] / r.reference_s
        context[_LINK_PRESENT + shown] = 1.0


@compiled
def _show_request(requests: Requests, r: Plans, s: Lane, v: View, rate_hz: float, context: Row) -> None:
    count = s.clients[0].error_count
    for n in range(SAMPLES):
        error = s.clients[0].errors[(count - 1 - n) % SAMPLES] if n < count else 0.0
        context[_ERRORS + n] = max(error + 1.0, 0.0)
    context[_REQUEST] = min(v.device_backlog_s / r.reference_s, _MOST)
    context[_REQUEST + 1] = min(v.uplink_backlog_bytes / r.reference_bytes, _MOST)
    context[_REQUEST + 2] = min(rate_hz * r.reference_s, _MOST)
    context[_REQUEST + 3] = min(requests[0, s.clients[0].next_request, DEADLINE] / r.reference_s, _MOST)
    context[_REQUEST + 4] = min(v.input_bytes / r.reference_bytes, _MOST)
