import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.save_util import load_from_zip_file

from agent.checkpoint import load_checkpoint
from agent.frozen import OVER_BEST, FrozenNetwork, FrozenPolicy
from agent.network import CandidatePolicy, export_weights
from agent.train.buffer import CreditRolloutBuffer
from agent.train.config import TrainConfig
from agent.train.evaluate import Evaluator, compare
from agent.train.facts import Facts
from agent.train.rehearse import LookUp, Rehearsal, Tried
from agent.train.run import run_train
from agent.train.vecenv import LearnerVecEnv
from agent.train.watch import BEST
from agent.train.worlds import Worlds
from env.catalogue import make_sites
from env.episodes import Completed, Episodes
from env.scenario import SyntheticScenario
from env.spaces import action_space, observation_space
from env.vector import SplitInferenceVectorEnv
from runtime.errors import ConfigError
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS
from tests.logged import MODEL, logged_site, write_log
from tests.problems import random_state

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

SITES = make_sites(("random:2",))


def make_env():
    return SplitInferenceVectorEnv(3, sites=SITES, scenario="both", num_requests=4, staggered=True)


def tiny(out, **others):
    kept = {"models": ("random:2",), "held_out": (), "random_models": 0, "per_model": 1, "eval_scenarios": ("both",)}
    small = {"num_envs": 4, "n_steps": 8, "batch_size": 16, "epochs": 1, "hidden": 8, "hold": 4, "num_requests": 6}
    often = {"eval_every": 32, "save_every": 32, "eval_episodes": 1, "scenarios": ("both",), "rehearsal": 32}
    looked = {"rehearsal_steps": 8, "rehearsal_width": 3, "rehearsal_horizon": 2}
    return TrainConfig(out=out, **(kept | small | often | looked | {"steps": 96} | others))


def weights_of(folder):
    (path,) = folder.glob("state-*.zip")
    return load_from_zip_file(path, load_data=False)[1]["policy"]


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_adapter_steps_as_the_environment_and_tells_sb3_of_truncation():
    env, twin = make_env(), LearnerVecEnv(make_env(), seed=7)
    expected, _ = env.reset(seed=7)
    given = twin.reset()
    ended = 0
    for _ in range(9):
        assert all(np.array_equal(given[name], rows) for name, rows in expected.items())
        np.testing.assert_array_equal(get_action_masks(twin), expected["mask"] > 0)
        actions = (expected["mask"] > 0).argmax(axis=1)
        expected, rewards, _, is_over, infos = env.step(actions)
        given, got, dones, each = twin.step(actions)
        np.testing.assert_allclose(got, rewards, rtol=1e-6)
        np.testing.assert_array_equal(dones, is_over)
        assert twin.completed.number.tolist() == infos["completed"].number.tolist()
        for lane, info in enumerate(each):
            if not is_over[lane]:
                assert info == {}
                continue
            ended += 1
            assert info["TimeLimit.truncated"]
            assert all(np.array_equal(info["terminal_observation"][n], r) for n, r in infos["final_obs"][lane].items())
            assert not np.array_equal(info["terminal_observation"]["context"], given["context"][lane])
    assert ended >= 6
    assert is_masking_supported(twin)
    assert twin.get_attr("num_envs", [0, 2]) == [3, 3]
    assert twin.env_is_wrapped(LearnerVecEnv) == [False] * 3
    twin.close()


# --- where terms count ------------------------------------------------------------------------------------------------


def ended(lane, number, term):
    empty = np.zeros(len(lane))
    return Completed(np.array(lane), np.array(number), empty, np.array(term), empty.astype(int), empty, empty)


def fill(buffer, rows):
    """Add rows of (rewards, episode starts, requests that ended) of two environments."""
    blank = {name: np.zeros((2, *space.shape)) for name, space in observation_space().spaces.items()}
    buffer.reset()
    for rewards, starts, completed in rows:
        if completed is not None:
            buffer.note(completed)
        zero = torch.zeros(2)
        buffer.add(blank, np.zeros((2, 1)), np.array(rewards, float), np.array(starts), zero, zero, action_masks=None)
    buffer.compute_returns_and_advantage(torch.zeros(2), np.zeros(2, bool))


