"""A lane's life: begin, requests that come, what follows from each event, and how requests end.

arrive -> device share -> link -> head -> link -> cloud -> link -> (head passes on) -> link -> end
             |             |        |                                                   |
             +-------------+--------+--> completed on the device --------------------> end
"""

import math
from typing import Any

from env.kernel import device as dev
from env.kernel import links, nodes
from env.kernel.compiled import ZERO, compiled, constants, entry
from env.kernel.decide import read_state, weigh
from env.kernel.device import LOCAL_NONE, LOCAL_WANTED
from env.kernel.events import ARRIVAL, DELAY, DEVICE, GUARD, LINK, NODE, TICK, earliest, is_current, push, remove
from env.kernel.layout import (
    ARRIVES,
    CHOSEN,
    DEADLINE,
    DONE,
    DOWN,
    LANE,
    LATENCY,
    LINKS,
    METER,
    OUTCOME,
    SAMPLES,
    SLOTS,
    Lane,
    Plans,
    State,
    World,
    make_records,
)
from env.kernel.links import (
    DELAYED,
    DO_ARRIVE,
    DO_FAIL,
    DO_FINISH,
    DO_SEND,
    LINK_FLIGHT,
    NODE_QUEUE,
    NODE_RUN,
    NOWHERE,
)
from env.traces import GRID_S

REMOTE, ON_DEVICE, LOCAL, FAILED = constants(5)[1:]
"""Outcomes: answered by a node, planned for the device alone, completed by the device instead, not at all."""

STATUS_S = 0.5
LOST_AFTER_S = 2.0
"""As in `runtime.node.worker` and `runtime.wire.events.Limits`."""

PROBE_AFTER_S = 5.0
PROBE_S = 0.05
FIRST_PROBE_BYTES = 64 * 1024.0
MAX_PROBE_BYTES = 2.0**20
"""As in `runtime.wire.link`."""

FAILURES_TO_OPEN = 2
COOL_DOWN_S = 1.0
COOL_DOWN_MAX_S = 30.0
"""As in `runtime.device.breaker`."""

FLOOR_BPS = 1000.0

_CLOSED, _OPEN, _HALF_OPEN = range(3)


# --- begin ------------------------------------------------------------------------------------------------------------


@compiled
def _begin(w: World, r: Plans, s: Lane) -> None:
    """Set a blank lane to time 0: every link has been probed once, every node heard of, as the world has it."""
    for client in range(r.num_clients):
        push(s, w.requests[client, ARRIVES, 0], ARRIVAL, client, ZERO)
        for link in range(r.num_links):
            server = links.server_of(r, client, link)
            if server // LINKS == client and s.meter_count[server] == 0:
                _first_probe(w, r, s, client, link, server)
    _tick(w, r, s)


@compiled
def _first_probe(w: World, r: Plans, s: Lane, client: int, link: int, server: int) -> None:
    rtt_s = links.rtt_at(w, r, client, link, 0.0)
    elapsed_s = links.transfer_end(w, r, client, link, 0.0, FIRST_PROBE_BYTES) + rtt_s
    if elapsed_s < w.requests[client, ARRIVES, 0]:
        links.add_sample(s, server, elapsed_s, FIRST_PROBE_BYTES, elapsed_s, rtt_s)


# --- requests come ----------------------------------------------------------------------------------------------------


@compiled
def submit(w: World, r: Plans, s: Lane, client: int, row: int, predicted_s: float) -> None:
    """Start a client's next request under a plan, at the instant of its arrival."""
    number = s.next_request[client]
    s.next_request[client] += 1
    if s.next_request[client] < r.num_requests:
        push(s, w.requests[client, ARRIVES, number + 1], ARRIVAL, client, ZERO)
    if client == 0:
        w.requests[0, CHOSEN, number] = row
    slot = _free_slot(s)
    if slot < 0:
        _record(w, s, client, number, math.inf, FAILED)
        return
    s.is_active[slot] = True
    s.client[slot], s.number[slot], s.row[slot] = client, number, row
    s.arrived_s[slot] = s.now_s
    s.deadline_at_s[slot] = s.now_s + w.requests[client, DEADLINE, number]
    s.predicted_s[slot] = predicted_s
    s.place[slot], s.hop[slot] = NOWHERE, 0
    s.version[slot] += 1
    s.is_coded[slot], s.is_stage_done[slot], s.is_remote[slot] = False, False, False
    s.target[slot], s.local[slot], s.guard_s[slot] = -1, LOCAL_NONE, math.inf
    if r.has_layers[row, 0] > 0.0:
        dev.queue_stage(w, r, s, slot)
        dev.guard(r, s, slot)
    else:
        dev.guard(r, s, slot)
        _stage_done(w, r, s, slot)


