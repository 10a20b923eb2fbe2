"""Nodes: one request runs at a time, first in, first out, among background requests; and what a node says of itself.

Background requests cost no events. They are taken in when a request needs to know: until it starts, everything that
came before it has been served. What was taken in since somebody last had the processor for good can be undone: when the
request that has it is given up or computes for longer, or when another goes on, ahead of all that has not begun.
"""

import math

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

COLD_S = 0.02
"""Building a segment, besides a first run that takes twice as long. Guess: tens of milliseconds were seen."""


@compiled
def contention_at(w: World, node: int, at_s: float) -> float:
    """Factor on service times at an instant."""
    return float(w.course.grid[CONTENTION + node, step_of(at_s)])


@compiled
def _note_job(s: Lane, node: int, start_s: float, wait_s: float, service_s: float, ratio: float) -> None:
    queue = s.nodes[node]
    job = s.jobs[node, queue.jobs & LAST_JOB]
    job.start_s = start_s
    job.wait_s = wait_s
    job.end_s = start_s + service_s
    job.ratio = ratio
    queue.jobs += 1
    queue.busy_s += service_s
    queue.free_s = start_s + service_s


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
    queue = s.nodes[node]
    count = r.bg_count[node]
    while True:
        at_s = _background_at(w, r, node, queue.bg)
        if at_s >= until_s or max(queue.free_s, at_s) >= start_until_s:
            return
        index = queue.bg
        service_s = w.course.background[NODES + node, index if index < count else index % count]
        queue.bg += 1
        jobs = queue.jobs
        if jobs >= CAPACITY and s.jobs[node, (jobs - CAPACITY) & LAST_JOB].start_s > at_s:
            continue
        start_s = max(queue.free_s, at_s)
        factor = contention_at(w, node, start_s)
        _note_job(s, node, start_s, start_s - at_s, service_s * factor, factor)


@compiled
def _save(s: Lane, node: int) -> None:
    queue = s.nodes[node]
    queue.saved_free_s = queue.free_s
    queue.saved_bg = queue.bg
    queue.saved_jobs = queue.jobs
    queue.saved_busy_s = queue.busy_s


@compiled
def _restore(s: Lane, node: int) -> None:
    """Undo what was taken in since `_save`: background requests that came wait again."""
    queue = s.nodes[node]
    queue.free_s = queue.saved_free_s
    queue.bg = queue.saved_bg
    queue.jobs = queue.saved_jobs
    queue.busy_s = queue.saved_busy_s


@compiled
def queue_length(w: World, r: Plans, s: Lane, node: int, at_s: float) -> int:
    """Requests that wait at an instant, background included."""
    queue = s.nodes[node]
    waiting = 0
    for slot in range(s.top):
        request = s.slots[slot]
        if (
            request.is_active
            and request.server == node
            and (request.place == NODE_QUEUE or request.place == NODE_READY)
        ):
            waiting += 1
    if waiting == 0:
        # What has begun by now has the processor for good; the rest is only counted. So no more is ever undone than stands in
        # the ring of jobs, which what is counted goes over.
        _restore(s, node)
        take_background(w, r, s, node, at_s, at_s)
        _save(s, node)
        take_background(w, r, s, node, at_s, math.inf)
    jobs = queue.jobs
    for back in range(1, min(jobs, RING) + 1):
        if s.jobs[node, (jobs - back) & LAST_JOB].start_s <= at_s:
            break  # nor does any before it wait
        waiting += 1
    index = queue.bg
    while _background_at(w, r, node, index) < at_s and waiting < 2 * RING:
        waiting += 1
        index += 1
    return waiting


@compiled
def arrive(w: World, r: Plans, s: Lane, slot: int, node: int) -> bool:
    """Let a request join a node's queue; False when it is full."""
    request = s.slots[slot]
    if queue_length(w, r, s, node, s.now_s) + _num_gathering(r, s, node) >= CAPACITY:
        return False
    request.place = NODE_QUEUE
    request.server = node
    request.queued = next_sequence(s)
    request.queued_s = s.now_s
    if s.nodes[node].slot < 0 and next_up(s, node) == slot:
        schedule(w, r, s, node)
    return True


@compiled
def _num_gathering(r: Plans, s: Lane, node: int) -> int:
    """Requests whose tiles are out: they count against the head's capacity."""
    count = 0
    if r.num_tiled > 0:
        for slot in range(s.top):
            request = s.slots[slot]
            if request.is_active and request.place == GATHERING and request.server == node:
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
    queue = s.nodes[node]
    queue.version += 1
    slot = next_up(s, node)
    request = s.slots[slot]
    if slot < 0:
        return
    if request.place == NODE_READY:
        # Who goes on stands ahead of the background requests that have not begun, even if they were counted meanwhile.
        _restore(s, node)
        take_background(w, r, s, node, request.queued_s, request.queued_s)
    else:
        take_background(w, r, s, node, request.queued_s, math.inf)
    start_s = max(queue.free_s, request.queued_s, s.now_s)
    push(s, start_s, NODE, node, queue.version)


