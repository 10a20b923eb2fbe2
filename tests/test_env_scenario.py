import json
from dataclasses import replace

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from env.catalogue import make_sites
from env.draw import SCENARIOS, hash_seed, make_streams
from env.families import NUM_LENGTHS, Family, load_families
from env.fit import fit_folder
from env.kernel.random import exponential, normal, uniform
from env.ranges import NETWORK_FAMILIES
from env.recording import Recording, spells_s
from env.scenario import SyntheticScenario, TraceScenario
from env.traces import FLOOR_BPS, GRID_S, split_of, trace_files
from env.world import BACKBONE, DEVICE_CLOUD
from runtime.errors import ConfigError
from runtime.planning.arrays import blank_states
from runtime.planning.cost import predict_total
from runtime.planning.estimators import ReadingsArrays


@pytest.fixture(scope="module")
def sites():
    return make_sites(("random:1", "torchvision:resnet18"), per_model=2)


def arrays_of(world):
    background = [array for b in world.background for array in (b.arrivals_s, b.service_s)]
    names = ("rate_bps", "rtt_s", "scale", "contention", "is_down", "shift", "arrivals_s", "input_bytes", "deadline_s")
    return [*(getattr(world, name) for name in names), world.noise, world.is_warm, *background]


@pytest.mark.parametrize("kind", SCENARIOS)
def test_world_follows_from_its_seed_alone(kind, sites):
    scenario = SyntheticScenario(kind)
    first, again, other = (scenario.world(sites[0], seed, 20) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(first), arrays_of(again), strict=True))
    assert not np.array_equal(first.arrivals_s, other.arrivals_s)


@pytest.mark.parametrize("kind", SCENARIOS)
def test_request_is_the_same_however_many_follow(kind, sites):
    scenario = SyntheticScenario(kind)
    few, many = scenario.world(sites[1], 3, 10), scenario.world(sites[1], 3, 50)
    for name in ("arrivals_s", "input_bytes", "deadline_s", "noise"):
        assert np.array_equal(getattr(few, name), getattr(many, name)[:, :10])


@pytest.mark.parametrize("kind", SCENARIOS)
def test_world_is_what_its_kind_says(kind, sites):
    for seed in range(6):
        world = SyntheticScenario(kind).world(sites[seed % len(sites)], seed, 30)
        access = world.rate_bps[: DEVICE_CLOUD + 1]
        varies = np.ptp(access) > 0 and not (access == access[:, :1]).all()
        assert varies == (kind not in ("static", "load"))
        has_background = any(len(b.arrivals_s) for b in world.background)
        assert has_background == (kind not in ("static", "bandwidth"))
        assert (len(world.shift) > 1) == (kind == "contention")
        assert (world.contention >= 1).all()
        assert (world.rate_bps >= FLOOR_BPS).all()
        assert (np.diff(world.arrivals_s, axis=1) > 0).all()
        assert (world.deadline_s > 0).all()
        if kind == "outage":
            assert (access == FLOOR_BPS).any() or world.is_down.any()
        else:
            assert not world.is_down.any()
        if kind == "handover":
            assert np.ptp(world.rtt_s[0]) > 0


@pytest.mark.parametrize("kind", ["streaming", "contention"])
def test_best_plan_leaves_every_server_a_tenth_of_its_time(kind, sites):
    for seed in range(12):
        site = sites[seed % len(sites)]
        world = SyntheticScenario(kind).world(site, seed, 400)
        costs, clients = site.candidates.costs, len(world.shift)
        link_bps = world.rate_bps.mean(axis=1)[world.path] * world.scale
        rtt_s = world.rtt_s.mean(axis=1)[world.path]
        k = world.contention.mean(axis=1)
        state = blank_states(costs.layout, 1)
        state.input_bytes[:] = site.typical_bytes
        rate_hz = (world.arrivals_s.shape[1] - 1) / np.ptp(world.arrivals_s, axis=1)
        # The same best plan whatever waits at the nodes, or the test would have to know the queues.
        zero = np.zeros_like(k)
        total_s = predict_total(costs, ReadingsArrays(link_bps[None], rtt_s[None], k[None], zero[None]), state)[0]
        near = np.flatnonzero(total_s <= 1.5 * total_s.min())
        busy = []
        for plan in near:
            device_s = costs.full("idle_s")[plan, 0]
            link = costs.full("link")[plan, 0]
            bits = 8 * (costs.full("plain_bytes")[plan, 0] + costs.full("has_input")[plan, 0] * site.typical_bytes)
            up_s = (bits / link_bps[link] + rtt_s[link]) * costs.full("has_hop")[plan, 0]
            busy.append(max(device_s, up_s) * rate_hz.max())
        assert min(busy) <= 0.9 * 1.25  # arrivals of 400 requests differ from their mean rate
        assert clients == 1 or kind == "contention"


