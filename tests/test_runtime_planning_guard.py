import dataclasses
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from runtime.planning.policies.guard import REASONS, GuardedPolicy, guard_mask
from runtime.planning.policies.planner import build_planner
from runtime.planning.policies.static import FixedPolicy
from runtime.planning.problem import PlanningProblem
from runtime.types import Constraints, Plan, SystemState
from tests.graphs import make_state, varied
from tests.problems import random_problem, random_state


@dataclass
class Scripted:
    """A primary that answers one plan, and misbehaves as told; its decisions take `took_s` of the test's clock."""

    answer: Plan
    error: Exception | None = None
    outside: str = ""
    took_s: float = 0.0
    is_stateful: bool = False
    asked: int = 0
    now_s: float = field(default=0.0, repr=False)

    def plan(self, state: SystemState) -> Plan:
        del state
        self.asked += 1
        self.now_s += self.took_s
        if self.error is not None:
            raise self.error
        return self.answer

    def out_of_range(self, state: SystemState) -> str:
        del state
        return self.outside

    def reset(self) -> None:
        self.asked = 0


PROBLEM = varied(0)
N = PROBLEM.graph.num_layers
DEVICE_ONLY = Plan.split(N, N, N)
CLOUD_ONLY = Plan.split(N, 2, 2)
STATE = make_state(PROBLEM)


def guarded(primary: Scripted, problem: PlanningProblem = PROBLEM) -> GuardedPolicy:
    return GuardedPolicy(problem, primary, build_planner(problem), clock=lambda: primary.now_s)


def expect_fallback(guard: GuardedPolicy, state: SystemState, reason: str) -> None:
    assert guard.plan(state) == guard.fallback.plan(state)
    assert guard.last_reason == reason
    assert guard.reasons[reason] == 1
    assert reason in REASONS


def near_best() -> Plan:
    """A plan that is not the planner's but within twice of it."""
    plans = build_planner(PROBLEM).candidates
    best = plans.index[build_planner(PROBLEM).plan(STATE)]
    guards = [(plan, guarded(Scripted(plan))) for k, plan in enumerate(plans.plans[: plans.num_plans]) if k != best]
    return next(plan for plan, guard in guards if guard.plan(STATE) == plan)


def test_a_primary_that_behaves_is_obeyed() -> None:
    plan = near_best()
    guard = guarded(Scripted(plan))
    assert guard.plan(STATE) == plan != guard.fallback.plan(STATE)
    assert (guard.last_reason, sum(guard.reasons.values()), guard.decisions) == ("", 0, 1)


def test_a_primary_that_raises_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    expect_fallback(guarded(Scripted(DEVICE_ONLY, error=ZeroDivisionError("boom"))), STATE, "raised")
    assert "boom" in caplog.text


def test_a_late_primary_is_replaced_and_rests() -> None:
    primary = Scripted(near_best(), took_s=1.0)
    guard = guarded(primary)
    expect_fallback(guard, STATE, "late")
    primary.took_s = 0.0
    expect_fallback(guard, STATE, "resting")
    for _ in range(guard.settings.rest_decisions - 1):
        guard.plan(STATE)
    assert primary.asked == 1
    assert guard.plan(STATE) == primary.answer
    assert guard.reasons["resting"] == guard.settings.rest_decisions


def test_an_illegal_plan_is_replaced() -> None:
    expect_fallback(guarded(Scripted(Plan.split(N, 3, 5, edge_nodes=("edge7",)))), STATE, "illegal")
    expect_fallback(guarded(Scripted(Plan.split(3, 3, 3))), STATE, "illegal")


def test_a_plan_for_a_node_that_is_down_is_replaced() -> None:
    expect_fallback(guarded(Scripted(CLOUD_ONLY)), make_state(PROBLEM, down=("cloud",)), "down")


def test_a_state_outside_the_training_range_is_the_fallback_s() -> None:
    primary = Scripted(near_best(), outside="request:request_rate")
    expect_fallback(guarded(primary), STATE, "range")
    assert primary.asked == 0


def test_a_plan_predicted_to_take_far_longer_is_replaced() -> None:
    expect_fallback(guarded(Scripted(CLOUD_ONLY)), make_state(PROBLEM, uplink_backlog_bytes=10**9), "worse")


def test_prediction_errors_out_of_the_calibrated_range_are_the_fallback_s() -> None:
    primary = Scripted(near_best())
    guard = guarded(primary)
    few = dataclasses.replace(STATE, recent_errors=(9.0, 9.0, 9.0))
    assert guard.plan(few) == primary.answer
    expect_fallback(guard, dataclasses.replace(STATE, recent_errors=(9.0, 9.0, 9.0, 0.1)), "error")


def test_the_same_plan_as_the_fallback_s_needs_no_objection() -> None:
    fallback = build_planner(PROBLEM).plan(STATE)
    guard = guarded(Scripted(fallback))
    assert guard.plan(STATE) == fallback
    assert not guard.reasons


def test_reset_reaches_both_and_keeps_the_counts() -> None:
    primary = Scripted(near_best(), took_s=1.0)
    guard = GuardedPolicy(PROBLEM, primary, FixedPolicy(DEVICE_ONLY), clock=lambda: primary.now_s)
    guard.plan(STATE)
    guard.reset()
    primary.took_s = 0.0
    assert guard.plan(STATE) == primary.answer  # no rest any more
    assert guard.reasons["late"] == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_of_a_learner_is_what_the_guard_lets_pass(seed: int) -> None:
    problem = random_problem(seed, edges=2)
    planner = build_planner(problem)
    choices, counts = planner.candidates, np.zeros(2, dtype=int)
    for draw in range(6):
        state = random_state(problem, 10 * seed + draw)
        if draw % 3 == 1:
            nodes = tuple(replace(node, is_up=node.name != "edge0") for node in state.nodes)
            state = replace(state, nodes=nodes)
        elif draw % 3 == 2:
            state = replace(state, recent_errors=(9.0,) * 4)
        passes = []
        for plan in choices.plans[: choices.num_plans]:
            guard = GuardedPolicy(problem, FixedPolicy(plan), planner)
            passes.append(guard.plan(state) == plan)
        mask = guard_mask(choices, state)
        assert mask[: choices.num_plans].tolist() == passes
        assert not mask[choices.num_plans :].any()
        counts += mask.sum(), choices.num_plans - mask.sum()
    assert counts.min() > 0  # both happen


def test_where_nothing_can_run_the_planners_choice_passes_alone() -> None:
    problem = random_problem(1, constraints=Constraints(device_has_model=False))
    state = random_state(problem, 1)
    state = replace(state, nodes=tuple(replace(node, is_up=False) for node in state.nodes))
    planner = build_planner(problem)
    mask = guard_mask(planner.candidates, state)
    assert [planner.candidates.plans[k] for k in np.flatnonzero(mask)] == [planner.plan(state)]
