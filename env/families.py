"""Bandwidth and load families: few numbers each, fitted to recordings, and the generator that plays them.

A family is a marginal, a memory and outages. `z(t)`, a standard normal process, is a level drawn once per trace and two
Ornstein-Uhlenbeck processes, one fast and one slow; the value at t is the family's quantile at `Phi(z(t))`, so the
marginal is met by construction and the autocorrelation by the fit of three numbers. A link is up and out by turns
(semi-Markov): how long is drawn from recorded lengths, each turn for itself; while it is out it gives next to nothing.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter
from scipy.special import ndtr

from env.traces import GRID_S, FloatArray

NUM_QUANTILES = 65
NUM_LENGTHS = 32
FLOOR_BPS = 1000.0
"""Rate of a link in an outage, as the relay of the test bed has it."""

_TURNS = 16
"""Turns that are drawn at once: most traces need no more."""


@dataclass(frozen=True)
class Family:
    """One fitted family. Values are bits per second, or load relative to its mean."""

    name: str
    kind: str  # network or load
    quantiles: tuple[float, ...]  # while up, at NUM_QUANTILES even steps from 0 to 1
    level_var: float  # share of z's variance that lies between traces
    fast_s: float  # time constant
    slow_s: float
    fast_var: float  # share of the variance within a trace that is fast
    out_value: float = 0.0  # mean during an outage
    out_s: tuple[float, ...] = ()  # lengths of outages, each as likely; none: it is never out
    up_s: tuple[float, ...] = ()  # lengths of what lies between outages, each as likely

    def sample(self, rng: np.random.Generator, count: int, step_s: float = GRID_S) -> FloatArray:
        """Draw a trace of `count` steps of `step_s`."""
        noise = rng.standard_normal(1 + 2 * count)
        fast = _ou(noise[1 : 1 + count], step_s, self.fast_s, (1.0 - self.level_var) * self.fast_var)
        slow = _ou(noise[1 + count :], step_s, self.slow_s, (1.0 - self.level_var) * (1.0 - self.fast_var))
        values = self.value_at(ndtr(math.sqrt(self.level_var) * noise[0] + fast + slow))
        if self.out_s:
            values[self._outages(rng, count, step_s)] = self.out_value
        return values

    def sample_one(self, rng: np.random.Generator) -> float:
        """Draw one instant of a trace that is never out."""
        return float(self.value_at(ndtr(rng.standard_normal())))

    def _outages(self, rng: np.random.Generator, count: int, step_s: float) -> npt.NDArray[np.bool_]:
        """Draw where a trace is out, as if it had begun long ago: long turns are more likely to be under way."""
        lengths_s, running_s = self._turns
        which, passed = rng.random(2)
        first = int(np.searchsorted(running_s, which * running_s[-1]))
        is_up = first >= NUM_LENGTHS
        ends_s = np.array([lengths_s[first] * passed])
        while ends_s[-1] < count * step_s:
            drawn = rng.integers(NUM_LENGTHS, size=_TURNS)
            drawn[int(is_up) :: 2] += NUM_LENGTHS  # every other one is up, the first of them if the trace begins out
            ends_s = np.concatenate([ends_s, ends_s[-1] + np.cumsum(lengths_s[drawn])])
        turn = np.searchsorted(ends_s, step_s * (np.arange(count) + 0.5))
        is_out: npt.NDArray[np.bool_] = (turn + is_up) % 2 == 0
        return is_out

    @cached_property
    def _turns(self) -> tuple[FloatArray, FloatArray]:
        """Lengths of outages, then of what lies between, and their running sum."""
        lengths_s = np.array(self.out_s + self.up_s)
        return lengths_s, np.cumsum(lengths_s)

    def value_at(self, probability: FloatArray) -> FloatArray:
        """Read the quantile function between its steps."""
        return np.interp(probability, *self._steps)

    @cached_property
    def _steps(self) -> tuple[FloatArray, FloatArray]:
        """Probabilities and values of the quantile function's steps."""
        return np.linspace(0.0, 1.0, len(self.quantiles)), np.array(self.quantiles)

    @property
    def out_frac(self) -> float:
        """Share of the time that it is out."""
        return sum(self.out_s) / sum(self.out_s + self.up_s) if self.out_s else 0.0

    @property
    def mean(self) -> float:
        """Mean over time, outages included."""
        up = float(np.trapezoid(self.quantiles, dx=1.0 / (len(self.quantiles) - 1)))
        return self.out_frac * self.out_value + (1.0 - self.out_frac) * up


def _ou(noise: FloatArray, step_s: float, time_s: float, variance: float) -> FloatArray:
    """Make a stationary Ornstein-Uhlenbeck process from independent standard normals, which it takes."""
    keep = math.exp(-step_s / time_s)
    sigma = math.sqrt(variance)
    noise[0] *= sigma
    noise[1:] *= sigma * math.sqrt(1.0 - keep * keep)
    out: FloatArray = lfilter(_ONE, np.array([1.0, -keep]), noise)
    return out


_ONE = np.ones(1)
_TABLE = Path(__file__).with_name("families.json")


@lru_cache(maxsize=1)
def load_families() -> dict[str, Family]:
    """Read the fitted families that ship with the package, by name."""
    rows: list[dict[str, Any]] = json.loads(_TABLE.read_text(encoding="utf-8"))
    lists = ("quantiles", "out_s", "up_s")
    return {row["name"]: Family(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in rows}


def save_families(families: list[Family], path: Path = _TABLE) -> None:
    """Write families as the package ships them, five significant digits each."""
    rows = [{key: _short(value) for key, value in asdict(family).items()} for family in families]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def _short(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
