"""Links: first in, first out, one message in flight until it is acknowledged, at the rate the world gives."""

import math
from typing import cast

import numpy as np

from env.kernel.compiled import compiled, constants
from env.kernel.events import DELAY, LINK, next_sequence, push
from env.kernel.layout import DOWN, INPUT, LINKS, METER, RTT, Lane, Plans, World
from env.traces import GRID_S
from runtime.planning.estimators import MIN_BANDWIDTH_BPS

NOWHERE, DEVICE_QUEUE, LINK_QUEUE, LINK_FLIGHT, NODE_QUEUE, NODE_RUN, DELAYED = constants(7)
"""Places of a request's remote part (`Lanes.place`)."""

DO_SEND, DO_ARRIVE, DO_FAIL, DO_FINISH = constants(4)
"""What a delay leads to (`Lanes.todo`)."""

PROBE = cast(int, np.int64(-2))
MIN_SAMPLE_BYTES = 16 * 1024.0
"""As in `runtime.wire.link`: smaller messages give no bandwidth sample."""

_MEAN_SAMPLES = 100
_MIN_TRANSFER_S = 1e-6


@compiled
def server_of(r: Plans, client: int, link: int) -> int:
    """Server of a link: a device has its own links, those between nodes are shared."""
    if r.link_source[link] == 0 or r.link_target[link] == 0:
        return client * LINKS + link
    return link


@compiled
def rate_at(w: World, r: Plans, client: int, link: int, at_s: float) -> float:
    """Rate of a link at an instant."""
    steps = w.grid.shape[1]
    step = (int(at_s / GRID_S) + r.shift[client]) % steps
    return float(w.grid[r.path[link], step] * r.scale[link])


@compiled
def rtt_at(w: World, r: Plans, client: int, link: int, at_s: float) -> float:
    """Round trip of a link at an instant."""
    steps = w.grid.shape[1]
    return float(w.grid[RTT + r.path[link], (int(at_s / GRID_S) + r.shift[client]) % steps])


@compiled
def transfer_end(w: World, r: Plans, client: int, link: int, start_s: float, nbytes: float) -> float:
    """When the last bit leaves that began to leave at `start_s`: the rate integrated over the grid."""
    steps = w.grid.shape[1]
    path, scale, shift = r.path[link], r.scale[link], r.shift[client]
    bits, at_s = nbytes * 8.0, start_s
    step = int(start_s / GRID_S)
    while True:
        rate = w.grid[path, (step + shift) % steps] * scale
        room = ((step + 1) * GRID_S - at_s) * rate
        if bits <= room:
            return float(at_s + bits / rate)
        bits -= max(room, 0.0)
        step += 1
        at_s = step * GRID_S


@compiled
def is_broken(w: World, r: Plans, client: int, link: int, at_s: float) -> bool:
    """Tell whether a node at either end answers nobody."""
    step = (int(at_s / GRID_S)) % w.grid.shape[1]
    return bool((w.grid[DOWN + r.link_source[link], step] > 0.0) or (w.grid[DOWN + r.link_target[link], step] > 0.0))


@compiled
def newest_bps(s: Lane, server: int) -> float:
    """What the sender last measured, NaN before the first."""
    count = s.meter_count[server]
    return float(s.meter_bps[server, (count - 1) % METER]) if count > 0 else math.nan


@compiled
def add_sample(s: Lane, server: int, at_s: float, nbytes: float, elapsed_s: float, rtt_s: float) -> None:
    """Take in an acknowledged transfer, as `runtime.wire.link.LinkMeter` does."""
    if nbytes < MIN_SAMPLE_BYTES:
        return
    transfer_s = max(elapsed_s - rtt_s / 2.0, elapsed_s / 2.0, _MIN_TRANSFER_S)
    bps = nbytes * 8.0 / transfer_s
    count = s.meter_count[server]
    mean = math.log(bps)
    if count > 0:
        before = s.meter_log_mean[server, (count - 1) % METER]
        mean = before + (mean - before) / min(count + 1, _MEAN_SAMPLES)
    s.meter_s[server, count % METER] = at_s
    s.meter_bps[server, count % METER] = bps
    s.meter_log_bps[server, count % METER] = math.log(max(bps, MIN_BANDWIDTH_BPS))
    s.meter_log_mean[server, count % METER] = mean
    s.meter_count[server] = count + 1


