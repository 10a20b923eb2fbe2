"""Requests whose edge share is in tiles, as `runtime.node.scatter` and `runtime.node.state` play them.

    head:  untiled layers, then by span: own tile -> [other work, while tiles are out] -> what is left -> on, or back
    peer:               link -> queue -> tile -> link

A tile that is out has a slot of its own: it queues at its node among requests and background, and is refused where the
queue is full. The head goes on, ahead of its queue, when the last is back; it does those itself that are not to come: the
node is not connected, refused, or took too long. Such a tile is done from the start of its chain on, and stays with the
head to the chain's end. Where nobody is there to help at the start of a chain, its spans run in one piece.

Simpler than the runtime: the untiled layers of the edge all run before the first span, and k is noted at their end; tiles
cross links that nobody else holds, raw, and leave no readings behind; a node is connected unless it is silent now and was
`LOST_AFTER_S` ago; a lost connection ends no wait before patience does, and patience is by the slowest crossing of all tiles
sent, not of those still out; background is not turned away for requests that gather; segments of tiles are built already;
borders of a chain's tiles go to other nodes when all of the span before is back; what the head has taken over it does last;
a node may be too busy for a chain's next span.
"""

import math
from typing import Any

from env.kernel import links, nodes
from env.kernel.compiled import ZERO, compiled, wide
from env.kernel.events import DELAY, next_sequence, push
from env.kernel.layout import (
    ALONE_S,
    BACK,
    BACK_BYTES,
    DOWN,
    FIXED_S,
    GOES_ON,
    IDLE_S,
    NODE_AT,
    REPLAY_S,
    THERE,
    THERE_BYTES,
    Lane,
    Plans,
    View,
    World,
)
from env.kernel.links import (
    DO_COMPUTE,
    DO_GIVE_UP,
    DO_MISS,
    DO_RETURN,
    GATHERING,
    LOST_AFTER_S,
    NODE_QUEUE,
    NODE_READY,
    NODE_RUN,
    NOWHERE,
)

PATIENCE = 3.0
SLACK_S = 0.25
PROTECTION_FACTOR = 1.5
"""As in `runtime.node.scatter`, which needs torch."""

ALL = -1
"""Taken over: every tile, before the first was sent."""

Tiles = Any
"""Tiles of a lane's plans, (T, TILE_COLUMNS)."""


# --- what they are expected to take -----------------------------------------------------------------------------------


@compiled
def weigh_spans(tiles: Tiles, r: Plans, v: View) -> None:
    """Predict the tiled spans of every plan, as `runtime.planning.grids.TileRows.seconds` has it."""
    for row in range(r.num_rows):
        plan = r.rows[row]
        if plan.num_peers > 0:
            total_s, span_s = 0.0, 0.0
            for at in range(plan.first_tile, plan.first_tile + plan.num_tiles):
                tile = tiles[at]
                node = int(tile[NODE_AT])
                seconds = v.k[node] * tile[IDLE_S] + tile[FIXED_S]
                if tile[THERE] < 0.0:
                    total_s += span_s
                    span_s = seconds
                else:
                    there, back = int(tile[THERE]), int(tile[BACK])
                    seconds += tile[THERE_BYTES] * v.s_per_byte[there] + tile[BACK_BYTES] * v.s_per_byte[back]
                    seconds += v.half_rtt_s[there] + v.half_rtt_s[back] + v.q_s[node]
                    span_s = max(span_s, seconds)
            v.tiled_s[row] = total_s + span_s


# --- at the head ------------------------------------------------------------------------------------------------------


@compiled
def proceed(w: World, r: Plans, s: Lane, slot: int, node: int) -> bool:
    """A piece of a head's share is done: go on with what comes next. False when that was all."""
    request = s.slots[slot]
    plan = r.rows[request.row]
    if request.is_span_open:
        if request.num_out > 0:
            _gather(w, r, s, slot, node)
            return True
        request.is_span_open = False
        if request.left_s > 0.0:
            left_s = request.left_s * nodes.contention_at(w, node, s.now_s) * nodes.head_noise(w, s, slot)
            request.left_s = 0.0
            nodes.go_on(s, node, slot, left_s)
            return True
    if request.tile >= plan.first_tile + plan.num_tiles:
        return False
    _open_span(w, r, s, slot, node)
    return True


