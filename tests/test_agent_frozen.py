import dataclasses
import math
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from agent import load_policy
from agent.checkpoint import Checkpoint, SeenRange, load_checkpoint, save_checkpoint
from agent.frozen import FrozenPolicy
from agent.network import export_weights
from runtime.errors import PlanError
from runtime.planning.features import CANDIDATE_COLUMNS
from runtime.planning.policies.guard import GuardedPolicy
from runtime.planning.policies.planner import build_planner
from runtime.planning.problem import check_plan
from tests.toy import PROBLEM, STATES, arrays, features, observe, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the toy's policy that has seen the toy's states."""
    folder = tmp_path_factory.mktemp("checkpoints") / "toy"
    seen = SeenRange.of(features().candidates, features().context, features().mask)
    save_checkpoint(
        folder, export_weights(trained().policy), seen=seen, error_range=(-0.5, 0.5), config={}, training={}
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture
def frozen(checkpoint: Checkpoint) -> FrozenPolicy:
    return FrozenPolicy(PROBLEM, checkpoint)


def test_the_logits_are_those_of_the_policy_that_was_trained(frozen: FrozenPolicy) -> None:
    policy = trained().policy
    with torch.no_grad():
        expected = policy.extract_features(policy.obs_to_tensor(observe(features()))[0])[:, : features().mask.shape[1]]
    np.testing.assert_allclose(frozen.network.score(features()), expected.numpy(), atol=1e-5, rtol=1e-5)


def test_the_choice_is_that_of_the_policy_that_was_trained(frozen: FrozenPolicy) -> None:
    expected, _ = trained().predict(observe(features()), action_masks=features().mask, deterministic=True)
    np.testing.assert_array_equal(frozen.choose(arrays()), expected)
    plans = frozen.encoder.candidates.plans
    assert [frozen.plan(state) for state in STATES] == [plans[choice] for choice in expected]
    for state in STATES[:10]:
        assert check_plan(PROBLEM, frozen.plan(state)) == frozen.plan(state)


def test_only_what_the_mask_allows_is_chosen(frozen: FrozenPolicy) -> None:
    favourite = int(frozen.network.score(features())[0].argmax())
    mask = features().mask.copy()
    mask[0, favourite] = False
    assert frozen.pick(dataclasses.replace(features(), mask=mask))[0] != favourite


def test_the_states_of_the_training_are_in_range(frozen: FrozenPolicy) -> None:
    assert [frozen.out_of_range(state) for state in STATES] == [""] * len(STATES)


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"request_rate_hz": 1e5}, "candidates held:"),
        ({"deadline_s": 1e-4}, "context request:deadline"),
        ({"input_bytes": 10**9}, "context request:input_bytes"),
    ],
)
def test_a_state_outside_the_range_is_named_by_its_column(
    frozen: FrozenPolicy, changes: dict[str, float], column: str
) -> None:
    assert frozen.out_of_range(dataclasses.replace(STATES[1], **changes)).startswith(column)


def test_a_candidate_that_is_not_picked_may_be_out_of_range(checkpoint: Checkpoint, frozen: FrozenPolicy) -> None:
    total, seen = CANDIDATE_COLUMNS.index("total:total"), checkpoint.manifest.seen
    rows = [frozen.encoder.encode_state(state).candidates[0, :, total] for state in STATES]
    plans = [frozen.encoder.candidates.plans.index(frozen.plan(state)) for state in STATES]
    picked = np.array([row[plan] for row, plan in zip(rows, plans, strict=True)])
    most = float(np.median(picked))
    narrow = [(low, most) if at == total else (low, high) for at, (low, high) in enumerate(seen.candidates)]
    manifest = msgspec.structs.replace(
        checkpoint.manifest, seen=msgspec.structs.replace(seen, candidates=tuple(narrow))
    )
    policy = FrozenPolicy(PROBLEM, dataclasses.replace(checkpoint, manifest=manifest))
    is_out = np.array([policy.out_of_range(state).startswith("candidates total") for state in STATES])
    assert is_out.any()
    assert not is_out[picked <= most].any()
    assert any(
        row.max() > most + 1.0 for row in np.array(rows)[picked <= most]
    )  # although others than the one picked are out of range


def test_a_state_is_encoded_anew_when_it_changes(frozen: FrozenPolicy) -> None:
    far = dataclasses.replace(STATES[1], deadline_s=1e-4)
    assert [bool(frozen.out_of_range(state)) for state in (STATES[1], far, STATES[1])] == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["device_backlog_s", "uplink_backlog_bytes", "input_bytes", "request_rate_hz"])
def test_with_readings_that_are_no_numbers_the_answer_is_still_a_legal_plan(
    folder: Path, field: str, value: float
) -> None:
    guard = load_policy(str(folder)).build(PROBLEM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        plan = guard.plan(dataclasses.replace(STATES[1], **{field: value}))
    assert check_plan(PROBLEM, plan) == plan


def test_scores_that_are_no_numbers_are_never_a_plan(checkpoint: Checkpoint) -> None:
    broken = {**checkpoint.weights, "scorer.mix.bias": np.full_like(checkpoint.weights["scorer.mix.bias"], np.nan)}
    policy = FrozenPolicy(PROBLEM, dataclasses.replace(checkpoint, weights=broken))
    with pytest.raises(PlanError, match="got NaN or infinity"):
        policy.plan(STATES[1])
    guard = GuardedPolicy(PROBLEM, policy, build_planner(PROBLEM))
    assert guard.plan(STATES[1]) == guard.fallback.plan(STATES[1])
    assert guard.last_reason == "raised"


def test_weights_out_of_any_range_are_never_a_plan(checkpoint: Checkpoint) -> None:
    large = {name: np.full_like(values, 1e38) for name, values in checkpoint.weights.items()}
    guard = GuardedPolicy(
        PROBLEM, FrozenPolicy(PROBLEM, dataclasses.replace(checkpoint, weights=large)), build_planner(PROBLEM)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert guard.plan(STATES[1]) == guard.fallback.plan(STATES[1])
    assert guard.last_reason == "raised"


def test_the_guard_trusts_the_policy_in_range_and_the_planner_outside(folder: Path) -> None:
    guard = load_policy(str(folder)).build(PROBLEM)
    bare = load_policy(str(folder), guard=False).build(PROBLEM)
    assert isinstance(guard, GuardedPolicy)
    assert isinstance(bare, FrozenPolicy)
    guard.clock = lambda: 0.0  # on a busy machine any decision may be late
    state = next(state for state in STATES if bare.plan(state) != build_planner(PROBLEM).plan(state))
    assert guard.plan(state) == bare.plan(state)
    far = dataclasses.replace(state, deadline_s=1e-4)
    assert guard.plan(far) == build_planner(PROBLEM).plan(far)
    assert guard.last_reason == "range"
    off = dataclasses.replace(state, recent_errors=(0.7,) * 8)  # within the guard's own range, not the checkpoint's
    assert guard.plan(off) == build_planner(PROBLEM).plan(off)
    assert guard.last_reason == "error"
