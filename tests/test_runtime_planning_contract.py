"""What every registered rule promises, whatever it is made of: a new line in the registry is tested without a new test."""

import math
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.policies.registry import load_policy, policy_names
from runtime.planning.problem import PlanningProblem, Policy, check_plan, private_layers
from runtime.types import Constraints, LinkSample, LinkState, NodeState, Plan, SystemState, Tier
from tests.problems import legal_plans, link_ends, random_problem, random_state

PLAIN = [name for name in policy_names() if ":" not in name]
STATIC = [name for name in PLAIN if name.endswith(("-only", "-to-cloud"))]
PUBLISHED = [
    name
    for name in PLAIN
    if name.startswith(("neurosurgeon", "dads", "loadpart", "d3", "optimal")) and name not in STATIC
]
SUFFIXED = [
    name + suffix for name in ("loadpart", "dads-k", "d3", "optimal") for suffix in ("+tuned", "@cloud", "@edge+tuned")
]
EVERY = [*PLAIN, *SUFFIXED, "fixed:1,2", "fixed:1,1@edge0"]

SUBSETS = [tuple(t for t in Tier if mask >> t & 1) for mask in range(1, 8)]
LIMITS = st.builds(
    Constraints,
    private_input=st.booleans(),
    device_has_model=st.sampled_from([True, True, False]),
    allowed_tiers=st.sampled_from([*SUBSETS, tuple(Tier), tuple(Tier)]),
    lossless_only=st.booleans(),
    tiles=st.booleans(),
)
PLACES = st.sampled_from([(1, True), (3, True), (0, True), (2, False)])
KINDS = st.sampled_from([("encoded", True), ("image", True), ("tensor", True), ("tensor", False)])

once = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@lru_cache(maxsize=64)
def _cached(
    seed: int, length: int, edges: int, has_cloud: bool, limits: Constraints, kind: str, has_stage: bool
) -> PlanningProblem:
    return random_problem(
        seed, length, edges=edges, has_cloud=has_cloud, constraints=limits, input_kind=kind, has_stage=has_stage
    )


@st.composite
def problems(draw: st.DrawFn) -> PlanningProblem:
    (edges, has_cloud), (kind, has_stage) = draw(PLACES), draw(KINDS)
    return _cached(draw(st.integers(0, 3)), draw(st.integers(1, 3)), edges, has_cloud, draw(LIMITS), kind, has_stage)


def broken_states(problem: PlanningProblem) -> list[SystemState]:
    """Everything well; each node down; all down; a link at rate 0; nothing known of anything."""
    names = [node.name for node in problem.deployment.nodes]
    well = random_state(problem, 1)
    states = [well]
    for down in (*((name,) for name in names), tuple(names)):
        nodes = tuple(NodeState(n.name, n.tier, n.name not in down, 1.5, 0.01, age_s=0.1) for n in well.nodes)
        states.append(random_state(problem, 2, nodes=nodes))
    dead = tuple(LinkState(a, b, (LinkSample(0.1, 0.0),), 0.0, 0.01) for a, b in link_ends(problem))
    states.append(random_state(problem, 3, links=dead))
    unheard = tuple(NodeState(n.name, n.tier, True) for n in well.nodes)
    blank = tuple(LinkState(a, b) for a, b in link_ends(problem))
    states.append(random_state(problem, 4, links=blank, nodes=unheard, request_rate_hz=math.nan))
    states.append(random_state(problem, 4, links=(), nodes=unheard))
    states.append(random_state(problem, 5, request_rate_hz=1e6))  # more than anything keeps up with
    return states


def build(name: str, problem: PlanningProblem) -> Policy | None:
    try:
        return load_policy(name).build(problem)
    except PlanError:
        return None


def used_nodes(problem: PlanningProblem, plan: Plan) -> set[str]:
    """Nodes that a request visits under a plan, the device apart."""
    tiers = set(plan.tiers[problem.entry :])
    visited = {plan.head} if plan.head is not None and tiers != {Tier.DEVICE} else set()
    cloud = problem.deployment.cloud
    return visited | ({cloud.name} if cloud is not None and Tier.CLOUD in tiers else set())


@pytest.mark.parametrize("name", EVERY)
@once
@given(problem=problems())
def test_a_rule_answers_legal_plans_in_every_state_or_refuses_at_build(name: str, problem: PlanningProblem) -> None:
    """A published rule refuses only what nothing can satisfy, and avoids nodes that are down where any plan can."""
    policy = build(name, problem)
    legal = list(legal_plans(problem)) if name in PUBLISHED else []
    if policy is None:
        assert not legal, "refused though a legal plan exists"
        return
    for state in broken_states(problem):
        after_others = policy.plan(state)
        assert check_plan(problem, after_others) == after_others
        down = {node.name for node in state.nodes if not node.is_up}
        if any(not used_nodes(problem, plan) & down for plan in legal):
            assert not used_nodes(problem, after_others) & down  # a stateful rule must see it at once
        policy.reset()
        plan = policy.plan(state)
        assert check_plan(problem, plan) == plan
        again = policy.plan(state)
        assert check_plan(problem, again) == again
        if not policy.is_stateful:
            assert again == plan
        policy.reset()
        assert policy.plan(state) == plan


@pytest.mark.parametrize("name", PUBLISHED)
def test_constraints_that_leave_no_plan_are_refused_at_build(name: str) -> None:
    nothing_there = random_problem(0, 3, has_cloud=False, constraints=Constraints(allowed_tiers=(Tier.CLOUD,)))
    private = random_problem(0, 3, constraints=Constraints(private_input=True, device_has_model=False))
    for problem in (nothing_there, private):
        with pytest.raises(PlanError, match="no plan is legal"):
            load_policy(name).build(problem)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_private_layers_depend_on_stays_on_the_device_too(name: str) -> None:
    for seed in range(10):
        problem = random_problem(
            seed, 8, constraints=Constraints(private_input=True), has_stage=True, input_kind="image"
        )
        policy = load_policy(name).build(problem)
        for state in (random_state(problem, 1), random_state(problem, 2)):
            plan = check_plan(problem, policy.plan(state))
            assert all(plan.tiers[i] is Tier.DEVICE for i in private_layers(problem.graph))


@pytest.mark.parametrize("name", EVERY)
def test_five_hundred_layers_and_three_edge_nodes_are_planned(name: str) -> None:
    problem = _cached(7, 498, 3, True, Constraints(), "encoded", True)
    policy = build(name, problem)
    assert policy is not None
    for seed in range(2):
        plan = policy.plan(random_state(problem, seed))
        assert check_plan(problem, plan) == plan


@pytest.mark.parametrize("name", [*PUBLISHED, "planner"])
def test_of_several_edge_nodes_the_one_with_the_fast_link_is_taken(name: str) -> None:
    problem = random_problem(3, 6, edges=3, has_cloud=False)
    policy = load_policy(name).build(problem)
    for fast in ("edge0", "edge1", "edge2"):
        links = tuple(
            LinkState(a, b, (LinkSample(0.1, 1e9 if fast in (a, b) else 1e5),), math.nan, 1e-3)
            for a, b in link_ends(problem)
        )
        nodes = tuple(NodeState(f"edge{i}", Tier.EDGE, True, 1.0, 0.0, age_s=0.1) for i in range(3))
        policy.reset()
        assert policy.plan(random_state(problem, 0, links=links, nodes=nodes)).head == fast
