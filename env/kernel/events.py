"""The calendar of a lane: a short unsorted list, the earliest first, of equal ones the one put in first."""

import numpy as np

from env.kernel.compiled import compiled, constants
from env.kernel.layout import EVENTS, Lane

ARRIVAL, DEVICE, DELAY, LINK, NODE, TICK, GUARD = constants(7)


@compiled
def push(s: Lane, at_s: float, kind: int, what: int, version: int) -> None:
    """Put an event in. Should the list be full, events of versions gone by have filled it: they are dropped first."""
    count = s.event_count
    if count == EVENTS:
        count = _compact(s)
    s.event_s[count] = at_s
    s.event_kind[count] = kind
    s.event_id[count] = what
    s.event_version[count] = version
    s.event_count = count + 1


@compiled
def _compact(s: Lane) -> int:
    kept = 0
    for at in range(s.event_count):
        if is_current(s, at):
            s.event_s[kept] = s.event_s[at]
            s.event_kind[kept] = s.event_kind[at]
            s.event_id[kept] = s.event_id[at]
            s.event_version[kept] = s.event_version[at]
            kept += 1
    return kept


@compiled
def is_current(s: Lane, at: int) -> bool:
    """Tell whether an event still means anything."""
    kind, what, version = s.event_kind[at], s.event_id[at], s.event_version[at]
    if kind == DEVICE:
        return bool(s.device_version[what] == version)
    if kind == DELAY:
        return bool(s.version[what] == version)
    if kind == LINK:
        return bool(s.link_version[what] == version)
    if kind == NODE:
        return bool(s.node_version[what] == version)
    if kind == GUARD:
        return bool(s.is_active[what] and s.guard_s[what] == s.event_s[at])
    return True


@compiled
def take_next(s: Lane) -> tuple[int, int]:
    """Go on to the next event that still means anything, and take it out: its kind, and what it is of."""
    while True:
        at = _earliest(s)
        at_s, kind, what = s.event_s[at], s.event_kind[at], s.event_id[at]
        is_valid = is_current(s, at)
        _remove(s, at)
        if is_valid:
            s.now_s = at_s
            return kind, what


@compiled
def _earliest(s: Lane) -> int:
    best, best_s = 0, np.inf
    for at in range(s.event_count):
        if s.event_s[at] < best_s:
            best_s = s.event_s[at]
            best = at
    return best


@compiled
def _remove(s: Lane, at: int) -> None:
    """Take an event out; the order of the others stays."""
    last = s.event_count - 1
    for k in range(at, last):
        s.event_s[k] = s.event_s[k + 1]
        s.event_kind[k] = s.event_kind[k + 1]
        s.event_id[k] = s.event_id[k + 1]
        s.event_version[k] = s.event_version[k + 1]
    s.event_count = last


@compiled
def next_sequence(s: Lane) -> int:
    """Number for whoever joins a queue."""
    s.sequence += 1
    return int(s.sequence)