def test_background_takes_no_more_than_there_is(sites):
    for seed in range(4):
        world = SyntheticScenario("load").world(sites[0], seed, 4000)
        assert world.background_until_s == np.inf  # the episode takes more than a period
        for node, background in enumerate(world.background):
            busy = background.service_s.sum() * world.contention[node].mean() / world.period_s
            assert busy < 1.2
            assert (np.diff(background.arrivals_s) >= 0).all()
            assert (background.arrivals_s <= world.period_s).all()


def test_background_comes_for_as_long_as_the_episode_goes(sites):
    scenario = SyntheticScenario("load")
    few, many = scenario.world(sites[1], 3, 10), scenario.world(sites[1], 3, 4000)
    assert few.background_until_s > few.arrivals_s.max() + few.deadline_s.max()
    for a, b in zip(few.background, many.background, strict=True):
        assert np.array_equal(a.arrivals_s, b.arrivals_s[b.arrivals_s < few.background_until_s])


@pytest.mark.parametrize(("draw", "law"), [(uniform, "uniform"), (exponential, "expon"), (normal, "norm")])
def test_random_numbers_follow_their_law(draw, law):
    @numba.njit
    def fill(stream, out):
        for at in range(len(out)):
            out[at] = draw(stream)

    values = np.empty(200_000)
    fill(make_streams(3)[0], values)
    assert kstest(values, law).pvalue > 0.001
    assert np.corrcoef(values[1:], values[:-1])[0, 1] == pytest.approx(0.0, abs=0.01)
    if draw is uniform:  # from this state the generator's first words can be worked out by hand
        fill(np.array([1, 2, 3, 4], dtype=np.uint64), values)
        assert (values[:2] * 2.0**53 == np.array([(5 << 23) + 1, 58720359]) >> 11).all()


@pytest.mark.parametrize("name", NETWORK_FAMILIES)
def test_family_has_the_marginal_it_was_fitted_to(name):
    family = load_families()[name]
    rng = np.random.default_rng(2)
    values = np.concatenate([family.sample(rng, 400) for _ in range(300)])
    median = family.value_at(np.array(0.5))
    share = np.mean(values <= median)
    assert share == pytest.approx(family.out_frac + 0.5 * (1.0 - family.out_frac), abs=0.08)
    assert values.mean() == pytest.approx(family.mean, rel=0.25)


def test_outages_last_as_long_as_the_family_says_and_as_often():
    family = replace(load_families()["norway3g"], out_value=-1.0)
    rng = np.random.default_rng(4)
    traces = [Recording(0.2, family.sample(rng, 3000)) for _ in range(200)]
    out_s, _ = spells_s(traces, 0.0)
    assert np.mean([t.values < 0.0 for t in traces]) == pytest.approx(family.out_frac, rel=0.15)
    assert out_s.mean() == pytest.approx(np.mean(family.out_s), rel=0.1)
    assert np.quantile(out_s, 0.9) == pytest.approx(np.quantile(family.out_s, 0.9), rel=0.2)


def test_fit_finds_the_family_that_made_the_recordings(tmp_path):
    lengths_s = np.linspace(0.4, 8.0, NUM_LENGTHS)
    made = Family(
        "lake", "network", tuple(np.linspace(1e6, 9e6, 65).tolist()), 0.2, 0.4, 12.0, 0.3,
        out_value=1e4, out_s=tuple(lengths_s.tolist()), up_s=tuple((10.0 * lengths_s).tolist()),
    )  # fmt: skip
    rng = np.random.default_rng(5)
    for folder in ("network", "load"):
        (tmp_path / folder).mkdir()
    for number in range(30):
        rates = made.sample(rng, 1500, 0.2) / 1e6
        rows = "".join(f"{0.2 * at:.1f},{rate:.4f}\n" for at, rate in enumerate(rates))
        (tmp_path / "network" / f"lake__t{number}.csv").write_text("time_s,bandwidth_mbps\n" + rows)
        (tmp_path / "load" / f"pond__t{number}.csv").write_text("time_s,requests_per_s\n0,4\n600,5\n1200,6\n")
    report = tmp_path / "report.md"
    pond, lake = fit_folder(tmp_path, report, tmp_path / "table.json")
    assert (pond.name, lake.name) == ("pond", "lake")
    assert lake.mean == pytest.approx(made.mean, rel=0.1)
    assert lake.level_var == pytest.approx(0.2, abs=0.12)
    assert lake.out_frac == pytest.approx(1.0 / 11.0, rel=0.2)
    assert lake.out_value == pytest.approx(made.out_value, rel=1e-3)
    assert np.quantile(lake.out_s, (0.1, 0.5, 0.9)) == pytest.approx(np.quantile(made.out_s, (0.1, 0.5, 0.9)), rel=0.3)
    lags_s = np.array([0.2, 1.0, 5.0, 20.0])

    def memory(f):
        return f.fast_var * np.exp(-lags_s / f.fast_s) + (1 - f.fast_var) * np.exp(-lags_s / f.slow_s)

    assert memory(lake) == pytest.approx(memory(made), abs=0.12)
    assert "## lake (network, " in report.read_text()
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert [row["name"] for row in json.loads((tmp_path / "table.json").read_text())] == ["pond", "lake"]


