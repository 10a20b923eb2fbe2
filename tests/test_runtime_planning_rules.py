"""What the published rules are known to do: optimal where theory says so, monotone, never back towards the device."""

import itertools
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.planning.arrays import Layout, encode_states
from runtime.planning.estimators import last_value, last_value_arrays
from runtime.planning.policies import d3, dads, loadpart
from runtime.planning.policies.optimal import build_optimal
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import PlanningProblem, check_plan, find_route
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    LinkSample,
    LinkState,
    ModelProfile,
    NodeProfile,
    NodeState,
    Plan,
    SystemState,
    Tier,
)
from tests.graphs import make_graph, make_problem, make_state
from tests.problems import legal_plans, link_ends, planning_cases, predict_s, random_problem, random_state

SEEDS = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


def with_load(state: SystemState, k: float, q: float, *, age_s: float = 0.1) -> SystemState:
    nodes = tuple(NodeState(n.name, n.tier, True, k, q, age_s=age_s) for n in state.nodes)
    return replace(state, nodes=nodes)


def with_rate(state: SystemState, factor: float) -> SystemState:
    """Every link `factor` times as fast."""
    links = tuple(
        replace(x, samples=tuple(LinkSample(s.age_s, s.bandwidth_bps * factor) for s in x.samples)) for x in state.links
    )
    return replace(state, links=links)


def linear_plans(problem: PlanningProblem, head: str | None) -> list[Plan]:
    n = problem.graph.num_layers
    tier_end = [(p, n) if head else (p, p) for p in range(problem.entry, n)]
    plans = [Plan.split(n, i, j, edge_nodes=(head,) if head else ()) for i, j in tier_end]
    return [*plans, Plan.split(n, n, n)]


def split_point(plan: Plan) -> int:
    return plan.tiers.count(Tier.DEVICE)


# --- linear splits ---------------------------------------------------------------------------------------------------


@given(seed=SEEDS, is_chain=st.booleans())
@few
def test_on_an_idle_server_loadpart_and_neurosurgeon_agree_and_find_the_best_linear_split(
    seed: int, is_chain: bool
) -> None:
    problem = random_problem(seed, 12, is_chain=is_chain, has_stage=seed % 2 == 0, input_kind="encoded")
    state = with_load(random_state(problem, seed), 1.0, 0.0)
    plan = load_policy("loadpart").build(problem).plan(state)
    assert plan == load_policy("neurosurgeon").build(problem).plan(state)
    best_s = min(predict_s(problem, other, state) for other in linear_plans(problem, "edge0"))
    assert predict_s(problem, plan, state) == pytest.approx(best_s, rel=1e-9)


@given(seed=SEEDS)
@few
def test_under_load_loadpart_finds_the_best_linear_split_towards_the_server(seed: int) -> None:
    problem = random_problem(seed, 12, edges=0)
    state = random_state(problem, seed)
    plan = load_policy("loadpart").build(problem).plan(state)
    best_s = min(predict_s(problem, other, state) for other in linear_plans(problem, None))
    assert predict_s(problem, plan, state) == pytest.approx(best_s, rel=1e-9)


@given(seed=SEEDS, name=st.sampled_from(["loadpart", "neurosurgeon-k"]))
@few
def test_the_split_point_never_falls_as_k_rises(seed: int, name: str) -> None:
    problem = random_problem(seed, 15)
    policy, state = load_policy(name).build(problem), random_state(problem, seed)
    points = [split_point(policy.plan(with_load(state, k, 0.01))) for k in (1, 1.5, 2, 4, 8, 16, 64)]
    assert points == sorted(points)


@given(seed=SEEDS)
@few
def test_once_local_loadpart_stays_local_as_q_rises_and_moves_the_split_for_no_other_reason(seed: int) -> None:
    problem = random_problem(seed, 15)
    policy, state = load_policy("loadpart").build(problem), random_state(problem, seed)
    n = problem.graph.num_layers
    points = [split_point(policy.plan(with_load(state, 2.0, q))) for q in (0, 0.01, 0.03, 0.1, 0.3, 1, 10)]
    remote = [p for p in points if p < n]
    assert points == remote + [n] * (len(points) - len(remote))
    assert len(set(remote)) <= 1
    assert points[-1] == n


