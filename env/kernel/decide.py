"""What a device knows when a request comes, and what the planner makes of it.

`read_state` writes what `runtime.planning.arrays.StateArrays` holds; `glance` and `weigh` are `tuned_arrays` and `predict`
of `runtime.planning` for one lane, whose plans differ from the next lane's, without a state in between. A test holds the
two equal.
"""

import math

from env.kernel.compiled import ZERO, compiled, wide
from env.kernel.layout import (
    ARRIVES,
    BPS,
    DEADLINE,
    INPUT,
    LINKS,
    LOG_MEAN,
    LOG_SUM,
    MEASURED,
    METER,
    NODES,
    SAMPLES,
    SHOWN_LINKS,
    WEIGHT,
    Lane,
    Plans,
    Requests,
    State,
    View,
    World,
)
from env.kernel.links import (
    DEVICE_QUEUE,
    LAST_SAMPLE,
    LINK_QUEUE,
    SAMPLE_RATE,
    hop_bytes,
    rtt_at,
    server_of,
    sum_samples,
)
from env.kernel.tiles import weigh_spans
from env.world import PEERS
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.cost import PARTS
from runtime.planning.estimators import MIN_BANDWIDTH_BPS, NOMINAL_BANDWIDTH_BPS, NOMINAL_RTT_S, TunedSettings

NEVER_S = 1e9
_TUNED = TunedSettings()
_MEAN_WEIGHT = _TUNED.mean_weight
_STALE_S = _TUNED.stale_after_s
_LOAD_RATE = -1.0 / _TUNED.load_time_s
_LOG_MIN_BPS = math.log(MIN_BANDWIDTH_BPS)
_ARRIVALS = 8

_ORDER = (
    "device", "edge", "cloud", "uplink", "backbone_up", "backbone_down", "downlink", "round_trips", "codec",
    "wait_device", "wait_uplink", "wait_backbone", "wait_nodes", "messages",
)  # fmt: skip
assert PARTS == _ORDER, f"`predict` gives the parts {_ORDER}, planning has {PARTS}"

Parts = tuple[float, float, float, float, float, float, float, float, float, float, float, float, float, float]
"""A predicted latency part by part, in seconds."""

# --- what a rule is told ----------------------------------------------------------------------------------------------


@compiled
def read_state(w: World, requests: Requests, r: Plans, s: Lane, out: State, client: int) -> None:
    """Write what a client's device has measured, as its next request comes."""
    device = s.clients[client]
    now_s, number = s.now_s, device.next_request
    out.uplink_backlog_bytes = 0.0
    for link in range(r.num_links):
        _read_link(w, r, s, out, client, link)
    for node in range(r.num_nodes):
        out.is_up[node] = s.known[client, node].is_up
        is_known = s.known[client, node].heard_s > -math.inf
        out.node_age_s[node] = now_s - s.known[client, node].heard_s if is_known else NEVER_S
        out.load_factor[node] = s.known[client, node].k
        out.queue_delay_s[node] = s.known[client, node].q_s
        out.queue_length[node] = s.known[client, node].length
        out.utilisation_frac[node] = s.known[client, node].busy_frac
    out.is_up[0] = True
    out.load_factor[0], out.queue_delay_s[0], out.queue_length[0] = 1.0, 0.0, 0.0
    out.utilisation_frac[0], out.node_age_s[0] = math.nan, 0.0
    out.device_backlog_s = device_backlog_s(r, s, client)
    out.request_rate_hz = request_rate_hz(requests, client, number)
    out.input_bytes = requests[client, number, INPUT]
    out.deadline_s = requests[client, number, DEADLINE]
    count = device.error_count
    for back in range(SAMPLES):
        out.recent_errors[back] = device.errors[(count - 1 - back) % SAMPLES] if back < count else math.nan
    out.current = device.in_force


