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
    while at > 0 and s.events[at - 1].at_s <= at_s:
        s.events[at] = s.events[at - 1]
        at -= 1
    event = s.events[at]
    event.at_s, event.kind, event.what, event.version = at_s, kind, what, version
    s.event_count = count + 1


@compiled
def _compact(s: Lane) -> int:
    kept = 0
    for at in range(s.event_count):
        if is_current(s, at):
            s.events[kept] = s.events[at]
            kept += 1
    return kept


@compiled
def is_current(s: Lane, at: int) -> bool:
    """Tell whether an event still means anything."""
    event = s.events[at]
    kind, what, version = event.kind, event.what, event.version
    if kind == DEVICE:
        return bool(s.clients[what].version == version)
    if kind == DELAY:
        return bool(s.slots[what].version == version)
    if kind == LINK:
        return bool(s.servers[what].version == version)
    if kind == NODE:
        return bool(s.nodes[what].version == version)
    if kind == GUARD:
        return bool(s.slots[what].is_active and s.slots[what].guard_s == event.at_s)
    return True


@compiled
def take_next(s: Lane) -> tuple[int, int]:
    """Go on to the next event that still means anything, and take it out: its kind, and what it is of."""
    while True:
        at = s.event_count - 1
        s.event_count = at
        if is_current(s, at):
            s.now_s = s.events[at].at_s
            return s.events[at].kind, s.events[at].what


@compiled
def next_sequence(s: Lane) -> int:
    """Number for whoever joins a queue."""
    s.sequence += 1
    return int(s.sequence)
