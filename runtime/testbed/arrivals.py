"""When background requests come: pure arithmetic, the same for the same shape on every machine."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from runtime.errors import ConfigError
from runtime.testbed.rate import RateSchedule

_BITS = 1e9
"""Bits that stand for one request in a `RateSchedule`: enough that its floor under a rate does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShape:
    """How many requests per second, and when. The default is none."""

    rates_hz: tuple[float, ...] = (0.0,)
    """Mean rates, one after the other; one alone holds for ever."""
    starts_s: tuple[float, ...] = (0.0,)
    """When each rate begins."""
    period_s: float | None = None
    """When the rates start over; None: the last one holds."""
    arrivals: Literal["poisson", "periodic"] = "poisson"
    """Independent arrivals, or evenly spaced ones."""
    seed: int = 0
    """Of the Poisson arrivals."""
    instants_s: tuple[float, ...] = ()
    """Where given, requests come at just these instants, over again after `period_s`; rates do not count."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming what was expected.
        """
        if self.arrivals not in ("poisson", "periodic"):
            raise ConfigError(f"expected arrivals to be poisson or periodic, got {self.arrivals!r}")
        self.schedule()
        ends = (*self.instants_s, math.inf if self.period_s is None else self.period_s)
        if self.instants_s and not (self.instants_s[0] >= 0.0 and all(a <= b for a, b in itertools.pairwise(ends))):
            raise ConfigError(f"expected instants_s to ascend from 0 to period_s, got {self.instants_s[:4]}...")

    def schedule(self) -> RateSchedule:
        """The rates as a schedule in which a request counts `_BITS`."""
        period_s = math.inf if self.period_s is None else self.period_s
        return RateSchedule(self.starts_s, tuple(_BITS * rate for rate in self.rates_hz), period_s)


class Arrivals:
    """When the requests of a load come, in seconds from its start: the same for the same shape, on every machine.

    With a rate that changes, gaps shrink and stretch with it; each is still one mean gap of its time on average.
    """

    def __init__(self, shape: LoadShape) -> None:
        self._schedule = shape.schedule()
        self._random = random.Random(shape.seed)
        self._is_poisson = shape.arrivals == "poisson"
        self._at_s = 0.0
        self._instants_s = _instants(shape)

    def next_s(self) -> float:
        """Instant of the next request; inf when there will be none."""
        if self._instants_s is not None:
            return next(self._instants_s, math.inf)
        requests = self._random.expovariate(1.0) if self._is_poisson else 1.0
        self._at_s = self._schedule.finish_s(self._at_s, _BITS * requests)
        return self._at_s


def _instants(shape: LoadShape) -> Iterator[float] | None:
    """The instants that a shape names, period after period; None where it names none."""
    if not shape.instants_s:
        return None
    rounds = itertools.count() if shape.period_s is not None else range(1)
    period_s = shape.period_s or 0.0
    return (turn * period_s + at_s for turn in rounds for at_s in shape.instants_s)
