import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.planning.arrays import encode_states
from runtime.planning.candidates import candidates
from runtime.planning.conditions import sample_conditions
from runtime.planning.cost import PARTS, predict, total_s
from runtime.planning.estimators import tuned_arrays
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import PlanCosts, compile_plan
from runtime.planning.scan import list_families, make_plan, scan_stream
from runtime.planning.stream import HELD_PARTS, bottleneck_s, held_s, stream_s, wait_s
from runtime.profiles.shipped import load_shipped_profile
from runtime.types import Constraints, ModelProfile, NodeProfile, Tier
from tests.graphs import make_deployment, varied
from tests.problems import random_state
from tests.test_runtime_planning_candidates import all_splits

PROBLEMS = {
    "one edge": varied(1),
    "two edges": varied(2, edges=2),
    "private": varied(3, constraints=Constraints(private_input=True), kind="image"),
    "no cloud": varied(4, constraints=Constraints(allowed_tiers=(Tier.DEVICE, Tier.EDGE))),
    "no edge": varied(5, constraints=Constraints(allowed_tiers=(Tier.DEVICE, Tier.CLOUD)), kind="encoded"),
    "no model": varied(6, constraints=Constraints(device_has_model=False, deadline_s=1.0)),
}


@given(st.floats(1e-4, 10.0), st.floats(0.01, 0.98), st.floats(0.01, 0.5))
def test_waiting_grows_with_the_rate_and_with_what_is_held(held: float, utilisation: float, more: float) -> None:
    rates = np.array([utilisation, utilisation + more * (1 - utilisation)]) / held
    waits = wait_s(np.array([held, held]), rates)
    assert 0 < waits[0] < waits[1]
    assert wait_s(np.array([held / 2]), rates[:1])[0] < waits[0] / 2
    assert waits[0] == pytest.approx(held * utilisation / (2 * (1 - utilisation)))


def test_a_resource_that_cannot_keep_up_makes_the_latency_infinite() -> None:
    parts = np.full((1, 2, len(PARTS)), 0.01)
    parts[0, 1, PARTS.index("uplink")] = 0.5
    assert np.isfinite(stream_s(parts, np.array([1.0]))).all()
    assert stream_s(parts, np.array([2.0])).tolist()[0][1] == np.inf
    assert bottleneck_s(parts).tolist() == [[0.01, 0.5]]
    assert held_s(parts).shape == (1, 2, len(HELD_PARTS))
    np.testing.assert_allclose(stream_s(parts, np.zeros(1)), total_s(parts))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_scan_s_seconds_are_those_of_the_plans_it_names(name: str) -> None:
    problem, count = PROBLEMS[name], 40
    conditions, families = sample_conditions(problem, count), tuple(list_families(problem))
    shares = np.full(count, 0.8)
    rate_hz, best_s, splits = scan_stream(problem, families, conditions, shares, np.full(count, np.inf))
    plans = [make_plan(problem, *split) for split in splits]
    parts = predict(PlanCosts.stack([compile_plan(problem, p) for p in plans]), conditions.readings, conditions.state)
    np.testing.assert_allclose(stream_s(parts, rate_hz).min(axis=1), best_s, rtol=1e-9)
    assert len(plans) == len(set(plans))


@pytest.mark.parametrize("name", PROBLEMS)
def test_some_candidate_is_nearly_as_good_in_a_stream_as_the_best_of_all_splits(name: str) -> None:
    problem, count = PROBLEMS[name], 200
    conditions = sample_conditions(problem, count, first=20_000)  # others than those that the candidates were made from
    has_edge = Tier.EDGE in problem.constraints.allowed_tiers  # else a head that only relays is legal, but no candidate
    plans = [plan for plan in all_splits(problem) if has_edge or plan.head is None]
    every = PlanCosts.stack([compile_plan(problem, plan) for plan in plans])
    all_parts = predict(every, conditions.readings, conditions.state)
    own_parts = predict(candidates(problem).costs, conditions.readings, conditions.state)
    slower = bottleneck_s(own_parts).min(axis=1) / bottleneck_s(all_parts).min(axis=1) - 1.0
    assert slower.min() >= -1e-9
    assert slower.mean() < 0.05
    rate_hz = 0.8 / bottleneck_s(all_parts).min(axis=1)
    ratio = stream_s(own_parts, rate_hz).min(axis=1) / stream_s(all_parts, rate_hz).min(axis=1)
    assert np.quantile(ratio, 0.95) < 1.05
    assert np.isfinite(ratio).mean() > 0.98  # in the others the best candidate is some 20 % too slow for the rate


def shipped(spec: str) -> PlanningProblem:
    """A shipped profile with an edge as fast as the machine that measured it, a device six times slower."""
    model = load_shipped_profile(spec)
    slow = {"device": 6.0, "edge0": 1.0, "cloud": 0.15}
    nodes = {
        name: NodeProfile(tuple(seconds * factor for seconds in model.profile.layer_s), 2e8, 4e8, 5e-4)
        for name, factor in slow.items()
    }
    profile = ModelProfile(model.graph, nodes, model.ratios.by_value)
    return PlanningProblem(profile, make_deployment(), Constraints(), "tensor")


def test_the_candidates_keep_up_as_dads_heavy_does() -> None:
    problem = shipped("torchvision:resnet18")
    dads, choices = load_policy("dads-heavy-k+tuned").build(problem), candidates(problem)
    assert choices.num_plans > 16
    ratios = []
    for seed in range(12):
        state = random_state(problem, seed)
        one = compile_plan(problem, dads.plan(state))
        costs = PlanCosts.stack([one, choices.costs])
        arrays = encode_states(costs.layout, (state,))
        longest = bottleneck_s(predict(costs, tuned_arrays(arrays), arrays))[0]
        ratios.append(longest[1:].min() / longest[0])
    assert np.mean(ratios) < 1.02
