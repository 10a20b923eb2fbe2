"""Environments that gymnasium sees: `offcut/SplitInference-v0` on the twin, and what it shares with the live one."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from env.backend import Backend, Ended, TwinBackend
from env.catalogue import make_sites
from env.draw import SCENARIOS
from env.episodes import Episodes, pick_episode
from env.reward import EXCESS_WEIGHT
from env.scenario import Scenario, SyntheticScenario
from env.site import Site
from env.spaces import Observation, action_space, observation_space
from runtime.errors import ConfigError, OffcutError

logger = logging.getLogger(__name__)

NUM_REQUESTS = 128
"""Steps of an episode."""


class BackendEnv(gymnasium.Env[Observation, np.int64]):
    """Where each layer of a network runs, request by request.

    ## Description
    A device gets requests from outside, at instants that do not depend on answers. Step n decides on request n as it
    comes; `step` returns when request n + 1 comes. Requests overlap: what one occupies, later ones wait for.

    ## Action space
    `Discrete(32)`: a candidate plan of the site's model (`runtime.planning.candidates`). `mask` tells which need no node
    that is down; others may be chosen and are carried out as a device would, which costs time.

    ## Observation space
    `Dict` of flat boxes, all finite: `candidates`, `context`, `mask`; the table in `runtime.planning.features` says what
    each column is.

    ## Rewards
    The sum of the terms of the requests that *ended* since the last step (`env.reward`): at most those of the requests
    sent so far. `info["completed"]` lists them: number (of the step that decided), latency in seconds, term; and
    `info["outcomes"]` what became of each (`env.twin.OUTCOMES`).

    ## Starting state
    A site and a scenario drawn from those given; every link was probed once, every node that is up was heard of.

    ## Episode end
    Truncation after `num_requests` steps; what is under way is then waited for and credited to the last step. Never
    termination. A fault of the machinery, such as a process that cannot be reached, truncates too: the step's reward is
    0, its observation the last one, and `info["error_type"]` and `info["error"]` tell what it was. The next `reset`
    starts anew.

    ## Arguments
    `backend`: what carries the episodes out. `scenario`: a name of `env.draw.SCENARIOS`, a scenario, or several of
    either.

    ## Version history
    v0: first.

    Raises:
        ConfigError: when there is no such scenario.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(
        self,
        backend: Backend,
        scenario: str | Scenario | Sequence[str | Scenario] = "both",
        *,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = observation_space()
        self.action_space = action_space()
        self.backend = backend
        """What carries the episodes out."""
        self._scenarios = make_scenarios(scenario)
        self._site, self._scenario = 0, 0
        self._observation: Observation = {}
        self.ended: list[Ended] = []
        """The requests that ended in the last step, with all that is known of them."""
        self._seed, self._count = 0, 0
        self._is_running, self._is_closed = False, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. With a seed it is fully determined; without one the next of the last seed's follows.

        Raises:
            ClosedEnvironmentError: after `close`.
        """
        self._check_open()
        super().reset(seed=seed, options=options)
        if seed is not None or self._count == 0:
            self._seed, self._count = (int(self.np_random.integers(2**31)) if seed is None else seed), 0
        seeds = episode_seed(self._seed, 0, self._count)
        self._count += 1
        self._site, self._scenario = pick_episode(seeds, len(self.backend.sites), len(self._scenarios))
        self._is_running, self.ended = False, []
        self._start(seeds)
        self._is_running = True
        self._observation = self.backend.observation()
        return self._copy(), {**self._describe(), "reference_s": self.backend.reference_s}

    def _start(self, seeds: tuple[int, int, int]) -> None:
        """Start the episode; what a fault has left is cleared away and one more attempt made."""
        try:
            self.backend.start(self._site, self._scenarios[self._scenario], seeds)
        except OffcutError as error:
            logger.warning("starting once more, the first attempt failed: %s", error)
            self.backend.replace()
            self.backend.start(self._site, self._scenarios[self._scenario], seeds)

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decide on the request at hand.

        Raises:
            ResetNeeded: before the first `reset`, and after the end of an episode.
            InvalidAction: for what is no action.
            ClosedEnvironmentError: after `close`.
        """
        self._check_open()
        if not self._is_running:
            raise ResetNeeded("expected a running episode, got none: call reset() before step(), and after truncation")
        if not self.action_space.contains(np.int64(action)):
            raise gymnasium.error.InvalidAction(f"expected an action in {self.action_space}, got {action}")
        plan = self.backend.sites[self._site].candidates.plans[int(action)]  # padding repeats the first plan
        try:
            is_over, self.ended = self.backend.step(plan)
            self._observation = self.backend.observation()
        except (OffcutError, OSError) as error:
            return self._give_up(error)
        self._is_running = not is_over
        info = self._describe()
        info["completed"] = [(one.number, one.latency_s, one.term) for one in self.ended]
        info["outcomes"] = [one.outcome for one in self.ended]
        info["paused_s"] = self.backend.paused_s
        return self._copy(), math.fsum(one.term for one in self.ended), False, is_over, info

    def _give_up(self, error: Exception) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """End the episode for a fault that no decision caused."""
        logger.warning("an episode has ended by a fault: %s: %s", type(error).__name__, error)
        info = {**self._describe(), "completed": [], "outcomes": [], "paused_s": 0.0}
        info |= {"error_type": type(error).__name__, "error": str(error)}
        self._is_running, self.ended = False, []
        self.backend.replace()
        return self._copy(), 0.0, False, True, info

    def _describe(self) -> dict[str, Any]:
        return {
            "site": self.backend.sites[self._site].name,
            "scenario": self._scenarios[self._scenario].kind,
            "time_s": self.backend.time_s,
        }

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which actions need no node that is down, shape (K,): what maskable learners ask for."""
        allowed: npt.NDArray[np.bool_] = self._observation["mask"] > 0
        return allowed

    def close(self) -> None:
        """End the environment; it cannot be used any more."""
        if not self._is_closed:
            self.backend.close()
        self._is_closed = True

    def _copy(self) -> Observation:
        return {name: row.copy() for name, row in self._observation.items()}

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedEnvironmentError("expected an open environment, got a closed one: make another")


class SplitInferenceEnv(BackendEnv):
    """`BackendEnv` on the twin: vectorised training steps `env.vector`, which draws the same episodes.

    Args:
        models: specs, as `env.catalogue.make_sites` takes them.
        scenario: as `BackendEnv`.
        num_requests: steps of an episode.
        sites: made before, instead of models.
        render_mode: none is known.

    Raises:
        ConfigError: when there is no such model or scenario, or a number is not positive.
    """

    def __init__(
        self,
        models: Sequence[str] | None = None,
        scenario: str | Scenario | Sequence[str | Scenario] = "both",
        *,
        num_requests: int = NUM_REQUESTS,
        sites: Sequence[Site] | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_sizes(num_requests, 1)
        places = make_sites(models) if sites is None else tuple(sites)
        super().__init__(TwinBackend(places, num_requests=num_requests), scenario, render_mode=render_mode)


def episode_seed(seed: int, lane: int, count: int) -> tuple[int, int, int]:
    """Seed of the `count`-th episode of a lane."""
    return seed, lane, count


def make_episodes(
    models: Sequence[str] | None,
    scenario: str | Scenario | Sequence[str | Scenario],
    sites: Sequence[Site] | None,
    *,
    num_lanes: int,
    num_requests: int,
    excess_weight: float = EXCESS_WEIGHT,
) -> Episodes:
    """Make the lanes of an environment from what its constructor was given.

    Raises:
        ConfigError: when there is no such model or scenario, or a number is not positive.
    """
    check_sizes(num_requests, num_lanes)
    places = make_sites(models) if sites is None else tuple(sites)
    scenarios = make_scenarios(scenario)
    return Episodes(places, scenarios, num_lanes=num_lanes, num_requests=num_requests, excess_weight=excess_weight)


def check_sizes(num_requests: int, num_lanes: int) -> None:
    """Refuse numbers that make no episodes.

    Raises:
        ConfigError: when one is not positive.
    """
    if num_requests < 1 or num_lanes < 1:
        raise ConfigError(f"expected num_requests >= 1 and num_envs >= 1, got {num_requests} and {num_lanes}")


def make_scenarios(scenario: str | Scenario | Sequence[str | Scenario]) -> tuple[Scenario, ...]:
    """Make scenarios of names.

    Raises:
        ConfigError: when there is none, or no such one.
    """
    given = [scenario] if isinstance(scenario, str) or not isinstance(scenario, Sequence) else scenario
    if not given:
        raise ConfigError(f"expected a scenario among {', '.join(SCENARIOS)}, got none")
    return tuple(SyntheticScenario(one) if isinstance(one, str) else one for one in given)
