"""What devices hear of nodes: statuses, replies, silence; and the probes that keep links known."""

from env.kernel import links, nodes
from env.kernel.compiled import ZERO, compiled, wide
from env.kernel.events import TICK, push
from env.kernel.layout import (
    DOWN,
    LINKS,
    Lane,
    Plans,
    World,
)
from env.kernel.life import answered, finish_here, lost, withdraw
from env.kernel.links import LOST_AFTER_S
from env.traces import FLOOR_BPS

STATUS_S = 0.5
"""As in `runtime.node.worker`."""

PROBE_AFTER_S = 5.0
PROBE_S = 0.05
FIRST_PROBE_BYTES = 64 * 1024.0
MAX_PROBE_BYTES = 2.0**20
"""As in `runtime.wire.link`."""


@compiled
def tick(w: World, r: Plans, s: Lane) -> None:
    """Twice a second: statuses arrive, silence is noticed, links that were not used are probed."""
    now_s = s.now_s
    step = links.step_of(now_s)
    for node in range(1, r.num_nodes):
        length = nodes.queue_length(w, r, s, node, now_s)
        k, q_s = nodes.load_at(s, node, now_s)
        busy = nodes.busy_frac(s, node, now_s)
        if not (w.course.grid[DOWN + node, step] > 0.0):
            for client in range(r.num_clients):
                _hear(w, r, s, client, node, k, q_s, length, busy)
    s.tick_count += 1
    for client in range(r.num_clients):
        for node in range(1, r.num_nodes):
            known = s.known[client, node]
            if known.is_up and now_s - known.heard_s >= LOST_AFTER_S:
                _lose(w, r, s, client, node)
        _probe_links(w, r, s, client)
    push(s, now_s + STATUS_S, TICK, ZERO, ZERO)


@compiled
def _hear(
    w: World, r: Plans, s: Lane, client: int, node: int, k: float, q_s: float, length: float, busy: float
) -> None:
    """A status comes, unless the link to the device is as good as gone."""
    link = wide(r.back_link[node])
    if links.rate_at(w, r, client, link, s.now_s) <= FLOOR_BPS:
        return
    known = s.known[client, node]
    known.heard_s = max(s.now_s - links.rtt_at(w, r, client, link, s.now_s) / 2.0, 0.0)
    known.k, known.q_s, known.length, known.busy_frac = k, q_s, length, busy
    if not known.is_up:
        known.is_up = True
        answered(s, client, node)


@compiled
def hear_reply(w: World, r: Plans, s: Lane, slot: int) -> None:
    """An answer tells the load of the nodes it passed."""
    request = s.slots[slot]
    client, now_s = request.client, s.now_s
    plan = r.rows[request.row]
    said_s = now_s - links.rtt_at(w, r, client, wide(plan.link[3]), now_s) / 2.0
    for tier in (1, 2):
        node = wide(plan.node[tier])
        known = s.known[client, node]
        if node > 0 and plan.has_layers[tier] > 0.0 and said_s > known.heard_s:
            known.heard_s = said_s
            known.k, known.q_s = nodes.load_at(s, node, said_s)
            known.length = nodes.queue_length(w, r, s, node, now_s)


@compiled
def _lose(w: World, r: Plans, s: Lane, client: int, node: int) -> None:
    """A node has been silent too long: its connection is dropped with all that waits for it."""
    s.known[client, node].is_up = False
    lost(s, client, node)
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.client == client and request.is_remote:
            if request.target == node:
                withdraw(w, r, s, slot)
                request.version += 1
                finish_here(w, r, s, slot)
    for link in range(r.num_links):
        if r.link_source[link] == 0 and r.link_target[link] == node:
            server = links.server_of(r, client, link)
            if s.servers[server].slot == links.PROBE:
                links.free(w, r, s, server)


@compiled
def _probe_links(w: World, r: Plans, s: Lane, client: int) -> None:
    now_s = s.now_s
    for link in range(r.num_links):
        server = links.server_of(r, client, link)
        wire = s.servers[server]
        if server // LINKS != client or wire.slot != -1:
            continue
        count = wire.meter_count
        if count > 0 and now_s - wire.measured_s < PROBE_AFTER_S:
            continue
        end = max(r.link_source[link], r.link_target[link])
        device_link = r.link_source[link] == 0 or r.link_target[link] == 0
        if device_link and not s.known[client, end].is_up:
            continue
        nbytes = FIRST_PROBE_BYTES
        if count > 0:
            nbytes = min(max(links.newest_bps(w, s, server) * PROBE_S / 8.0, links.MIN_SAMPLE_BYTES), MAX_PROBE_BYTES)
        links.probe(w, r, s, server, nbytes)