@compiled
def _free_slot(s: Lane) -> int:
    for slot in range(SLOTS):
        if not s.is_active[slot]:
            s.top = max(s.top, slot + 1)
            return slot
    return -1


@compiled
def _stage_done(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The device's share is done: on to the first node, or that was all."""
    s.is_stage_done[slot] = True
    if not dev.has_remote(r, s, slot):
        _end(w, r, s, slot, ON_DEVICE)
    elif s.local[slot] == LOCAL_WANTED:
        dev.queue_completion(w, r, s, slot)
    else:
        _send(w, r, s, slot)


@compiled
def _send(w: World, r: Plans, s: Lane, slot: int) -> None:
    client, row = s.client[slot], s.row[slot]
    node = r.link_target[r.link[row, 0]]
    s.target[slot] = node
    if not s.is_up[client, node] or not _admits(s, client, node):
        _finish_here(w, r, s, slot)
        return
    s.is_remote[slot] = True
    s.hop[slot] = 0
    _encode(w, r, s, slot, r.plain_codec_s[row])


@compiled
def _encode(w: World, r: Plans, s: Lane, slot: int, extra_s: float) -> None:
    """Choose the codec of the present transfer by its sender's newest sample, then send."""
    row, hop, client = s.row[slot], s.hop[slot], s.client[slot]
    if hop % 2 == 0 or r.is_relayed[row] == 0.0:
        link = r.link[row, hop]
        bps = links.newest_bps(s, links.server_of(r, client, link))
        saved_s = 0.0 if math.isnan(bps) else r.saved_bytes[row, hop] * 8.0 / bps
        s.is_coded[slot] = saved_s > r.coding_s[row, hop]
    delay_s = extra_s + (r.coding_s[row, hop] if s.is_coded[slot] else 0.0)
    _delay(w, r, s, slot, delay_s, DO_SEND)


@compiled
def _delay(w: World, r: Plans, s: Lane, slot: int, delay_s: float, todo: int) -> None:
    s.place[slot] = DELAYED
    s.todo[slot] = todo
    push(s, s.now_s + delay_s, DELAY, slot, s.version[slot])


# --- what follows from events -----------------------------------------------------------------------------------------


@compiled
def _handle(w: World, r: Plans, s: Lane, kind: int, what: int) -> None:
    if kind == DELAY:
        _continue(w, r, s, what)
    elif kind == LINK:
        links.acknowledged(w, r, s, what)
    elif kind == NODE:
        _node_event(w, r, s, what)
    elif kind == DEVICE:
        _device_event(w, r, s, what)
    elif kind == GUARD:
        _guard_event(w, r, s, what)
    else:
        _tick(w, r, s)


@compiled
def _continue(w: World, r: Plans, s: Lane, slot: int) -> None:
    """A request's delay has passed."""
    todo, client, row, hop = s.todo[slot], s.client[slot], s.row[slot], s.hop[slot]
    if todo == DO_SEND:
        links.enqueue(w, r, s, slot)
    elif todo == DO_ARRIVE:
        if links.is_broken(w, r, client, r.link[row, hop], s.now_s):
            s.place[slot] = NOWHERE  # lost on the way: nobody will tell
        elif hop < 2:
            _reach_node(w, r, s, slot)
        elif hop == 2:
            s.hop[slot] = 3
            _encode(w, r, s, slot, 0.0)
        else:
            _delay(w, r, s, slot, r.message_s[row], DO_FINISH)
    else:
        _answered(s, client, s.target[slot])
        if todo == DO_FINISH:
            _hear_reply(w, r, s, slot)
            _end(w, r, s, slot, REMOTE)
        else:
            s.is_remote[slot] = False
            s.place[slot] = NOWHERE
            _finish_here(w, r, s, slot)


@compiled
def _reach_node(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The tensors are at a node: compute, pass on, or be refused."""
    row, tier = s.row[slot], nodes.tier_of(r, s, slot)
    node = r.node[row, tier]
    if s.now_s >= s.deadline_at_s[slot]:
        _refuse(w, r, s, slot)
    elif r.has_layers[row, tier] > 0.0:
        if not nodes.arrive(w, r, s, slot, node):
            _refuse(w, r, s, slot)
    else:
        _leave_node(w, r, s, slot)


@compiled
def _leave_node(w: World, r: Plans, s: Lane, slot: int) -> None:
    """A node's share is done: on to the cloud, or back."""
    row = s.row[slot]
    if s.hop[slot] == 0 and r.has_hop[row, 1] > 0.0:
        s.hop[slot] = 1
    else:
        s.hop[slot] = 2 if r.has_hop[row, 2] > 0.0 else 3
    _encode(w, r, s, slot, 0.0)


@compiled
def _refuse(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Tell the device that there will be no result; the notice is a small message on the way back."""
    row, client = s.row[slot], s.client[slot]
    back_s = links.rtt_at(w, r, client, r.link[row, 3], s.now_s) / 2.0
    if s.hop[slot] == 1:
        back_s += links.rtt_at(w, r, ZERO, r.link[row, 2], s.now_s) / 2.0
    _delay(w, r, s, slot, back_s, DO_FAIL)


@compiled
def _node_event(w: World, r: Plans, s: Lane, node: int) -> None:
    if s.node_slot[node] < 0:
        late = nodes.start(w, r, s, node)
        if late >= 0:
            _refuse(w, r, s, late)
        return
    slot = nodes.done(w, r, s, node)
    step = int(s.now_s / GRID_S) % w.grid.shape[1]
    if w.grid[DOWN + node, step] > 0.0:
        s.place[slot] = NOWHERE
    else:
        _leave_node(w, r, s, slot)


@compiled
def _device_event(w: World, r: Plans, s: Lane, client: int) -> None:
    slot, is_local = s.device_slot[client], s.device_is_local[client]
    dev.stop(s, client)
    if is_local:
        _end(w, r, s, slot, LOCAL)
    else:
        _stage_done(w, r, s, slot)
    dev.start_next(w, r, s, client)


@compiled
def _guard_event(w: World, r: Plans, s: Lane, slot: int) -> None:
    s.guard_s[slot] = math.inf
    if dev.guard_at_s(r, s, slot) > s.now_s:
        dev.guard(r, s, slot)
    elif math.isinf(r.local_s):
        _end(w, r, s, slot, FAILED)
    elif s.local[slot] == LOCAL_NONE:
        _finish_here(w, r, s, slot)


@compiled
def _finish_here(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Finish a request on the device; a node that still has it may answer first."""
    if s.local[slot] != LOCAL_NONE:
        return
    if math.isinf(r.local_s):
        return  # nothing to do but wait for the deadline
    client = s.client[slot]
    is_stage_running = s.device_slot[client] == slot and not s.device_is_local[client]
    if is_stage_running and not s.is_stage_done[slot]:
        s.local[slot] = LOCAL_WANTED
    else:
        dev.queue_completion(w, r, s, slot)


# --- endings ----------------------------------------------------------------------------------------------------------


@compiled
def _end(w: World, r: Plans, s: Lane, slot: int, outcome: int) -> None:
    """A request has its answer, or will have none."""
    client = s.client[slot]
    latency_s = s.now_s - s.arrived_s[slot]
    if outcome == FAILED:
        latency_s = math.inf
    else:
        at = s.error_count[client] % SAMPLES
        s.errors[client, at] = latency_s / s.predicted_s[slot] - 1.0
        s.error_count[client] += 1
        s.in_force[client] = s.row[slot]
    if outcome != REMOTE and s.is_remote[slot]:
        _unanswered(s, client, s.target[slot])
        _withdraw(w, r, s, slot)
    s.is_active[slot] = False
    s.version[slot] += 1
    if s.device_slot[client] == slot:  # the answer came while the device was at it too
        dev.stop(s, client)
    s.local[slot] = LOCAL_NONE
    while s.top > 0 and not s.is_active[s.top - 1]:
        s.top -= 1
    _record(w, s, client, s.number[slot], latency_s, outcome)
    dev.start_next(w, r, s, client)


@compiled
def _record(w: World, s: Lane, client: int, number: int, latency_s: float, outcome: int) -> None:
    if client != 0:
        return
    w.requests[0, LATENCY, number] = latency_s
    w.requests[0, OUTCOME, number] = outcome
    w.requests[0, DONE, s.done_count] = number
    s.done_count += 1


@compiled
def _withdraw(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Take the remote part from wherever it is. An upload under way is cut off; what nodes send each other is not."""
    place, server = s.place[slot], s.server[slot]
    s.place[slot] = NOWHERE
    s.is_remote[slot] = False
    if place == NODE_QUEUE or place == NODE_RUN:
        s.place[slot] = place
        nodes.give_up(w, r, s, slot)
    elif place == LINK_FLIGHT and s.hop[slot] == 0 and s.link_slot[server] == slot:
        links.free(w, r, s, server)


# --- breaker, as runtime.device.breaker -------------------------------------------------------------------------------


@compiled
def _admits(s: Lane, client: int, node: int) -> bool:
    if s.breaker[client, node] == _OPEN and s.now_s >= s.retry_s[client, node]:
        s.breaker[client, node] = _HALF_OPEN
        return True
    return bool(s.breaker[client, node] == _CLOSED)


@compiled
def _answered(s: Lane, client: int, node: int) -> None:
    s.breaker[client, node], s.failures[client, node] = _CLOSED, 0
    s.cool_down_s[client, node] = COOL_DOWN_S


@compiled
def _unanswered(s: Lane, client: int, node: int) -> None:
    s.failures[client, node] += 1
    if s.breaker[client, node] == _HALF_OPEN:
        s.cool_down_s[client, node] = min(2.0 * s.cool_down_s[client, node], COOL_DOWN_MAX_S)
    elif s.breaker[client, node] == _OPEN or s.failures[client, node] < FAILURES_TO_OPEN:
        return
    s.breaker[client, node] = _OPEN
    s.retry_s[client, node] = s.now_s + s.cool_down_s[client, node]


# --- what devices hear ------------------------------------------------------------------------------------------------


@compiled
def _tick(w: World, r: Plans, s: Lane) -> None:
    """Twice a second: statuses arrive, silence is noticed, links that were not used are probed."""
    now_s = s.now_s
    step = int(now_s / GRID_S) % w.grid.shape[1]
    for node in range(1, r.num_nodes):
        length = nodes.queue_length(w, r, s, node, now_s)
        k, q_s = nodes.load_factor(s, node, now_s), nodes.queue_delay_s(s, node, now_s)
        busy = nodes.busy_frac(s, node, now_s)
        if not (w.grid[DOWN + node, step] > 0.0):
            for client in range(r.num_clients):
                _hear(w, r, s, client, node, k, q_s, length, busy)
    s.tick_count += 1
    for client in range(r.num_clients):
        for node in range(1, r.num_nodes):
            if s.is_up[client, node] and now_s - s.heard_s[client, node] >= LOST_AFTER_S:
                _lose(w, r, s, client, node)
        _probe_links(w, r, s, client)
    push(s, now_s + STATUS_S, TICK, ZERO, ZERO)


@compiled
def _hear(
    w: World, r: Plans, s: Lane, client: int, node: int, k: float, q_s: float, length: float, busy: float
) -> None:
    """A status comes, unless the link to the device is as good as gone."""
    link = _link_to_device(r, node)
    if links.rate_at(w, r, client, link, s.now_s) <= FLOOR_BPS:
        return
    s.heard_s[client, node] = max(s.now_s - links.rtt_at(w, r, client, link, s.now_s) / 2.0, 0.0)
    s.known_k[client, node], s.known_q_s[client, node] = k, q_s
    s.known_length[client, node], s.known_busy_frac[client, node] = length, busy
    if not s.is_up[client, node]:
        s.is_up[client, node] = True
        _answered(s, client, node)


@compiled
def _link_to_device(r: Plans, node: int) -> int:
    for link in range(r.num_links):
        if r.link_source[link] == node and r.link_target[link] == 0:
            return link
    return 0


@compiled
def _hear_reply(w: World, r: Plans, s: Lane, slot: int) -> None:
    """An answer tells the load of the nodes it passed."""
    client, row, now_s = s.client[slot], s.row[slot], s.now_s
    said_s = now_s - links.rtt_at(w, r, client, r.link[row, 3], now_s) / 2.0
    for tier in (1, 2):
        node = r.node[row, tier]
        if node > 0 and r.has_layers[row, tier] > 0.0 and said_s > s.heard_s[client, node]:
            s.heard_s[client, node] = said_s
            s.known_k[client, node] = nodes.load_factor(s, node, said_s)
            s.known_q_s[client, node] = nodes.queue_delay_s(s, node, said_s)
            s.known_length[client, node] = nodes.queue_length(w, r, s, node, now_s)


@compiled
def _lose(w: World, r: Plans, s: Lane, client: int, node: int) -> None:
    """A node has been silent too long: its connection is dropped with all that waits for it."""
    s.is_up[client, node] = False
    s.breaker[client, node], s.retry_s[client, node] = _OPEN, math.inf
    for slot in range(s.top):
        if s.is_active[slot] and s.client[slot] == client and s.is_remote[slot]:
            if s.target[slot] == node:
                _withdraw(w, r, s, slot)
                s.version[slot] += 1
                _finish_here(w, r, s, slot)
    for link in range(r.num_links):
        if r.link_source[link] == 0 and r.link_target[link] == node:
            server = links.server_of(r, client, link)
            if s.link_slot[server] == links.PROBE:
                links.free(w, r, s, server)


@compiled
def _probe_links(w: World, r: Plans, s: Lane, client: int) -> None:
    now_s = s.now_s
    for link in range(r.num_links):
        server = links.server_of(r, client, link)
        if server // LINKS != client or s.link_slot[server] != -1:
            continue
        end = max(r.link_source[link], r.link_target[link])
        device_link = r.link_source[link] == 0 or r.link_target[link] == 0
        if device_link and not s.is_up[client, end]:
            continue
        count = s.meter_count[server]
        if count > 0 and now_s - s.meter_s[server, (count - 1) % METER] < PROBE_AFTER_S:
            continue
        nbytes = FIRST_PROBE_BYTES
        if count > 0:
            nbytes = min(max(links.newest_bps(s, server) * PROBE_S / 8.0, links.MIN_SAMPLE_BYTES), MAX_PROBE_BYTES)
        links.probe(w, r, s, server, nbytes)


# --- steps ------------------------------------------------------------------------------------------------------------


@compiled
def _advance(w: World, r: Plans, s: Lane, x: State, other: State, is_planned: bool) -> bool:
    """Go on to the next arrival of client 0; at its last one, until all its earlier requests have ended.

    The last arrival is never started: it is there to be seen, so that an episode ends with a state to value.

    Args:
        w: the lane's world.
        r: its plans.
        s: the lane.
        x: takes the state that client 0 sees.
        other: takes those of the others.
        is_planned: the planner decides for client 0 too, until the end.

    Returns:
        True when client 0's last request has come and all earlier ones have ended.
    """
    is_last = False
    while True:
        at = earliest(s)
        at_s, kind, what = s.event_s[at], s.event_kind[at], s.event_id[at]
        is_valid = is_current(s, at)
        remove(s, at)
        if not is_valid:
            continue
        s.now_s = at_s
        if kind != ARRIVAL:
            _handle(w, r, s, kind, what)
        elif what == 0 and (not is_planned or s.next_request[0] + 1 == r.num_requests):
            read_state(w, r, s, x, ZERO)
            weigh(r, x)
            is_last = s.next_request[0] + 1 == r.num_requests
            if not is_last:
                return False
        elif s.next_request[what] < r.num_requests:
            read_state(w, r, s, other, what)
            row = weigh(r, other)
            submit(w, r, s, what, row, other.total_s[row])
        if is_last and not _has_requests(s):
            return True


@compiled
def _has_requests(s: Lane) -> bool:
    for slot in range(s.top):
        if s.is_active[slot] and s.client[slot] == 0:
            return True
    return False


Array = Any
STEP, BEGIN, PLAN = constants(3)


@entry
def run_lanes(
    w: World,
    plans: Array,
    lanes: Array,
    states: Array,
    chosen: Array,
    rows: Array,
    mode: int,
    is_over: Array,
    ended: Array,
) -> int:
    """Run the chosen lanes. One function for all, so that everything is compiled once.

    Args:
        w: worlds; arrays here have the lanes first.
        plans: records of `PLANS`.
        lanes: records of `LANE`; blank ones unless the mode is `STEP`.
        states: records of `STATE`, one more than lanes: the last is for the other clients.
        chosen: numbers of the lanes.
        rows: plan of client 0's request at hand, for `STEP`.
        mode: `STEP`: submit that request and go on to the next; `BEGIN`: go to the first; `PLAN`: run the whole
            episode, the planner deciding for every client.
        is_over: takes where the request now at hand is the last.
        ended: takes the place in `chosen` and the number of each of client 0's requests that ended.

    Returns:
        How many ended.
    """
    num_ended = 0
    for at in range(len(chosen)):
        b = chosen[at]
        world = World(w.grid[b], w.background[b], w.requests[b])
        r, s, x = plans[b], lanes[b], states[b]
        s.done_count = 0
        if mode == STEP:
            submit(world, r, s, ZERO, rows[at], x.total_s[rows[at]])
        else:
            _begin(world, r, s)
        is_over[at] = _advance(world, r, s, x, states[-1], mode == PLAN)
        for index in range(s.done_count):
            ended[0, num_ended], ended[1, num_ended] = at, int(world.requests[0, DONE, index])
            num_ended += 1
    return num_ended


def blank_lane() -> Lane:
    """A lane before anything has happened."""
    lane = make_records(LANE, 1)
    for name in ("device_slot", "link_slot", "node_slot", "in_force"):
        lane[name] = -1
    for name in ("known_k", "known_q_s", "known_busy_frac"):
        lane[name] = math.nan
    lane["heard_s"], lane["retry_s"], lane["cool_down_s"] = -math.inf, math.inf, COOL_DOWN_S
    return lane[0]