@compiled
def _open_span(w: World, r: Plans, s: Lane, slot: int, node: int) -> None:
    """Send the tiles of other nodes off, then run the own one."""
    request = s.slots[slot]
    plan = r.rows[request.row]
    first, end = wide(request.tile), wide(plan.first_tile + plan.num_tiles)
    at = first + 1
    request.crossing_s = 0.0
    if w.tiles[first, GOES_ON] == 0.0:
        request.taken = 0
    while at < end and w.tiles[at, THERE] >= 0.0:
        if request.taken >> (at - first) & 1:
            request.left_s += w.tiles[at, ALONE_S]
        elif not _is_connected(w, int(w.tiles[at, NODE_AT]), s.now_s) or not _send(w, r, s, slot, at):
            _take_over(w, s, slot, at)
        at += 1
    request.tile = at
    request.scattered_s = s.now_s
    request.is_span_open = request.num_out > 0
    factor = nodes.contention_at(w, node, s.now_s) * nodes.head_noise(w, s, slot)
    own_s, fixed_s = w.tiles[first, IDLE_S], w.tiles[first, FIXED_S]
    if request.num_out == 0:
        if w.tiles[first, GOES_ON] == 0.0 or request.taken == ALL:
            request.taken = ALL
            own_s, fixed_s = w.tiles[first, ALONE_S], 0.0
        else:
            own_s += request.left_s
        request.left_s = 0.0
    nodes.go_on(s, node, slot, own_s * factor + fixed_s)


@compiled
def _take_over(w: World, s: Lane, slot: int, at: int) -> None:
    """A tile is left to the head, with all that came before it in its chain, and stays with it."""
    s.slots[slot].left_s += w.tiles[at, REPLAY_S]
    index = 0
    while w.tiles[at - index, THERE] >= 0.0:
        index += 1
    s.slots[slot].taken |= 1 << index


@compiled
def _is_connected(w: World, node: int, now_s: float) -> bool:
    before_s = max(now_s - LOST_AFTER_S, 0.0)
    is_silent = (
        w.course.grid[DOWN + node, links.step_of(now_s)] > 0.0
        and w.course.grid[DOWN + node, links.step_of(before_s)] > 0.0
    )
    return not is_silent


@compiled
def _gather(w: World, r: Plans, s: Lane, slot: int, node: int) -> None:
    """Leave the processor to others until all tiles are back, or have taken too long."""
    request = s.slots[slot]
    own_s = s.now_s - request.scattered_s
    patient_s = request.scattered_s + PATIENCE * (own_s + request.crossing_s) + SLACK_S
    left_s = 0.0
    for other in range(s.top):
        part = s.slots[other]
        if part.is_active and part.parent == slot:
            left_s += w.tiles[part.tile, REPLAY_S]
    plan = r.rows[request.row]
    for at in range(request.tile, plan.first_tile + plan.num_tiles):
        if w.tiles[at, THERE] < 0.0:
            left_s += w.tiles[at, ALONE_S]
    until_s = max(min(patient_s, request.deadline_at_s - PROTECTION_FACTOR * left_s), s.now_s)
    nodes.done(w, r, s, node)
    request.place = GATHERING
    request.todo = DO_GIVE_UP
    push(s, until_s, DELAY, slot, request.version)


