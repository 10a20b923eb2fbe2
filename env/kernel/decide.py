"""What a device knows when a request comes, and what the planner makes of it.

`read_state` writes what `runtime.planning.arrays.StateArrays` holds; `weigh` is `tuned_arrays` and `predict` of
`runtime.planning` for one lane, whose plans differ from the next lane's. A test holds the two equal.
"""

import math

from env.kernel.compiled import compiled
from env.kernel.layout import (
    ARRIVES,
    DEADLINE,
    INPUT,
    METER,
    NODES,
    ROWS,
    SAMPLES,
    SHOWN_LINKS,
    Lane,
    Plans,
    State,
    World,
)
from env.kernel.links import LINK_QUEUE, hop_bytes, rtt_at, server_of
from runtime.planning.cost import PARTS
from runtime.planning.estimators import MIN_BANDWIDTH_BPS, NOMINAL_BANDWIDTH_BPS, NOMINAL_RTT_S, TunedSettings

NEVER_S = 1e9
_TUNED = TunedSettings()
_RATE = -1.0 / _TUNED.bandwidth_time_s
_MEAN_WEIGHT = _TUNED.mean_weight
_STALE_S = _TUNED.stale_after_s
_LOAD_RATE = -1.0 / _TUNED.load_time_s
_ARRIVALS = 8
_TRANSFERS = PARTS.index("uplink")  # and the three after it
_ROUND_TRIPS, _CODEC, _MESSAGES = PARTS.index("round_trips"), PARTS.index("codec"), PARTS.index("messages")
_WAIT_DEVICE, _WAIT_UPLINK = PARTS.index("wait_device"), PARTS.index("wait_uplink")
_WAIT_BACKBONE, _WAIT_NODES = PARTS.index("wait_backbone"), PARTS.index("wait_nodes")


@compiled
def read_state(w: World, r: Plans, s: Lane, out: State, client: int) -> None:
    """Write what a client's device has measured, as its next request comes."""
    now_s, number = s.now_s, s.next_request[client]
    out.uplink_backlog_bytes = 0.0
    for link in range(r.num_links):
        _read_link(w, r, s, out, client, link)
    for node in range(r.num_nodes):
        out.is_up[node] = s.is_up[client, node]
        is_known = s.heard_s[client, node] > -math.inf
        out.node_age_s[node] = now_s - s.heard_s[client, node] if is_known else NEVER_S
        out.load_factor[node] = s.known_k[client, node]
        out.queue_delay_s[node] = s.known_q_s[client, node]
        out.queue_length[node] = s.known_length[client, node]
        out.utilisation_frac[node] = s.known_busy_frac[client, node]
    out.is_up[0] = True
    out.load_factor[0], out.queue_delay_s[0], out.queue_length[0] = 1.0, 0.0, 0.0
    out.utilisation_frac[0], out.node_age_s[0] = math.nan, 0.0
    out.device_backlog_s = device_backlog_s(r, s, client)
    first = max(number + 1 - _ARRIVALS, 0)
    span_s = w.requests[client, ARRIVES, number] - w.requests[client, ARRIVES, first]
    out.request_rate_hz = (number - first) / span_s if span_s > 0.0 else math.nan
    out.input_bytes = w.requests[client, INPUT, number]
    out.deadline_s = w.requests[client, DEADLINE, number]
    count = s.error_count[client]
    for back in range(SAMPLES):
        out.recent_errors[back] = s.errors[client, (count - 1 - back) % SAMPLES] if back < count else math.nan
    out.current = s.in_force[client]


