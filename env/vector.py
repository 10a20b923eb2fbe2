"""Many environments in one process: what training steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from env.reward import EXCESS_WEIGHT
from env.scenario import Scenario
from env.site import Site
from env.spaces import Observation, action_space, observation_space
from env.split_inference import NUM_REQUESTS, episode_seed, make_episodes
from runtime.errors import ConfigError


class SplitInferenceVectorEnv(VectorEnv[Observation, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """`num_envs` environments as `SplitInferenceEnv`, stepped together.

    An episode that ends is replaced in the same step: `infos["final_obs"]` and `infos["final_info"]` hold its end, as
    gymnasium's same-step mode has it. With `staggered` the first episodes end at different steps, so that a learner
    never sees all of them at the same age; what is under way at such a cut is not waited for.

    `infos["completed"]` holds the requests that ended in the step, of all environments (`env.episodes.Completed`).

    Args:
        num_envs: how many.
        models: as `SplitInferenceEnv`.
        scenario: as `SplitInferenceEnv`.
        num_requests: steps of an episode.
        sites: as `SplitInferenceEnv`.
        staggered: cut the first episodes short, evenly.
        excess_weight: of the linear part of the reward (`env.reward`).

    Raises:
        ConfigError: when there is no such model or scenario, or a number is not positive.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        models: Sequence[str] | None = None,
        scenario: str | Scenario | Sequence[str | Scenario] = "both",
        *,
        num_requests: int = NUM_REQUESTS,
        sites: Sequence[Site] | None = None,
        staggered: bool = False,
        excess_weight: float = EXCESS_WEIGHT,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = observation_space()
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes = make_episodes(
            models, scenario, sites, num_lanes=num_envs, num_requests=num_requests, excess_weight=excess_weight
        )
        self._lanes = np.arange(num_envs)
        self._counts = np.zeros(num_envs, dtype=np.int64)
        self._seed: int | None = None
        self._ages = np.zeros(num_envs, dtype=np.int64)
        self._first_ages = self._lanes * num_requests // num_envs if staggered else self._ages.copy()
        self._masks: npt.NDArray[np.bool_] | None = None
        self._is_open = True

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode everywhere; with a seed all that follows is determined.

        Raises:
            ClosedEnvironmentError: after `close`.
            ConfigError: for a list of seeds; lanes draw theirs from one.
        """
        self._check_open()
        if isinstance(seed, list):
            raise ConfigError("expected one seed for all environments, got a list; each draws its own from it")
        super().reset(seed=seed, options=options)
        if seed is not None or self._seed is None:
            self._seed = int(self.np_random.integers(2**31)) if seed is None else seed
            self._counts[:] = 0
        self._episodes.give_observations()
        self._start(self._lanes)
        self._ages[:] = self._first_ages
        return self._look(), {}

    def _start(self, lanes: npt.NDArray[np.int64]) -> None:
        assert self._seed is not None
        seeds = [episode_seed(self._seed, lane, int(self._counts[lane])) for lane in lanes.tolist()]
        self._episodes.start(lanes, seeds)
        self._counts[lanes] += 1

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Decide on the request at hand everywhere.

        Raises:
            ResetNeeded: before the first `reset`.
            ClosedEnvironmentError: after `close`.
            ConfigError: when there is not one action per environment.
        """
        self._check_open()
        if self._seed is None:
            raise ResetNeeded("expected running episodes, got none: call reset() before step()")
        chosen = np.asarray(actions, dtype=np.int64)
        if chosen.shape != (self.num_envs,):
            raise ConfigError(f"expected one action for each of {self.num_envs} environments, got shape {chosen.shape}")
        self._episodes.give_observations()  # to copy them would take as long as to write them
        rewards, is_over, completed = self._episodes.step(self._lanes, chosen)
        self._ages += 1
        is_over = is_over | (self._ages >= self._episodes.num_requests)
        infos: dict[str, Any] = {"completed": completed}
        ended = self._lanes[is_over]
        if len(ended):
            finals: list[Any] = [None] * self.num_envs
            for lane in ended.tolist():
                finals[lane] = {name: rows[lane].copy() for name, rows in self._episodes.observations.items()}
            infos["final_obs"], infos["_final_obs"] = _objects(finals), is_over.copy()
            infos["final_info"], infos["_final_info"] = {}, is_over.copy()
            self._start(ended)
            self._ages[ended] = 0
        return self._look(), rewards, np.zeros(self.num_envs, dtype=np.bool_), is_over, infos

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which actions need no node that is down, shape (num_envs, K).

        Raises:
            ResetNeeded: before the first `reset`.
        """
        if self._masks is None:
            raise ResetNeeded("expected running episodes, got none: call reset() before action_masks()")
        return self._masks

    def close_extras(self, **kwargs: Any) -> None:
        """End the environments; they cannot be used any more."""
        self._is_open = False

    def _look(self) -> Observation:
        """What is seen, the caller's from now on; of the masks we keep a copy."""
        seen = self._episodes.observations
        self._masks = seen["mask"].astype(np.bool_)
        return seen

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClosedEnvironmentError("expected open environments, got closed ones: make others")


def _objects(values: list[Any]) -> npt.NDArray[Any]:
    """Put anything into an array of objects, one each."""
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
