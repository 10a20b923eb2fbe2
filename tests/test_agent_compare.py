import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.checkpoint import SeenRange, load_checkpoint, save_checkpoint, weight_shapes
from agent.compare.contestants import CLAIRVOYANT, ROLLOUT, Contestant, find_contestant
from agent.compare.play import Ground, Place, play_episode
from agent.compare.run import run_compare
from agent.compare.statistics import draw_counts, geometric_means, interval, means, quantiles
from agent.compare.tables import ALL, BEST, KNOWN, UNKNOWN, make_rows
from agent.config import CompareConfig
from agent.policies import load_policy
from env.backend import TwinBackend
from env.catalogue import make_sites
from env.lookahead import Clairvoyant, Rollout
from env.reward import EXCESS_WEIGHT
from env.scenario import SyntheticScenario
from env.twin import Twin
from runtime.errors import ConfigError, PlanError
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS
from runtime.planning.policies.guard import GuardedPolicy
from tests.sites import still_world, toy_site

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

VALUES = np.array([[1.0, 2.0], [4.0, 8.0], [3.0, 5.0]])
COUNTS = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
BOTH = SyntheticScenario("both")


def test_means_and_quantiles_of_draws_are_those_of_the_episodes_drawn():
    drawn = [np.repeat(VALUES, count, axis=0).ravel() for count in COUNTS]
    assert means(VALUES, COUNTS) == pytest.approx([23 / 6, (1 + 2 + 1 + 2 + 3 + 5) / 6, 6.0])
    assert geometric_means(VALUES, COUNTS) == pytest.approx([960 ** (1 / 6), 60 ** (1 / 6), 32**0.5])
    for share in (0.5, 0.95):
        expected = [np.quantile(values, share, method="inverted_cdf") for values in drawn]
        assert quantiles(VALUES, COUNTS, share) == pytest.approx(expected)


def test_draws_are_of_as_many_episodes_and_the_interval_is_their_percentiles():
    counts = draw_counts(5, 200, seed=3)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 5).all()
    assert not np.array_equal(counts[1:], draw_counts(5, 200, seed=4)[1:])
    found = interval(np.concatenate([[7.0], np.arange(101.0)]))
    assert (found.value, found.low, found.high) == pytest.approx((7.0, 2.5, 97.5))


@pytest.fixture(scope="module")
def sites():
    return make_sites(("random:2", "torchvision:alexnet"))


