import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from env.catalogue import make_sites
from env.draw import MAX_STEPS, SCENARIOS
from env.kernel import device, hear, layout, life, links, nodes
from env.scenario import SyntheticScenario
from env.traces import GRID_S
from env.twin import OUTCOMES, Twin
from env.world import World
from runtime.device import breaker, request
from runtime.errors import ConfigError
from runtime.node import load, worker
from runtime.node.config import WorkerConfig
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.features import FeatureEncoder
from runtime.planning.policies.planner import build_planner
from runtime.types import Plan
from runtime.wire import link
from runtime.wire.events import Limits
from tests.sites import (
    BACKBONE_BPS,
    BACKBONE_RTT_S,
    CLOUD_S,
    CUT_BYTES,
    DEVICE_S,
    DOWN_BPS,
    EDGE_RTT_S,
    EDGE_S,
    INPUT_BYTES,
    RESULT_BYTES,
    UP_BPS,
    still_world,
    toy_site,
)

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

LANE = np.zeros(1, dtype=np.int64)
EDGE_ONLY, DEVICE_ONLY = Plan.split(3, 0, 3, edge_nodes=("edge0",)), Plan.split(3, 3, 3)
AFTER_FIRST = Plan.split(3, 1, 3, edge_nodes=("edge0",))
UP_S, CUT_UP_S, DOWN_S = INPUT_BYTES * 8 / UP_BPS, CUT_BYTES * 8 / UP_BPS, RESULT_BYTES * 8 / DOWN_BPS
HALF_S = EDGE_RTT_S / 2
EDGE_LATENCY_S = UP_S + HALF_S + sum(EDGE_S) + DOWN_S + HALF_S


@pytest.fixture(scope="module")
def site():
    return toy_site()


def without(site, plan):
    """The same site, where one plan is no candidate."""
    known = site.candidates
    rows = [row for row in range(known.num_plans) if known.plans[row] != plan]
    places = np.array(rows + [rows[0]] * (len(known.plans) - len(rows)))
    smaller = replace(
        known,
        plans=tuple(known.plans[row] for row in places),
        costs=known.costs.take(places),
        num_plans=len(rows),
        down_cost=known.down_cost[:, places],
        link_cost=known.link_cost[:, places],
        padding_cost=np.where(np.arange(len(places)) < len(rows), 0.0, known.padding_cost.max() + 1e18),
        index={known.plans[row]: place for place, row in enumerate(rows)},
    )
    other = replace(site)
    object.__setattr__(other, "candidates", smaller)
    return other


def play(twin, site, world: World, plans) -> tuple[np.ndarray, list[str]]:
    """Run plans through a world: latency and outcome of every request."""
    twin.load(0, site, world)
    twin.begin(LANE)
    for plan in plans:
        twin.step(LANE, np.array([twin.add_plan(0, plan)]))
    numbers = np.arange(len(plans))
    latency_s, _, outcomes = twin.requests(np.zeros_like(numbers), numbers)
    return latency_s, [OUTCOMES[code] for code in outcomes]


def test_requests_that_overlap_wait_for_device_uplink_and_node_as_worked_out_by_hand(site):
    first, second, third = 2.0, 2.03, 2.04
    world = still_world(site, [first, second, third, 4.0])
    latency_s, outcomes = play(Twin(1, 4), site, world, [AFTER_FIRST, AFTER_FIRST, DEVICE_ONLY])
    edge_s, back_s = sum(EDGE_S[1:]), DOWN_S + HALF_S
    device_first, device_second = first + DEVICE_S[0], first + 2 * DEVICE_S[0]
    reach_first = device_first + CUT_UP_S + HALF_S
    # The uplink is free again when the first message is acknowledged: a round trip after its last bit.
    uplink_second = max(device_second, device_first + CUT_UP_S + EDGE_RTT_S)
    reach_second = uplink_second + CUT_UP_S + HALF_S
    edge_second = max(reach_second, reach_first + edge_s)
    assert edge_second > reach_second  # the node's queue is part of the sum
    assert latency_s == pytest.approx(
        [
            reach_first + edge_s + back_s - first,
            edge_second + edge_s + back_s - second,
            device_second + sum(DEVICE_S) - third,
        ],
        abs=1e-9,
    )
    assert outcomes == ["remote", "remote", "device"]