@compiled
def start(w: World, r: Plans, s: Lane, node: int) -> int:
    """Start the request that is next, at the instant planned for it.

    Returns:
        -1, or the request when its time has run out: it is no longer in the queue.
    """
    slot = next_up(s, node)
    request = s.slots[slot]
    now_s = s.now_s
    if now_s > request.deadline_at_s:
        request.place = 0
        schedule(w, r, s, node)
        return int(slot)
    tier = tier_of(r, s, slot)
    plan = r.rows[request.row]
    if plan.num_peers > 0 and (request.place == NODE_READY or request.parent >= 0):
        _start_tile(w, r, s, node, slot)
        return -1
    noise = request.noise[tier]
    factor = contention_at(w, node, now_s) * noise
    idle_s = plan.idle_s[tier]
    cold_s = 0.0
    if not s.is_warm[plan.segment[tier]]:
        s.is_warm[plan.segment[tier]] = True
        cold_s = COLD_S + idle_s
    _note_job(s, node, now_s, now_s - request.queued_s, (idle_s + cold_s) * factor, factor)
    _run(s, node, slot)
    if plan.num_peers > 0:
        request.tile, request.num_out, request.taken = plan.first_tile, 0, 0
        request.left_s, request.is_span_open = 0.0, False
    return -1


@compiled
def _start_tile(w: World, r: Plans, s: Lane, node: int, slot: int) -> None:
    """Start a tile of another head's request; or what was left to the head of one that goes on."""
    request = s.slots[slot]
    factor = contention_at(w, node, s.now_s) * head_noise(w, s, slot)
    if request.parent >= 0:
        idle_s = w.tiles[request.tile, IDLE_S]
        _note_job(s, node, s.now_s, s.now_s - request.queued_s, idle_s * factor, factor)
        _run(s, node, slot)
        return
    s.nodes[node].free_s = s.now_s
    _save(s, node)
    go_on(s, node, slot, request.left_s * factor)
    request.left_s = 0.0


@compiled
def head_noise(w: World, s: Lane, slot: int) -> float:
    """Factor on the service of a request's edge share; its tiles have the same."""
    owner = s.slots[slot].parent if s.slots[slot].parent >= 0 else slot
    return float(s.slots[owner].noise[1])


@compiled
def go_on(s: Lane, node: int, slot: int, service_s: float) -> None:
    """Let a request that runs compute for longer; it is no new job."""
    queue = s.nodes[node]
    _restore(s, node)
    queue.free_s = s.now_s + service_s
    queue.busy_s += service_s
    _run(s, node, slot)


@compiled
def _run(s: Lane, node: int, slot: int) -> None:
    """A request has the node until all that has started is done."""
    queue = s.nodes[node]
    _save(s, node)
    s.slots[slot].place = NODE_RUN
    queue.slot = slot
    queue.version += 1
    push(s, queue.free_s, NODE, node, queue.version)


@compiled
def tier_of(r: Plans, s: Lane, slot: int) -> int:
    """Tier whose node a request's present transfer leads to: 1 the head, 2 the cloud."""
    request = s.slots[slot]
    if request.hop == 0:
        return 1 if r.rows[request.row].node[1] != 0 else 2
    return 2


@compiled
def done(w: World, r: Plans, s: Lane, node: int) -> int:
    """The request that runs has ended: give it, and plan the next."""
    queue = s.nodes[node]
    slot = queue.slot
    queue.slot = -1
    schedule(w, r, s, node)
    return int(slot)


@compiled
def give_up(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Take a request from a node where it waits or runs."""
    request = s.slots[slot]
    node, place = request.server, request.place
    queue = s.nodes[node]
    request.place = 0
    if place == NODE_RUN:
        _restore(s, node)
        queue.busy_s -= queue.free_s - s.now_s  # it would have had the processor for so much longer
        queue.free_s = s.now_s
        _save(s, node)
        queue.slot = -1
        schedule(w, r, s, node)
    elif queue.slot < 0:
        schedule(w, r, s, node)


@compiled
def load_at(s: Lane, node: int, at_s: float) -> tuple[float, float]:
    """K and q as `runtime.node.load.NodeLoad` has them.

    Returns:
        Mean ratio of the last segments that ended in the window, and mean wait of the requests that started in it.
    """
    ratios, num_ended, waits_s, num_started = 0.0, 0, 0.0, 0
    jobs, since_s = s.nodes[node].jobs, at_s - WINDOW_S
    for back in range(1, min(jobs, RING) + 1):
        job = s.jobs[node, (jobs - back) & LAST_JOB]
        if job.end_s < since_s:
            break
        if job.end_s <= at_s and num_ended < WINDOW_LENGTH:
            ratios += job.ratio
            num_ended += 1
        if since_s <= job.start_s <= at_s and num_started < WINDOW_LENGTH:
            waits_s += job.wait_s
            num_started += 1
    k = min(max(ratios / num_ended, 1.0), LOAD_FACTOR_MAX) if num_ended > 0 else 1.0
    return k, waits_s / num_started if num_started > 0 else 0.0


@compiled
def busy_frac(s: Lane, node: int, at_s: float) -> float:
    """Share of the window that was busy; called at every tick, half a second apart."""
    queue = s.nodes[node]
    busy_s = queue.busy_s - max(queue.free_s - at_s, 0.0)
    at = s.tick_count % TICKS
    before_s = s.tick_busy_s[node, at]
    s.tick_busy_s[node, at] = busy_s
    return float(min(max((busy_s - before_s) / WINDOW_S, 0.0), 1.0))
