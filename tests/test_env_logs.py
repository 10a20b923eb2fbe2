"""Corrections and logs without any process: what is put into a deployment's events must be found again."""

from pathlib import Path

import numpy as np
import pytest

from env.backend import TwinBackend
from env.correction import (
    Correction,
    component_errors,
    corrected,
    fit_correction,
    parts_of,
    read_correction,
    tiers_of,
)
from env.log_scenario import LogScenario, site_from_log
from env.logs import SESSION_GAP_S, read_log
from env.scenario import SyntheticScenario
from env.site import Site
from env.split_inference import SplitInferenceEnv
from runtime.device.telemetry import EVENTS_FILE
from runtime.errors import ConfigError
from runtime.planning.cost import estimate
from runtime.profiles.shipped import load_shipped_profile
from runtime.types import Plan
from tests.logged import COUNT, EDGE_FACTOR, MESSAGE_S, MODEL, logged_site, write_log
from tests.sites import EDGE_S, still_world, toy_site

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them


@pytest.fixture(scope="module")
def site() -> Site:
    return logged_site()


@pytest.fixture(scope="module")
def folder(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a session in a world of the twin."""
    folder = tmp_path_factory.mktemp("log")
    write_log(folder, site)
    return folder


def test_a_log_gives_back_the_requests_speeds_and_errors_that_were_put_into_it(site, folder: Path) -> None:
    log = read_log(folder)
    world = SyntheticScenario("both").world(site, 2, COUNT + 1)
    assert log.arrivals_s == pytest.approx(world.arrivals_s[0, :COUNT] - world.arrivals_s[0, 0], abs=1e-6)
    assert log.input_bytes == pytest.approx(np.round(world.input_bytes[0, :COUNT]))
    correction = log.correction()
    assert correction.compute["edge"] == pytest.approx(EDGE_FACTOR, rel=0.01)
    assert correction.compute["device"] == pytest.approx(1.0)
    assert correction.message_s == pytest.approx(MESSAGE_S, rel=0.05)
    again = site_from_log(log, MODEL)
    for name, profile in again.problem.profile.nodes.items():
        factor = EDGE_FACTOR if name.startswith("edge") else 1.0
        expected = factor * np.array(site.problem.profile.nodes[name].layer_s)
        assert profile.layer_s == pytest.approx(expected, rel=0.15), name  # k is read, and ages


def test_a_session_that_was_started_again_follows_the_one_before(folder: Path, tmp_path: Path) -> None:
    one, lines = read_log(folder), (folder / EVENTS_FILE).read_bytes()
    (tmp_path / f"{EVENTS_FILE}.1").write_bytes(lines)
    (tmp_path / EVENTS_FILE).write_bytes(lines.replace(b'"2026-01-01', b'"2026-01-02'))
    both = read_log(tmp_path)
    gap_s = both.arrivals_s[COUNT] - both.arrivals_s[COUNT - 1]
    assert gap_s == pytest.approx(SESSION_GAP_S)
    assert np.diff(both.arrivals_s[COUNT:]) == pytest.approx(np.diff(one.arrivals_s))


def test_a_scenario_of_a_log_plays_what_was_read_and_runs_in_the_environment(folder: Path) -> None:
    log = read_log(folder)
    site, scenario = site_from_log(log, MODEL), LogScenario(log)
    world, same = scenario.world(site, 5, 60), scenario.world(site, 5, 60)
    assert np.array_equal(world.rate_bps, same.rate_bps)
    assert (np.diff(world.arrivals_s[0]) >= 0).all()
    assert world.arrivals_s[0, 0] >= 1.0
    slot = site.candidates.costs.layout.link_slot["device", "edge0"]
    instants_s, bps = log.bandwidth_bps["device", "edge0"]
    played = world.rate_bps[world.path[slot]]
    assert bps.min() * 0.999 <= played.min() <= played.max() <= bps.max() * 1.001
    assert len(instants_s) == len(np.unique(instants_s))
    correction = log.correction()
    sites, scenarios = corrected(correction, [site], [scenario])
    e = SplitInferenceEnv(sites=sites, scenario=scenarios, num_requests=9)
    e.reset(seed=1)
    rewards = [e.step(np.int64(0))[1] for _ in range(9)]
    assert np.isfinite(rewards).all()


def test_files_that_are_no_log_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="events of a session"):
        read_log(tmp_path / "nothing")
    lines = (folder / EVENTS_FILE).read_bytes().splitlines()
    (tmp_path / EVENTS_FILE).write_bytes(b"\n".join(lines[:5]))
    with pytest.raises(ConfigError, match="at least 20 requests"):
        read_log(tmp_path)
    (tmp_path / EVENTS_FILE).write_bytes(b"\n".join([*lines, lines[0].replace(b'"one"', b'"other"')]))
    with pytest.raises(ConfigError, match="one model"):
        read_log(tmp_path)
    with pytest.raises(ConfigError, match="layers"):
        site_from_log(read_log(folder), load_shipped_profile("torchvision:vgg16"))


def test_a_corrected_twin_takes_the_corrected_time(tmp_path: Path) -> None:
    site = toy_site()
    world = still_world(site, [2.0, 4.0])
    correction = Correction(compute={"edge": 1.5}, transfer={"uplink": 2.0}, message_s=0.01)
    correction.write(tmp_path / "correction.json")
    assert read_correction(tmp_path / "correction.json") == correction
    plan = Plan.split(3, 1, 3, edge_nodes=("edge0",))
    took = []
    for place, played in ((site, world), (correction.site(site), correction.world(site, world))):
        backend = TwinBackend([place], num_requests=1)
        backend.start_world(0, played)
        took.append(backend.step(plan)[1][0].latency_s)
    up_s = 62_500 * 8 / 10e6
    messages = took[1] - took[0] - 0.5 * sum(EDGE_S[1:]) - up_s
    assert messages == pytest.approx(0.02, abs=1e-9)  # there and back
    (tmp_path / "broken.json").write_text("{}x")
    with pytest.raises(ConfigError, match="calibrate"):
        read_correction(tmp_path / "broken.json")


def test_nothing_is_corrected_where_nothing_differs() -> None:
    site = toy_site()
    plan = Plan.split(3, 1, 3, edge_nodes=("edge0",))
    backend = TwinBackend([site], num_requests=1)
    backend.start_world(0, still_world(site, [2.0, 4.0]))
    parts = parts_of(estimate(site.problem, plan, backend.state()), tiers_of(site))
    correction = fit_correction([(parts, parts)] * 6)
    assert set(correction.compute.values()) | set(correction.transfer.values()) == {1.0}
    assert correction.message_s == 0.0
    assert correction.site(site) is site
    rows = {row.component: row for row in component_errors([(parts, parts)] * 6)}
    assert rows["edge"].worked_s == pytest.approx(sum(EDGE_S[1:]))
    assert rows["total"].error_frac == 0.0
    assert rows["cloud"].count == 0