def test_uplink_backlog_delays_by_the_acknowledgement(site):
    latency_s, _ = play(Twin(1, 3), site, still_world(site, [2.0, 2.01, 4.0]), [EDGE_ONLY, EDGE_ONLY])
    uploaded = 2.0 + UP_S + EDGE_RTT_S + UP_S + HALF_S
    started = max(uploaded, 2.0 + UP_S + HALF_S + sum(EDGE_S))
    assert latency_s == pytest.approx([EDGE_LATENCY_S, started + sum(EDGE_S) + DOWN_S + HALF_S - 2.01], abs=1e-9)


def test_plan_over_head_and_cloud_adds_up_and_its_first_run_builds_what_no_candidate_has(site):
    plan = Plan.split(3, 1, 2, edge_nodes=("edge0",))
    site = without(site, plan)
    assert plan not in site.candidates.index
    latency_s, _ = play(Twin(1, 3), site, still_world(site, [2.0, 4.0, 9.0]), [plan, plan])
    up_s = DEVICE_S[0] + CUT_UP_S + HALF_S + EDGE_S[1] + CUT_BYTES * 8 / BACKBONE_BPS + BACKBONE_RTT_S / 2
    down_s = CLOUD_S[2] + RESULT_BYTES * 8 / BACKBONE_BPS + BACKBONE_RTT_S / 2 + DOWN_S + HALF_S
    assert latency_s == pytest.approx([up_s + down_s + nodes.COLD_S + EDGE_S[1], up_s + down_s], abs=1e-9)


def test_background_requests_hold_the_node(site):
    node = site.candidates.costs.layout.node_slot["edge0"]
    reach = 2.0 + UP_S + HALF_S
    world = still_world(site, [2.0, 9.0], background={node: ([reach - 0.01, reach + 0.001], [0.4, 0.4])})
    latency_s, _ = play(Twin(1, 2), site, world, [EDGE_ONLY])
    assert latency_s == pytest.approx([EDGE_LATENCY_S + 0.39], abs=1e-9)  # the one that came later waits


@pytest.mark.parametrize("until_s", [50.0, np.inf])
def test_background_comes_again_after_a_period_unless_it_was_drawn_in_part(site, until_s):
    node = site.candidates.costs.layout.node_slot["edge0"]
    reach = 2.0 + UP_S + HALF_S
    again = 2.0 + MAX_STEPS * GRID_S
    world = still_world(site, [2.0, again, again + 9.0], background={node: ([reach - 0.01], [0.4])})
    latency_s, _ = play(Twin(1, 3), site, replace(world, background_until_s=until_s), [EDGE_ONLY] * 2)
    late_s = 0.39 if until_s == np.inf else 0.0
    assert latency_s == pytest.approx([EDGE_LATENCY_S + 0.39, EDGE_LATENCY_S + late_s], abs=1e-6)


def test_contention_multiplies_service(site):
    world = still_world(site, [2.0, 9.0])
    world.contention[site.candidates.costs.layout.node_slot["edge0"]] = 3.0
    latency_s, _ = play(Twin(1, 2), site, world, [EDGE_ONLY])
    assert latency_s == pytest.approx([EDGE_LATENCY_S + 2 * sum(EDGE_S)], abs=1e-9)


def test_transfer_integrates_the_rate_over_the_grid(site):
    world = still_world(site, [2.0, 9.0])
    world.rate_bps[0, 10:] = DOWN_BPS / 10  # from 2 s on
    world.rate_bps[0, 11:] = DOWN_BPS  # from 2.2 s on
    latency_s, _ = play(Twin(1, 2), site, world, [EDGE_ONLY])
    slow_bits = 0.2 * UP_BPS / 10
    up_s = 0.2 + (INPUT_BYTES * 8 - slow_bits) / UP_BPS
    assert latency_s == pytest.approx([EDGE_LATENCY_S - UP_S + up_s], abs=1e-9)


def test_device_completes_a_request_when_its_deadline_is_near(site):
    deadline_s, local_s = 2.0, sum(DEVICE_S)
    world = still_world(site, [2.0, 9.0], deadline_s=deadline_s)
    world.rate_bps[0, 10:40] = 1000.0  # the upload hangs
    latency_s, outcomes = play(Twin(1, 2), site, world, [EDGE_ONLY])
    protect_s = deadline_s - request.PROTECTION_FACTOR * local_s - request.HAND_OVER_S
    assert outcomes == ["local"]
    assert latency_s == pytest.approx([protect_s + local_s], abs=1e-9)


