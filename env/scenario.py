"""Scenarios: what may happen around a site. One kind and one seed give one world, whatever is decided in it.

Links, nodes and clients have a random stream each, and a client's requests follow one another in theirs, so request n of
client c meets the same bytes, deadline and noise however many requests there are and whatever is decided.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from env.draw import MAX_STEPS, SCENARIOS, draw_world
from env.kernel.layout import EDGES, NODES
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
        return draw_world(self.kind, site, seed, num_requests)


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
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_RECORDED,)))
        networks, loads = _networks(self._files[0]), _loads(self._files[1])
        rates_bps = np.stack([_play(networks, rng) for _ in range(EDGES)])
        if not loads:
            return draw_world(self.kind, site, seed, num_requests, rates_bps)
        values = np.stack([_play(loads, rng) for _ in range(NODES)])
        values /= np.maximum(values.mean(axis=1, keepdims=True), 1e-9)
        return draw_world(self.kind, site, seed, num_requests, rates_bps, values)


_RECORDED = 1
"""Of the seeds: the one that picks recorded traces."""


@lru_cache(maxsize=8)
def _networks(files: tuple[Path, ...]) -> list[_Recorded]:
    """Read once for all the scenarios of a training."""
    return [(np.array(one.starts_s), np.array(one.rates_bps), one.period_s) for one in read_networks(files)]


@lru_cache(maxsize=8)
def _loads(files: tuple[Path, ...]) -> list[_Recorded]:
    return [(np.array(one.starts_s), np.array(one.values), one.period_s) for one in read_loads(files)]


def _play(recorded: list[_Recorded], rng: np.random.Generator) -> FloatArray:
    starts_s, values, period_s = recorded[int(rng.integers(len(recorded)))]
    return on_grid(starts_s, values, period_s, rng.uniform(0.0, period_s), MAX_STEPS)


def _check_kind(kind: str) -> None:
    if kind not in SCENARIOS:
        raise ConfigError(f"expected a scenario among {', '.join(SCENARIOS)}, got {kind!r}")