@compiled
def give_up(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The tiles of a request that are out are left to its head."""
    for other in range(s.top):
        part = s.slots[other]
        if part.is_active and part.parent == slot:
            _take_over(w, s, slot, part.tile)
    recall(w, r, s, slot)
    _make_ready(w, r, s, slot)


@compiled
def recall(w: World, r: Plans, s: Lane, slot: int) -> None:
    """The tiles of a request that are out are wanted no more."""
    s.slots[slot].num_out = 0
    for other in range(s.top):
        part = s.slots[other]
        if part.is_active and part.parent == slot:
            if part.place == NODE_QUEUE or part.place == NODE_RUN:
                nodes.give_up(w, r, s, other)
            _drop(s, other)


@compiled
def _make_ready(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Nothing of a request is out any more: its head is to go on, ahead of what waits."""
    request = s.slots[slot]
    request.version += 1  # no more giving up
    request.is_span_open = False
    request.place = NODE_READY
    request.queued = next_sequence(s)
    request.queued_s = s.now_s
    if s.nodes[request.server].slot < 0:
        nodes.schedule(w, r, s, request.server)


# --- a tile of another node -------------------------------------------------------------------------------------------


@compiled
def _send(w: World, r: Plans, s: Lane, slot: int, at: int) -> bool:
    """Send a tile off; False when so much is under way that there is no slot for it."""
    request = s.slots[slot]
    own = links.free_slot(s)
    if own < 0:
        return False
    part = s.slots[own]
    part.is_active = True
    part.parent, part.tile = slot, at
    part.client = -1
    part.number, part.row, part.hop = request.number, request.row, 0
    part.deadline_at_s, part.guard_s = request.deadline_at_s, math.inf
    part.local, part.is_remote = 0, False
    request.num_out += 1
    there = int(w.tiles[at, THERE])
    links.delay(s, own, _crossing_s(w, r, s, there, w.tiles[at, THERE_BYTES], w.tiles[at, FIXED_S]), DO_COMPUTE)
    rtt_s, bps = links.rtt_at(w, r, ZERO, there, s.now_s), links.newest_bps(w, s, links.server_of(r, ZERO, there))
    if not math.isnan(bps):
        rtt_s += (w.tiles[at, THERE_BYTES] + w.tiles[at, BACK_BYTES]) * 8.0 / bps
    request.crossing_s = max(request.crossing_s, rtt_s)
    return True


@compiled
def _crossing_s(w: World, r: Plans, s: Lane, link: int, nbytes: float, fixed_s: float) -> float:
    """Seconds until tensors are at the other end of a link; half the fixed seconds are the other message's."""
    end_s = links.transfer_end(w, r, ZERO, link, s.now_s, nbytes)
    return float(end_s - s.now_s + links.rtt_at(w, r, ZERO, link, end_s) / 2.0 + fixed_s / 2.0)


@compiled
def reach(w: World, r: Plans, s: Lane, slot: int) -> None:
    """What a tile's delay led to."""
    part = s.slots[slot]
    tile = w.tiles[part.tile]
    if links.is_broken(w, r, ZERO, int(tile[THERE]), s.now_s):
        part.place = NOWHERE  # lost on the way: nobody will tell
    elif part.todo == DO_COMPUTE:
        if s.now_s >= part.deadline_at_s or not nodes.arrive(w, r, s, slot, int(tile[NODE_AT])):
            miss(w, r, s, slot)
    else:
        head = wide(part.parent)
        request = s.slots[head]
        if part.todo == DO_MISS:
            _take_over(w, s, head, part.tile)
        _drop(s, slot)
        request.num_out -= 1
        if request.num_out == 0 and request.place == GATHERING:
            _make_ready(w, r, s, head)


@compiled
def miss(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Tell the head that a tile is not to come; the notice is a small message."""
    links.delay(s, slot, links.rtt_at(w, r, ZERO, int(w.tiles[s.slots[slot].tile, BACK]), s.now_s) / 2.0, DO_MISS)


@compiled
def computed(w: World, r: Plans, s: Lane, node: int) -> None:
    """A tile is done at its node: send it back."""
    slot = nodes.done(w, r, s, node)
    part = s.slots[slot]
    tile = w.tiles[part.tile]
    if w.course.grid[DOWN + node, links.step_of(s.now_s)] > 0.0:
        part.place = NOWHERE
    else:
        links.delay(s, slot, _crossing_s(w, r, s, int(tile[BACK]), tile[BACK_BYTES], tile[FIXED_S]), DO_RETURN)


@compiled
def _drop(s: Lane, slot: int) -> None:
    s.slots[slot].parent = -1
    links.release(s, slot)
