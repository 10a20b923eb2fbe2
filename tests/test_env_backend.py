from dataclasses import fields, replace

import numpy as np
import pytest

from env.backend import Ended, TwinBackend
from env.catalogue import make_sites
from env.scenario import SyntheticScenario
from env.split_inference import SplitInferenceEnv
from runtime.errors import ConfigError, PlanError
from runtime.planning.arrays import NEVER_S, encode_states
from runtime.planning.policies.registry import load_policy
from runtime.types import Plan
from tests.sites import CUT_BYTES, INPUT_BYTES, RESULT_BYTES, still_world, toy_site

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

SITES = make_sites(("random:2", "torchvision:alexnet"))
BOTH = SyntheticScenario("both")
RULES = ("device-only", "neurosurgeon-k", "dads-heavy", "loadpart", "d3-hpa", "optimal", "planner")


def play(backend, site, policy, seed=3, scenario=BOTH) -> list[Ended]:
    backend.start(site, scenario, seed)
    is_over, out = False, []
    while not is_over:
        is_over, ended = backend.step(policy.plan(backend.state()))
        out += ended
    return out


def test_state_is_the_record_that_the_lane_holds_as_arrays():
    backend = TwinBackend(SITES, num_requests=8)
    for site in range(2):
        backend.start(site, SyntheticScenario("outage"), 5)
        for step in range(8):
            state, lane = backend.state(), backend._arrays()
            back = encode_states(SITES[site].candidates.costs.layout, (state,))
            for field in fields(lane):
                expected, got = getattr(lane, field.name), getattr(back, field.name)
                if field.name.endswith("_bytes"):
                    assert got == pytest.approx(expected, abs=0.5), field.name
                else:
                    expected, got = np.minimum(expected, NEVER_S), np.minimum(got, NEVER_S)
                    assert got == pytest.approx(expected, rel=1e-12, nan_ok=True), field.name
            plan = SITES[site].candidates.plans[step]
            backend.step(plan)
            assert state.plan_in_force is None or state.plan_in_force in SITES[site].candidates.plans[:step]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_runs_in_the_twin_as_it_does_on_a_device(name):
    backend = TwinBackend(SITES[1:], num_requests=10)
    policy = load_policy(name).build(SITES[1].problem)
    ended = play(backend, 0, policy)
    assert sorted(one.number for one in ended) == list(range(10))
    assert all(one.reference_s == backend.reference_s[one.number] for one in ended)
    if name == "planner":  # its own reference, up to bytes that a record rounds
        assert [one.term for one in ended] == pytest.approx([0.0] * 10, abs=1e-3)
    if name == "device-only":
        assert {one.outcome for one in ended} == {"device"}
        assert {(one.uplink_bytes, one.backbone_bytes) for one in ended} == {(0.0, 0.0)}


def test_environment_and_backend_are_one_world():
    e, backend = (
        SplitInferenceEnv(sites=SITES[1:], scenario="both", num_requests=6),
        TwinBackend(SITES[1:], num_requests=6),
    )
    observation, info = e.reset(seed=4)
    backend.start(0, BOTH, (4, 0, 0))
    assert np.array_equal(info["reference_s"], backend.reference_s)
    for action in (0, 3, 5, 1, 2, 4):
        assert all(np.array_equal(observation[key], rows) for key, rows in backend.observation().items())
        observation, _, _, truncated, info = e.step(action)
        is_over, ended = backend.step(SITES[1].candidates.plans[action])
        assert (truncated, info["completed"]) == (is_over, [(one.number, one.latency_s, one.term) for one in ended])
        assert backend.time_s == info["time_s"]


def test_bytes_follow_the_plan():
    site = toy_site()
    backend = TwinBackend([site], num_requests=3)
    backend.start_world(0, still_world(site, [2.0, 4.0, 9.0, 15.0]))
    plans = [
        Plan.split(3, 0, 3, edge_nodes=("edge0",)),
        Plan.split(3, 1, 2, edge_nodes=("edge0",)),
        Plan.split(3, 0, 0),
    ]
    ended = [one for plan in plans for one in backend.step(plan)[1]]
    assert [one.plan for one in ended] == plans
    assert {one.latency for one in ended} == {None}
    assert [(one.uplink_bytes, one.backbone_bytes) for one in ended] == [
        (INPUT_BYTES, 0),
        (CUT_BYTES, CUT_BYTES + RESULT_BYTES),
        (INPUT_BYTES, INPUT_BYTES + RESULT_BYTES),
    ]


def test_plan_that_is_no_candidate_counts_with_its_own_prediction():
    site = toy_site()
    backend = TwinBackend([site], num_requests=3)
    backend.start_world(0, still_world(site, [2.0, 4.0, 9.0, 15.0]))
    known = site.candidates.plans[1]
    other = replace(known, codec="raw")
    assert other not in site.candidates.index
    for plan in (other, known, other):
        backend.step(plan)
    assert backend.state().plan_in_force == other
    errors = backend.state().recent_errors
    assert len(errors) == 3
    assert max(map(abs, errors)) < 1.0


def test_misuse_is_refused_by_name_and_costs_no_request():
    backend = TwinBackend(SITES[1:], num_requests=2)
    layers = SITES[1].problem.graph.num_layers
    with pytest.raises(ConfigError, match="start"):
        backend.step(Plan.split(layers, 0, 0))
    backend.start(0, BOTH, 1)
    at_s = backend.time_s
    with pytest.raises(PlanError):
        backend.step(Plan.split(layers, 0, 2, edge_nodes=("nowhere",)))
    assert backend.time_s == at_s
    assert not backend.step(Plan.split(layers, layers, layers))[0]
    assert backend.step(Plan.split(layers, layers, layers))[0]
    with pytest.raises(ConfigError, match="start"):
        backend.step(Plan.split(layers, 0, 0))
    with pytest.raises(ConfigError, match="3 requests"):
        backend.start_world(0, still_world(SITES[1], [1.0, 2.0, 3.0, 4.0]))
