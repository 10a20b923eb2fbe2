"""Bandwidth and load families: few numbers each, fitted to recordings, and the generator that plays them.

A family is a marginal, a memory and outages. `z(t)`, a standard normal process, is a level drawn once per trace and two
Ornstein-Uhlenbeck processes, one fast and one slow; the value at t is the family's quantile at `Phi(z(t))`, so the
marginal is met by construction and the autocorrelation by the fit of three numbers. A link is up and out by turns
(semi-Markov): how long is drawn from recorded lengths, each turn for itself; while it is out it gives next to nothing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from env.kernel import layout
from env.kernel.family import play_alone
from env.kernel.layout import MAX_SIGMA, PER_SIGMA, make_records
from env.traces import GRID_S, FloatArray

NUM_QUANTILES = 65
NUM_LENGTHS = layout.LENGTHS


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
        values = np.empty(count)
        play_alone(rng.integers(1, 2**63, size=4, dtype=np.uint64), make_table((self,), step_s), values)
        return values

    def value_at(self, probability: FloatArray) -> FloatArray:
        """Read the quantile function between its steps."""
        return np.interp(probability, np.linspace(0.0, 1.0, len(self.quantiles)), self.quantiles)

    @property
    def out_frac(self) -> float:
        """Share of the time that it is out."""
        return sum(self.out_s) / sum(self.out_s + self.up_s) if self.out_s else 0.0

    @property
    def mean(self) -> float:
        """Mean over time, outages included."""
        up = float(np.trapezoid(self.quantiles, dx=1.0 / (len(self.quantiles) - 1)))
        return self.out_frac * self.out_value + (1.0 - self.out_frac) * up


def make_table(families: Sequence[Family], step_s: float = GRID_S) -> Any:
    """Write families as records for compiled functions, for traces of some step."""
    records = make_records(layout.FAMILY, len(families))
    sigmas = np.arange(-MAX_SIGMA * PER_SIGMA, MAX_SIGMA * PER_SIGMA + 1) / PER_SIGMA
    for record, family in zip(records, families, strict=True):
        record.level_sigma, record.step_s = math.sqrt(family.level_var), step_s
        within = 1.0 - family.level_var
        record.fast_sigma = math.sqrt(within * family.fast_var)
        record.slow_sigma = math.sqrt(within * (1.0 - family.fast_var))
        record.fast_keep, record.slow_keep = math.exp(-step_s / family.fast_s), math.exp(-step_s / family.slow_s)
        record.fast_step = record.fast_sigma * math.sqrt(1.0 - record.fast_keep**2)
        record.slow_step = record.slow_sigma * math.sqrt(1.0 - record.slow_keep**2)
        record.value[:] = family.value_at(ndtr(sigmas))
        if family.out_s:
            record.has_outages, record.out_value = True, family.out_value
            record.turn_s[:] = family.out_s + family.up_s
            record.running_s[:] = np.cumsum(record.turn_s)
    return records


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
