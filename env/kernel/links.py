"""Links: first in, first out, one message in flight until it is acknowledged, at the rate the world gives."""

import math
from typing import cast

import numpy as np

from env.kernel.compiled import compiled, constants, wide
from env.kernel.events import DELAY, LINK, next_sequence, push
from env.kernel.layout import (
    BPS,
    DECAY,
    DOWN,
    LINKS,
    LOG_BPS,
    LOG_MEAN,
    LOG_SUM,
    MEASURED,
    METER,
    RTT,
    SAMPLES,
    SLOTS,
    STEPS,
    WEIGHT,
    Lane,
    Plans,
    World,
)
from env.traces import GRID_S
from runtime.planning.estimators import MIN_BANDWIDTH_BPS, TunedSettings

NOWHERE, DEVICE_QUEUE, LINK_QUEUE, LINK_FLIGHT, NODE_QUEUE, NODE_RUN, DELAYED, NODE_READY, GATHERING = constants(9)
"""Places of a request's remote part (`SLOT`, `place`). The last two: at its head, all tiles back or some still out."""

DO_SEND, DO_ARRIVE, DO_FAIL, DO_FINISH, DO_COMPUTE, DO_RETURN, DO_MISS, DO_GIVE_UP = constants(8)
"""What a delay leads to (`SLOT`, `todo`); the last four with tiles: at its node, back, not to come, waited for too long."""

LOST_AFTER_S = 2.0
"""As in `runtime.wire.events.Limits`."""

PROBE = cast(int, np.int64(-2))
MIN_SAMPLE_BYTES = 16 * 1024.0
"""As in `runtime.wire.link`: smaller messages give no bandwidth sample."""

LAST_STEP, LAST_SAMPLE = STEPS - 1, METER - 1
"""Mask a number of a step or of a sample: its place in what starts over."""

SAMPLE_RATE = -1.0 / TunedSettings().bandwidth_time_s
"""At which samples lose weight under the tuned estimator."""

_LOG_MIN_BPS = math.log(MIN_BANDWIDTH_BPS)
_MEAN_SAMPLES = 100
_MIN_TRANSFER_S = 1e-6


@compiled
def free_slot(s: Lane) -> int:
    """A slot that no request has, -1 for none."""
    for slot in range(SLOTS):
        if not s.slots[slot].is_active:
            s.top = max(s.top, slot + 1)
            return slot
    return -1


@compiled
def release(s: Lane, slot: int) -> None:
    """Leave a slot; what was to come of it no longer counts."""
    request = s.slots[slot]
    request.is_active = False
    request.version += 1
    while s.top > 0 and not s.slots[s.top - 1].is_active:
        s.top -= 1


@compiled
def delay(s: Lane, slot: int, delay_s: float, todo: int) -> None:
    """Let a request wait, and say what to do then."""
    request = s.slots[slot]
    request.place = DELAYED
    request.todo = todo
    push(s, s.now_s + delay_s, DELAY, slot, request.version)


@compiled
def step_of(at_s: float) -> int:
    """Step of the grid at an instant."""
    return int(at_s / GRID_S) & LAST_STEP


@compiled
def server_of(r: Plans, client: int, link: int) -> int:
    """Server of a link: a device has its own links, those between nodes are shared."""
    if r.link_source[link] == 0 or r.link_target[link] == 0:
        return client * LINKS + link
    return link


@compiled
def rate_at(w: World, r: Plans, client: int, link: int, at_s: float) -> float:
    """Rate of a link at an instant."""
    step = (step_of(at_s) + r.shift[client]) & LAST_STEP
    return float(w.course.grid[r.path[link], step] * r.scale[link])


@compiled
def rtt_at(w: World, r: Plans, client: int, link: int, at_s: float) -> float:
    """Round trip of a link at an instant."""
    return float(w.course.grid[RTT + r.path[link], (step_of(at_s) + r.shift[client]) & LAST_STEP])


@compiled
def transfer_end(w: World, r: Plans, client: int, link: int, start_s: float, nbytes: float) -> float:
    """When the last bit leaves that began to leave at `start_s`: the rate integrated over the grid."""
    path, scale, shift = r.path[link], r.scale[link], r.shift[client]
    bits, at_s = nbytes * 8.0, start_s
    step = int(start_s / GRID_S)
    while True:
        rate = w.course.grid[path, (step + shift) & LAST_STEP] * scale
        room = ((step + 1) * GRID_S - at_s) * rate
        if bits <= room:
            return float(at_s + bits / rate)
        bits -= max(room, 0.0)
        step += 1
        at_s = step * GRID_S


@compiled
def is_broken(w: World, r: Plans, client: int, link: int, at_s: float) -> bool:
    """Tell whether a node at either end answers nobody."""
    step = step_of(at_s)
    return bool(
        (w.course.grid[DOWN + r.link_source[link], step] > 0.0)
        or (w.course.grid[DOWN + r.link_target[link], step] > 0.0)
    )


@compiled
def newest_bps(w: World, s: Lane, server: int) -> float:
    """What the sender last measured, NaN before the first."""
    count = s.servers[server].meter_count
    return float(w.meters.sample[server, (count - 1) & LAST_SAMPLE, BPS]) if count > 0 else math.nan


