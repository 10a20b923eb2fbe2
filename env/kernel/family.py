"""Play fitted families of links and loads (`env.families`)."""

from typing import Any

from env.kernel.compiled import compiled, entry
from env.kernel.layout import LENGTHS, MAX_SIGMA, PER_SIGMA, Family
from env.kernel.random import Stream, below, normal, uniform

Column = Any
"""A row of the grid, or as long a trace as is wanted."""


@compiled
def play(stream: Stream, family: Family, out: Column) -> None:
    """Draw a trace: two Ornstein-Uhlenbeck processes around a level, read through the family's quantiles, and outages."""
    level = family.level_sigma * normal(stream)
    fast, slow = family.fast_sigma * normal(stream), family.slow_sigma * normal(stream)
    for step in range(len(out)):
        out[step] = value_at(family, level + fast + slow)
        fast = family.fast_keep * fast + family.fast_step * normal(stream)
        slow = family.slow_keep * slow + family.slow_step * normal(stream)
    if family.has_outages:
        _put_outages(stream, family, out)


@compiled
def value_at(family: Family, sigmas: float) -> float:
    """Value that so many standard deviations from the median stand for."""
    at = (min(max(sigmas, -MAX_SIGMA), MAX_SIGMA) + MAX_SIGMA) * PER_SIGMA
    before = min(int(at), 2 * MAX_SIGMA * PER_SIGMA - 1)
    return float(family.value[before] + (at - before) * (family.value[before + 1] - family.value[before]))


@compiled
def _put_outages(stream: Stream, family: Family, out: Column) -> None:
    """Let a trace be out by turns, as if it had begun long ago: long turns are more likely to be under way."""
    which, turn = uniform(stream) * family.running_s[2 * LENGTHS - 1], 0
    while family.running_s[turn] < which:
        turn += 1
    is_out = turn < LENGTHS
    end_s = family.turn_s[turn] * uniform(stream)
    for step in range(len(out)):
        while end_s < family.step_s * (step + 0.5):
            is_out = not is_out
            end_s += family.turn_s[below(stream, LENGTHS) + (0 if is_out else LENGTHS)]
        if is_out:
            out[step] = family.out_value


@entry
def play_alone(stream: Stream, families: Any, out: Column) -> None:
    """Draw one trace of the first of some families."""
    play(stream, families[0], out)
