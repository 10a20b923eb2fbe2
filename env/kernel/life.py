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
    device = s.clients[client]
    number = device.next_request
    device.next_request += 1
    if device.next_request < r.num_requests:
        push(s, requests[client, number + 1, ARRIVES], ARRIVAL, client, ZERO)
    slot = links.free_slot(s)
    if slot < 0:
        _record(s, client, number, math.inf, FAILED)
        return
    request = s.slots[slot]
    request.is_active = True
    request.client, request.number, request.row = client, number, row
    request.arrived_s = s.now_s
    request.deadline_at_s = s.now_s + requests[client, number, DEADLINE]
    request.input_bytes = requests[client, number, INPUT]
    for tier in range(3):
        request.noise[tier] = requests[client, number, NOISE + tier]
    request.predicted_s = predicted_s
    request.place, request.hop = NOWHERE, 0
    request.version += 1
    request.is_coded, request.is_stage_done, request.is_remote = False, False, False
    request.target, request.local, request.guard_s = -1, LOCAL_NONE, math.inf
    if r.rows[row].has_layers[0] > 0.0:
        dev.queue_stage(w, r, s, slot)
        dev.guard(r, s, slot)
    else:
        dev.guard(r, s, slot)
        stage_done(w, r, s, slot)


@compiled
def stage_done(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The device's share is done: on to the first node, or that was all."""
    request = s.slots[slot]
    request.is_stage_done = True
    if not dev.has_remote(r, s, slot):
        end(w, r, s, slot, ON_DEVICE)
    elif request.local == LOCAL_WANTED:
        dev.queue_completion(w, r, s, slot)
    else:
        _send(w, r, s, slot)


@compiled
def _send(w: World, r: Plans, s: Lane, slot: int) -> None:
    request = s.slots[slot]
    client = request.client
    plan = r.rows[request.row]
    node = wide(r.link_target[plan.link[0]])
    request.target = node
    if not s.known[client, node].is_up or not _admits(s, client, node):
        finish_here(w, r, s, slot)
        return
    request.is_remote = True
    request.hop = 0
    encode(w, r, s, slot, plan.plain_codec_s)


@compiled
def encode(w: World, r: Plans, s: Lane, slot: int, extra_s: float) -> None:
    """Choose the codec of the present transfer by its sender's newest sample, then send."""
    request = s.slots[slot]
    hop, client = request.hop, request.client
    plan = r.rows[request.row]
    if hop % 2 == 0 or plan.is_relayed == 0:
        link = wide(plan.link[hop])
        bps = links.newest_bps(w, s, links.server_of(r, client, link))
        saved_s = 0.0 if math.isnan(bps) else plan.saved_bytes[hop] * 8.0 / bps
        request.is_coded = saved_s > plan.coding_s[hop]
    delay_s = extra_s + (plan.coding_s[hop] if request.is_coded else 0.0)
    links.delay(s, slot, delay_s, DO_SEND)


@compiled
def finish_here(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Finish a request on the device; a node that still has it may answer first."""
    request = s.slots[slot]
    if request.local != LOCAL_NONE:
        return
    if math.isinf(r.local_s):
        return  # nothing to do but wait for the deadline
    client = request.client
    device = s.clients[client]
    is_stage_running = device.slot == slot and not device.is_local
    if is_stage_running and not request.is_stage_done:
        request.local = LOCAL_WANTED
    else:
        dev.queue_completion(w, r, s, slot)


# --- endings ------------------------------------------------------------------------------------------------------------


@compiled
def end(w: World, r: Plans, s: Lane, slot: int, outcome: int) -> None:
    """A request has its answer, or will have none."""
    request = s.slots[slot]
    client = request.client
    device = s.clients[client]
    latency_s = s.now_s - request.arrived_s
    if outcome == FAILED:
        latency_s = math.inf
    else:
        at = device.error_count % SAMPLES
        device.errors[at] = latency_s / request.predicted_s - 1.0
        device.error_count += 1
        device.in_force = request.row
    if outcome != REMOTE and request.is_remote:
        _unanswered(s, client, request.target)
        withdraw(w, r, s, slot)
    if device.slot == slot:  # the answer came while the device was at it too
        dev.stop(s, client)
    request.local = LOCAL_NONE
    links.release(s, slot)
    _record(s, client, request.number, latency_s, outcome)
    dev.start_next(w, r, s, client)


@compiled
def _record(s: Lane, client: int, number: int, latency_s: float, outcome: int) -> None:
    if client != 0:
        return
    ending = s.ended[s.ended_count]
    ending.number, ending.latency_s, ending.outcome = number, latency_s, outcome
    s.ended_count += 1


@compiled
def withdraw(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Take the remote part from wherever it is. An upload under way is cut off; what nodes send each other is not."""
    request = s.slots[slot]
    place, server = request.place, request.server
    request.place = NOWHERE
    request.is_remote = False
    if r.rows[request.row].num_peers > 0:
        tiles.recall(w, r, s, slot)
    if place == NODE_QUEUE or place == NODE_RUN or place == NODE_READY:
        request.place = place
        nodes.give_up(w, r, s, slot)
    elif place == LINK_FLIGHT and request.hop == 0 and s.servers[server].slot == slot:
        links.free(w, r, s, server)


# --- breaker, as runtime.device.breaker ---------------------------------------------------------------------------------


@compiled
def _admits(s: Lane, client: int, node: int) -> bool:
    known = s.known[client, node]
    if known.breaker == _OPEN and s.now_s >= known.retry_s:
        known.breaker = _HALF_OPEN
        return True
    return bool(known.breaker == _CLOSED)


@compiled
def answered(s: Lane, client: int, node: int) -> None:
    """A node has answered, be it with *busy*: its breaker is closed."""
    known = s.known[client, node]
    known.breaker, known.failures = _CLOSED, 0
    known.cool_down_s = COOL_DOWN_S


@compiled
def _unanswered(s: Lane, client: int, node: int) -> None:
    known = s.known[client, node]
    known.failures += 1
    if known.breaker == _HALF_OPEN:
        known.cool_down_s = min(2.0 * known.cool_down_s, COOL_DOWN_MAX_S)
    elif known.breaker == _OPEN or known.failures < FAILURES_TO_OPEN:
        return
    known.breaker = _OPEN
    known.retry_s = s.now_s + known.cool_down_s


@compiled
def lost(s: Lane, client: int, node: int) -> None:
    """The link is gone: nothing but hearing from the node helps."""
    known = s.known[client, node]
    known.breaker, known.retry_s = _OPEN, math.inf