@given(seed=SEEDS)
@few
def test_the_bytes_sent_never_fall_as_bandwidth_rises(seed: int) -> None:
    problem = random_problem(seed, 15)
    # Without packing: with it the same tensor is packed on slow links and plain on fast ones.
    problem = replace(problem, profile=replace(problem.profile, lossless_ratio={}))
    policy, state = load_policy("loadpart").build(problem), random_state(problem, seed)
    sizes = {v.name: v.tensor.nbytes for v in problem.graph.values}
    one_way = [x for x in state.links if x.target != "device"]  # the way back is not among the bytes sent
    sent = []
    for factor in (0.01, 0.1, 0.3, 1, 3, 10):
        faster = with_rate(replace(state, links=tuple(one_way)), factor).links
        back = tuple(x for x in state.links if x.target == "device")
        route = find_route(problem.graph, policy.plan(replace(state, links=(*faster, *back))), "tensor")
        sent.append(sum(sizes[name] for name in route.up[0]) if route.up else 0.0)
    assert all(more >= less - 1e-6 for less, more in itertools.pairwise(sent))


def test_stale_load_decays_to_an_idle_server_and_unheard_load_counts_as_idle() -> None:
    problem = random_problem(1, 5)
    state = random_state(problem, 1)

    def believed(age_s: float, k: float = 9.0) -> tuple[float, float]:
        aged = with_load(state, k, 0.8, age_s=age_s)
        return loadpart.read_decayed_load(aged, last_value(aged), "edge0")

    assert believed(loadpart.STALE_AFTER_S) == (9.0, 0.8)
    later = believed(loadpart.STALE_AFTER_S + loadpart.DECAY_S)
    assert later == pytest.approx((1 + 8 / math.e, 0.8 / math.e))
    assert believed(math.inf) == (1.0, 0.0)
    assert believed(math.nan) == (1.0, 0.0)


def test_the_same_split_is_the_same_plan_object() -> None:
    problem = random_problem(2, 40)
    policy = load_policy("loadpart").build(problem)
    states = [random_state(problem, seed) for seed in range(20)]
    plans = [policy.plan(state) for state in states]
    assert len({id(plan) for plan in plans}) == len(set(plans)) > 1


def test_the_cloud_serves_a_two_tier_rule_where_no_edge_node_is_up_or_allowed() -> None:
    problem = random_problem(4, 5, constraints=Constraints(device_has_model=False, deadline_s=1.0))
    for name in ("loadpart", "neurosurgeon", "dads-light", "dads-heavy"):
        policy = load_policy(name).build(problem)
        state = random_state(problem, 1)
        assert set(policy.plan(state).tiers) == {Tier.EDGE}
        nodes = tuple(replace(n, is_up=n.tier is Tier.CLOUD) for n in state.nodes)
        assert set(policy.plan(replace(state, nodes=nodes)).tiers) == {Tier.CLOUD}
        assert set(load_policy(f"{name}@cloud").build(problem).plan(state).tiers) == {Tier.CLOUD}


@given(seed=SEEDS)
@few
def test_last_values_in_plain_numbers_are_those_of_the_arrays(seed: int) -> None:
    problem = random_problem(seed % 5, 3, edges=2)
    state = random_state(problem, seed)
    rng = np.random.default_rng(seed)
    links = tuple(
        replace(
            x,
            samples=x.samples if rng.random() < 0.6 else (),
            mean_bandwidth_bps=float(rng.choice([math.nan, 1.0, 1e6])),
        )
        for x in state.links
    )
    nodes = tuple(replace(n, load_factor=float(rng.choice([math.nan, 0.5, 3.0]))) for n in state.nodes)
    state = replace(state, links=links, nodes=nodes)
    layout = Layout.of_state(state)
    arrays, plain = last_value_arrays(encode_states(layout, (state,))), last_value(state)
    for slot, ends in enumerate(layout.links):
        assert plain.bandwidth_bps[ends] == pytest.approx(float(arrays.bandwidth_bps[0, slot]), nan_ok=True)
        assert plain.rtt_s[ends] == float(arrays.rtt_s[0, slot])
    for slot, name in enumerate(layout.nodes[1:], start=1):
        assert plain.k(name) == float(arrays.load_factor[0, slot])
        assert plain.q(name) == float(arrays.queue_delay_s[0, slot])


# --- minimum cuts ----------------------------------------------------------------------------------------------------


@given(case=planning_cases())
@settings(max_examples=200, deadline=None)
def test_optimal_is_the_best_of_all_legal_plans(case: tuple[PlanningProblem, SystemState]) -> None:
    """Against every legal plan priced by the cost model."""
    problem, state = case
    plan, seconds = build_optimal(problem).solve(state)
    best_s = min(predict_s(problem, other, state) for other in legal_plans(problem))
    assert seconds == pytest.approx(best_s, rel=1e-6)
    assert predict_s(problem, check_plan(problem, plan), state) == pytest.approx(seconds, rel=1e-9)


