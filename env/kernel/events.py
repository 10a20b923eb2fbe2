"""The calendar of a lane: a list sorted by time, the earliest last, of equal ones the one put in first behind the others.

What is put in comes soon, most often: little is moved.
"""

from env.kernel.compiled import compiled, constants
from env.kernel.layout import EVENTS, Lane

ARRIVAL, DEVICE, DELAY, LINK, NODE, TICK, GUARD = constants(7)


@compiled
def push(s: Lane, at_s: float, kind: int, what: int, version: int) -> None:
    """Put an event in. Should the list be full, events of versions gone by have filled it: they are dropped first."""
    count = s.event_count
    if count == EVENTS:
        count = _compact(s)
    at = count
    while at > 0 and s.event_s[at - 1] <= at_s:
        s.event_s[at] = s.event_s[at - 1]
        s.event_kind[at] = s.event_kind[at - 1]
        s.event_id[at] = s.event_id[at - 1]
        s.event_version[at] = s.event_version[at - 1]
        at -= 1
    s.event_s[at] = at_s
    s.event_kind[at] = kind
    s.event_id[at] = what
    s.event_version[at] = version
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
        at = s.event_count - 1
        s.event_count = at
        if is_current(s, at):
            s.now_s = s.event_s[at]
            return s.event_kind[at], s.event_id[at]


@compiled
def next_sequence(s: Lane) -> int:
    """Number for whoever joins a queue."""
    s.sequence += 1
    return int(s.sequence)
