"""What others ask of a node: a co-tenant that slows it down, and background requests."""

import math
from typing import Any

from env.kernel.compiled import compiled, entry
from env.kernel.layout import BACKGROUND, Place
from env.kernel.random import Stream, below, between, exponential, log_between, normal
from env.traces import GRID_S

Column = Any

_FILL = 0.9
_SIZE_SIGMA = 0.5
"""Of the log of background requests' sizes."""

WAIT_OF_LOAD = 0.5 * math.exp(_SIZE_SIGMA**2)
"""M/G/1: mean wait = this x busy / (1 - busy) x mean size, (1 + cv^2) / 2 of the sizes."""


@compiled
def add_co_tenant(stream: Stream, p: Place, contention: Column) -> None:
    """Draw the contention by a co-tenant that comes and goes: 1 while it is away."""
    on_s, share = log_between(stream, p.co_tenant_on_s), between(stream, p.co_tenant)
    is_on = below(stream, 2) == 0
    end_s = on_s * exponential(stream)
    for step in range(len(contention)):
        while end_s < GRID_S * step:
            is_on = not is_on
            end_s += on_s * exponential(stream)
        contention[step] = 1.0 / (1.0 - share) if is_on else 1.0


@compiled
def limit_load(stream: Stream, p: Place, model_s: float, contention: Column, load: Column) -> tuple[float, float]:
    """Turn a node's load over its mean into the share of its time that background requests take.

    Returns:
        Their mean size in idle seconds, around one share of the model, and the share of the time that they take in all.
    """
    level, work_s, busy = between(stream, p.utilisation), 0.0, 0.0
    for step in range(len(load)):
        # A co-tenant slows background requests down too: together they may not ask for more than there is.
        load[step] = min(max(level * load[step], 0.0), p.utilisation_max / contention[step])
        work_s += load[step] * GRID_S
        busy += load[step] * contention[step]
    return most_size_s(log_between(stream, p.background_size) * model_s, work_s), busy / len(load)


@compiled
def mean(row: Column) -> float:
    """Mean of a row; numba's own allocates."""
    total = 0.0
    for value in row:
        total += value
    return total / len(row)


@compiled
def most_size_s(size_s: float, work_s: float) -> float:
    """Size of background requests: as is wanted, or more where there would be too many."""
    return float(max(size_s, work_s / (_FILL * BACKGROUND)))


@compiled
def fill_background(
    stream: Stream, load: Column, mean_s: float, until_s: float, arrivals_s: Column, service_s: Column
) -> int:
    """Draw Poisson arrivals whose rate follows a load on the grid, up to an instant; gives how many."""
    count, done, turn = 0, 0.0, exponential(stream)
    for step in range(len(load)):
        more = load[step] * GRID_S / mean_s
        while turn <= done + more:
            at_s = GRID_S * (step + (turn - done) / more)
            if at_s >= until_s or count == len(arrivals_s):
                return count
            arrivals_s[count] = at_s
            service_s[count] = mean_s * math.exp(_SIZE_SIGMA * normal(stream) - 0.5 * _SIZE_SIGMA**2)
            count += 1
            turn += exponential(stream)
        done += more
    return count


@entry
def fill_alone(stream: Stream, load: Column, size_s: float, arrivals_s: Column, service_s: Column) -> int:
    """Draw the background requests of one node over a whole period."""
    return fill_background(
        stream, load, most_size_s(size_s, mean(load) * len(load) * GRID_S), math.inf, arrivals_s, service_s
    )