def test_optimal_uses_every_topology_and_tier_somewhere() -> None:
    """The comparison above would prove little if one kind of plan always won."""
    seen = set()
    for case in range(80):
        problem = random_problem(case, 6)
        plan = build_optimal(problem).plan(random_state(problem, case))
        seen.add((frozenset(plan.tiers), plan.head is not None))
    tiers = [frozenset(x) for x in ((Tier.DEVICE,), (Tier.EDGE,), (Tier.CLOUD,), (Tier.DEVICE, Tier.CLOUD))]
    assert {tiers[0], tiers[1], tiers[2], tiers[3]} <= {kind for kind, _ in seen}
    assert any(len(kind) > 1 and Tier.EDGE in kind for kind, _ in seen)
    assert (tiers[2], True) in seen  # through the head without a layer there
    assert (tiers[2], False) in seen


@given(seed=SEEDS)
@few
def test_dads_light_is_the_best_two_tier_plan_and_never_hands_back(seed: int) -> None:
    problem = random_problem(seed, 5, edges=0)
    state = with_load(random_state(problem, seed), 1.0, 0.0)
    plan = check_plan(problem, load_policy("dads-light").build(problem).plan(state))
    best_s = min(predict_s(problem, other, state) for other in legal_plans(problem))
    assert predict_s(problem, plan, state) == pytest.approx(best_s, rel=1e-6)


def longest_stage_s(problem: PlanningProblem, plan: Plan, state: SystemState) -> float:
    """Longest of device, transfer and server of a plan without a head, by hand."""
    route = find_route(problem.graph, plan, "tensor")
    nodes = problem.profile.nodes
    s_per_byte = 8 / last_value(state).rate_bps("device", "cloud")
    up_s = 0.0
    for value in problem.graph.values:
        if route.up and value.name in route.up[0]:
            ratio = problem.profile.lossless_ratio.get(value.name, 1.0)
            codec_s = value.tensor.nbytes * 2 / nodes["cloud"].encode_bytes_per_s
            up_s += min(value.tensor.nbytes * s_per_byte, value.tensor.nbytes / ratio * s_per_byte + codec_s)
    return max(
        sum(nodes["device"].layer_s[i] for i in route.device.layers),
        up_s,
        sum(nodes["cloud"].layer_s[i] for i in route.cloud.layers),
    )


@given(seed=SEEDS)
@few
def test_dads_heavy_is_within_a_factor_of_three_and_no_slower_per_frame_than_light(seed: int) -> None:
    problem = random_problem(seed, 6, edges=0)
    state = with_load(random_state(problem, seed), 1.0, 0.0)
    heavy, light = (load_policy(name).build(problem).plan(state) for name in ("dads-heavy", "dads-light"))
    best_s = min(longest_stage_s(problem, other, state) for other in legal_plans(problem))
    longest_s = longest_stage_s(problem, heavy, state)
    assert longest_s <= 3 * best_s * (1 + 1e-6)
    assert longest_s <= longest_stage_s(problem, light, state) * (1 + 1e-6)


def test_dads_takes_the_light_plan_while_it_keeps_up_and_the_heavy_one_when_it_does_not() -> None:
    differing = 0
    for seed in range(30):
        problem = random_problem(seed, 8, edges=0)
        state = with_load(random_state(problem, seed), 1.0, 0.0)
        light, heavy = (load_policy(f"dads-{kind}").build(problem).plan(state) for kind in ("light", "heavy"))
        policy, limit_hz = load_policy("dads").build(problem), 1 / longest_stage_s(problem, light, state)
        assert policy.plan(state) == light  # no rate known yet
        assert policy.plan(replace(state, request_rate_hz=0.99 * limit_hz)) == light
        assert policy.plan(replace(state, request_rate_hz=1.01 * limit_hz)) == heavy
        differing += light != heavy
    assert differing > 3


# --- D3 --------------------------------------------------------------------------------------------------------------


def relabel(policy: d3.D3Policy, state: SystemState) -> Plan:
    """Show a state for as long as it takes to be believed."""
    for _ in range(d3.MIN_DWELL + d3.NUM_SAMPLES):
        plan = policy.plan(state)
    return plan


@given(seed=SEEDS)
@few
def test_hpa_is_optimal_on_chains(seed: int) -> None:
    problem = random_problem(seed, 20, is_chain=True)
    state = with_load(random_state(problem, seed), 2.0, 0.0)
    plan = d3.build_hpa(problem).plan(state)
    assert predict_s(problem, plan, state) == pytest.approx(build_optimal(problem).solve(state)[1], rel=1e-3)


@given(seed=SEEDS, private=st.booleans())
@few
def test_the_order_holds_after_full_runs_and_after_local_updates(seed: int, private: bool) -> None:
    limits = Constraints(private_input=private)
    problem = random_problem(seed, 25, constraints=limits, has_stage=True, input_kind="image")
    policy = d3.build_hpa(problem)
    for step in range(4):
        plan = relabel(policy, random_state(problem, seed + step))
        assert check_plan(problem, plan) == plan


