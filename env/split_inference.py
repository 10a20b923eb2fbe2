"""`offcut/SplitInference-v0`: one environment on the twin."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from env.catalogue import make_sites
from env.draw import SCENARIOS
from env.episodes import Episodes
from env.scenario import Scenario, SyntheticScenario
from env.site import Site
from env.spaces import Observation, action_space, observation_space
from env.twin import OUTCOMES
from runtime.errors import ConfigError

NUM_REQUESTS = 128
"""Steps of an episode."""

_LANE = np.zeros(1, dtype=np.int64)


class SplitInferenceEnv(gymnasium.Env[Observation, np.int64]):
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
    termination.

    ## Arguments
    `models`, `sites`: what runs where (`env.catalogue.make_sites`), or sites made before. `scenario`: a name of
    `env.draw.SCENARIOS`, a scenario, or several of either. `num_requests`: steps of an episode.

    ## Version history
    v0: first.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(
        self,
        models: Sequence[str] | None = None,
        scenario: str | Scenario | Sequence[str | Scenario] = "both",
        *,
        num_requests: int = NUM_REQUESTS,
        sites: Sequence[Site] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = observation_space()
        self.action_space = action_space()
        self._episodes = make_episodes(models, scenario, sites, num_lanes=1, num_requests=num_requests)
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
        self._episodes.start(_LANE, [episode_seed(self._seed, 0, self._count)])
        self._count += 1
        self._is_running = True
        return self._observation(), {**self._episodes.describe(0), "reference_s": self._episodes.reference_s(0)}

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
        rewards, is_over, completed = self._episodes.step(_LANE, np.array([action], dtype=np.int64))
        self._is_running = not is_over[0]
        ended = zip(completed.number.tolist(), completed.latency_s.tolist(), completed.term.tolist(), strict=True)
        info = {**self._episodes.describe(0), "completed": list(ended)}
        info["outcomes"] = [OUTCOMES[code] for code in completed.outcome]
        return self._observation(), float(rewards[0]), False, bool(is_over[0]), info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Which actions need no node that is down, shape (K,): what maskable learners ask for."""
        allowed: npt.NDArray[np.bool_] = self._episodes.observations["mask"][0] > 0
        return allowed

    def close(self) -> None:
        """End the environment; it cannot be used any more."""
        self._is_closed = True

    def _observation(self) -> Observation:
        return {name: rows[0].copy() for name, rows in self._episodes.observations.items()}

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedEnvironmentError("expected an open environment, got a closed one: make another")


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
) -> Episodes:
    """Make the lanes of an environment from what its constructor was given.

    Raises:
        ConfigError: when there is no such model or scenario, or a number is not positive.
    """
    if num_requests < 1 or num_lanes < 1:
        raise ConfigError(f"expected num_requests >= 1 and num_envs >= 1, got {num_requests} and {num_lanes}")
    given = [scenario] if isinstance(scenario, str) or not isinstance(scenario, Sequence) else scenario
    scenarios = [SyntheticScenario(one) if isinstance(one, str) else one for one in given]
    if not scenarios:
        raise ConfigError(f"expected a scenario among {', '.join(SCENARIOS)}, got none")
    places = make_sites(models) if sites is None else tuple(sites)
    return Episodes(places, scenarios, num_lanes=num_lanes, num_requests=num_requests)
