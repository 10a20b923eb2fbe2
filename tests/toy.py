"""A toy environment with the observation and the action of the real ones, and a policy trained on it for a moment."""

from dataclasses import replace
from functools import cache

import gymnasium
import numpy as np
from gymnasium import spaces
from sb3_contrib import MaskablePPO

from agent.frozen import OVER_BEST
from agent.network import CandidatePolicy
from runtime.planning.arrays import StateArrays, encode_states
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import (
    CANDIDATE_HIGH,
    CANDIDATE_LOW,
    CONTEXT_HIGH,
    CONTEXT_LOW,
    FeatureEncoder,
    Features,
)
from runtime.types import SystemState
from tests.problems import random_problem, random_state

PROBLEM = random_problem(3, 12, is_chain=True, edges=2)
ENCODER = FeatureEncoder(PROBLEM)


def _state(seed: int) -> SystemState:
    state = random_state(PROBLEM, seed, uplink_backlog_bytes=1000 * (seed % 5), request_rate_hz=1.0 + seed % 7)
    edge0, edge1, *rest = state.nodes
    return replace(state, nodes=(edge0, replace(edge1, is_up=seed % 3 > 0), *rest))


STATES = tuple(_state(seed) for seed in range(60))
"""In every third an edge is down."""


def make_spaces() -> spaces.Dict:
    """The spaces that the feature table says."""
    low, high = (np.tile(bound, NUM_CANDIDATES).astype(np.float32) for bound in (CANDIDATE_LOW, CANDIDATE_HIGH))
    return spaces.Dict(
        {
            "candidates": spaces.Box(low, high),
            "context": spaces.Box(CONTEXT_LOW.astype(np.float32), CONTEXT_HIGH.astype(np.float32)),
            "mask": spaces.Box(0, 1, (NUM_CANDIDATES,), np.int8),
        }
    )


@cache
def arrays() -> StateArrays:
    return encode_states(ENCODER.layout, STATES)


@cache
def features() -> Features:
    return ENCODER.encode(arrays())


@cache
def second_best() -> np.ndarray:
    return np.where(features().mask, features().candidates[..., OVER_BEST], np.inf).argsort(axis=1)[:, 1]


def observe(encoded: Features) -> dict[str, np.ndarray]:
    """A batch of observations."""
    return {
        "candidates": encoded.candidates.reshape(len(encoded.context), -1),
        "context": encoded.context,
        "mask": encoded.mask.astype(np.int8),
    }


class ToyEnv(gymnasium.Env):
    """Shows the states in turn and rewards the candidate that is predicted second best, which no planner would pick."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = make_spaces(), spaces.Discrete(NUM_CANDIDATES)
        self.row = 0

    def action_masks(self) -> np.ndarray:
        return features().mask[self.row]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        self.row = 0
        return self.show(), {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        reward = float(action == second_best()[self.row])
        self.row = (self.row + 1) % len(STATES)
        return self.show(), reward, False, self.row == 0, {}

    def show(self) -> dict[str, np.ndarray]:
        return {key: rows[self.row] for key, rows in observe(features()).items()}


def make_model(seed: int = 0) -> MaskablePPO:
    return MaskablePPO(
        CandidatePolicy, ToyEnv(), n_steps=64, batch_size=64, learning_rate=1e-3, gamma=0.0, seed=seed, device="cpu"
    )


@cache
def trained() -> MaskablePPO:
    return make_model().learn(256)
