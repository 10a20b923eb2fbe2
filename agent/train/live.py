"""The live environment as the vector environment that a training steps: one lane."""

from typing import Any

import numpy as np
import numpy.typing as npt

from env.backend import Ended
from env.episodes import Completed
from env.spaces import Observation
from env.split_inference import BackendEnv
from env.twin import OUTCOMES


class LiveLane:
    """One environment as `env.vector` shows many: rows of one, the next episode begins in the step that ends one.

    Args:
        env: what to step; it is not stepped by anyone else.
    """

    num_envs = 1
    render_mode = None

    def __init__(self, env: BackendEnv) -> None:
        self.env = env
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space

    def reset(self, *, seed: int | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; with a seed the worlds of all that follow are determined."""
        observation, _ = self.env.reset(seed=seed)
        return _row(observation), {}

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Decide on the request at hand."""
        observation, reward, _, is_over, _ = self.env.step(np.int64(actions[0]))
        infos: dict[str, Any] = {"completed": _completed(self.env.ended)}
        if is_over:
            infos["final_obs"] = [observation]
            observation, _ = self.env.reset()
        over = np.array([is_over])
        return _row(observation), np.array([reward]), np.zeros(1, dtype=np.bool_), over, infos

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which actions are allowed, shape (1, K)."""
        return self.env.action_masks()[None]

    def close(self) -> None:
        """End the environment and its processes."""
        self.env.close()


def _row(observation: Observation) -> Observation:
    return {name: part[None] for name, part in observation.items()}


def _completed(ended: list[Ended]) -> Completed:
    return Completed(
        lane=np.zeros(len(ended), dtype=np.int64),
        number=np.array([one.number for one in ended], dtype=np.int64),
        latency_s=np.array([one.latency_s for one in ended]),
        term=np.array([one.term for one in ended]),
        outcome=np.array([OUTCOMES.index(one.outcome) for one in ended], dtype=np.int64),
        deadline_s=np.array([one.deadline_s for one in ended]),
        reference_s=np.array([one.reference_s for one in ended]),
    )