@compiled
def _read_link(w: World, r: Plans, s: Lane, out: State, client: int, link: int) -> None:
    """Own links as of now, the others as their sender last told."""
    now_s, source = s.now_s, wide(r.link_source[link])
    server = server_of(r, client, link)
    wire = s.servers[server]
    told_s = now_s if source == 0 else s.known[client, source].heard_s
    newest = newest_told(w, s, server, told_s)
    known = num_told(s, server, newest)
    for at in range(SAMPLES):
        k = (newest - min(at, max(known - 1, 0))) & LAST_SAMPLE
        out.bandwidth_bps[link, at] = w.meters.sample[server, k, BPS] if known > 0 else math.nan
        out.sample_age_s[link, at] = now_s - w.meters.sample[server, k, MEASURED] if at < known else NEVER_S
    log_mean = w.meters.sample[server, newest & LAST_SAMPLE, LOG_MEAN]
    out.mean_bandwidth_bps[link] = math.exp(log_mean) if known > 0 else math.nan
    out.rtt_s[link] = rtt_at(w, r, client, link, max(told_s, 0.0)) if told_s > -math.inf else math.nan
    out.backlog_bytes[link] = 0.0
    out.rate_cap_bps[link] = math.inf
    flying = wire.slot != -1
    if flying:
        out.backlog_bytes[link] = wire.sent_bytes
        if source == 0:
            elapsed_s = now_s - wire.start_s
            out.rate_cap_bps[link] = wire.sent_bytes * 8.0 / max(elapsed_s, 1e-9)
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.place == LINK_QUEUE and request.server == server:
            out.backlog_bytes[link] += hop_bytes(w, r, s, slot)
    if source == 0:
        out.uplink_backlog_bytes += out.backlog_bytes[link]


@compiled
def request_rate_hz(requests: Requests, client: int, number: int) -> float:
    """Rate of a client's last arrivals, NaN when there was one."""
    first = max(number + 1 - _ARRIVALS, 0)
    span_s = requests[client, number, ARRIVES] - requests[client, first, ARRIVES]
    return float((number - first) / span_s) if span_s > 0.0 else math.nan


@compiled
def newest_told(w: World, s: Lane, server: int, told_s: float) -> int:
    """Number of a link's newest sample by the instant at which its sender last told, -1 for none that is kept."""
    count = s.servers[server].meter_count
    newest = count - 1
    while newest >= max(count - METER, 0) and w.meters.sample[server, newest & LAST_SAMPLE, MEASURED] > told_s:
        newest -= 1
    return int(newest)


@compiled
def num_told(s: Lane, server: int, newest: int) -> int:
    """How many samples from that one back are kept, of those that estimators take."""
    oldest = max(s.servers[server].meter_count - METER, 0)
    return int(max(min(newest + 1 - oldest, SAMPLES), 0))


@compiled
def device_backlog_s(r: Plans, s: Lane, client: int) -> float:
    """Predicted seconds of everything that waits or runs on a device."""
    device = s.clients[client]
    total = 0.0
    if device.slot >= 0:
        total += max(device.predicted_end_s - s.now_s, 0.0)
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.client == client:
            if request.place == DEVICE_QUEUE:
                total += r.rows[request.row].idle_s[0]
            if request.local == 2:
                total += remainder_s(r, s, slot)
    return total


@compiled
def remainder_s(r: Plans, s: Lane, slot: int) -> float:
    """Idle seconds that the device needs to answer a request by itself."""
    request = s.slots[slot]
    own = r.rows[request.row].idle_s[0] if request.is_stage_done else 0.0
    return float(max(r.local_s - own, 0.0))


# --- what the planner makes of it -------------------------------------------------------------------------------------


@compiled
def glance(w: World, requests: Requests, r: Plans, s: Lane, v: View, client: int) -> None:
    """Work out what the tuned estimators believe of links and nodes as a client's next request comes."""
    for shown in range(SHOWN_LINKS):  # those between edge nodes: `_glance_tiles`
        if r.shown_link[shown] >= 0:
            _glance_link(w, r, s, v, client, wide(r.shown_link[shown]))
    for shown in range(SHOWN_LINKS):
        if r.shown_link[shown] >= 0:
            _complete(r, v, wide(r.shown_link[shown]))
    _glance_backlogs(w, r, s, v, client)
    v.down = ZERO
    for node in range(r.num_nodes):
        known_k, known_q, decay = s.known[client, node].k, s.known[client, node].q_s, 1.0
        age_s = s.now_s - s.known[client, node].heard_s
        if age_s > _STALE_S:
            decay = math.exp((age_s - _STALE_S) * _LOAD_RATE)
        is_known = node > 0 and not math.isnan(known_k)
        v.k[node] = 1.0 + decay * (max(known_k, 1.0) - 1.0) if is_known else 1.0
        is_known = node > 0 and not math.isnan(known_q)
        v.q_s[node] = decay * max(known_q, 0.0) if is_known else 0.0
        if node > 0 and not s.known[client, node].is_up:
            v.down |= 1 << node
    v.device_backlog_s = device_backlog_s(r, s, client)
    v.input_bytes = requests[client, s.clients[client].next_request, INPUT]
    if r.num_tiled > 0:
        _glance_tiles(w, r, s, v, client)