@pytest.fixture(scope="module")
def grounds(sites):
    return [
        Ground(site, at, BOTH, "both", [(1_000_000 + e, at) for e in range(3)], 12) for at, site in enumerate(sites)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A network that nobody trained."""
    rng = np.random.default_rng(1)
    weights = {
        name: rng.normal(0.0, 0.3, size=shape).astype(np.float32) for name, shape in weight_shapes(hidden=8).items()
    }
    seen = SeenRange(((-9.0, 9.0),) * len(CANDIDATE_COLUMNS), ((-9.0, 9.0),) * len(CONTEXT_COLUMNS))
    folder = tmp_path_factory.mktemp("checkpoints") / "untrained"
    save_checkpoint(folder, weights, seen=seen, error_range=(5.0, 9.0), config={}, training={})
    assert load_checkpoint(folder).manifest.hidden == 8
    return folder


def test_batched_lanes_end_as_episodes_played_one_by_one(grounds, checkpoint):
    for name in ("planner", "planner-priced", f"{checkpoint}:raw"):
        for ground in grounds:
            batched, single = (ground.play(find_contestant(name), is_batched=flag) for flag in (True, False))
            for lane, alone in zip(batched, single, strict=True):
                np.testing.assert_allclose(lane.latency_s, alone.latency_s, rtol=1e-9)
                assert lane.num_switches == alone.num_switches
                assert (lane.uplink_bytes, lane.backbone_bytes) == pytest.approx(
                    (alone.uplink_bytes, alone.backbone_bytes), abs=1.0
                )


def test_the_planner_is_the_reference_that_rewards_have(grounds):
    for ground in grounds:
        for lane, episode in enumerate(ground.play(find_contestant("planner"))):
            reference_s = ground._twin.start(np.array([lane]))[0, :12]
            np.testing.assert_array_equal(episode.latency_s, reference_s)


def test_a_policy_against_itself_is_even_in_every_draw(grounds):
    episodes = [episode for ground in grounds for episode in ground.play(find_contestant("planner"))]
    twins = [Contestant("again", load_policy("planner"))]
    episodes += [episode for ground in grounds for episode in ground.play(twins[0])]
    rows = make_rows(episodes, ("planner",), ("torchvision:alexnet",), 50)
    assert {row.models for row in rows} == {ALL, KNOWN, UNKNOWN}
    for row in rows:
        for ratio in (row.mean_over[BEST], row.p95_over[BEST], row.geo_over["planner"]):
            assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_the_best_baseline_is_the_best_of_each_statistic(grounds):
    names = ("planner", "device-only", "edge-only")
    episodes = [episode for name in names for ground in grounds for episode in ground.play(find_contestant(name))]
    rows = [row for row in make_rows(episodes, names, (), 20) if row.models == ALL]
    assert min(row.mean_over[BEST].value for row in rows) == 1.0
    assert min(row.p95_over[BEST].value for row in rows) == 1.0
    device = next(row for row in rows if row.policy == "device-only")
    planner = next(row for row in rows if row.policy == "planner")
    assert device.mean_over["planner"].value == pytest.approx(device.mean.value / planner.mean.value)


def test_guard_counts_reasons_and_finds_no_decision_late(grounds, checkpoint):
    guarded = find_contestant(str(checkpoint))
    policy = guarded.build(grounds[0].site.problem)
    assert isinstance(policy, GuardedPolicy)
    assert policy.clock() == policy.clock()
    episodes = grounds[0].play(guarded)
    for episode in episodes:  # no prediction is as wrong as the checkpoint says that they are
        assert episode.reasons["error"] > 0
        assert "late" not in episode.reasons


# --- bounds -------------------------------------------------------------------------------------------------------------


def run_rows(twin, site, world, rows) -> np.ndarray:
    twin.load(0, site, world)
    twin.begin(np.zeros(1, dtype=np.int64))
    for row in rows:
        twin.step(np.zeros(1, dtype=np.int64), np.array([row]))
    return twin.requests(np.zeros(len(rows), dtype=np.int64), np.arange(len(rows)))[0]


LANE = np.zeros(1, dtype=np.int64)


def test_looking_ahead_sees_what_then_happens_and_changes_nothing():
    site = toy_site()
    world, twin = still_world(site, [2.0, 2.05, 2.1, 9.0]), Twin(1, 4)
    for rows in itertools.islice(itertools.product(range(site.candidates.num_plans), repeat=3), 0, None, 97):
        expected = run_rows(twin, site, world, rows)
        twin.begin(LANE)
        seen = twin.look(LANE, np.array([[*rows, 0]]))
        assert np.isnan(seen[:, 3]).all()  # the last arrival is never started
        np.testing.assert_array_equal(seen[0, :3], expected)
        for row in rows:
            twin.step(LANE, np.array([row]))
        np.testing.assert_array_equal(twin.requests(np.zeros(3, dtype=np.int64), np.arange(3))[0], expected)


def test_rollout_comes_near_the_plans_that_are_best_together_where_greedy_does_not():
    site, count = toy_site(), 3
    world, plans, twin = still_world(site, [2.0, 2.1, 2.2, 30.0]), site.candidates.num_plans, Twin(1, count + 1)

    def cost(latency_s: np.ndarray) -> np.ndarray:
        return (np.log(latency_s) + EXCESS_WEIGHT * latency_s).sum(axis=-1)

    twin.load(0, site, world)
    twin.begin(LANE)
    every = np.array(list(itertools.product(range(plans), repeat=count)))
    best = cost(twin.look(np.zeros(len(every), dtype=np.int64), every)).min()
    greedy, chosen = np.zeros((1, count), dtype=np.int64), np.zeros((1, count), dtype=np.int64)
    for number in range(count):
        greedy[:, number] = Clairvoyant(twin, plans).choose(LANE)
        twin.step(LANE, greedy[:, number])
    twin.begin(LANE)
    rollout = Rollout(twin, 1.0, greedy, width=plans)
    for number in range(count):
        chosen[:, number] = rollout.choose(LANE, number, plans)
        twin.step(LANE, chosen[:, number])
    greedy_cost, found = (cost(run_rows(twin, site, world, rows[0])) for rows in (greedy, chosen))
    assert best <= found < greedy_cost - 0.8 * (greedy_cost - best)


# --- names and the command ----------------------------------------------------------------------------------------------


def test_names_that_are_nothing_are_refused():
    with pytest.raises(ConfigError, match="rules have no guard"):
        find_contestant("planner:raw")
    with pytest.raises(ConfigError, match="expected a policy"):
        find_contestant("plannner")
    with pytest.raises(ConfigError, match="--episodes"):
        CompareConfig(episodes=0)
    with pytest.raises(ConfigError, match="--scenarios"):
        run_compare(CompareConfig(scenarios=("weather",)))


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(600)
def test_the_command_plays_on_the_real_runtime(tmp_path):
    run_compare(
        CompareConfig(
            policies=("loadpart",),
            baselines=("planner",),
            scenarios=("static",),
            models=("torchvision:squeezenet1_1",),
            backend="live",
            per_model=1,
            episodes=1,
            num_requests=4,
            resamples=20,
            out=tmp_path,
        )
    )
    with (tmp_path / "episodes.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["policy"], line["scenario"]) for line in lines] == [("loadpart", "static"), ("planner", "static")]
    latency_s = np.load(tmp_path / "latencies.npz")["latency_s"]
    assert latency_s.shape == (2, 4)
    assert (latency_s > 0.0).all()
    assert "(live)" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path, checkpoint):
    sizes = {"episodes": 2, "num_requests": 6, "per_model": 1, "resamples": 20, "workers": 1}
    run_compare(
        CompareConfig(
            policies=("loadpart", f"{checkpoint}:raw", ROLLOUT),
            scenarios=("static", "both"),
            models=("random:1", "torchvision:alexnet"),
            baselines=("planner",),
            out=tmp_path,
            **sizes,
        )
    )
    with (tmp_path / "episodes.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 2 * 2 * 2  # policies, scenarios, models, episodes
    assert {line["policy"] for line in lines} == {"loadpart", f"{checkpoint}:raw", "planner", CLAIRVOYANT, ROLLOUT}
    latency_s = np.load(tmp_path / "latencies.npz")["latency_s"]
    assert latency_s.shape == (len(lines), 6)
    assert float(lines[0]["mean_s"]) == pytest.approx(latency_s[0].mean(), rel=1e-4)
    assert "| planner | 1 [1, 1] | 1 [1, 1] |" in (tmp_path / "table.md").read_text()
    with (tmp_path / "table.csv").open() as file:
        assert {row["scenario"] for row in csv.DictReader(file)} == {"static", "both"}
    for name in ("latency-both", "timeline", "decisions"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    runs = {path.parent.name for path in tmp_path.glob("tensorboard/*/events*")}
    assert {"loadpart", "planner", "figures"} <= runs


@pytest.fixture(scope="module")
def shared():
    """A site in contention: its ground, and the worlds of it."""
    site = make_sites(("random:2",))[0]
    scenario, seeds = SyntheticScenario("contention"), [(1_000_000 + e, 0) for e in range(3)]
    return Ground(site, 0, scenario, "contention", seeds, 12), [scenario.world(site, seed, 13) for seed in seeds]


def test_planners_that_play_themselves_are_the_planners_that_are_compiled(shared):
    ground, worlds = shared
    assert all(len(world.shift) > 1 for world in worlds)
    contestant = find_contestant("planner")
    for alone, together in zip(ground.play(contestant), ground.play(contestant, self_play=True), strict=True):
        np.testing.assert_allclose(together.latency_s, alone.latency_s, rtol=1e-9)


def test_devices_that_all_compute_by_themselves_do_not_meet_at_the_edge(shared):
    ground, worlds = shared
    problem, backend = ground.site.problem, TwinBackend((ground.site,), num_requests=12)
    edge_only, device_only = (find_contestant(name).build(problem) for name in ("edge-only", "device-only"))
    met = 0
    for world in worlds:
        by_itself = replace(
            world,
            shift=world.shift[:1],
            **{name: getattr(world, name)[:1] for name in ("arrivals_s", "input_bytes", "deadline_s", "noise")},
        )
        others = len(world.shift) - 1
        place = Place("edge-only", "contention", ground.site.name, 0, (0, 0))
        found = []
        for played, company in ((by_itself, []), (world, [device_only] * others), (world, [edge_only] * others)):
            backend.start_world(0, played, company)
            found.append(play_episode(backend, edge_only, place).latency_s)
        np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
        met += int((found[2] > found[0] + 1e-6).sum())
    assert met > 0  # where all ask the edge, some wait for others


@pytest.mark.parametrize("more", [-1, 1])
def test_policies_for_more_or_fewer_than_the_other_devices_are_refused(shared, more):
    ground, worlds = shared
    backend = TwinBackend((ground.site,), num_requests=12)
    others = len(worlds[0].shift) - 1
    assert others > 1
    with pytest.raises(ConfigError, match="for each of"):
        backend.start_world(0, worlds[0], [find_contestant("device-only").build(ground.site.problem)] * (others + more))


def play_itself(backend, world, policy, others):
    backend.start_world(0, world, [others] * (len(world.shift) - 1))
    is_over = False
    while not is_over:
        is_over, _ = backend.step(policy.plan(backend.state()))


def test_the_last_state_of_a_self_play_is_the_agents(shared):
    ground, worlds = shared
    backend = TwinBackend((ground.site,), num_requests=12)
    policy = find_contestant("planner").build(ground.site.problem)
    for world in worlds:
        play_itself(backend, world, policy, policy)
        state = backend.state()
        assert state.input_bytes == pytest.approx(world.input_bytes[0, 12], abs=1.0)
        assert state.deadline_s == world.deadline_s[0, 12]


def test_a_policy_of_another_device_that_fails_ends_the_episode(shared):
    class Broken:
        is_stateful = False

        def plan(self, state):
            raise PlanError("no plan")

        def reset(self):
            pass

    ground, worlds = shared
    backend = TwinBackend((ground.site,), num_requests=12)
    policy = find_contestant("planner").build(ground.site.problem)
    with pytest.raises(PlanError):
        play_itself(backend, worlds[0], policy, Broken())
    with pytest.raises(ConfigError, match="running episode"):
        backend.step(policy.plan(backend.state()))


@pytest.mark.parametrize("settings", [{"backend": "live"}, {"policies": (CLAIRVOYANT,)}])
def test_self_play_where_there_is_none_is_refused(tmp_path, settings):
    with pytest.raises(ConfigError, match="self-play"):
        run_compare(CompareConfig(**{"policies": ("planner",)} | settings, self_play=True, quick=True, out=tmp_path))
