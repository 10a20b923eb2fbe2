"""A lane's life: begin, requests that come, what follows from each event, and how requests end.

arrive -> device share -> link -> head -> link -> cloud -> link -> (head passes on) -> link -> end
             |             |        |                                                   |
             +-------------+--------+--> completed on the device --------------------> end
"""

import math
from typing import Any

from env.kernel import device as dev
from env.kernel import links, nodes, tiles
from env.kernel.compiled import ZERO, compiled, constants, entry, wide
from env.kernel.decide import glance, predict, read_state, total, weigh
from env.kernel.device import LOCAL_NONE
from env.kernel.events import ARRIVAL, DELAY, DEVICE, GUARD, LINK, NODE, push, take_next
from env.kernel.hear import FIRST_PROBE_BYTES, hear_reply, tick
from env.kernel.lanes import blank, copy, fork
from env.kernel.layout import (
    ARRIVES,
    DOWN,
    LATENCY,
    LINKS,
    OUTCOME,
    ROWS,
    Lane,
    Plans,
    Requests,
    Seen,
    State,
    View,
    World,
    Worlds,
)
from env.kernel.life import (
    FAILED,
    LOCAL,
    REMOTE,
    answered,
    encode,
    end,
    finish_here,
    stage_done,
    submit,
)
from env.kernel.links import (
    DO_ARRIVE,
    DO_COMPUTE,
    DO_FAIL,
    DO_FINISH,
    DO_GIVE_UP,
    DO_SEND,
    NOWHERE,
)
from env.kernel.show import show

Array = Any

# --- begin --------------------------------------------------------------------------------------------------------------


@compiled
def _begin(w: World, requests: Requests, r: Plans, s: Lane) -> None:
    """Set a blank lane to time 0: every link has been probed once, every node heard of, as the world has it."""
    for client in range(r.num_clients):
        push(s, requests[client, 0, ARRIVES], ARRIVAL, client, ZERO)
        for link in range(r.num_links):
            server = links.server_of(r, client, link)
            if server // LINKS == client and s.servers[server].meter_count == 0:
                _first_probe(w, r, s, client, link, server, requests[client, 0, ARRIVES])
    tick(w, r, s)


@compiled
def _first_probe(w: World, r: Plans, s: Lane, client: int, link: int, server: int, until_s: float) -> None:
    rtt_s = links.rtt_at(w, r, client, link, 0.0)
    elapsed_s = links.transfer_end(w, r, client, link, 0.0, FIRST_PROBE_BYTES) + rtt_s
    if elapsed_s < until_s:
        links.add_sample(w, s, server, elapsed_s, FIRST_PROBE_BYTES, elapsed_s, rtt_s)


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
        tick(w, r, s)


@compiled
def _continue(w: World, r: Plans, s: Lane, slot: int) -> None:
    """A request's delay has passed."""
    request = s.slots[slot]
    todo, client, hop = request.todo, request.client, request.hop
    plan = r.rows[request.row]
    if todo == DO_SEND:
        links.enqueue(w, r, s, slot)
    elif todo == DO_ARRIVE:
        if links.is_broken(w, r, client, wide(plan.link[hop]), s.now_s):
            request.place = NOWHERE  # lost on the way: nobody will tell
        elif hop < 2:
            _reach_node(w, r, s, slot)
        elif hop == 2:
            request.hop = 3
            encode(w, r, s, slot, 0.0)
        else:
            links.delay(s, slot, plan.message_s, DO_FINISH)
    elif todo == DO_GIVE_UP:
        tiles.give_up(w, r, s, slot)
    elif todo >= DO_COMPUTE:
        tiles.reach(w, r, s, slot)
    else:
        answered(s, client, request.target)
        if todo == DO_FINISH:
            hear_reply(w, r, s, slot)
            end(w, r, s, slot, REMOTE)
        else:
            request.is_remote = False
            request.place = NOWHERE
            finish_here(w, r, s, slot)


