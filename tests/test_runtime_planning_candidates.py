import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import PlanError
from runtime.planning.arrays import encode_states
from runtime.planning.candidates import NUM_CANDIDATES, candidates
from runtime.planning.conditions import sample_conditions
from runtime.planning.cost import predict_total
from runtime.planning.problem import PlanningProblem, check_plan
from runtime.planning.rows import PlanCosts, compile_plan
from runtime.types import (
    LOSSY_CODECS,
    Constraints,
    ModelProfile,
    Plan,
    Tier,
)
from tests.graphs import make_state, varied


def all_splits(problem: PlanningProblem) -> list[Plan]:
    """Every legal split through every head, in every codec that the constraints allow, by trial."""
    n = problem.graph.num_layers
    heads = [(), *((node.name,) for node in problem.deployment.edges)]
    codecs = ("auto",) if problem.constraints.lossless_only else ("auto", *LOSSY_CODECS)
    plans = []
    for head, codec in itertools.product(heads, codecs):
        for i, j in itertools.combinations_with_replacement(range(problem.entry, n + 1), 2):
            try:
                plans.append(check_plan(problem, Plan.split(n, i, j, edge_nodes=head, codec=codec)))
            except PlanError:
                continue
    return list(dict.fromkeys(plans))


@pytest.mark.parametrize(
    ("edges", "constraints", "kind"),
    [
        (1, Constraints(), "encoded"),
        (2, Constraints(), "tensor"),
        (1, Constraints(private_input=True), "image"),
        (1, Constraints(lossless_only=False), "tensor"),
        (2, Constraints(allowed_tiers=(Tier.DEVICE, Tier.EDGE)), "tensor"),
        (1, Constraints(device_has_model=False, deadline_s=1.0), "encoded"),
    ],
)
def test_some_candidate_is_nearly_as_good_as_the_best_of_all_splits(
    edges: int, constraints: Constraints, kind: str
) -> None:
    problem = varied(edges, edges=edges, constraints=constraints, kind=kind)
    choices = candidates(problem)
    conditions = sample_conditions(problem, 200, first=10_000)  # others than those that the candidates were made from
    every = PlanCosts.stack([compile_plan(problem, plan) for plan in all_splits(problem)])
    best_s = predict_total(every, conditions.readings, conditions.state).min(axis=1)
    chosen_s = predict_total(choices.costs, conditions.readings, conditions.state).min(axis=1)
    regret = chosen_s / best_s - 1.0
    assert regret.min() >= -1e-9  # no candidate is outside the legal splits
    assert regret.mean() < 0.01
    assert np.quantile(regret, 0.95) < 0.05


@settings(max_examples=10)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["encoded", "image", "tensor"]),
    st.booleans(),
    st.sampled_from([(0, 1, 2), (0, 1), (0, 2), (0,)]),
)
def test_candidates_are_legal_distinct_and_padded_to_k(
    seed: int, kind: str, private: bool, tiers: tuple[int, ...]
) -> None:
    limits = Constraints(private_input=private, allowed_tiers=tuple(Tier(t) for t in tiers))
    problem = varied(seed, edges=2, constraints=limits, kind=kind)
    choices = candidates(problem)
    real = choices.plans[: choices.num_plans]
    assert len(choices.plans) == choices.costs.num_plans == NUM_CANDIDATES
    assert [check_plan(problem, plan) for plan in real] == list(real)
    assert len(set(real)) == len(real)
    assert candidates(problem) is choices


def test_the_plans_that_every_table_shows_are_always_there() -> None:
    problem = varied(3, edges=2, kind="encoded")
    n = problem.graph.num_layers
    always = [
        Plan.split(n, n, n),
        Plan.split(n, 0, 0),
        *(Plan.split(n, 0, n, edge_nodes=(e,)) for e in ("edge0", "edge1")),
    ]
    assert set(always) <= set(candidates(problem).plans)


def test_the_mask_leaves_out_padding_and_what_needs_a_node_that_is_down() -> None:
    problem = varied(4, edges=2)
    choices = candidates(problem)
    down = {"edge0", "cloud"}
    arrays = encode_states(choices.costs.layout, [make_state(problem), make_state(problem, down=tuple(down))])
    mask = choices.mask(arrays)
    assert mask[0].tolist() == [k < choices.num_plans for k in range(NUM_CANDIDATES)]
    for k, plan in enumerate(choices.plans[: choices.num_plans]):
        needs = set(plan.edge_nodes) if not all(t is Tier.DEVICE for t in plan.tiers) else set()
        needs |= {"cloud"} if plan.uses(Tier.CLOUD) else set()
        assert mask[1, k] == (not needs & down), plan.describe()


def test_with_every_node_down_and_no_model_on_the_device_some_legal_plan_is_left() -> None:
    problem = varied(5, constraints=Constraints(device_has_model=False, deadline_s=1.0))
    choices = candidates(problem)
    arrays = encode_states(choices.costs.layout, [make_state(problem, down=("edge0", "cloud"))])
    allowed = np.flatnonzero(choices.mask(arrays)[0])
    assert len(allowed)
    assert max(allowed) < choices.num_plans


def test_nodes_without_a_profile_take_no_part() -> None:
    problem = varied(6, edges=2)
    nodes = {name: node for name, node in problem.profile.nodes.items() if name in ("device", "edge1")}
    choices = candidates(dataclasses.replace(problem, profile=ModelProfile(problem.graph, nodes)))
    assert {name for plan in choices.plans for name in plan.edge_nodes} <= {"edge1"}
    assert not any(plan.uses(Tier.CLOUD) for plan in choices.plans)


def test_a_problem_in_which_no_split_is_legal_is_refused() -> None:
    problem = varied(7, constraints=Constraints(device_has_model=False, deadline_s=1.0))
    device_only = {"device": problem.profile.nodes["device"]}  # no node has described itself
    with pytest.raises(PlanError, match="no split of this model is legal here"):
        candidates(dataclasses.replace(problem, profile=ModelProfile(problem.graph, device_only)))