def test_a_local_update_labels_fewer_layers_than_a_full_run_and_is_about_as_good() -> None:
    touched, updated_s, fresh_s = [], [], []
    for seed in range(20):
        problem = random_problem(seed, 60)
        first, then = random_state(problem, seed), with_rate(random_state(problem, seed), 0.5)
        policy, fresh = d3.build_hpa(problem), d3.build_hpa(problem)
        policy.plan(first)
        full = policy.num_touched
        for _ in range(d3.MIN_DWELL - 1):
            policy.plan(then)
            assert policy.num_touched == 0
        updated_s.append(predict_s(problem, policy.plan(then), then))
        touched.append(policy.num_touched / full)
        fresh_s.append(predict_s(problem, fresh.plan(then), then))
    assert np.mean(touched) < 0.5
    assert max(touched) > 0
    assert np.mean(np.divide(updated_s, fresh_s)) < 1.1


def test_small_changes_short_ones_and_recent_labels_keep_the_plan() -> None:
    for seed in range(40):  # a problem whose plan depends on the rate
        problem = random_problem(seed, 20, is_chain=True)
        state = random_state(problem, seed)
        slow = with_rate(state, 0.05)
        before, after = (d3.build_hpa(problem).plan(x) for x in (state, slow))
        if before != after:
            break
    policy = d3.build_hpa(problem)
    plans = [policy.plan(state), *(policy.plan(with_rate(state, 1 - 0.9 * d3.THRESHOLD)) for _ in range(20))]
    assert set(plans) == {before}  # within the thresholds
    for _ in range(5):
        plans = [policy.plan(slow) for _ in range(d3.NUM_SAMPLES - 1)] + [policy.plan(state)]
        assert set(plans) == {before}  # never long enough
    plans = [policy.plan(slow) for _ in range(d3.NUM_SAMPLES)]
    assert plans == [before] * (d3.NUM_SAMPLES - 1) + [after]
    plans = [policy.plan(state) for _ in range(d3.MIN_DWELL)]
    assert plans == [after] * (d3.MIN_DWELL - 1) + [before]  # the new labels stay for a while
    policy.plan(slow)
    policy.reset()
    assert policy.plan(slow) == after  # nothing is left of what was seen


def test_the_gap_to_the_optimum_is_logged_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    problem = random_problem(5, 30)
    state = random_state(problem, 5)
    policy = d3.build_hpa(problem)
    with caplog.at_level(logging.DEBUG, logger=d3.__name__):
        policy.plan(state)
    assert "above the optimum" in caplog.text
    gap_frac = policy.gap_to_optimal_frac(state)
    assert -1e-9 <= gap_frac < 10
    optimum = policy.oracle.solve(state)[1]
    assert gap_frac == pytest.approx(
        predict_s(problem, policy.plan(state), without_queues(state)) / optimum - 1, abs=1e-2
    )


def without_queues(state: SystemState) -> SystemState:
    return replace(state, nodes=tuple(replace(n, queue_delay_s=0.0) for n in state.nodes))


def test_a_sibling_follows_to_a_tier_that_its_inputs_have_reached() -> None:
    """Two branches read one large input. Alone the first stays; the second brings the input to the edge for both."""
    graph = make_graph([(-1,), (-1,), (0, 1)], nbytes=100_000)
    plain = make_problem(graph, has_cloud=False)
    nodes = {
        DEVICE_NODE: NodeProfile((0.01, 1.0, 0.001), 1e9, 1e9),
        "edge0": NodeProfile((0.005, 0.005, 0.001), 1e9, 1e9),
    }
    problem = replace(plain, profile=ModelProfile(graph, nodes))
    links = tuple(LinkState(a, b, (LinkSample(0.1, 8e6),), 8e6, 0.001) for a, b in link_ends(problem))  # 0.1 s a tensor
    assert d3.build_hpa(problem).plan(make_state(problem, links=links)).tiers == (Tier.EDGE,) * 3
    alone = replace(
        problem, profile=ModelProfile(graph, {**nodes, "edge0": NodeProfile((0.02, 0.005, 0.001), 1e9, 1e9)})
    )
    assert d3.build_hpa(alone).plan(make_state(alone, links=links)).tiers == (Tier.DEVICE, Tier.EDGE, Tier.EDGE)


def test_the_rules_that_were_published_differ_where_they_should() -> None:
    """With load on the edge node, the rules that read it leave the edge sooner than those that do not."""
    problem = random_problem(8, 30)
    state = random_state(problem, 8)
    loaded = with_load(with_rate(state, 50.0), 30.0, 0.0)
    blind, reading = (
        split_point(load_policy(n).build(problem).plan(loaded)) for n in ("neurosurgeon", "neurosurgeon-k")
    )
    assert blind < reading
    assert dads.build_light(problem, last_value).plan(loaded) != dads.build_light_k(problem, last_value).plan(loaded)
