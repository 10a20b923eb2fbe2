"""Observation and action spaces, made from the one table in `runtime.planning.features`."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import (
    CANDIDATE_COLUMNS,
    CANDIDATE_HIGH,
    CANDIDATE_LOW,
    CONTEXT_COLUMNS,
    CONTEXT_HIGH,
    CONTEXT_LOW,
    Features,
)

Observation = dict[str, npt.NDArray[Any]]


def action_space() -> spaces.Discrete[np.int64]:
    """Index of a candidate plan."""
    return spaces.Discrete(NUM_CANDIDATES)


def observation_space() -> spaces.Space[Observation]:
    """`candidates` (K * F,): K rows of candidate features; `context` (G,); `mask` (K,): 1 where an action is allowed."""
    parts: dict[str, spaces.Space[Any]] = {
        "candidates": spaces.Box(_tile(CANDIDATE_LOW), _tile(CANDIDATE_HIGH), dtype=np.float32),
        "context": spaces.Box(CONTEXT_LOW.astype(np.float32), CONTEXT_HIGH.astype(np.float32), dtype=np.float32),
        "mask": spaces.Box(0, 1, (NUM_CANDIDATES,), dtype=np.int8),
    }
    return cast("spaces.Space[Observation]", spaces.Dict(parts))


def _tile(bounds: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.tile(bounds.astype(np.float32), NUM_CANDIDATES)


def blank_observations(count: int) -> Observation:
    """Allocate a batch of observations."""
    return {
        "candidates": np.zeros((count, NUM_CANDIDATES * len(CANDIDATE_COLUMNS)), dtype=np.float32),
        "context": np.zeros((count, len(CONTEXT_COLUMNS)), dtype=np.float32),
        "mask": np.zeros((count, NUM_CANDIDATES), dtype=np.int8),
    }


def put_features(into: Observation, rows: npt.NDArray[np.int64], features: Features) -> None:
    """Write encoded features into rows of a batch of observations."""
    into["candidates"][rows] = features.candidates.reshape(len(rows), -1)
    into["context"][rows] = features.context
    into["mask"][rows] = features.mask
