"""How long bits take over a link whose rate changes: exact arithmetic, no clock, no sockets."""

import bisect
import itertools
import math
from dataclasses import dataclass, field

from runtime.errors import ConfigError

FLOOR_BPS = 1000.0
"""A rate of 0 in a trace is an outage: so slow that nothing of use gets through, but time goes on."""


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """A rate that is constant from each instant to the next, and starts over after the last.

    Raises:
        ConfigError: when the instants do not ascend from 0, or a rate is negative or not finite.
    """

    starts_s: tuple[float, ...]  # when each rate begins; the first is 0
    rates_bps: tuple[float, ...]
    period_s: float  # after it the schedule starts over; inf for one that does not
    _bits: tuple[float, ...] = field(init=False, repr=False)  # sent before each start, from 0 on

    def __post_init__(self) -> None:
        """Check, put the floor under the rates, and sum up once."""
        starts, rates = self.starts_s, self.rates_bps
        ends = (*starts[1:], self.period_s)
        if not starts or starts[0] != 0.0 or any(not b > a for a, b in zip(starts, ends, strict=True)):
            raise ConfigError(f"expected instants that ascend from 0 to less than the period, got {starts[:4]}...")
        if len(rates) != len(starts) or any(not (0.0 <= rate < math.inf) for rate in rates):
            raise ConfigError(f"expected {len(starts)} finite rates >= 0, got {rates[:4]}...")
        object.__setattr__(self, "rates_bps", tuple(max(rate, FLOOR_BPS) for rate in rates))
        widths = [b - a for a, b in itertools.pairwise(starts)]
        steps = (rate * width for rate, width in zip(self.rates_bps, widths, strict=False))
        object.__setattr__(self, "_bits", tuple(itertools.accumulate(steps, initial=0.0)))

    @classmethod
    def constant(cls, rate_bps: float) -> "RateSchedule":
        """One rate for ever.

        Raises:
            ConfigError: when it is not positive.
        """
        if not rate_bps > 0:
            raise ConfigError(f"expected rate_bps > 0, got {rate_bps}")
        return cls((0.0,), (rate_bps,), math.inf)

    def rate_bps(self, at_s: float) -> float:
        """Rate at an instant."""
        within_s = at_s if math.isinf(self.period_s) else at_s % self.period_s
        return self.rates_bps[bisect.bisect_right(self.starts_s, within_s) - 1]

    def finish_s(self, start_s: float, bits: float) -> float:
        """When the last of `bits` has left that began to leave at `start_s`."""
        return self._when(self._sent(start_s) + bits)

    def _sent(self, at_s: float) -> float:
        """Bits that a busy link sends from 0 to an instant."""
        if math.isinf(self.period_s):
            return self._sent_within(at_s)
        rounds, within_s = divmod(at_s, self.period_s)
        return rounds * self._period_bits + self._sent_within(within_s)

    def _sent_within(self, at_s: float) -> float:
        index = bisect.bisect_right(self.starts_s, at_s) - 1
        return self._bits[index] + self.rates_bps[index] * (at_s - self.starts_s[index])

    def _when(self, bits: float) -> float:
        """When a link that is busy from 0 on has sent so many bits."""
        if math.isinf(self.period_s):
            return self._when_within(bits)
        rounds, within = divmod(bits, self._period_bits)
        return rounds * self.period_s + self._when_within(within)

    def _when_within(self, bits: float) -> float:
        index = bisect.bisect_right(self._bits, bits) - 1
        return self.starts_s[index] + (bits - self._bits[index]) / self.rates_bps[index]

    @property
    def _period_bits(self) -> float:
        return self._bits[-1] + self.rates_bps[-1] * (self.period_s - self.starts_s[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """How one direction of a link behaves. Without rates it is as fast as the machine."""

    rates_bps: tuple[float, ...] = ()
    """Rates, one after the other; one alone holds for ever."""
    starts_s: tuple[float, ...] = (0.0,)
    """When each rate begins."""
    period_s: float | None = None
    """When the rates start over; None: the last one holds."""
    delay_s: float = 0.0
    """From the last bit's leaving to its arrival."""
    jitter_s: float = 0.0
    """Added to the delay, drawn evenly from [0, jitter_s] for each chunk; order is kept."""
    seed: int = 0
    """Of the jitter."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field.
        """
        for name in ("delay_s", "jitter_s"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"expected {name} >= 0, got {value}")
        self.schedule()

    def schedule(self) -> RateSchedule | None:
        """The rates as a schedule; None without rates."""
        if not self.rates_bps:
            return None
        return RateSchedule(self.starts_s, self.rates_bps, math.inf if self.period_s is None else self.period_s)