@compiled
def _glance_tiles(w: World, r: Plans, s: Lane, v: View, client: int) -> None:
    """The same of the links between edge nodes, and what spans in tiles then take."""
    for link in range(r.num_links):
        if r.path[link] == PEERS:
            _glance_link(w, r, s, v, client, link)
    for link in range(r.num_links):
        if r.path[link] == PEERS:
            _complete(r, v, link)
    for link in range(r.num_links):
        if r.path[link] == PEERS:
            v.s_per_byte[link] = 8.0 / v.s_per_byte[link]
            v.half_rtt_s[link] *= 0.5
    weigh_spans(w.tiles, r, v)


@compiled
def _glance_link(w: World, r: Plans, s: Lane, v: View, client: int, link: int) -> None:
    """Rate and round trip of a link, NaN where nothing is known; `_complete` turns them into what a view holds."""
    source, server = wide(r.link_source[link]), server_of(r, client, link)
    wire = s.servers[server]
    told_s = s.now_s if source == 0 else s.known[client, source].heard_s
    v.s_per_byte[link] = v.half_rtt_s[link] = math.nan
    if told_s > -math.inf:
        v.half_rtt_s[link] = rtt_at(w, r, client, link, max(told_s, 0.0))
        newest = newest_told(w, s, server, told_s)
        known = num_told(s, server, newest)
        if known > 0:
            bps = _tuned_bps(w, s, server, newest, known)
            if source == 0 and wire.slot != -1:
                flying_s = max(s.now_s - wire.start_s, 1e-9)
                bps = min(bps, wire.sent_bytes * 8.0 / flying_s)
            v.s_per_byte[link] = max(bps, MIN_BANDWIDTH_BPS)


@compiled
def _tuned_bps(w: World, s: Lane, server: int, newest: int, known: int) -> float:
    """Rate of one link under `runtime.planning.estimators.tuned_arrays`."""
    sample = w.meters.sample[server, newest & LAST_SAMPLE]
    weight, total = sample[WEIGHT], sample[LOG_SUM]
    if known < min(newest + 1, SAMPLES):  # some of them are kept no more
        weight, total = sum_samples(w, server, newest, known)
    log_mean, log_rate = max(sample[LOG_MEAN], _LOG_MIN_BPS), total / weight
    weight *= math.exp((s.now_s - sample[MEASURED]) * SAMPLE_RATE)
    return math.exp(log_mean + weight / (weight + _MEAN_WEIGHT) * (log_rate - log_mean))


@compiled
def _complete(r: Plans, v: View, link: int) -> None:
    """Take what is not known of a link from its opposite, else the nominal values."""
    back = wide(r.reverse[link])
    if math.isnan(v.half_rtt_s[link]):
        v.half_rtt_s[link] = NOMINAL_RTT_S if math.isnan(v.half_rtt_s[back]) else v.half_rtt_s[back]
    if math.isnan(v.s_per_byte[link]):
        v.s_per_byte[link] = NOMINAL_BANDWIDTH_BPS if math.isnan(v.s_per_byte[back]) else v.s_per_byte[back]


@compiled
def _glance_backlogs(w: World, r: Plans, s: Lane, v: View, client: int) -> None:
    """Bytes in front of every link, and rates and round trips as predictions take them."""
    for shown in range(SHOWN_LINKS):
        link = wide(r.shown_link[shown])
        if link >= 0:
            v.s_per_byte[link] = 8.0 / v.s_per_byte[link]
            v.half_rtt_s[link] *= 0.5
            server = server_of(r, client, link)
            wire = s.servers[server]
            v.backlog_bytes[link] = wire.sent_bytes if wire.slot != -1 else 0.0
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.place == LINK_QUEUE:
            link = request.server % LINKS
            if request.server == server_of(r, client, link):
                v.backlog_bytes[link] += hop_bytes(w, r, s, slot)
    v.uplink_backlog_bytes = 0.0
    for shown in range(SHOWN_LINKS):
        link = wide(r.shown_link[shown])
        if link >= 0 and r.link_source[link] == 0:
            v.uplink_backlog_bytes += v.backlog_bytes[link]


