"""A device: one executor, completions before new work, and the deadline's guard, as `runtime.device.client` has them."""

import math

import numpy as np

from env.kernel.compiled import ZERO, compiled, constants
from env.kernel.decide import remainder_s
from env.kernel.events import DEVICE, GUARD, next_sequence, push
from env.kernel.layout import Lane, Plans, World
from env.kernel.links import DEVICE_QUEUE, NOWHERE
from env.kernel.nodes import COLD_S, contention_at

PROTECTION_FACTOR = 1.5
HAND_OVER_S = 0.01
HAND_OVER_FRAC = 0.1
"""As in `runtime.device.request`, which needs torch."""

LOCAL_NONE, LOCAL_WANTED, LOCAL_QUEUED, LOCAL_RUNS = constants(4)
"""Stages of a local completion (`SLOT`, `local`); wanted: it waits for the request's own share to end."""


@compiled
def queue_stage(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Queue the device's share of a request."""
    request = s.slots[slot]
    request.place = DEVICE_QUEUE
    request.queued = next_sequence(s)
    start_next(w, r, s, request.client)


@compiled
def queue_completion(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Queue the rest of a request, ahead of new work."""
    request = s.slots[slot]
    request.local = LOCAL_QUEUED
    request.local_queued = next_sequence(s)
    if request.place == DEVICE_QUEUE:
        request.place = NOWHERE
    start_next(w, r, s, request.client)
    watch(r, s, request.client)


@compiled
def start_next(w: World, r: Plans, s: Lane, client: int) -> None:
    """Start what comes first, when nothing runs."""
    device = s.clients[client]
    if device.slot >= 0:
        return
    slot, is_local = _pick(s, client)
    if slot < 0:
        return
    request = s.slots[slot]
    now_s = s.now_s
    plan = r.rows[request.row]
    idle_s = remainder_s(r, s, slot) if is_local else plan.idle_s[0]
    cold_s = 0.0
    if is_local:
        request.local = LOCAL_RUNS
    else:
        request.place = NOWHERE
        if not s.is_warm[plan.segment[0]]:
            s.is_warm[plan.segment[0]] = True
            cold_s = COLD_S + idle_s
    noise = request.noise[0]
    device.slot = slot
    device.is_local = is_local
    device.predicted_end_s = now_s + idle_s
    push(
        s,
        now_s + (idle_s + cold_s) * noise * contention_at(w, ZERO, now_s),
        DEVICE,
        client,
        device.version,
    )
    watch(r, s, client)


@compiled
def _pick(s: Lane, client: int) -> tuple[int, bool]:
    best, best_local, best_queued = -1, False, np.int64(2**62)
    for slot in range(s.top):
        request = s.slots[slot]
        if not request.is_active or request.client != client:
            continue
        if request.local == LOCAL_QUEUED and (not best_local or request.local_queued < best_queued):
            best, best_local, best_queued = slot, True, request.local_queued
        elif request.place == DEVICE_QUEUE and not best_local and request.queued < best_queued:
            best, best_queued = slot, request.queued
    return best, best_local


@compiled
def stop(s: Lane, client: int) -> None:
    """End what runs; its event no longer counts."""
    device = s.clients[client]
    device.slot = -1
    device.version += 1


@compiled
def guard_at_s(r: Plans, s: Lane, slot: int) -> float:
    """When the device must start to finish a request itself; inf when it is local or cannot be."""
    request = s.slots[slot]
    if request.local != LOCAL_NONE or not has_remote(r, s, slot):
        return math.inf
    if math.isinf(r.local_s):
        return float(request.deadline_at_s)
    client, now_s = request.client, s.now_s
    device = s.clients[client]
    limit_s = request.deadline_at_s - request.arrived_s
    at_s = request.deadline_at_s - PROTECTION_FACTOR * remainder_s(r, s, slot)
    at_s -= min(HAND_OVER_S, HAND_OVER_FRAC * limit_s)
    for other in range(s.top):
        sibling = s.slots[other]
        if sibling.is_active and sibling.client == client and sibling.local == LOCAL_QUEUED:
            at_s -= remainder_s(r, s, other)
    if device.slot >= 0:
        # While a piece runs its rest shrinks as the deadline comes nearer: it is late now, or not before its end.
        end_s = device.predicted_end_s
        if end_s > now_s and at_s <= end_s:
            return float(now_s)
    return float(max(at_s, now_s))


@compiled
def has_remote(r: Plans, s: Lane, slot: int) -> bool:
    """Tell whether a request's plan needs another node."""
    return bool(r.rows[s.slots[slot].row].has_hop[0] != 0)


@compiled
def watch(r: Plans, s: Lane, client: int) -> None:
    """Look at all deadlines of a client again: its device has more to do than before."""
    for slot in range(s.top):
        request = s.slots[slot]
        if request.is_active and request.client == client:
            guard(r, s, slot)


@compiled
def guard(r: Plans, s: Lane, slot: int) -> None:
    """Put a request's deadline into the calendar, if it comes earlier than known."""
    request = s.slots[slot]
    at_s = guard_at_s(r, s, slot)
    if at_s < request.guard_s:
        request.guard_s = at_s
        push(s, at_s, GUARD, slot, ZERO)
