"""Scenarios: what may happen around a site. One kind and one seed give one world, whatever is decided in it.

Random streams are numpy generators whose seeds are spawned by (what, number); a client's draws have one row per request,
so request n of client c meets the same bytes, deadline and noise however many requests there are and whatever is
decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from env.draw import SCENARIOS, draw_world
from env.families import load_families
from env.site import Site
from env.traces import FloatArray, on_grid, read_loads, read_networks, trace_files
from env.world import World
from runtime.errors import ConfigError

_Recorded = tuple[FloatArray, FloatArray, float]


class Scenario(Protocol):
    """Where worlds come from."""

    @property
    def kind(self) -> str:
        """One of `SCENARIOS`."""

    def world(self, site: Site, seed: int | Sequence[int], num_requests: int) -> World:
        """Draw an episode's world. The same site, seed and number give the same arrays."""


@dataclass(frozen=True)
class SyntheticScenario:
    """Plays the fitted families.

    Raises:
        ConfigError: when there is no such kind.
    """

    kind: str

    def __post_init__(self) -> None:
        """Check the kind."""
        _check_kind(self.kind)

    def world(self, site: Site, seed: int | Sequence[int], num_requests: int) -> World:
        """Draw an episode's world."""
        return draw_world(self.kind, site, seed, num_requests, self._bandwidth, self._load)

    @staticmethod
    def _bandwidth(rng: np.random.Generator, site: Site, count: int) -> FloatArray:
        names = site.ranges.families
        return load_families()[names[int(rng.integers(len(names)))]].sample(rng, count)

    @staticmethod
    def _load(rng: np.random.Generator, count: int) -> FloatArray:
        level = load_families()["servegen"].sample_one(rng)
        values: FloatArray = level * load_families()["azurellm2023"].sample(rng, count)
        return values


@dataclass(frozen=True)
class TraceScenario:
    """Plays recorded traces: files of any form that `runtime.testbed.workload` reads.

    Args:
        kind: one of `SCENARIOS`.
        networks: folder of bandwidth traces.
        loads: folder of load traces; None plays the fitted families.
        split: `train`, `validation` or `all` files (`env.traces.split_of`).

    Raises:
        ConfigError: when there is no such kind, or a folder holds no such traces.
    """

    kind: str
    networks: Path
    loads: Path | None = None
    split: str = "train"
    _files: tuple[tuple[Path, ...], tuple[Path, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the kind, and list the files."""
        _check_kind(self.kind)
        loads = () if self.loads is None else trace_files(self.loads, self.split)
        object.__setattr__(self, "_files", (trace_files(self.networks, self.split), loads))

    def world(self, site: Site, seed: int | Sequence[int], num_requests: int) -> World:
        """Draw an episode's world."""
        return draw_world(self.kind, site, seed, num_requests, self._bandwidth, self._load)

    def _bandwidth(self, rng: np.random.Generator, site: Site, count: int) -> FloatArray:
        del site
        return _play(_networks(self._files[0]), rng, count)

    def _load(self, rng: np.random.Generator, count: int) -> FloatArray:
        if not self._files[1]:
            return SyntheticScenario._load(rng, count)
        values = _play(_loads(self._files[1]), rng, count)
        return values / max(float(values.mean()), 1e-9)


@lru_cache(maxsize=8)
def _networks(files: tuple[Path, ...]) -> list[_Recorded]:
    """Read once for all the scenarios of a training."""
    return [(np.array(one.starts_s), np.array(one.rates_bps), one.period_s) for one in read_networks(files)]


@lru_cache(maxsize=8)
def _loads(files: tuple[Path, ...]) -> list[_Recorded]:
    return [(np.array(one.starts_s), np.array(one.values), one.period_s) for one in read_loads(files)]


def _play(recorded: list[_Recorded], rng: np.random.Generator, count: int) -> FloatArray:
    starts_s, values, period_s = recorded[int(rng.integers(len(recorded)))]
    return on_grid(starts_s, values, period_s, rng.uniform(0.0, period_s), count)


def _check_kind(kind: str) -> None:
    if kind not in SCENARIOS:
        raise ConfigError(f"expected a scenario among {', '.join(SCENARIOS)}, got {kind!r}")
