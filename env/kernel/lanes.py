"""Lanes as a whole: blank, copied, forked."""

import math
from typing import Any

from env.kernel.compiled import compiled
from env.kernel.layout import (
    FATE_COLUMNS,
    LANE,
    LATENCY,
    LINKS,
    METER,
    METER_COLUMNS,
    OUTCOME,
    ROWS,
    Lane,
    Plans,
    Worlds,
    make_records,
)
from env.kernel.life import COOL_DOWN_S

Array = Any


def blank_lane() -> Lane:
    """A lane before anything has happened, in an array."""
    lane = make_records(LANE, 1)
    for records, name in (
        ("clients", "slot"),
        ("clients", "in_force"),
        ("servers", "slot"),
        ("nodes", "slot"),
        ("slots", "parent"),
    ):
        lane[records][name] = -1
    for name in ("k", "q_s", "busy_frac"):
        lane["known"][name] = math.nan
    lane["known"]["heard_s"], lane["known"]["retry_s"], lane["known"]["cool_down_s"] = -math.inf, math.inf, COOL_DOWN_S
    lane["predicted_total_s"] = math.inf
    return lane


@compiled
def blank(w: Worlds, lanes: Array, b: int, home: int) -> None:
    """Make a lane as it is before anything has happened; the last one is such a lane."""
    lanes[b] = lanes[len(lanes) - 1]
    for segment in range(3 * ROWS):
        lanes[b].is_warm[segment] = w.courses[home].is_warm[segment]
    for number in range(w.fates.shape[1]):
        w.fates[b, number, LATENCY], w.fates[b, number, OUTCOME] = math.nan, 0.0


@compiled
def copy(w: Worlds, r: Plans, lanes: Array, b: int, to: int) -> None:
    """Copy a lane as it stands, but not what became of its requests."""
    lanes[to] = lanes[b]
    for server in range(r.num_clients * LINKS):
        for at in range(min(lanes[b].servers[server].meter_count, METER)):
            for column in range(METER_COLUMNS):
                w.meters[to].sample[server, at, column] = w.meters[b].sample[server, at, column]


@compiled
def fork(w: Worlds, r: Plans, lanes: Array, states: Array, b: int, to: int) -> None:
    """Copy all that a lane is."""
    copy(w, r, lanes, b, to)
    states[to] = states[b]
    for number in range(r.num_requests):
        for column in range(FATE_COLUMNS):
            w.fates[to, number, column] = w.fates[b, number, column]