def test_node_that_is_silent_is_given_up_and_comes_back(site):
    world = still_world(site, [2.0, 6.0, 12.0, 20.0])
    edge = site.candidates.costs.layout.node_slot["edge0"]
    world.is_down[edge, 10:50] = True  # 2 s to 10 s
    twin = Twin(1, 4)
    twin.load(0, site, world)
    twin.begin(LANE)
    row = np.array([twin.add_plan(0, EDGE_ONLY)])
    assert twin.known("is_up", LANE)[0, edge]
    twin.step(LANE, row)
    assert not twin.known("is_up", LANE)[0, edge]
    twin.step(LANE, row)
    assert twin.known("is_up", LANE)[0, edge]
    twin.step(LANE, row)
    latency_s, _, outcomes = twin.requests(np.zeros(3, dtype=np.int64), np.arange(3))
    assert [OUTCOMES[code] for code in outcomes] == ["local", "local", "remote"]
    assert latency_s[1:] == pytest.approx([sum(DEVICE_S), EDGE_LATENCY_S], abs=1e-9)


def test_device_without_the_model_fails_at_the_deadline():
    site = toy_site(device_has_model=False)
    world = still_world(site, [2.0, 9.0], deadline_s=1.0)
    world.rate_bps[0, 10:40] = 1000.0
    latency_s, outcomes = play(Twin(1, 2), site, world, [EDGE_ONLY])
    assert outcomes == ["failed"]
    assert np.isinf(latency_s).all()


def test_brute_force_finds_the_optimum_that_is_known(site):
    # Both at the edge wait for each other; the best is one there, and the other on the device.
    arrivals = [2.0, 2.001, 9.0]
    plans = (EDGE_ONLY, DEVICE_ONLY)
    twin = Twin(1, 3)
    cost_s = {
        pair: play(twin, site, still_world(site, arrivals), pair)[0].sum() for pair in itertools.product(plans, plans)
    }
    best = min(cost_s, key=cost_s.__getitem__)
    assert set(best) == set(plans)
    assert cost_s[best] == pytest.approx(EDGE_LATENCY_S + sum(DEVICE_S), abs=1e-9)


@pytest.fixture(scope="module")
def rollouts():
    """Random plans through every scenario, with what was known at each step."""
    sites = make_sites(("random:3", "torchvision:resnet18", "random:5"), seed=6)  # 1, 3 and 2 edge nodes
    lanes, rng = np.arange(len(sites)), np.random.default_rng(3)
    twin, seen = Twin(len(sites), 13), []
    for kind in SCENARIOS:
        for lane, place in enumerate(sites):
            twin.load(lane, place, SyntheticScenario(kind).world(place, (5, lane), 13))
        twin.begin(lanes)
        for _ in range(12):
            for lane, place in enumerate(sites):
                at = np.array([lane])
                shown = [rows[lane].copy() for rows in twin.seen]
                known = [twin.known(name, at) for name in ("current", "total_s")]
                seen.append(
                    (
                        place,
                        twin.state_arrays(place, at),
                        *(rows[:, :32] if rows.ndim > 1 else rows for rows in known),
                        shown,
                    )
                )
            twin.step(lanes, np.array([rng.integers(place.candidates.num_plans) for place in sites]))
    return seen


def test_compiled_prediction_equals_that_of_planning(rollouts):
    for place, state, _, total_s, _ in rollouts:
        expected = predict_total(place.candidates.costs, tuned_arrays(state), state)[0]
        count = place.candidates.num_plans
        assert total_s[0, :count] == pytest.approx(expected[:count], rel=1e-9)


def test_what_is_shown_equals_what_the_encoder_of_planning_makes_of_the_state(rollouts):
    assert {place.num_edges for place, *_ in rollouts} == {1, 2, 3}
    for place, state, current, _, (rows, context, mask) in rollouts:
        expected = FeatureEncoder(place.problem).encode(state, current=np.where(current < 32, current, -1))
        assert np.abs(rows - expected.candidates.ravel()).max() < 1e-6
        assert np.abs(context - expected.context[0]).max() < 1e-6
        assert (mask == expected.mask[0]).all()


