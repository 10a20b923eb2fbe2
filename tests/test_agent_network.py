import numpy as np
import pytest
import torch

from agent.checkpoint import weight_shapes
from agent.frozen import PLANNER_SCALE
from agent.network import CHUNK, HIDDEN, export_weights, import_weights
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.policies.planner import build_planner
from tests.toy import ENCODER, PROBLEM, arrays, features, make_model, observe, second_best, trained


def probabilities(model: object) -> np.ndarray:
    policy = model.policy  # type: ignore[attr-defined]
    with torch.no_grad():
        tensors = policy.obs_to_tensor(observe(features()))[0]
        return policy.get_distribution(tensors, features().mask).distribution.probs.numpy()


def test_an_untrained_policy_decides_as_the_planner() -> None:
    choice, _ = make_model().predict(observe(features()), action_masks=features().mask, deterministic=True)
    planned = build_planner(PROBLEM).choose(arrays())
    assert len(set(planned.tolist())) > 2  # the states do differ
    np.testing.assert_array_equal(choice, planned)


def test_an_untrained_policy_is_a_softmax_of_the_planner_s_predictions() -> None:
    total_s = predict_total(ENCODER.candidates.costs, tuned_arrays(arrays()), arrays())
    odds = np.where(features().mask, total_s, np.inf) ** -PLANNER_SCALE
    np.testing.assert_allclose(probabilities(make_model()), odds / odds.sum(axis=1, keepdims=True), atol=0.01)


def test_the_order_of_the_candidates_does_not_matter() -> None:
    policy = trained().policy
    turn = np.random.default_rng(0).permutation(features().mask.shape[1])
    observation = {key: torch.from_numpy(rows).float() for key, rows in observe(features()).items()}
    turned = dict(observation, mask=observation["mask"][:, turn])
    turned["candidates"] = observation["candidates"].view(*features().candidates.shape)[:, turn].flatten(1)
    with torch.no_grad():
        logits, value = policy.get_distribution(observation).distribution.logits, policy.predict_values(observation)
        assert torch.allclose(policy.get_distribution(turned).distribution.logits, logits[:, turn], atol=1e-4)
        assert torch.allclose(policy.predict_values(turned), value, atol=1e-4)
    assert value.std() > 0


def test_more_observations_than_are_scored_at_a_time_are_scored_as_alone() -> None:
    policy = trained().policy
    few = {key: torch.from_numpy(rows).float() for key, rows in observe(features()).items()}
    many = {key: rows.repeat(CHUNK // len(rows) + 2, 1) for key, rows in few.items()}
    assert len(many["mask"]) > CHUNK
    assert len(many["mask"]) % CHUNK
    with torch.no_grad():
        alone, together = policy.extract_features(few), policy.extract_features(many)
    assert torch.allclose(together, alone.repeat(CHUNK // len(alone) + 2, 1), atol=1e-5)


def test_training_learns_what_the_planner_would_not_do() -> None:
    rows = np.arange(len(second_best()))
    before, after = (probabilities(model)[rows, second_best()].mean() for model in (make_model(), trained()))
    assert after > before
    assert export_weights(trained().policy)["scorer.residual.weight"].any()


def test_weights_have_the_names_and_shapes_of_a_checkpoint_and_go_back_in() -> None:
    weights = export_weights(trained().policy)
    assert {name: values.shape for name, values in weights.items()} == weight_shapes(HIDDEN)
    other = make_model(seed=1)
    assert not np.allclose(probabilities(other), probabilities(trained()), atol=1e-6)
    import_weights(other.policy, weights)
    np.testing.assert_allclose(probabilities(other), probabilities(trained()), atol=1e-6)
    with pytest.raises(KeyError):
        import_weights(other.policy, {})
