import dataclasses
import itertools
import math

import numpy as np
import pytest

from runtime.planning.arrays import encode_states
from runtime.planning.candidates import candidates
from runtime.planning.cost import PARTS, estimate
from runtime.planning.explain import explain
from runtime.planning.policies.planner import build_planner, build_priced
from runtime.planning.problem import PlanningProblem
from runtime.types import DEVICE_NODE, LinkSample, LinkState, NodeState, Plan, SystemState, Tier
from tests.graphs import make_state, varied

SEEDS = range(8)


def measured(
    problem: PlanningProblem, *, rate_bps: float = 2e7, k: float = 1.0, q: float = 0.0, **changes: object
) -> SystemState:
    """A state in which every link has the same rate and every node the same load."""
    names = [DEVICE_NODE, *(node.name for node in problem.deployment.nodes)]
    links = tuple(LinkState(a, b, (LinkSample(0.1, rate_bps),), rate_bps, 0.01) for a in names for b in names if a != b)
    nodes = tuple(NodeState(n.name, n.tier, True, k, q, age_s=0.0) for n in problem.deployment.nodes)
    return make_state(problem, **{"links": links, "nodes": nodes, **changes})


def device_s(problem: PlanningProblem, plan: Plan) -> float:
    return sum(
        s for s, t in zip(problem.profile.nodes[DEVICE_NODE].layer_s, plan.tiers, strict=True) if t is Tier.DEVICE
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planner_picks_the_candidate_with_the_least_estimate(seed: int) -> None:
    problem = varied(seed, edges=2)
    state = measured(problem, rate_bps=1e6 * 4**seed, k=2.0, q=0.01)
    best_s = min(estimate(problem, plan, state).total_s for plan in candidates(problem).plans)
    assert estimate(problem, build_planner(problem).plan(state), state).total_s == pytest.approx(best_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_of_choices_equals_single_ones(seed: int) -> None:
    problem = varied(seed, edges=2)
    states = [measured(problem, rate_bps=10.0**e, request_rate_hz=5.0) for e in range(4, 10)]
    for policy in (build_planner(problem), build_priced(problem)):
        choices = policy.choose(encode_states(policy.candidates.costs.layout, states))
        assert [policy.candidates.plans[k] for k in choices] == [policy.plan(state) for state in states]


@pytest.mark.parametrize("seed", SEEDS)
def test_more_load_on_the_nodes_moves_no_work_away_from_the_device(seed: int) -> None:
    problem = varied(seed)
    policy = build_planner(problem)
    work_s = [device_s(problem, policy.plan(measured(problem, k=k))) for k in (1.0, 2.0, 8.0, 64.0, 1e6)]
    assert work_s == sorted(work_s)
    assert all(t is Tier.DEVICE for t in policy.plan(measured(problem, q=100.0)).tiers)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slower_network_never_makes_the_planner_send_more(seed: int) -> None:
    problem = varied(seed)
    policy = build_planner(problem)
    sent = []
    for exponent in range(3, 11):
        choice = policy.candidates.index[policy.plan(measured(problem, rate_bps=10.0**exponent))]
        costs = policy.candidates.costs
        sent.append(float((costs.plain_bytes - costs.saved_bytes)[choice].sum()))
    assert all(t is Tier.DEVICE for t in policy.plan(measured(problem, rate_bps=1e3)).tiers)
    assert all(slow <= fast * 1.0001 for slow, fast in itertools.pairwise(sent))


def test_what_already_waits_drives_work_away() -> None:
    problem = varied(1)
    policy = build_planner(problem)
    busy_device = policy.plan(measured(problem, device_backlog_s=100.0))
    assert busy_device.tiers[2] is not Tier.DEVICE
    busy_uplink = policy.plan(measured(problem, uplink_backlog_bytes=10**9))
    assert all(t is Tier.DEVICE for t in busy_uplink.tiers)


def test_a_plan_needs_nodes_that_are_up() -> None:
    problem = varied(2, edges=2)
    for policy in (build_planner(problem), build_priced(problem)):
        nodes = tuple(dataclasses.replace(node, is_up=False) for node in measured(problem).nodes)
        assert all(t is Tier.DEVICE for t in policy.plan(measured(problem, nodes=nodes)).tiers)


def test_the_price_holds_less_of_the_device_at_a_high_request_rate_and_nothing_at_none() -> None:
    held = {"priced": 0.0, "planner": 0.0}
    for seed in SEEDS:
        problem = varied(seed)
        state = measured(problem, rate_bps=5e6, request_rate_hz=math.nan)
        assert build_priced(problem).plan(state) == build_planner(problem).plan(state)
        state = dataclasses.replace(state, request_rate_hz=20.0)
        held["priced"] += device_s(problem, build_priced(problem).plan(state))
        held["planner"] += device_s(problem, build_planner(problem).plan(state))
    assert held["priced"] < held["planner"]


def test_an_explanation_ranks_plans_and_names_the_part_that_costs_most_more() -> None:
    problem = varied(3, edges=2)
    state = measured(problem)
    records = explain(problem, state, top=4)
    assert len(records) == 4
    assert records[0].plan == build_planner(problem).plan(state)
    assert (records[0].behind_s, records[0].loses_by) == (0.0, "")
    for record in records[1:]:
        alone = estimate(problem, record.plan, state)
        assert record.predicted.transfer_s == pytest.approx(alone.transfer_s)
        assert record.predicted.compute_s == pytest.approx(alone.compute_s)
        assert record.predicted.total_s == pytest.approx(alone.total_s)
        assert record.behind_s == pytest.approx(record.predicted.total_s - records[0].predicted.total_s)
        assert record.loses_by in PARTS
        assert record.loses_by_s * len(PARTS) >= record.behind_s
    behind = [record.behind_s for record in records]
    assert behind == sorted(behind)


def test_an_explanation_leaves_out_plans_that_cannot_run() -> None:
    problem = varied(3, edges=2)
    state = measured(problem)
    nodes = tuple(dataclasses.replace(node, is_up=node.name == "edge1") for node in state.nodes)
    records = explain(problem, dataclasses.replace(state, nodes=nodes), top=32)
    assert {name for record in records for name in record.plan.edge_nodes} == {"edge1"}
    assert np.isfinite([record.predicted.total_s for record in records]).all()