def test_reference_is_the_planner_of_planning():
    (place,) = make_sites(("random:4",))
    planner = build_planner(place.problem)
    world = SyntheticScenario("both").world(place, 11, 25)
    twin = Twin(1, 25)
    twin.load(0, place, world)
    expected = twin.start(LANE)[0, :24].copy()
    for _ in range(24):
        twin.step(LANE, planner.choose(twin.state_arrays(place, LANE)).astype(np.int64))
    latency_s, _, _ = twin.requests(np.zeros(24, dtype=np.int64), np.arange(24))
    assert (latency_s == expected).all()


def test_what_a_state_holds_is_what_a_device_can_know(rollouts):
    for _, state, *_ in rollouts:
        assert (state.sample_age_s >= 0).all()
        assert (np.diff(state.sample_age_s, axis=-1) >= 0).all()
        assert (state.node_age_s >= 0).all()
        assert (state.load_factor[np.isfinite(state.load_factor)] >= 1).all()
        assert (state.backlog_bytes >= 0).all()
        assert (state.device_backlog_s >= 0).all()


def test_constants_are_those_of_the_runtime():
    assert (device.PROTECTION_FACTOR, device.HAND_OVER_S, device.HAND_OVER_FRAC) == (
        request.PROTECTION_FACTOR,
        request.HAND_OVER_S,
        request.HAND_OVER_FRAC,
    )
    assert (life.FAILURES_TO_OPEN, life.COOL_DOWN_S, life.COOL_DOWN_MAX_S) == (
        breaker.FAILURES_TO_OPEN,
        breaker.COOL_DOWN_S,
        breaker.COOL_DOWN_MAX_S,
    )
    assert (nodes.WINDOW_S, nodes.WINDOW_LENGTH, nodes.LOAD_FACTOR_MAX) == (
        load.WINDOW_S,
        load.WINDOW_LENGTH,
        load.LOAD_FACTOR_MAX,
    )
    assert WorkerConfig.__dataclass_fields__["queue"].default == nodes.CAPACITY
    assert (worker.STATUS_PERIOD_S, Limits().lost_after_s) == (hear.STATUS_S, hear.LOST_AFTER_S)
    assert (hear.PROBE_AFTER_S, hear.PROBE_S, hear.FIRST_PROBE_BYTES, hear.MAX_PROBE_BYTES) == (
        link.PROBE_AFTER_S,
        link.PROBE_S,
        link.FIRST_PROBE_BYTES,
        link.MAX_PROBE_BYTES,
    )
    assert links.MIN_SAMPLE_BYTES == link.MIN_SAMPLE_BYTES


def test_too_large_a_world_is_refused_by_name(site):
    with pytest.raises(ConfigError, match="at most 3 edge nodes, 6 clients and 2 requests, got 1, 1 and 3"):
        Twin(1, 2).load(0, site, still_world(site, [2.0, 3.0, 4.0]))


# --- records and plain Python -------------------------------------------------------------------------------------------


def play_overlapping():
    """Play requests that overlap: their latencies, then what is seen."""
    site, lane = toy_site(), np.array([0])
    twin = Twin(1, 9)
    twin.load(0, site, still_world(site, [2.0 + 0.05 * at for at in range(9)]))
    latency_s = twin.start(lane)[0, :8]
    for _ in range(4):
        twin.step(lane, lane)
    return [*latency_s.tolist(), *(float(rows.sum()) for rows in twin.seen)]


def test_fields_of_records_are_not_hidden_by_numpy():
    forms = [form for form in vars(layout).values() if isinstance(form, np.dtype)]
    assert len(forms) > 10
    names = {name for form in forms for name in form.names or ()}
    assert not names & set(dir(np.record))


def in_plain_python(module, name):
    """The numbers that a function of a test module returns where nothing is compiled."""
    run = subprocess.run(
        [sys.executable, "-c", f"from {module} import {name}; print(*{name}())"],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(word) for word in run.stdout.split()]


def test_plain_python_plays_what_is_compiled():
    assert in_plain_python(__name__, "play_overlapping") == pytest.approx(play_overlapping(), rel=1e-9)
