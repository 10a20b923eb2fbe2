import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.save_util import load_from_zip_file

from agent.checkpoint import load_checkpoint
from agent.frozen import OVER_BEST, FrozenPolicy
from agent.train.buffer import CreditRolloutBuffer
from agent.train.config import TrainConfig
from agent.train.evaluate import Evaluator, compare
from agent.train.facts import Facts
from agent.train.run import run_train
from agent.train.vecenv import TwinVecEnv
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
    return TrainConfig(out=out, **(kept | small | often | {"steps": 96} | others))


def weights_of(folder):
    (path,) = folder.glob("state-*.zip")
    return load_from_zip_file(path, load_data=False)[1]["policy"]


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_adapter_steps_as_the_environment_and_tells_sb3_of_truncation():
    env, twin = make_env(), TwinVecEnv(make_env(), seed=7)
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
    assert twin.env_is_wrapped(TwinVecEnv) == [False] * 3
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
    assert [point["steps"] for point in curve] == [0, 32]
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


def test_a_training_that_is_stopped_goes_on_to_the_same_end(tmp_path, capsys):
    config = tiny(tmp_path, steps=32 * 12, eval_every=32 * 12)
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
    done = json.loads(saved.read_text())["steps"]
    assert 0 < done < config.steps
    run_train(TrainConfig(out=tmp_path, resume=True))
    state = json.loads(saved.read_text())
    assert (state["steps"], state["updates"]) == (config.steps, 12)
    assert [path.name for path in tmp_path.glob("state-*.zip")] == [f"state-{config.steps}.zip"]
    assert [point["steps"] for point in state["curve"]] == [0, config.steps]


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


def test_what_is_looked_up_is_what_happens():
    episodes = Episodes(SITES, (SyntheticScenario("both"),), num_lanes=3, num_requests=6)
    lanes = np.arange(3)
    episodes.start(lanes, [(5, lane) for lane in range(3)])
    planned = np.where(episodes.observations["mask"] > 0, over_best(episodes.observations), np.inf).argmin(axis=1)
    before = {name: rows.copy() for name, rows in episodes.observations.items()}
    looked = episodes.look(np.stack([planned, np.ones(3, dtype=np.int64)], axis=1), horizon=2)
    assert looked.shape == (3, 2, 3)
    for name, rows in before.items():
        assert np.array_equal(rows, episodes.observations[name]), name  # nothing has changed
    assert looked[:, 0] == pytest.approx(
        0.0, abs=1e-9
    )  # the planner's own choice is the reference, as long as it decides
    terms = {}
    for step in range(6):
        _, _, completed = episodes.step(lanes, np.ones(3, dtype=np.int64) if step == 0 else planned)
        terms |= {
            (int(lane), int(n)): t for lane, n, t in zip(completed.lane, completed.number, completed.term, strict=True)
        }
    assert [terms[lane, 0] for lane in range(3)] == pytest.approx(looked[:, 1, 0].tolist(), rel=1e-9)


def over_best(observations):
    return observations["candidates"].reshape(3, -1, len(CANDIDATE_COLUMNS))[..., OVER_BEST]