@compiled
def _read_link(w: World, r: Plans, s: Lane, out: State, client: int, link: int) -> None:
    """Own links as of now, the others as their sender last told."""
    now_s, source = s.now_s, r.link_source[link]
    server = server_of(r, client, link)
    told_s = now_s if source == 0 else s.heard_s[client, source]
    count = s.meter_count[server]
    skip = 0
    while skip < min(count, METER) and s.meter_s[server, (count - 1 - skip) % METER] > told_s:
        skip += 1
    known = min(count - skip, METER - skip, SAMPLES) if told_s > -math.inf else 0
    for at in range(SAMPLES):
        k = (count - 1 - skip - min(at, max(known - 1, 0))) % METER
        out.bandwidth_bps[link, at] = s.meter_bps[server, k] if known > 0 else math.nan
        out.log_bps[link, at] = s.meter_log_bps[server, k]
        out.sample_age_s[link, at] = now_s - s.meter_s[server, k] if at < known else NEVER_S
    newest = (count - 1 - skip) % METER
    out.mean_bandwidth_bps[link] = math.exp(s.meter_log_mean[server, newest]) if known > 0 else math.nan
    out.rtt_s[link] = rtt_at(w, r, client, link, max(told_s, 0.0)) if told_s > -math.inf else math.nan
    out.backlog_bytes[link] = 0.0
    out.rate_cap_bps[link] = math.inf
    flying = s.link_slot[server] != -1
    if flying:
        out.backlog_bytes[link] = s.link_bytes[server]
        if source == 0:
            elapsed_s = now_s - s.link_start_s[server]
            out.rate_cap_bps[link] = s.link_bytes[server] * 8.0 / max(elapsed_s, 1e-9)
    for slot in range(s.top):
        if s.is_active[slot] and s.place[slot] == LINK_QUEUE and s.server[slot] == server:
            out.backlog_bytes[link] += hop_bytes(w, r, s, slot)
    if source == 0:
        out.uplink_backlog_bytes += out.backlog_bytes[link]


@compiled
def device_backlog_s(r: Plans, s: Lane, client: int) -> float:
    """Predicted seconds of everything that waits or runs on a device."""
    total = 0.0
    if s.device_slot[client] >= 0:
        total += max(s.device_predicted_end_s[client] - s.now_s, 0.0)
    for slot in range(s.top):
        if s.is_active[slot] and s.client[slot] == client:
            if s.place[slot] == 1:  # DEVICE_QUEUE
                total += r.idle_s[s.row[slot], 0]
            if s.local[slot] == 2:
                total += remainder_s(r, s, slot)
    return total


@compiled
def remainder_s(r: Plans, s: Lane, slot: int) -> float:
    """Idle seconds that the device needs to answer a request by itself."""
    own = r.idle_s[s.row[slot], 0] if s.is_stage_done[slot] else 0.0
    return float(max(r.local_s - own, 0.0))


@compiled
def weigh(r: Plans, x: State) -> int:
    """Predict every plan's latency from a state, under the tuned estimators; gives the planner's choice."""
    believe(r, x)
    best, best_down, best_s = 0, NODES + 1, math.inf
    for row in range(ROWS):
        if r.padding[row] == 1:
            x.total_s[row] = math.inf
            continue
        x.total_s[row] = total = predict(r, x, row)
        if r.padding[row] == 2:
            continue
        down = nodes_down(r, x, row)
        if down < best_down or (down == best_down and total < best_s):
            best, best_down, best_s = row, down, total
    return best


@compiled
def nodes_down(r: Plans, x: State, row: int) -> int:
    """How many of the nodes that a plan needs are down."""
    down = 0
    for node in range(r.num_nodes):
        if r.needs[row, node] > 0.0 and not x.is_up[node]:
            down += 1
    return down


@compiled
def believe(r: Plans, x: State) -> None:
    """Work out what the tuned estimators believe of links and nodes, unknown links completed."""
    for shown in range(SHOWN_LINKS):  # no plan here takes another
        link = r.shown_link[shown]
        if link >= 0:
            x.s_per_byte[link] = _tuned_bps(x, link)
            x.half_rtt_s[link] = x.rtt_s[link]
    for shown in range(SHOWN_LINKS):
        link = r.shown_link[shown]
        if link >= 0:
            _complete(x, link, r.reverse[link])
    for shown in range(SHOWN_LINKS):
        link = r.shown_link[shown]
        if link >= 0:
            x.s_per_byte[link] = 8.0 / x.s_per_byte[link]
            x.half_rtt_s[link] *= 0.5
    for node in range(r.num_nodes):
        decay = math.exp(max(x.node_age_s[node] - _STALE_S, 0.0) * _LOAD_RATE)
        known_k, known_q = x.load_factor[node], x.queue_delay_s[node]
        x.k[node] = 1.0 + decay * ((1.0 if math.isnan(known_k) else max(known_k, 1.0)) - 1.0)
        x.q_s[node] = decay * (0.0 if math.isnan(known_q) else max(known_q, 0.0))