def test_files_of_one_recording_share_a_split():
    pairs = [
        ("ucc5g__driving_B_2019.12.14_10.16.30_s0.csv", "ucc5g__driving_B_2019.12.14_10.49.02_s1.csv"),
        ("norway3g__r.2010-09-29_1823CEST.csv", "norway3g__r.2010-09-29_1827CEST.csv"),
        ("hairpineth__trace1_s0.csv", "hairpineth__trace1_s1.csv"),
        ("fcc16__trace_925806_www.amazon.com.csv", "fcc16__trace_925806_www.cnn.com.csv"),
        ("zhuge4g__trace2_s0.csv", "zhuge4g__trace11_s0.csv"),
    ]
    assert all(split_of(a) == split_of(b) for a, b in pairs)
    splits = [split_of(f"oboe__oboe_trace_{number}.csv") for number in range(500)]
    assert 0.15 < splits.count("validation") / 500 < 0.25


def test_trace_scenario_plays_files_of_every_form(tmp_path, sites):
    (tmp_path / "a.csv").write_text("time_s,bandwidth_mbps\n0,3\n1,3\n2,3\n")
    (tmp_path / "b.json").write_text('[{"duration_ms": 4000, "bandwidth_kbps": 3000}]')
    (tmp_path / "c.log").write_text("".join(f"{4 * at}\n" for at in range(1, 1001)))
    scenario = TraceScenario("bandwidth", tmp_path, split="all")
    for seed in range(8):
        world = scenario.world(sites[0], seed, 5)
        ratio = world.rate_bps[0] / world.rate_bps[0, 0]
        assert ratio == pytest.approx(np.ones_like(ratio), rel=0.05)
        assert 1e6 < world.rate_bps[0].mean() < 7e6
        assert world.rate_bps[BACKBONE].mean() > 2e7


def test_trace_scenario_plays_recorded_load(tmp_path, sites):
    (tmp_path / "n.csv").write_text("time_s,bandwidth_mbps\n0,3\n1,5\n")
    loads = tmp_path / "loads"
    loads.mkdir()
    (loads / "l.csv").write_text("time_s,utilization\n0,0\n20,0.8\n40,0\n60,0.8\n80,0\n100,0\n")
    world = TraceScenario("load", tmp_path, loads, split="all").world(sites[0], 4, 4000)
    counts = np.histogram(world.background[1].arrivals_s, bins=np.arange(0, world.period_s, 10.0))[0]
    assert (counts == 0).sum() >= 2
    assert counts.max() > 0


def test_refusals_say_what_there_is(tmp_path):
    with pytest.raises(ConfigError, match="got 'fog'"):
        SyntheticScenario("fog")
    with pytest.raises(ConfigError, match="expected a folder with train traces"):
        TraceScenario("both", tmp_path)
    with pytest.raises(ConfigError, match="expected a split among"):
        trace_files(tmp_path, "test")
    with pytest.raises(ConfigError, match="no profile ships for 'torchvision:nothing'"):
        make_sites(("torchvision:nothing",))


def test_grid_is_as_fine_as_the_finest_recordings():
    assert GRID_S == 0.2


@given(
    seed=st.one_of(st.integers(0, 2**70), st.lists(st.integers(0, 2**70), min_size=1, max_size=4)),
    spawn_key=st.lists(st.integers(0, 200), max_size=2).map(tuple),
)
def test_seeds_are_hashed_as_seed_sequence_does(seed, spawn_key):
    expected = np.random.SeedSequence(seed, spawn_key=spawn_key).generate_state(8, np.uint64)
    np.testing.assert_array_equal(hash_seed(seed, spawn_key).generate_state(8, np.uint64), expected)


@pytest.mark.parametrize(
    "seed", [np.int64(3), np.uint32(3), [np.int64(2**40 + 1), 1], np.array([2**40 + 1]), [True, 2]]
)
def test_seeds_of_numpy_are_hashed_as_seed_sequence_does(seed):
    expected = np.random.SeedSequence(seed).generate_state(8, np.uint64)
    np.testing.assert_array_equal(hash_seed(seed).generate_state(8, np.uint64), expected)


@pytest.mark.parametrize("seed", [(-1,), (np.int64(-1),), [1.5]])
def test_what_is_no_seed_is_refused_as_by_seed_sequence(seed):
    with pytest.raises((ValueError, TypeError)):
        hash_seed(seed)