def make_buffer(steps, **others):
    return CreditRolloutBuffer(steps, observation_space(), action_space(), "cpu", n_envs=2, **others)


def test_terms_go_to_the_step_that_decided():
    buffer = make_buffer(4)
    fill(
        buffer,
        [
            ([0, 0], [True, True], None),
            ([-3, 0], [False, False], ended([0, 0], [0, 1], [-1, -2])),
            ([0, -4], [False, True], ended([1], [0], [-4])),  # of the episode that just began in the second lane
            ([-5, -6], [False, False], ended([0, 1], [1, 0], [-5, -6])),
        ],
    )
    np.testing.assert_allclose(buffer.rewards[:, 0], [-1, -2 - 5, 0, 0])
    np.testing.assert_allclose(buffer.rewards[:, 1], [0, 0, -4 - 6, 0])


def test_a_value_that_sb3_adds_stays_where_it_is():
    buffer = make_buffer(2)
    fill(buffer, [([0, 0], [True, True], None), ([-1 + 0.5, 0], [False, False], ended([0], [0], [-1]))])
    np.testing.assert_allclose(buffer.rewards[:, 0], [-1, 0.5])


def test_the_last_steps_wait_and_get_the_terms_of_requests_that_end_in_the_next_rollout():
    buffer = make_buffer(3, hold=1)
    quiet = ([0, 0], [False, False], None)
    fill(buffer, [([0, 0], [True, True], None), quiet, quiet])
    assert sum(len(batch.actions) for batch in buffer.get(3)) == 2 * 2  # two of three steps, two environments
    last = buffer.observations["context"][-1].copy()
    fill(buffer, [([-7, -9], [False, False], ended([0, 1], [2, 0], [-7, -9])), quiet, quiet])
    np.testing.assert_array_equal(buffer.observations["context"][0], last)
    np.testing.assert_allclose(buffer.rewards[:, 0], [-7, 0, 0, 0])  # request 2 was decided in the step that waited
    np.testing.assert_allclose(buffer.rewards[:, 1], [0, -9, 0, 0])  # request 0 was learnt from: it stays
    batches = list(buffer.get(4))
    assert sum(len(batch.actions) for batch in batches) == 3 * 2
    np.testing.assert_allclose(sorted(np.concatenate([batch.returns for batch in batches]))[0], -9.0, atol=1.0)


# --- measures ---------------------------------------------------------------------------------------------------------


def test_ratios_by_hand():
    latency_s, reference_s = np.array([[1.0, 4.0], [np.inf, 2.0]]), np.array([[2.0, 2.0], [2.0, 2.0]])
    found = compare("both", latency_s, reference_s, np.full((2, 2), 4.0), np.array([[1.0], [2.0]]))
    assert found.geometric == pytest.approx((0.5 * 2 * 2 * 1) ** 0.25)
    assert found.mean == pytest.approx((1 + 4 + 2 + 1) / (2 + 2 + 1 + 1))
    assert found.p95 == pytest.approx(np.percentile([1, 4, 2, 1], 95) / 2.0)
    assert (found.missed_frac, found.planner_missed_frac) == (0.25, 0.0)


def test_weights_that_add_nothing_are_the_planner(tmp_path):
    run_train(tiny(tmp_path, steps=32))
    curve = json.loads((tmp_path / "state.json").read_text())["curve"]
    assert [point["decisions"] for point in curve] == [0, 32, 64]  # the planner, rehearsed, and what PPO made of it
    first = curve[0]["learnt"][0]
    assert first["geometric"] == pytest.approx(1.0, abs=0.02)
    assert curve[0]["score"] == pytest.approx((first["mean"] * first["p95"]) ** 0.5, abs=1e-4)


def test_trusted_errors_are_those_of_the_training_and_some_more():
    facts, context = Facts(), np.zeros((1000, 1, len(CONTEXT_COLUMNS)), dtype=np.float32)
    columns = [at for at, name in enumerate(CONTEXT_COLUMNS) if name.startswith("errors:")]
    context[:, 0, columns] = np.linspace(-0.3, 0.3, 1000)[:, None]
    mask = np.ones((1000, 1, 32), dtype=np.float32)
    facts.observe({"candidates": np.zeros((1000, 1, 32 * len(CANDIDATE_COLUMNS))), "context": context, "mask": mask})
    low, high = facts.error_range()
    assert low == pytest.approx(10**-0.3 / 1.5 - 1, abs=0.03)
    assert high == pytest.approx(10**0.3 * 1.5 - 1, abs=0.1)
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))).error_range() == (low, high)