@compiled
def _complete(x: State, link: int, reverse: int) -> None:
    """Take what is not known of a link from its opposite, else the nominal values."""
    if math.isnan(x.half_rtt_s[link]):
        opposite = x.rtt_s[reverse]
        x.half_rtt_s[link] = NOMINAL_RTT_S if math.isnan(opposite) else opposite
    if math.isnan(x.s_per_byte[link]):
        opposite = _tuned_bps(x, reverse)
        x.s_per_byte[link] = NOMINAL_BANDWIDTH_BPS if math.isnan(opposite) else opposite


@compiled
def _tuned_bps(x: State, link: int) -> float:
    """Rate of one link under `runtime.planning.estimators.tuned_arrays`; NaN where nothing is known."""
    mean = x.mean_bandwidth_bps[link]
    log_mean = math.log(max(mean, MIN_BANDWIDTH_BPS)) if not math.isnan(mean) else math.nan
    newest_s = x.sample_age_s[link, 0]
    if math.isnan(x.bandwidth_bps[link, 0]):
        log_rate, trust = log_mean, 0.0
    else:
        weight, total = 0.0, 0.0
        for n in range(SAMPLES):
            age_s = x.sample_age_s[link, n]
            if age_s >= NEVER_S:
                break
            relative = math.exp((age_s - newest_s) * _RATE)
            weight += relative
            total += relative * x.log_bps[link, n]
        log_rate = total / weight
        weight *= math.exp(newest_s * _RATE)
        trust = weight / (weight + _MEAN_WEIGHT)
    if math.isnan(log_rate):
        return math.nan
    if not math.isnan(log_mean):
        log_rate = log_mean + trust * (log_rate - log_mean)
    return float(max(min(math.exp(log_rate), x.rate_cap_bps[link]), MIN_BANDWIDTH_BPS))


@compiled
def predict(r: Plans, x: State, row: int) -> float:
    """Predict the latency of one plan, part by part (`State.parts`) as `runtime.planning.cost.predict` has it."""
    parts = x.parts
    round_trips_s, codec_s, queue_s = 0.0, r.plain_codec_s[row], 0.0
    for tier in range(3):
        node = r.node[row, tier]
        parts[tier] = x.k[node] * r.idle_s[row, tier]
        queue_s += x.q_s[node] * r.has_layers[row, tier]
    is_coded = False
    for hop in range(4):
        parts[_TRANSFERS + hop] = 0.0
        if r.has_hop[row, hop] == 0.0:
            continue
        link = r.link[row, hop]
        saved_s = r.saved_bytes[row, hop] * x.s_per_byte[link]
        if hop % 2 == 0 or r.is_relayed[row] == 0.0:
            is_coded = saved_s > r.coding_s[row, hop]
        sent = r.plain_bytes[row, hop] + r.has_input[row, hop] * x.input_bytes
        parts[_TRANSFERS + hop] = sent * x.s_per_byte[link]
        round_trips_s += x.half_rtt_s[link]
        if is_coded:
            parts[_TRANSFERS + hop] -= saved_s
            codec_s += r.coding_s[row, hop]
    parts[_ROUND_TRIPS], parts[_CODEC] = round_trips_s, codec_s
    parts[_WAIT_DEVICE] = x.device_backlog_s * r.has_layers[row, 0]
    parts[_WAIT_UPLINK] = parts[_WAIT_BACKBONE] = 0.0
    if r.has_hop[row, 0] > 0.0:
        wait_s = x.uplink_backlog_bytes * x.s_per_byte[r.link[row, 0]]
        parts[_WAIT_UPLINK] = max(wait_s - parts[0], 0.0)
    if r.has_hop[row, 1] > 0.0:
        parts[_WAIT_BACKBONE] = x.backlog_bytes[r.link[row, 1]] * x.s_per_byte[r.link[row, 1]]
    parts[_WAIT_NODES], parts[_MESSAGES] = queue_s, r.message_s[row]
    total = 0.0
    for part in range(len(PARTS)):
        total += parts[part]
    return float(total)
