"""Nodes: one request runs at a time, first in, first out, among background requests; and what a node says of itself.

Background requests cost no events. They are taken in when a request needs to know: until it starts, everything that
came before it has been served. What was taken in since somebody last had the processor for good can be undone: when the
request that has it is given up or computes for longer, or when another goes on, ahead of all that has not begun.
"""

import math
from typing import Any

from env.kernel.compiled import compiled
from env.kernel.events import NODE, next_sequence, push
from env.kernel.layout import CONTENTION, IDLE_S, NODES, RING, STEPS, TICKS, Lane, Plans, World
from env.kernel.links import GATHERING, NODE_QUEUE, NODE_READY, NODE_RUN, first_waiting, step_of
from env.traces import GRID_S

LAST_JOB = RING - 1
"""Masks a number of a job: its place in the ring."""

CAPACITY = 16
"""Requests that may wait, as a worker's default."""

WINDOW_S = 5.0
WINDOW_LENGTH = 16
LOAD_FACTOR_MAX = 100.0
"""As in `runtime.node.load`."""

Ring = Any
"""One column of all nodes' last jobs."""

COLD_S = 0.02
"""Building a segment, besides a first run that takes twice as long. Guess: tens of milliseconds were seen."""


@compiled
def contention_at(w: World, node: int, at_s: float) -> float:
    """Factor on service times at an instant."""
    return float(w.course.grid[CONTENTION + node, step_of(at_s)])


@compiled
def _note_job(s: Lane, node: int, start_s: float, wait_s: float, service_s: float, ratio: float) -> None:
    at = s.node_jobs[node] & LAST_JOB
    s.ring_start_s[node, at] = start_s
    s.ring_wait_s[node, at] = wait_s
    s.ring_end_s[node, at] = start_s + service_s
    s.ring_ratio[node, at] = ratio
    s.node_jobs[node] += 1
    s.node_busy_s[node] += service_s
    s.node_free_s[node] = start_s + service_s