# --- whole trainings --------------------------------------------------------------------------------------------------


def test_equal_settings_and_seed_give_equal_weights_and_a_policy_that_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_train(tiny(tmp_path / name, seed=seed, credit="decision", hold=3))
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    checkpoint = load_checkpoint(tmp_path / "a" / "best")
    problem = SITES[0].problem
    assert FrozenPolicy(problem, checkpoint).plan(random_state(problem, 1)).tiers
    assert str(tmp_path) not in json.dumps(checkpoint.manifest.config | checkpoint.manifest.training)
    run_train(tiny(tmp_path / "d", start_from=str(tmp_path / "a" / BEST), rehearsal=0, steps=32))
    begun = json.loads((tmp_path / "d" / "state.json").read_text())
    ended = json.loads((tmp_path / "a" / "state.json").read_text())
    assert begun["curve"][0]["score"] == pytest.approx(min(point["score"] for point in ended["curve"][1:]))
    assert begun["best_score"] <= begun["curve"][0]["score"]  # where it began may be the best one


@pytest.mark.parametrize(("rehearsal", "steps"), [(0, 32 * 12), (32 * 12, 32)])
def test_a_training_that_is_stopped_goes_on_to_the_same_end(tmp_path, capsys, rehearsal, steps):
    config = tiny(tmp_path, rehearsal=rehearsal, steps=steps, eval_every=32 * 12)
    saved, main = tmp_path / "state.json", threading.Event()

    def stop_once_saved():
        while not saved.exists() and not main.wait(0.002):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_once_saved)
    thread.start()
    with pytest.raises(SystemExit) as left:
        run_train(config)
    thread.join()
    assert left.value.code == 128 + signal.SIGTERM
    assert f"offcut train --out {tmp_path} --resume" in capsys.readouterr().out.replace("\n", " ")
    state = json.loads(saved.read_text())
    assert 0 < state["rehearsed"] + state["steps"] < rehearsal + steps
    run_train(TrainConfig(out=tmp_path, resume=True))
    state = json.loads(saved.read_text())
    assert (state["rehearsed"], state["steps"], state["updates"]) == (rehearsal, steps, steps // 32)
    assert [path.name for path in tmp_path.glob("state-*.zip")] == [f"state-{rehearsal + steps}.zip"]
    assert state["curve"][0]["decisions"] == 0
    assert state["curve"][-1]["decisions"] == rehearsal + steps


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"steps": 0}, "--steps > 0"),
        ({"gamma": 1.5}, "--gamma"),
        ({"synthetic": False}, "--traces"),
        ({"batch_size": 64}, "--batch-size <= num_envs"),
        ({"credit": "decision", "hold": 8}, "--hold"),
        ({"input_kinds": ("png",)}, "--input-kinds"),
        ({"held_out": ("random:2",)}, "random:2"),
        ({"eval_scenarios": ()}, "--eval-scenarios"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, others, expected):
    with pytest.raises(ConfigError, match=expected):
        tiny(tmp_path, **others)


def test_nothing_to_go_on_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="start anew without --resume"):
        run_train(TrainConfig(out=tmp_path, resume=True))


def test_an_evaluation_gives_the_same_twice_and_reads_no_training_world():
    worlds = Worlds(SITES, {"static": SyntheticScenario("static")})
    evaluator = Evaluator(worlds, episodes=1, num_requests=6)
    rng = np.random.default_rng(0)
    from agent.checkpoint import weight_shapes

    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weight_shapes(8).items()}
    assert evaluator.run(weights) == evaluator.run(weights)