@compiled
def add_sample(w: World, s: Lane, server: int, at_s: float, nbytes: float, elapsed_s: float, rtt_s: float) -> None:
    """Take in an acknowledged transfer, as `runtime.wire.link.LinkMeter` does."""
    wire = s.servers[server]
    if nbytes < MIN_SAMPLE_BYTES:
        return
    transfer_s = max(elapsed_s - rtt_s / 2.0, elapsed_s / 2.0, _MIN_TRANSFER_S)
    bps = nbytes * 8.0 / transfer_s
    count = wire.meter_count
    mean, decay = math.log(bps), 0.0
    log_bps = mean if bps >= MIN_BANDWIDTH_BPS else _LOG_MIN_BPS
    if count > 0:
        before = w.meters.sample[server, (count - 1) & LAST_SAMPLE, LOG_MEAN]
        mean = before + (mean - before) / min(count + 1, _MEAN_SAMPLES)
        decay = math.exp((at_s - wire.measured_s) * SAMPLE_RATE)
    sample = w.meters.sample[server, count & LAST_SAMPLE]
    sample[MEASURED], sample[BPS], sample[LOG_BPS] = at_s, bps, log_bps
    sample[LOG_MEAN], sample[DECAY] = mean, decay
    wire.measured_s = at_s
    wire.meter_count = count + 1
    sample[WEIGHT], sample[LOG_SUM] = sum_samples(w, server, count, min(count + 1, SAMPLES))


@compiled
def sum_samples(w: World, server: int, newest: int, count: int) -> tuple[float, float]:
    """Sum the weights and weighted logarithms of some samples in a row; the newest weighs 1, and has a number."""
    relative, weight, total = 1.0, 0.0, 0.0
    for back in range(count):
        at = (newest - back) & LAST_SAMPLE
        weight += relative
        total += relative * w.meters.sample[server, at, LOG_BPS]
        relative *= w.meters.sample[server, at, DECAY]
    return weight, total


@compiled
def hop_bytes(w: World, r: Plans, s: Lane, slot: int) -> float:
    """Bytes of a request's present transfer."""
    request = s.slots[slot]
    hop = request.hop
    plan = r.rows[request.row]
    sent = plan.plain_bytes[hop]
    sent += plan.has_input[hop] * request.input_bytes
    return float(sent - plan.saved_bytes[hop]) if request.is_coded else float(sent)


@compiled
def enqueue(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Put a request's tensors at the end of the queue of its present link."""
    request = s.slots[slot]
    client = request.client
    link = wide(r.rows[request.row].link[request.hop])
    request.place = LINK_QUEUE
    request.server = server_of(r, client, link)
    request.queued = next_sequence(s)
    if s.servers[request.server].slot == -1:
        _fly(w, r, s, slot)


@compiled
def _fly(w: World, r: Plans, s: Lane, slot: int) -> None:
    request = s.slots[slot]
    server = request.server
    client, link = server // LINKS, server % LINKS
    end_s = _occupy(w, r, s, server, slot, hop_bytes(w, r, s, slot))
    request.place = LINK_FLIGHT
    request.todo = DO_ARRIVE
    push(s, end_s + rtt_at(w, r, client, link, end_s) / 2.0, DELAY, slot, request.version)


@compiled
def _occupy(w: World, r: Plans, s: Lane, server: int, what: int, nbytes: float) -> float:
    """Start a message on an idle link; gives when its last bit leaves. What devices share runs by the first's clock."""
    wire = s.servers[server]
    client, link, now_s = server // LINKS, server % LINKS, s.now_s
    end_s = transfer_end(w, r, client, link, now_s, nbytes)
    wire.slot = what
    wire.start_s = now_s
    wire.sent_bytes = nbytes
    push(s, end_s + rtt_at(w, r, client, link, end_s), LINK, server, wire.version)
    return end_s


@compiled
def probe(w: World, r: Plans, s: Lane, server: int, nbytes: float) -> None:
    """Send a probe over an idle link."""
    _occupy(w, r, s, server, PROBE, nbytes)


@compiled
def acknowledged(w: World, r: Plans, s: Lane, server: int) -> None:
    """The message in flight has been acknowledged: measure, and start the next one."""
    wire = s.servers[server]
    client = server // LINKS
    link, now_s = server % LINKS, s.now_s
    if not is_broken(w, r, client, link, now_s):
        elapsed_s = now_s - wire.start_s
        add_sample(w, s, server, now_s, wire.sent_bytes, elapsed_s, rtt_at(w, r, client, link, now_s))
    free(w, r, s, server)


@compiled
def free(w: World, r: Plans, s: Lane, server: int) -> None:
    """End whatever is in flight, and start the next message."""
    wire = s.servers[server]
    wire.slot = -1
    wire.version += 1
    first = first_waiting(s, LINK_QUEUE, server)
    if first >= 0:
        _fly(w, r, s, first)


@compiled
def first_waiting(s: Lane, place: int, server: int) -> int:
    """Request that has waited longest in a queue, -1 for none."""
    best, best_queued = -1, np.int64(2**62)
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.place == place and request.server == server:
            if request.queued < best_queued:
                best_queued = request.queued
                best = slot
    return best
