import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ClosedEnvironmentError, InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import env
from env.catalogue import make_sites
from env.reward import reward_terms
from env.split_inference import SplitInferenceEnv
from env.vector import SplitInferenceVectorEnv
from runtime.errors import ConfigError
from runtime.planning.features import CANDIDATE_COLUMNS

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

SITES = make_sites(("random:2", "torchvision:alexnet"))
TOTAL = CANDIDATE_COLUMNS.index("total:total")


def planned(observation):
    """The planner's choice, read from the observation."""
    rows = observation["candidates"].reshape(*observation["mask"].shape, -1)[..., TOTAL]
    return np.where(observation["mask"] > 0, rows, np.inf).argmin(axis=-1)


def make(**kwargs):
    return SplitInferenceEnv(sites=SITES, num_requests=12, **kwargs)


def test_env_obeys_gymnasium_and_stable_baselines_with_warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gymnasium.make("offcut/SplitInference-v0", models=["random:2"], num_requests=12)
        check_env(made.unwrapped)
        check_env_sb3(made.unwrapped)


def test_import_is_light():
    code = "import env, sys; assert not {'torch', 'numba', 'zmq', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_registered_under_its_name():
    assert env.__doc__ is not None
    made = gymnasium.make("offcut/SplitInference-v0", sites=SITES, num_requests=3)
    made.reset(seed=1)
    made.close()
    many = gymnasium.make_vec("offcut/SplitInference-v0", num_envs=2, sites=SITES, num_requests=3)
    many.reset(seed=1)
    many.close()


def rollout(seed, actions=None):
    e, out = make(scenario=("both", "outage")), []
    observation, info = e.reset(seed=seed)
    rng = np.random.default_rng(0)
    for step in range(12):
        action = rng.integers(32) if actions is None else actions[step]
        observation, reward, terminated, truncated, info = e.step(action)
        assert not terminated
        assert truncated == (step == 11)
        out.append((observation, reward, info["completed"], info["time_s"]))
    return out


def test_equal_seeds_give_equal_rollouts():
    for (a, ra, ca, ta), (b, rb, cb, tb) in zip(rollout(5), rollout(5), strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)
        assert (ra, ca, ta) == (rb, cb, tb)


def test_actions_change_neither_arrivals_nor_the_reference():
    one, other = make(), make()
    _, first = one.reset(seed=4)
    _, second = other.reset(seed=4)
    assert np.array_equal(first["reference_s"], second["reference_s"])
    sent = [[e.step(action)[4]["time_s"] for _ in range(11)] for e, action in ((one, 0), (other, 5))]
    assert sent[0] == sent[1]


def test_every_request_ends_once_and_rewards_are_the_sum_of_terms():
    steps = rollout(9)
    completed = [one for _, _, of_step, _ in steps for one in of_step]
    assert sorted(number for number, _, _ in completed) == list(range(12))
    for _, reward, of_step, _ in steps:
        assert reward == pytest.approx(sum(term for _, _, term in of_step))


def test_planner_against_itself_earns_nothing_and_a_bad_plan_less():
    e = SplitInferenceEnv(sites=SITES[:1], num_requests=12, scenario="both")
    observation, _ = e.reset(seed=3)
    total = 0.0
    for _ in range(12):
        observation, reward, _, _, _ = e.step(planned(observation))
        total += abs(reward)
    assert total == 0.0
    observation, _ = e.reset(seed=3)
    rows = [observation["candidates"].reshape(32, -1)[:, TOTAL].argmax()] * 12
    assert sum(e.step(row)[1] for row in rows) < -1.0


def test_reward_terms_by_hand():
    latency_s, reference_s = np.array([0.2, 0.4, 9.0, np.inf, 0.1]), np.array([0.2, 0.2, 0.2, 0.2, 0.2])
    deadline_s, scale_s = np.array([5.0, 5.0, 5.0, 0.4, 5.0]), np.full(5, 0.1)
    expected = [0.0, -np.log(2) - 0.2, -np.log(25) - 0.5, -np.log(2) - 0.2, np.log(2) + 0.1]
    assert reward_terms(latency_s, deadline_s, reference_s, scale_s) == pytest.approx(expected)


def test_misuse_is_refused_by_name():
    e = make()
    with pytest.raises(ResetNeeded):
        e.step(0)
    e.reset(seed=1)
    with pytest.raises(InvalidAction):
        e.step(32)
    for _ in range(12):
        e.step(0)
    with pytest.raises(ResetNeeded):
        e.step(0)
    e.close()
    with pytest.raises(ClosedEnvironmentError):
        e.reset()
    with pytest.raises(ConfigError, match="num_requests >= 1"):
        SplitInferenceEnv(sites=SITES, num_requests=0)
    many = SplitInferenceVectorEnv(2, sites=SITES, num_requests=3)
    with pytest.raises(ResetNeeded):
        many.step(np.zeros(2, dtype=np.int64))
    with pytest.raises(ResetNeeded):
        many.action_masks()
    with pytest.raises(ConfigError, match="one seed"):
        many.reset(seed=[1, 2])
    rows, _ = many.reset(seed=1)
    before = {key: row.copy() for key, row in rows.items()}
    with pytest.raises(ConfigError, match="one action for each of 2"):
        many.step(np.zeros(3, dtype=np.int64))
    rows["mask"][:] = 0  # the caller's own
    assert np.array_equal(many.action_masks(), before["mask"] > 0)
    assert np.array_equal(rows["context"], before["context"])
    many.close()
    with pytest.raises(ClosedEnvironmentError):
        many.reset()


def test_vector_env_is_the_single_one_side_by_side_and_starts_over_in_the_same_step():
    many = SplitInferenceVectorEnv(3, sites=SITES, scenario="both", num_requests=12)
    single = make(scenario="both")
    rows, _ = many.reset(seed=8)
    row, _ = single.reset(seed=8)
    for step in range(30):
        actions = planned(rows)
        assert all(np.array_equal(rows[key][0], row[key]) for key in row)
        rows, rewards, terminated, truncated, infos = many.step(actions)
        row, reward, _, is_over, _ = single.step(actions[0])
        assert rewards[0] == reward
        assert not terminated.any()
        assert truncated.tolist() == [is_over] * 3
        if is_over:
            assert step in (11, 23)
            assert all(np.array_equal(infos["final_obs"][0][key], row[key]) for key in row)
            row, _ = single.reset()
        else:
            assert "final_obs" not in infos
    assert all(many.single_observation_space.contains({key: rows[key][at] for key in rows}) for at in range(3))


def test_staggered_episodes_end_at_different_steps():
    many = SplitInferenceVectorEnv(4, sites=SITES[:1], num_requests=12, staggered=True)
    rows, _ = many.reset(seed=2)
    ends = []
    for _ in range(24):
        rows, _, _, truncated, _ = many.step(planned(rows))
        ends.append(truncated.tolist())
    assert [np.flatnonzero(lane).tolist() for lane in np.array(ends).T] == [[11, 23], [8, 20], [5, 17], [2, 14]]


def test_observations_stay_as_they_were_while_the_environments_go_on():
    many = SplitInferenceVectorEnv(3, sites=SITES, scenario="both", num_requests=4)
    rows, _ = many.reset(seed=2)
    given, before = [], []
    for _ in range(9):  # over two ends of episodes
        given.append(rows)
        before.append({key: row.copy() for key, row in rows.items()})
        rows, *_ = many.step(planned(rows))
    for now, then in zip(given, before, strict=True):
        assert all(np.array_equal(now[key], then[key]) for key in then)