@compiled
def _reach_node(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The tensors are at a node: compute, pass on, or be refused."""
    request = s.slots[slot]
    tier = nodes.tier_of(r, s, slot)
    plan = r.rows[request.row]
    node = wide(plan.node[tier])
    if s.now_s >= request.deadline_at_s:
        _refuse(w, r, s, slot)
    elif plan.has_layers[tier] > 0.0:
        if not nodes.arrive(w, r, s, slot, node):
            _refuse(w, r, s, slot)
    else:
        _leave_node(w, r, s, slot)


@compiled
def _leave_node(w: World, r: Plans, s: Lane, slot: int) -> None:
    """A node's share is done: on to the cloud, or back."""
    request = s.slots[slot]
    plan = r.rows[request.row]
    if request.hop == 0 and plan.has_hop[1] > 0.0:
        request.hop = 1
    else:
        request.hop = 2 if plan.has_hop[2] > 0.0 else 3
    encode(w, r, s, slot, 0.0)


@compiled
def _refuse(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Tell the device that there will be no result; the notice is a small message on the way back."""
    request = s.slots[slot]
    client = request.client
    plan = r.rows[request.row]
    back_s = links.rtt_at(w, r, client, wide(plan.link[3]), s.now_s) / 2.0
    if request.hop == 1:
        back_s += links.rtt_at(w, r, ZERO, wide(plan.link[2]), s.now_s) / 2.0
    links.delay(s, slot, back_s, DO_FAIL)


@compiled
def _node_event(w: World, r: Plans, s: Lane, node: int) -> None:
    queue = s.nodes[node]
    if queue.slot < 0:
        late = nodes.start(w, r, s, node)
        if late >= 0 and r.rows[s.slots[late].row].num_peers > 0 and s.slots[late].parent >= 0:
            tiles.miss(w, r, s, late)
        elif late >= 0:
            _refuse(w, r, s, late)
        return
    slot = queue.slot
    if r.rows[s.slots[slot].row].num_peers > 0 and s.slots[slot].hop == 0:
        if s.slots[slot].parent >= 0:
            tiles.computed(w, r, s, node)
            return
        if tiles.proceed(w, r, s, slot, node):
            return
    slot = nodes.done(w, r, s, node)
    step = links.step_of(s.now_s)
    if w.course.grid[DOWN + node, step] > 0.0:
        s.slots[slot].place = NOWHERE
    else:
        _leave_node(w, r, s, slot)


@compiled
def _device_event(w: World, r: Plans, s: Lane, client: int) -> None:
    device = s.clients[client]
    slot, is_local = device.slot, device.is_local
    dev.stop(s, client)
    if is_local:
        end(w, r, s, slot, LOCAL)
    else:
        stage_done(w, r, s, slot)
    dev.start_next(w, r, s, client)


@compiled
def _guard_event(w: World, r: Plans, s: Lane, slot: int) -> None:
    request = s.slots[slot]
    request.guard_s = math.inf
    if dev.guard_at_s(r, s, slot) > s.now_s:
        dev.guard(r, s, slot)
    elif math.isinf(r.local_s):
        end(w, r, s, slot, FAILED)
    elif request.local == LOCAL_NONE:
        finish_here(w, r, s, slot)


# --- steps ------------------------------------------------------------------------------------------------------------


@compiled
def _advance(
    w: World,
    requests: Requests,
    r: Plans,
    s: Lane,
    v: View,
    x: State,
    candidates: Array,
    context: Array,
    mask: Array,
) -> bool:
    """Go on to the next arrival of client 0, and show it; at its last one, until all its earlier requests have ended.

    In a lane that asks for everyone, an arrival of another client is a stop too: it can be read, but is not shown.

    The last arrival is never started: it is there to be seen, so that an episode ends with a state to value.

    Args:
        w: the lane's world.
        requests: and its requests.
        r: its plans.
        s: the lane.
        v: what is believed, one after the other.
        x: takes the state at the last arrival; at others it can be read while the lane stands there.
        candidates: takes what is seen.
        context: the same.
        mask: the same.

    Returns:
        True when client 0's last request has come and all earlier ones have ended.
    """
    while True:
        kind, what = take_next(s)
        if kind != ARRIVAL:
            _handle(w, r, s, kind, what)
        elif what == 0:
            s.turn = ZERO
            show(w, requests, r, s, v, candidates, context, mask)
            s.is_over = s.clients[0].next_request + 1 == r.num_requests
            if not s.is_over:
                return False
            _read(w, requests, r, s, x)
        elif not s.is_asking:
            _submit_planned(w, requests, r, s, v, what)
        elif s.clients[what].next_request < r.num_requests:
            _ask(w, requests, r, s, v, what)
            return False
        if s.is_over and not _has_requests(s):
            if s.turn != 0:  # others were asked meanwhile
                _ask(w, requests, r, s, v, ZERO)
                _read(w, requests, r, s, x)
            return True


@compiled
def _read(w: World, requests: Requests, r: Plans, s: Lane, x: State) -> None:
    """Write what the device has measured whose request is at hand."""
    read_state(w, requests, r, s, x, s.turn)
    for row in range(ROWS):
        x.total_s[row] = s.predicted_total_s[row]


@compiled
def _ask(w: World, requests: Requests, r: Plans, s: Lane, v: View, client: int) -> None:
    """Stand at a client's request: work out what the planner predicts of every plan."""
    s.turn = client
    glance(w, requests, r, s, v, client)
    for row in range(r.num_rows):
        s.predicted_total_s[row] = math.inf if r.rows[row].padding == 1 else total(predict(r, v, row))


@compiled
def _submit_planned(w: World, requests: Requests, r: Plans, s: Lane, v: View, client: int) -> None:
    """Let the planner decide on a request that has come, unless it is one too many."""
    if s.clients[client].next_request < r.num_requests:
        glance(w, requests, r, s, v, client)
        row, total_s = weigh(r, v)
        submit(w, requests, r, s, client, row, total_s)


@compiled
def _plan(w: World, requests: Requests, r: Plans, s: Lane, v: View, fates: Array, latency_s: Array) -> None:
    """Run a whole episode, the planner deciding for every client; client 0's last request does not start."""
    _begin(w, requests, r, s)
    is_over = False
    while not is_over or _has_requests(s):
        kind, what = take_next(s)
        if kind != ARRIVAL:
            _handle(w, r, s, kind, what)
        elif what == 0 and s.clients[0].next_request + 1 == r.num_requests:
            is_over = True
        else:
            if what == 0:
                _settle(s, fates)
            _submit_planned(w, requests, r, s, v, what)
    _settle(s, fates)
    for number in range(len(fates)):
        latency_s[number] = fates[number, LATENCY]


@compiled
def _settle(s: Lane, fates: Array) -> None:
    """Write down what became of the requests of client 0 that have ended."""
    for at in range(s.ended_count):
        ending = s.ended[at]
        fates[ending.number, LATENCY], fates[ending.number, OUTCOME] = ending.latency_s, ending.outcome
    s.ended_count = 0


@compiled
def _has_requests(s: Lane) -> bool:
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.client == 0:
            return True
    return False


@compiled
def _follow(w: World, requests: Requests, r: Plans, s: Lane, v: View, rows: Array, fates: Array) -> None:
    """Start client 0's request at hand and those that follow, then wait until all have ended.

    Args:
        w: the lane's world.
        requests: and its requests.
        r: its plans.
        s: the lane.
        v: what is believed, one after the other.
        rows: plan of the request at hand and of each that follows. None: not even the request at hand is started.
        fates: takes what becomes of them.
    """
    first = s.clients[0].next_request
    stop = min(first + len(rows), r.num_requests - 1)
    if len(rows) > 0:
        submit(w, requests, r, s, ZERO, rows[0], s.predicted_total_s[rows[0]])
    while s.clients[0].next_request < stop or _has_requests(s):
        kind, what = take_next(s)
        if kind != ARRIVAL:
            _handle(w, r, s, kind, what)
        elif what != 0:
            _submit_planned(w, requests, r, s, v, what)
        elif s.clients[0].next_request < stop:
            _settle(s, fates)
            row = rows[s.clients[0].next_request - first]
            glance(w, requests, r, s, v, ZERO)
            submit(w, requests, r, s, ZERO, row, total(predict(r, v, row)))
    _settle(s, fates)


STEP, BEGIN, START, LOOK, FINISH, FORK, READ = constants(7)
"""What to do with a lane. `STEP`: submit the request at hand and go on to the next. `BEGIN`: start over, and go to the
first. `START`: run the whole episode, the planner deciding for every client, then as `BEGIN`. `LOOK`: submit the
request in a copy of the lane, and see what becomes of it and of those that follow; the lane stays as it is. `FINISH`:
submit nothing, and go on until all earlier requests have ended. `FORK`: copy the lane. `READ`: write the state at the
request at hand."""


@compiled
def _look(w: Worlds, r: Plans, lanes: Array, v: View, b: int, home: int, rows: Array, looked_s: Array) -> None:
    last = len(lanes) - 2
    copy(w, r, lanes, b, last)
    s, fates = lanes[last], w.fates[last]
    first = s.clients[0].next_request
    _follow(World(w.courses[home], w.meters[last], w.tiles[home]), w.requests[home], r, s, v, rows, fates)
    for later in range(len(rows)):
        is_there = first + later < r.num_requests - 1
        looked_s[later] = fates[first + later, LATENCY] if is_there else math.nan


@entry
def run_lanes(
    w: Worlds,
    plans: Array,
    lanes: Array,
    states: Array,
    views: Array,
    seen: Seen,
    homes: Array,
    chosen: Array,
    rows: Array,
    mode: int,
    is_over: Array,
    ended: Array,
    looked_s: Array,
) -> int:
    """Run the chosen lanes. One function for all, so that everything is compiled once.

    Args:
        w: worlds.
        plans: records of `PLANS`.
        lanes: records of `LANE`, two more than there are: one to look ahead in, and one that stays blank.
        states: records of `STATE`.
        views: one record of `VIEW`, to work in.
        seen: takes the observations of the requests then at hand, for `STEP`, `BEGIN` and `START`.
        homes: lane whose world and plans each lane has: its own number, unless it is a fork.
        chosen: numbers of the lanes.
        rows: plan of the request at hand for `STEP`, shape (chosen, 1); for `LOOK` also of client 0's that follow, shape
            (chosen, how many). For `FORK`: number of the fork. For `BEGIN`: 1 to be asked by every client, not only 0.
        mode: one of those above.
        is_over: takes where the request now at hand is the last.
        ended: takes the place in `chosen` and the number of each of client 0's requests that ended.
        looked_s: takes latencies, for `LOOK` of the same requests, for `START` of all under the planner.

    Returns:
        How many ended.
    """
    num_ended, v = 0, views[0]
    for at in range(len(chosen)):
        b = chosen[at]
        home = homes[b]
        r, s, x = plans[home], lanes[b], states[b]
        if mode == LOOK:
            _look(w, r, lanes, v, b, home, rows[at], looked_s[at])
            continue
        if mode == FORK:
            fork(w, r, lanes, states, b, rows[at, 0])
            continue
        world, requests = World(w.courses[home], w.meters[b], w.tiles[home]), w.requests[home]
        if mode == READ:
            if not s.is_over or s.turn != 0:
                _read(world, requests, r, s, x)
            continue
        if mode == FINISH:
            _follow(world, requests, r, s, v, rows[at], w.fates[b])
            continue
        if mode == START:
            blank(w, lanes, b, home)
            _plan(world, requests, r, s, v, w.fates[b], looked_s[at])
        if mode == STEP:
            submit(world, requests, r, s, s.turn, rows[at, 0], s.predicted_total_s[rows[at, 0]])
        else:
            blank(w, lanes, b, home)
            s.is_asking = mode == BEGIN and rows[at, 0] != 0
            _begin(world, requests, r, s)
        is_over[at] = _advance(world, requests, r, s, v, x, seen.candidates[b], seen.context[b], seen.mask[b])
        for index in range(s.ended_count):
            ended[0, num_ended], ended[1, num_ended] = at, s.ended[index].number
            num_ended += 1
        _settle(s, w.fates[b])
    return num_ended
