"""Bandwidth and load families: few numbers each, fitted to recordings, and the generator that plays them.

A family is a marginal and a memory. `z(t)`, a standard normal process, is a level drawn once per trace and two
Ornstein-Uhlenbeck processes, one fast and one slow; the value at t is the family's quantile at `Phi(z(t))`, so the
marginal is met by construction and the autocorrelation by the fit of three numbers.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.signal import lfilter
from scipy.special import ndtr

from env.traces import GRID_S, FloatArray

NUM_QUANTILES = 65
FLOOR_BPS = 1000.0
"""Rate of a link in an outage, as the relay of the test bed has it."""


@dataclass(frozen=True, slots=True)
class Family:
    """One fitted family. Values are bits per second, or load relative to its mean."""

    name: str
    kind: str  # network or load
    quantiles: tuple[float, ...]  # at NUM_QUANTILES even steps from 0 to 1
    level_var: float  # share of z's variance that lies between traces
    fast_s: float  # time constant
    slow_s: float
    fast_var: float  # share of the variance within a trace that is fast

    def sample(self, rng: np.random.Generator, count: int, step_s: float = GRID_S) -> FloatArray:
        """Draw a trace of `count` steps of `step_s`."""
        level = rng.standard_normal()
        fast = _ou(rng, count, step_s, self.fast_s)
        slow = _ou(rng, count, step_s, self.slow_s)
        within = np.sqrt(self.fast_var) * fast + np.sqrt(1.0 - self.fast_var) * slow
        z = np.sqrt(self.level_var) * level + np.sqrt(1.0 - self.level_var) * within
        return self.value_at(ndtr(z))

    def value_at(self, probability: FloatArray) -> FloatArray:
        """Read the quantile function between its steps."""
        return np.interp(probability, np.linspace(0.0, 1.0, len(self.quantiles)), self.quantiles)

    @property
    def mean(self) -> float:
        """Mean of the marginal."""
        return float(np.trapezoid(self.quantiles, dx=1.0 / (len(self.quantiles) - 1)))


def _ou(rng: np.random.Generator, count: int, step_s: float, time_s: float) -> FloatArray:
    """Sample a stationary Ornstein-Uhlenbeck process of variance 1."""
    noise = rng.standard_normal(count)
    keep = np.exp(-step_s / time_s)
    noise[1:] *= np.sqrt(1.0 - keep * keep)
    out: FloatArray = lfilter([1.0], [1.0, -keep], noise)
    return out


_TABLE = Path(__file__).with_name("families.json")


@lru_cache(maxsize=1)
def load_families() -> dict[str, Family]:
    """Read the fitted families that ship with the package, by name."""
    rows = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {row["name"]: Family(**{**row, "quantiles": tuple(row["quantiles"])}) for row in rows}


def save_families(families: list[Family], path: Path = _TABLE) -> None:
    """Write families as the package ships them, five significant digits each."""
    rows = [{key: _short(value) for key, value in asdict(family).items()} for family in families]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def _short(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
