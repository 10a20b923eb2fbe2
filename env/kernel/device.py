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
"""Stages of a local completion (`Lane.local`); wanted: it waits for the request's own share to end."""


@compiled
def queue_stage(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Queue the device's share of a request."""
    s.place[slot] = DEVICE_QUEUE
    s.queued[slot] = next_sequence(s)
    start_next(w, r, s, s.client[slot])


@compiled
def queue_completion(w: World, r: Plans, s: Lane, slot: int) -> None:
    """Queue the rest of a request, ahead of new work."""
    s.local[slot] = LOCAL_QUEUED
    s.local_queued[slot] = next_sequence(s)
    if s.place[slot] == DEVICE_QUEUE:
        s.place[slot] = NOWHERE
    start_next(w, r, s, s.client[slot])
    watch(r, s, s.client[slot])


@compiled
def start_next(w: World, r: Plans, s: Lane, client: int) -> None:
    """Start what comes first, when nothing runs."""
    if s.device_slot[client] >= 0:
        return
    slot, is_local = _pick(s, client)
    if slot < 0:
        return
    row, now_s = s.row[slot], s.now_s
    idle_s = remainder_s(r, s, slot) if is_local else r.idle_s[row, 0]
    cold_s = 0.0
    if is_local:
        s.local[slot] = LOCAL_RUNS
    else:
        s.place[slot] = NOWHERE
        if not s.is_warm[r.segment[row, 0]]:
            s.is_warm[r.segment[row, 0]] = True
            cold_s = COLD_S + idle_s
    noise = s.noise[slot, 0]
    s.device_slot[client] = slot
    s.device_is_local[client] = is_local
    s.device_predicted_end_s[client] = now_s + idle_s
    push(
        s,
        now_s + (idle_s + cold_s) * noise * contention_at(w, ZERO, now_s),
        DEVICE,
        client,
        s.device_version[client],
    )
    watch(r, s, client)


@compiled
def _pick(s: Lane, client: int) -> tuple[int, bool]:
    best, best_local, best_queued = -1, False, np.int64(2**62)
    for slot in range(s.top):
        if not s.is_active[slot] or s.client[slot] != client:
            continue
        if s.local[slot] == LOCAL_QUEUED and (not best_local or s.local_queued[slot] < best_queued):
            best, best_local, best_queued = slot, True, s.local_queued[slot]
        elif s.place[slot] == DEVICE_QUEUE and not best_local and s.queued[slot] < best_queued:
            best, best_queued = slot, s.queued[slot]
    return best, best_local


@compiled
def stop(s: Lane, client: int) -> None:
    """End what runs; its event no longer counts."""
    s.device_slot[client] = -1
    s.device_version[client] += 1


@compiled
def guard_at_s(r: Plans, s: Lane, slot: int) -> float:
    """When the device must start to finish a request itself; inf when it is local or cannot be."""
    if s.local[slot] != LOCAL_NONE or not has_remote(r, s, slot):
        return math.inf
    if math.isinf(r.local_s):
        return float(s.deadline_at_s[slot])
    client, now_s = s.client[slot], s.now_s
    limit_s = s.deadline_at_s[slot] - s.arrived_s[slot]
    at_s = s.deadline_at_s[slot] - PROTECTION_FACTOR * remainder_s(r, s, slot)
    at_s -= min(HAND_OVER_S, HAND_OVER_FRAC * limit_s)
    for other in range(s.top):
        if s.is_active[other] and s.client[other] == client and s.local[other] == LOCAL_QUEUED:
            at_s -= remainder_s(r, s, other)
    if s.device_slot[client] >= 0:
        # While a piece runs its rest shrinks as the deadline comes nearer: it is late now, or not before its end.
        end_s = s.device_predicted_end_s[client]
        if end_s > now_s and at_s <= end_s:
            return float(now_s)
    return float(max(at_s, now_s))


@compiled
def has_remote(r: Plans, s: Lane, slot: int) -> bool:
    """Tell whether a request's plan needs another node."""
    return bool(r.has_hop[s.row[slot], 0] != 0)


@compiled
def watch(r: Plans, s: Lane, client: int) -> None:
    """Look at all deadlines of a client again: its device has more to do than before."""
    for slot in range(s.top):
        if s.is_active[slot] and s.client[slot] == client:
            guard(r, s, slot)


@compiled
def guard(r: Plans, s: Lane, slot: int) -> None:
    """Put a request's deadline into the calendar, if it comes earlier than known."""
    at_s = guard_at_s(r, s, slot)
    if at_s < s.guard_s[slot]:
        s.guard_s[slot] = at_s
        push(s, at_s, GUARD, slot, ZERO)