@compiled
def weigh(r: Plans, v: View) -> tuple[int, float]:
    """Choose as the planner does, and tell what it predicts of its choice."""
    best, best_down, best_s = 0, NODES + 1, math.inf
    for row in range(NUM_CANDIDATES):
        if r.rows[row].padding == 1:
            continue
        down = nodes_down(r, v, row)
        if down > best_down:
            continue
        total_s = total(predict(r, v, row))
        if down < best_down or total_s < best_s:
            best, best_down, best_s = row, down, total_s
    return best, best_s


@compiled
def nodes_down(r: Plans, v: View, row: int) -> int:
    """How many of the nodes that a plan needs are down.

    `Candidates.penalty` counts links of tiles too of which nothing was told. Here their head is then down itself, and some
    plan without tiles needs fewer nodes that are: the device's own, or a single edge node's.
    """
    both, down = r.rows[row].needs & v.down, 0
    while both:
        both &= both - 1
        down += 1
    return down


@compiled
def predict(r: Plans, v: View, row: int) -> Parts:
    """Predict the latency of one plan as `runtime.planning.cost.predict` has it, in the order of its parts."""
    plan = r.rows[row]
    device, edge, cloud = plan.node[0], plan.node[1], plan.node[2]
    device_s = v.k[device] * plan.idle_s[0]
    edge_s = v.k[edge] * plan.idle_s[1]
    if plan.num_peers > 0:
        edge_s += v.tiled_s[row]
    cloud_s = v.k[cloud] * plan.idle_s[2]
    queue_s = v.q_s[device] * plan.has_layers[0]
    queue_s += v.q_s[edge] * plan.has_layers[1]
    queue_s += v.q_s[cloud] * plan.has_layers[2]
    wait_device_s = v.device_backlog_s * plan.has_layers[0]
    up_s, up_trip_s, up_codec_s, is_coded = _transfer(r, v, row, 0, False)
    on_s, on_trip_s, on_codec_s, is_coded = _transfer(r, v, row, 1, is_coded)
    back_s, back_trip_s, back_codec_s, is_coded = _transfer(r, v, row, 2, is_coded)
    down_s, down_trip_s, down_codec_s, is_coded = _transfer(r, v, row, 3, is_coded)
    trips_s = up_trip_s + on_trip_s + back_trip_s + down_trip_s
    codec_s = plan.plain_codec_s + up_codec_s + on_codec_s + back_codec_s + down_codec_s
    up, on = plan.link[0], plan.link[1]
    wait_uplink_s = max(v.uplink_backlog_bytes * v.s_per_byte[up] - device_s, 0.0)
    wait_backbone_s = v.backlog_bytes[on] * v.s_per_byte[on]
    wait_uplink_s = wait_uplink_s if plan.has_hop[0] != 0 else 0.0
    wait_backbone_s = wait_backbone_s if plan.has_hop[1] != 0 else 0.0
    return (
        device_s, edge_s, cloud_s, up_s, on_s, back_s, down_s, trips_s, codec_s, wait_device_s, wait_uplink_s,
        wait_backbone_s, queue_s, plan.message_s,
    )  # fmt: skip


@compiled
def _transfer(r: Plans, v: View, row: int, hop: int, is_coded: bool) -> tuple[float, float, float, bool]:
    """Seconds on a link, of its half round trip and of the codec, and whether it is sent coded."""
    plan = r.rows[row]
    # No branches: plans differ, so that every other one would be guessed wrong.
    has_hop, link, coding_s = plan.has_hop[hop] != 0, plan.link[hop], plan.coding_s[hop]
    s_per_byte, half_rtt_s = v.s_per_byte[link], v.half_rtt_s[link]
    saved_s = plan.saved_bytes[hop] * s_per_byte
    sent_s = (plan.plain_bytes[hop] + plan.has_input[hop] * v.input_bytes) * s_per_byte
    chooses = has_hop & ((hop % 2 == 0) | (plan.is_relayed == 0))  # the head passes on what came in as it came
    is_coded = (chooses & (saved_s > coding_s)) | (is_coded & (not chooses))
    sent_s -= saved_s if is_coded else 0.0
    return (
        sent_s if has_hop else 0.0,
        half_rtt_s if has_hop else 0.0,
        coding_s if has_hop & is_coded else 0.0,
        is_coded,
    )


@compiled
def total(p: Parts) -> float:
    """Sum the parts."""
    return p[0] + p[1] + p[2] + p[3] + p[4] + p[5] + p[6] + p[7] + p[8] + p[9] + p[10] + p[11] + p[12] + p[13]
