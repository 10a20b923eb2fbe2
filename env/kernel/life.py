"""A request's life on its way: started, sent, refused, completed by the device, ended; and the breaker of its node."""

import math

from env.kernel import device as dev
from env.kernel import links, nodes, tiles
from env.kernel.compiled import ZERO, compiled, constants, wide
from env.kernel.device import LOCAL_NONE, LOCAL_WANTED
from env.kernel.events import ARRIVAL, push
from env.kernel.layout import (
    ARRIVES,
    DEADLINE,
    INPUT,
    NOISE,
    SAMPLES,
    Lane,
    Plans,
    Requests,
    World,
)
from env.kernel.links import (
    DO_SEND,
    LINK_FLIGHT,
    NODE_QUEUE,
    NODE_READY,
    NODE_RUN,
    NOWHERE,
)

REMOTE, ON_DEVICE, LOCAL, FAILED = constants(5)[1:]
"""Outcomes: answered by a node, planned for the device alone, completed by the device instead, not at all."""

FAILURES_TO_OPEN = 2
COOL_DOWN_S = 1.0
COOL_DOWN_MAX_S = 30.0
"""As in `runtime.device.breaker`."""

_CLOSED, _OPEN, _HALF_OPEN = range(3)


@compiled
def submit(w: World, requests: Requests, r: Plans, s: Lane, client: int, row: int, predicted_s: float) -> None:
    """Start a client's next request under a plan, at the instant of its arrival."""
    number = s.next_request[client]
    s.next_request[client] += 1
    if s.next_request[client] < r.num_requests:
        push(s, requests[client, number + 1, ARRIVES], ARRIVAL, client, ZERO)
    slot = links.free_slot(s)
    if slot < 0:
        _record(s, client, number, math.inf, FAILED)
        return
    s.is_active[slot] = True
    s.client[slot], s.number[slot], s.row[slot] = client, number, row
    s.arrived_s[slot] = s.now_s
    s.deadline_at_s[slot] = s.now_s + requests[client, number, DEADLINE]
    s.input_bytes[slot] = requests[client, number, INPUT]
    for tier in range(3):
        s.noise[slot, tier] = requests[client, number, NOISE + tier]
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
        stage_done(w, r, s, slot)


@compiled
def stage_done(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The device's share is done: on to the first node, or that was all."""
    s.is_stage_done[slot] = True
    if not dev.has_remote(r, s, slot):
        end(w, r, s, slot, ON_DEVICE)
    elif s.local[slot] == LOCAL_WANTED:
        dev.queue_completion(w, r, s, slot)
    else:
        _send(w, r, s, slot)


@compiled
def _send(w: World, r: Plans, s: Lane, slot: int) -> None:
    client, row = s.client[slot], s.row[slot]
    node = wide(r.link_target[r.link[row, 0]])
    s.target[slot] = node
    if not s.is_up[client, node] or not _admits(s, client, node):
        finish_here(w, r, s, slot)
        return
    s.is_remote[slot] = True
    s.hop[slot] = 0
    encode(w, r, s, slot, r.plain_codec_s[row])


@compiled
def encode(w: World, r: Plans, s: Lane, slot: int, extra_s: float) -> None:
    """Choose the codec of the present transfer by its sender's newest sample, then send."""
    row, hop, client = s.row[slot], s.hop[slot], s.client[slot]
    if hop % 2 == 0 or r.is_relayed[row] == 0:
        link = wide(r.link[row, hop])
        bps = links.newest_bps(w, s, links.server_of(r, client, link))
        saved_s = 0.0 if math.isnan(bps) else r.saved_bytes[row, hop] * 8.0 / bps
        s.is_coded[slot] = saved_s > r.coding_s[row, hop]
    delay_s = extra_s + (r.coding_s[row, hop] if s.is_coded[slot] else 0.0)
    links.delay(s, slot, delay_s, DO_SEND)


@compiled
def finish_here(w: World, r: Plans, s: Lane, slot: int) -> None:
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


# --- endings ------------------------------------------------------------------------------------------------------------


@compiled
def end(w: World, r: Plans, s: Lane, slot: int, outcome: int) -> None:
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
        withdraw(w, r, s, slot)
    if s.device_slot[client] == slot:  # the answer came while the device was at it too
        dev.stop(s, client)
    s.local[slot] = LOCAL_NONE
    links.release(s, slot)
    _record(s, client, s.number[slot], latency_s, outcome)
    dev.start_next(w, r, s, client)


@compiled
def _record(s: Lane, client: int, number: int, latency_s: float, outcome: int) -> None:
    if client != 0:
        return
    at = s.ended_count
    s.ended[at], s.latency_s[at], s.outcome[at] = number, latency_s, outcome
    s.ended_count = at + 1


@compiled
def withdraw(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Take the remote part from wherever it is. An upload under way is cut off; what nodes send each other is not."""
    place, server = s.place[slot], s.server[slot]
    s.place[slot] = NOWHERE
    s.is_remote[slot] = False
    if r.num_peers[s.row[slot]] > 0:
        tiles.recall(w, r, s, slot)
    if place == NODE_QUEUE or place == NODE_RUN or place == NODE_READY:
        s.place[slot] = place
        nodes.give_up(w, r, s, slot)
    elif place == LINK_FLIGHT and s.hop[slot] == 0 and s.link_slot[server] == slot:
        links.free(w, r, s, server)


# --- breaker, as runtime.device.breaker ---------------------------------------------------------------------------------


@compiled
def _admits(s: Lane, client: int, node: int) -> bool:
    if s.breaker[client, node] == _OPEN and s.now_s >= s.retry_s[client, node]:
        s.breaker[client, node] = _HALF_OPEN
        return True
    return bool(s.breaker[client, node] == _CLOSED)


@compiled
def answered(s: Lane, client: int, node: int) -> None:
    """A node has answered, be it with *busy*: its breaker is closed."""
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


@compiled
def lost(s: Lane, client: int, node: int) -> None:
    """The link is gone: nothing but hearing from the node helps."""
    s.breaker[client, node], s.retry_s[client, node] = _OPEN, math.inf