@compiled
def hop_bytes(w: World, r: Plans, s: Lane, slot: int) -> float:
    """Bytes of a request's present transfer."""
    row, hop = s.row[slot], s.hop[slot]
    sent = r.plain_bytes[row, hop]
    sent += r.has_input[row, hop] * w.requests[s.client[slot], INPUT, s.number[slot]]
    return float(sent - r.saved_bytes[row, hop]) if s.is_coded[slot] else float(sent)


@compiled
def enqueue(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Put a request's tensors at the end of the queue of its present link."""
    client = s.client[slot]
    link = r.link[s.row[slot], s.hop[slot]]
    s.place[slot] = LINK_QUEUE
    s.server[slot] = server_of(r, client, link)
    s.queued[slot] = next_sequence(s)
    if s.link_slot[s.server[slot]] == -1:
        _fly(w, r, s, slot)


@compiled
def _fly(w: World, r: Plans, s: Lane, slot: int) -> None:
    server = s.server[slot]
    client, link = server // LINKS, server % LINKS
    end_s = _occupy(w, r, s, server, slot, hop_bytes(w, r, s, slot))
    s.place[slot] = LINK_FLIGHT
    s.todo[slot] = DO_ARRIVE
    push(s, end_s + rtt_at(w, r, client, link, end_s) / 2.0, DELAY, slot, s.version[slot])


@compiled
def _occupy(w: World, r: Plans, s: Lane, server: int, what: int, nbytes: float) -> float:
    """Start a message on an idle link; gives when its last bit leaves. What devices share runs by the first's clock."""
    client, link, now_s = server // LINKS, server % LINKS, s.now_s
    end_s = transfer_end(w, r, client, link, now_s, nbytes)
    s.link_slot[server] = what
    s.link_start_s[server] = now_s
    s.link_bytes[server] = nbytes
    push(s, end_s + rtt_at(w, r, client, link, end_s), LINK, server, s.link_version[server])
    return end_s


@compiled
def probe(w: World, r: Plans, s: Lane, server: int, nbytes: float) -> None:
    """Send a probe over an idle link."""
    _occupy(w, r, s, server, PROBE, nbytes)


@compiled
def acknowledged(w: World, r: Plans, s: Lane, server: int) -> None:
    """The message in flight has been acknowledged: measure, and start the next one."""
    client = server // LINKS
    link, now_s = server % LINKS, s.now_s
    if not is_broken(w, r, client, link, now_s):
        elapsed_s = now_s - s.link_start_s[server]
        add_sample(s, server, now_s, s.link_bytes[server], elapsed_s, rtt_at(w, r, client, link, now_s))
    free(w, r, s, server)


@compiled
def free(w: World, r: Plans, s: Lane, server: int) -> None:
    """End whatever is in flight, and start the next message."""
    s.link_slot[server] = -1
    s.link_version[server] += 1
    first = first_waiting(s, LINK_QUEUE, server)
    if first >= 0:
        _fly(w, r, s, first)


@compiled
def first_waiting(s: Lane, place: int, server: int) -> int:
    """Request that has waited longest in a queue, -1 for none."""
    best, best_queued = -1, np.int64(2**62)
    for slot in range(s.top):
        if s.is_active[slot] and s.place[slot] == place and s.server[slot] == server:
            if s.queued[slot] < best_queued:
                best_queued = s.queued[slot]
                best = slot
    return best


@compiled
def backlog_bytes(w: World, r: Plans, s: Lane, server: int) -> float:
    """Bytes that wait for a link, and those in flight whole."""
    total = 0.0
    if s.link_slot[server] != -1:
        total += s.link_bytes[server]
    for slot in range(s.top):
        if s.is_active[slot] and s.place[slot] == LINK_QUEUE and s.server[slot] == server:
            total += hop_bytes(w, r, s, slot)
    return total
