"""The environment over real processes: obeys gymnasium and its learners, plays the world, and outlives faults."""

import time
import warnings
from collections.abc import Iterator
from contextlib import closing

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from env.live_site import COMPUTE_SLOW_DOWN, LiveSite, make_live_sites
from env.scenario import SyntheticScenario
from env.split_inference_live import SplitInferenceLiveEnv
from runtime.planning.policies.guard import GuardedPolicy, GuardSettings, guard_mask
from runtime.planning.policies.planner import build_planner
from runtime.planning.policies.static import FixedPolicy

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 6


@pytest.fixture(scope="module")
def site() -> LiveSite:
    slow_down = {"device": 300.0, "edge0": 60.0, "cloud": 1.0}
    return make_live_sites(["tests.models:chain"], slow_down=slow_down)[0]


@pytest.fixture(scope="module")
def live(site: LiveSite) -> Iterator[SplitInferenceLiveEnv]:
    made = gymnasium.make("offcut/SplitInferenceLive-v0", sites=[site], scenario="both", num_requests=STEPS)
    bare = made.unwrapped
    assert isinstance(bare, SplitInferenceLiveEnv)
    yield bare
    made.close()


def test_env_obeys_gymnasium_and_stable_baselines_with_warnings_as_errors(live: SplitInferenceLiveEnv) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(live, skip_close_check=True)
        check_env_sb3(live)


def test_nodes_as_fast_as_this_machine_replay_and_the_others_compute(site: LiveSite) -> None:
    modes = {node.name: node.emulate.mode for node in site.deployment.nodes if node.emulate is not None}
    assert modes == {"edge0": "compute", "cloud": "replay"}
    (drawn,) = make_live_sites(["tests.models:chain"], seed=3)
    factors = [node.emulate.factor for node in drawn.deployment.nodes if node.emulate and node.name != "cloud"]
    assert min(factors) >= COMPUTE_SLOW_DOWN
    assert drawn.site.model_s("edge0") >= 0.03 * (1 - 1e-9)


def test_every_request_ends_once_in_the_world_that_the_twin_plays(live: SplitInferenceLiveEnv, site: LiveSite) -> None:
    _, info = live.reset(seed=4)
    world = SyntheticScenario("both").world(site.site, (4, 0, 0), STEPS + 1)
    assert info["time_s"] == world.arrivals_s[0, 0]
    completed: list[tuple[int, float, float]] = []
    for step in range(STEPS):
        observation, reward, terminated, truncated, info = live.step(np.int64(step))
        assert (terminated, truncated) == (False, step == STEPS - 1)
        assert live.observation_space.contains(observation)
        assert reward == pytest.approx(sum(term for _, _, term in info["completed"]))
        assert info["time_s"] == world.arrivals_s[0, step + 1]
        completed += info["completed"]
    assert sorted(number for number, _, _ in completed) == list(range(STEPS))
    with pytest.raises(ResetNeeded):
        live.step(np.int64(0))


def test_a_killed_node_costs_latency_and_no_error_and_is_back_in_the_next_episode(live: SplitInferenceLiveEnv) -> None:
    live.reset(seed=5)
    backend = live.backend
    plans = backend.sites[0].candidates.plans
    at_edge = next(at for at, plan in enumerate(plans) if plan.head == "edge0" and plan.tiers[-1].label == "edge")
    outcomes = []
    for step in range(STEPS):
        if step == 1:
            backend.cluster.kill("edge0")  # type: ignore[attr-defined]
        _, _, _, truncated, info = live.step(np.int64(at_edge))
        assert "error_type" not in info
        outcomes += info["outcomes"]
    assert truncated
    assert len(outcomes) == STEPS
    assert "local" in outcomes
    live.reset(seed=6)
    state = backend.state().node("edge0")
    assert state is not None
    assert state.is_up


def test_a_learner_that_is_late_sets_the_clock_back(live: SplitInferenceLiveEnv) -> None:
    live.reset(seed=7)
    time.sleep(3.0)
    info = live.step(np.int64(0))[4]
    assert info["paused_s"] > 0.0
    assert live.step(np.int64(0))[4]["paused_s"] < info["paused_s"]


def test_a_fault_of_the_machinery_truncates_with_a_neutral_reward_and_the_next_episode_runs(
    live: SplitInferenceLiveEnv,
) -> None:
    before, _ = live.reset(seed=8)
    live.backend._episode._session.close()  # type: ignore[attr-defined]
    observation, reward, terminated, truncated, info = live.step(np.int64(0))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["error_type"] == "PeerClosed"
    assert all(np.array_equal(observation[key], before[key]) for key in before)
    with pytest.raises(ResetNeeded):
        live.step(np.int64(0))
    live.reset(seed=9)
    assert not live.step(np.int64(0))[3]


def test_steps_before_reset_and_after_close_are_refused_and_nothing_was_started(site: LiveSite) -> None:
    made = SplitInferenceLiveEnv(sites=[site], num_requests=2)
    with pytest.raises(ResetNeeded):
        made.step(np.int64(0))
    made.close()
    for call in (made.reset, lambda: made.step(np.int64(0))):
        with pytest.raises(ClosedEnvironmentError):
            call()


def test_a_guarded_environment_masks_what_the_guard_would_refuse(site: LiveSite) -> None:
    with closing(SplitInferenceLiveEnv(sites=[site], num_requests=2, guard=GuardSettings())) as made:
        made.reset(seed=3)
        state, choices = made.backend.state(), site.site.candidates
        np.testing.assert_array_equal(made.action_masks(), guard_mask(choices, state))
        plan = choices.plans[int(made.action_masks().argmax())]
        planner = build_planner(site.site.problem)
        assert GuardedPolicy(site.site.problem, FixedPolicy(plan), planner).plan(state) == plan