@compiled
def _background_at(w: World, r: Plans, node: int, index: int) -> float:
    count = r.bg_count[node]
    if count == 0:
        return math.inf
    if index < count:
        return float(w.course.background[node, index])
    return float(w.course.background[node, index % count] + (index // count) * STEPS * GRID_S)


@compiled
def take_background(w: World, r: Plans, s: Lane, node: int, until_s: float, start_until_s: float) -> None:
    """Serve the background requests that came before an instant, if they can start before another.

    One that finds the queue full is turned away.
    """
    count = r.bg_count[node]
    while True:
        at_s = _background_at(w, r, node, s.node_bg[node])
        if at_s >= until_s or max(s.node_free_s[node], at_s) >= start_until_s:
            return
        index = s.node_bg[node]
        service_s = w.course.background[NODES + node, index if index < count else index % count]
        s.node_bg[node] += 1
        jobs = s.node_jobs[node]
        if jobs >= CAPACITY and s.ring_start_s[node, (jobs - CAPACITY) & LAST_JOB] > at_s:
            continue
        start_s = max(s.node_free_s[node], at_s)
        factor = contention_at(w, node, start_s)
        _note_job(s, node, start_s, start_s - at_s, service_s * factor, factor)


@compiled
def _save(s: Lane, node: int) -> None:
    s.saved_free_s[node] = s.node_free_s[node]
    s.saved_bg[node] = s.node_bg[node]
    s.saved_jobs[node] = s.node_jobs[node]
    s.saved_busy_s[node] = s.node_busy_s[node]


@compiled
def _restore(s: Lane, node: int) -> None:
    """Undo what was taken in since `_save`: background requests that came wait again."""
    s.node_free_s[node] = s.saved_free_s[node]
    s.node_bg[node] = s.saved_bg[node]
    s.node_jobs[node] = s.saved_jobs[node]
    s.node_busy_s[node] = s.saved_busy_s[node]


@compiled
def queue_length(w: World, r: Plans, s: Lane, node: int, at_s: float) -> int:
    """Requests that wait at an instant, background included."""
    waiting = 0
    for slot in range(s.top):
        if (
            s.is_active[slot]
            and s.server[slot] == node
            and (s.place[slot] == NODE_QUEUE or s.place[slot] == NODE_READY)
        ):
            waiting += 1
    if waiting == 0:
        # What has begun by now has the processor for good; the rest is only counted. So no more is ever undone than stands in
        # the ring of jobs, which what is counted goes over.
        _restore(s, node)
        take_background(w, r, s, node, at_s, at_s)
        _save(s, node)
        take_background(w, r, s, node, at_s, math.inf)
    jobs = s.node_jobs[node]
    for back in range(1, min(jobs, RING) + 1):
        if s.ring_start_s[node, (jobs - back) & LAST_JOB] <= at_s:
            break  # nor does any before it wait
        waiting += 1
    index = s.node_bg[node]
    while _background_at(w, r, node, index) < at_s and waiting < 2 * RING:
        waiting += 1
        index += 1
    return waiting


@compiled
def arrive(w: World, r: Plans, s: Lane, slot: int, node: int) -> bool:
    """Let a request join a node's queue; False when it is full."""
    if queue_length(w, r, s, node, s.now_s) + _num_gathering(r, s, node) >= CAPACITY:
        return False
    s.place[slot] = NODE_QUEUE
    s.server[slot] = node
    s.queued[slot] = next_sequence(s)
    s.queued_s[slot] = s.now_s
    if s.node_slot[node] < 0 and next_up(s, node) == slot:
        schedule(w, r, s, node)
    return True


@compiled
def _num_gathering(r: Plans, s: Lane, node: int) -> int:
    """Requests whose tiles are out: they count against the head's capacity."""
    count = 0
    if r.num_tiled > 0:
        for slot in range(s.top):
            if s.is_active[slot] and s.place[slot] == GATHERING and s.server[slot] == node:
                count += 1
    return count


@compiled
def next_up(s: Lane, node: int) -> int:
    """Request that is next: one that goes on, else the one that has waited longest; -1 for none."""
    slot = first_waiting(s, NODE_READY, node)
    return slot if slot >= 0 else first_waiting(s, NODE_QUEUE, node)


@compiled
def schedule(w: World, r: Plans, s: Lane, node: int) -> None:
    """Plan the start of the request that is next."""
    s.node_version[node] += 1
    slot = next_up(s, node)
    if slot < 0:
        return
    if s.place[slot] == NODE_READY:
        # Who goes on stands ahead of the background requests that have not begun, even if they were counted meanwhile.
        _restore(s, node)
        take_background(w, r, s, node, s.queued_s[slot], s.queued_s[slot])
    else:
        take_background(w, r, s, node, s.queued_s[slot], math.inf)
    start_s = max(s.node_free_s[node], s.queued_s[slot], s.now_s)
    push(s, start_s, NODE, node, s.node_version[node])


@compiled
def start(w: World, r: Plans, s: Lane, node: int) -> int:
    """Start the request that is next, at the instant planned for it.

    Returns:
        -1, or the request when its time has run out: it is no longer in the queue.
    """
    slot = next_up(s, node)
    now_s = s.now_s
    if now_s > s.deadline_at_s[slot]:
        s.place[slot] = 0
        schedule(w, r, s, node)
        return int(slot)
    row, tier = s.row[slot], tier_of(r, s, slot)
    if r.num_peers[row] > 0 and (s.place[slot] == NODE_READY or s.parent[slot] >= 0):
        _start_tile(w, r, s, node, slot)
        return -1
    noise = s.noise[slot, tier]
    factor = contention_at(w, node, now_s) * noise
    idle_s = r.idle_s[row, tier]
    cold_s = 0.0
    if not s.is_warm[r.segment[row, tier]]:
        s.is_warm[r.segment[row, tier]] = True
        cold_s = COLD_S + idle_s
    _note_job(s, node, now_s, now_s - s.queued_s[slot], (idle_s + cold_s) * factor, factor)
    _run(s, node, slot)
    if r.num_peers[row] > 0:
        s.tile[slot], s.num_out[slot] = r.first_tile[row], 0
        s.left_s[slot], s.is_span_open[slot] = 0.0, False
    return -1


@compiled
def _start_tile(w: World, r: Plans, s: Lane, node: int, slot: int) -> None:
    """Start a tile of another head's request; or what was left to the head of one that goes on."""
    factor = contention_at(w, node, s.now_s) * head_noise(w, s, slot)
    if s.parent[slot] >= 0:
        idle_s = w.tiles[s.tile[slot], IDLE_S]
        _note_job(s, node, s.now_s, s.now_s - s.queued_s[slot], idle_s * factor, factor)
        _run(s, node, slot)
        return
    s.node_free_s[node] = s.now_s
    _save(s, node)
    go_on(s, node, slot, s.left_s[slot] * factor)
    s.left_s[slot] = 0.0


@compiled
def head_noise(w: World, s: Lane, slot: int) -> float:
    """Factor on the service of a request's edge share; its tiles have the same."""
    request = s.parent[slot] if s.parent[slot] >= 0 else slot
    return float(s.noise[request, 1])


@compiled
def go_on(s: Lane, node: int, slot: int, service_s: float) -> None:
    """Let a request that runs compute for longer; it is no new job."""
    _restore(s, node)
    s.node_free_s[node] = s.now_s + service_s
    s.node_busy_s[node] += service_s
    _run(s, node, slot)


@compiled
def _run(s: Lane, node: int, slot: int) -> None:
    """A request has the node until all that has started is done."""
    _save(s, node)
    s.place[slot] = NODE_RUN
    s.node_slot[node] = slot
    s.node_version[node] += 1
    push(s, s.node_free_s[node], NODE, node, s.node_version[node])


@compiled
def tier_of(r: Plans, s: Lane, slot: int) -> int:
    """Tier whose node a request's present transfer leads to: 1 the head, 2 the cloud."""
    if s.hop[slot] == 0:
        return 1 if r.node[s.row[slot], 1] != 0 else 2
    return 2


@compiled
def done(w: World, r: Plans, s: Lane, node: int) -> int:
    """The request that runs has ended: give it, and plan the next."""
    slot = s.node_slot[node]
    s.node_slot[node] = -1
    schedule(w, r, s, node)
    return int(slot)


@compiled
def give_up(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Take a request from a node where it waits or runs."""
    node, place = s.server[slot], s.place[slot]
    s.place[slot] = 0
    if place == NODE_RUN:
        _restore(s, node)
        s.node_busy_s[node] -= s.node_free_s[node] - s.now_s  # it would have had the processor for so much longer
        s.node_free_s[node] = s.now_s
        _save(s, node)
        s.node_slot[node] = -1
        schedule(w, r, s, node)
    elif s.node_slot[node] < 0:
        schedule(w, r, s, node)


@compiled
def load_factor(s: Lane, node: int, at_s: float) -> float:
    """K as `runtime.node.load.NodeLoad` has it: mean ratio of the last segments that ended in the window."""
    mean = _window_mean(s, node, at_s, s.ring_end_s, s.ring_ratio)
    return 1.0 if math.isnan(mean) else float(min(max(mean, 1.0), LOAD_FACTOR_MAX))


@compiled
def queue_delay_s(s: Lane, node: int, at_s: float) -> float:
    """q: mean wait of the requests that started in the window."""
    mean = _window_mean(s, node, at_s, s.ring_start_s, s.ring_wait_s)
    return 0.0 if math.isnan(mean) else float(mean)


@compiled
def _window_mean(s: Lane, node: int, at_s: float, when_s: Ring, what: Ring) -> float:
    """Mean of one column over a node's last jobs by an instant, of those in the window; NaN without any."""
    total, count = 0.0, 0
    jobs = s.node_jobs[node]
    for back in range(1, min(jobs, RING) + 1):
        at = (jobs - back) & LAST_JOB
        if when_s[node, at] <= at_s:
            if when_s[node, at] < at_s - WINDOW_S or count == WINDOW_LENGTH:
                break
            total += what[node, at]
            count += 1
    return total / count if count > 0 else math.nan


@compiled
def busy_frac(s: Lane, node: int, at_s: float) -> float:
    """Share of the window that was busy; called at every tick, half a second apart."""
    busy_s = s.node_busy_s[node] - max(s.node_free_s[node] - at_s, 0.0)
    at = s.tick_count % TICKS
    before_s = s.tick_busy_s[node, at]
    s.tick_busy_s[node, at] = busy_s
    return float(min(max((busy_s - before_s) / WINDOW_S, 0.0), 1.0))