def test_a_training_from_logs_learns_and_evaluates_at_the_logged_deployment(tmp_path):
    write_log(tmp_path, logged_site())
    run_train(tiny(tmp_path / "out", models=(MODEL.spec,), from_logs=tmp_path))
    facts = load_checkpoint(tmp_path / "out" / BEST).manifest.training
    assert [one["scenario"] for one in facts["evaluation"]["learnt models"]] == ["log"]
    with pytest.raises(ConfigError, match="one of --models"):
        TrainConfig(from_logs=tmp_path)


# --- looking up ---------------------------------------------------------------------------------------------------------


def test_a_fork_sees_what_happens_and_changes_nothing():
    episodes = Episodes(SITES, (SyntheticScenario("both"),), num_lanes=3, num_requests=6, num_forks=6)
    lanes = np.arange(3)
    episodes.start(lanes, [(5, lane) for lane in range(3)])
    before = {name: rows[:3].copy() for name, rows in episodes.observations.items()}
    planned, other = least_predicted(before), np.ones(3, dtype=np.int64)
    forks = episodes.fork(np.repeat(lanes, 2))
    going, actions = forks, np.stack([planned, other], axis=1).ravel()
    for _ in range(3):
        episodes.step(going, actions)
        actions = least_predicted({name: rows[going] for name, rows in episodes.observations.items()})
    episodes.finish(going)
    seen = episodes.outcomes(np.repeat(forks, 3), np.tile(np.arange(3), 6)).term.reshape(3, 2, 3)
    assert np.isfinite(seen).all()
    assert seen[:, 0] == pytest.approx(0.0, abs=1e-9)  # the planner's choices are the reference
    for name, rows in before.items():
        assert np.array_equal(rows, episodes.observations[name][:3]), name
    terms = {}
    for step in range(6):
        planned = least_predicted({name: rows[:3] for name, rows in episodes.observations.items()})
        _, _, completed = episodes.step(lanes, other if step == 0 else planned)
        terms |= {(lane, n): t for lane, n, t in zip(completed.lane, completed.number, completed.term, strict=True)}
    # What comes after its last request may still change how a fork's requests end: only the first is surely the same.
    assert [terms[lane, 0] for lane in range(3)] == pytest.approx(seen[:, 1, 0].tolist(), rel=1e-9)
    with pytest.raises(ConfigError, match="at most 6 forks, got 7"):
        episodes.fork(np.zeros(7, dtype=np.int64))


def least_predicted(observations):
    over_best = observations["candidates"].reshape(len(observations["mask"]), -1, len(CANDIDATE_COLUMNS))[
        ..., OVER_BEST
    ]
    return np.where(observations["mask"] > 0, over_best, np.inf).argmin(axis=1)


def test_an_untrained_network_looks_up_as_the_planner_and_learning_moves_it_to_what_was_better(tmp_path):
    config = tiny(tmp_path, num_envs=16, num_requests=24, rehearsal=16 * 16, rehearsal_steps=16, rehearsal_keep=1)
    policy = CandidatePolicy(observation_space(), action_space(), lambda _: 1e-3, hidden=8)
    worlds = Worlds(SITES, {"both": SyntheticScenario("both")})
    network = FrozenNetwork(export_weights(policy))
    tried = Tried.join(list(LookUp(config, worlds, Facts()).steps(network)))
    shape = (len(tried), 32, len(CANDIDATE_COLUMNS))
    planned = least_predicted({"candidates": tried.candidates.astype(np.float32).reshape(shape), "mask": tried.mask})
    assert np.mean(tried.actions[:, 0] == planned) > 0.95  # halves are rounded: near ties may come out otherwise
    assert (tried.advantage[:, 0] == 0.0).all()
    assert np.isnan(tried.advantage).any() == (np.take_along_axis(tried.mask, tried.actions.astype(int), 1) == 0).any()
    found = []
    for rate in (1e-9, 1e-2):
        changed = replace(config, rehearsal_epochs=300, rehearsal_rate=rate, rehearsal_divergence=0.0)
        found.append(Rehearsal(changed, worlds, policy, Facts()).round(lambda: False))
    still, moved = found
    assert still is not None
    assert moved is not None
    assert still["advantage"] + 0.002 < moved["advantage"] < moved["hindsight"] == still["hindsight"]
    assert still["divergence"] < 0.001 < moved["divergence"]
    assert Rehearsal(config, worlds, policy, Facts()).round(lambda: True) is None
