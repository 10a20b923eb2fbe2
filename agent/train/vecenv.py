"""Environments as Stable-Baselines3 wants them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn

from agent.train.live import LiveLane
from env.episodes import Completed
from env.vector import SplitInferenceVectorEnv


class LearnerVecEnv(VecEnv):
    """Steps the twin's environments, or the live one; all start the next episode in the step that ends one.

    An ended episode is a truncated one: its info holds `terminal_observation` and `TimeLimit.truncated`, from which
    SB3 adds the value of what would have followed. `completed` holds the requests that ended in the last step, of all
    environments; other infos are empty.

    Args:
        env: what to step; it is not stepped by anyone else.
        seed: of the first `reset`; `seed` sets another.
    """

    def __init__(self, env: SplitInferenceVectorEnv | LiveLane, seed: int = 0) -> None:
        self.env = env
        self.completed: Completed | None = None
        self._seed: int | None = seed
        self._actions = np.zeros(env.num_envs, dtype=np.int64)
        single, action = env.single_observation_space, env.single_action_space
        assert isinstance(single, spaces.Dict)
        super().__init__(env.num_envs, single, action)

    def reset(self) -> VecEnvObs:
        """Start an episode everywhere."""
        observations, _ = self.env.reset(seed=self._seed)
        self._seed, self.completed = None, None
        self._reset_seeds()
        return observations

    def step_async(self, actions: npt.NDArray[np.int64]) -> None:
        """Take the actions."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Carry them out."""
        observations, rewards, _, is_over, infos = self.env.step(self._actions)
        self.completed = infos["completed"]
        each: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for lane in np.flatnonzero(is_over).tolist():
            each[lane] = {"terminal_observation": infos["final_obs"][lane], "TimeLimit.truncated": True}
        return observations, rewards.astype(np.float32), is_over, each

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which actions are allowed, shape (num_envs, K)."""
        return self.env.action_masks()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next `reset`; every environment's follows from it."""
        self._seed = seed
        return [seed] * self.num_envs

    def close(self) -> None:
        """End the environments."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The same for each: they share one object."""
        value = getattr(self if attr_name == "action_masks" else self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set it for all of them."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method once; its rows are one environment's each."""
        rows = getattr(self.env, method_name)(*args, **kwargs)
        return [rows[index] for index in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """None is."""
        return [False for _ in self._get_indices(indices)]
