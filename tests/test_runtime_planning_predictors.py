import dataclasses

import numpy as np
import pytest

from runtime.errors import ConfigError
from runtime.planning.predictors import (
    MIN_MODELS,
    REACH,
    fit_machine,
    is_within_reach,
    layer_features,
    leave_models_out,
    leave_one_out,
)
from runtime.types import ModelProfile, NodeProfile, TensorSpec
from tests.graphs import chain

TRUTH = {"conv": (2e-10, 1e-9, 3e-9, 2e-5), "linear": (1e-9, 4e-9, 0.0, 1e-5)}


def profile_of(seed: int, *, noise: float = 0.0, overhead: float = 1.0, node: str = "device") -> ModelProfile:
    """A random model whose layers take what `TRUTH` says of their kind, times noise; the whole run `overhead` times."""
    draw = np.random.default_rng(seed)
    graph = chain(24)
    layers = tuple(
        dataclasses.replace(layer, kind="linear" if n % 3 == 2 else "conv", flops=float(draw.integers(10**5, 10**9)))
        for n, layer in enumerate(graph.layers)
    )
    values = tuple(
        dataclasses.replace(value, tensor=TensorSpec((int(draw.integers(10, 10**6)),), "float32", 4))
        for value in graph.values
    )
    graph = dataclasses.replace(graph, layers=layers, values=values, graph_id=f"synthetic{seed}")
    rates = np.array([TRUTH[layer.kind] for layer in layers])
    seconds = (layer_features(graph) * rates).sum(axis=1) * draw.lognormal(0.0, noise, len(layers)) * overhead
    return ModelProfile(graph, {node: NodeProfile(tuple(seconds.tolist()), 1e9, 2e9, 0.001)})


def test_a_regression_finds_the_coefficients_that_made_the_times() -> None:
    predictor = fit_machine([profile_of(seed) for seed in range(4)], "device")
    for kind, expected in TRUTH.items():
        assert predictor.kinds[kind].coefficients == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert predictor.segment_scale == pytest.approx(1.0)


def test_a_model_left_out_is_predicted_from_the_others() -> None:
    for error in leave_one_out([profile_of(seed, noise=0.1) for seed in range(6)], "device"):
        assert error.median_frac < 0.15
        assert abs(error.total_frac) < 0.1
        assert error.num_layers == 6 * (8 if error.kind == "linear" else 16)


def test_no_prediction_is_negative_whatever_the_noise() -> None:
    predictor = fit_machine([profile_of(seed, noise=2.0) for seed in range(3)], "device")
    assert min(predictor.layer_s(profile_of(99).graph)) >= 0.0
    assert all(min(fit.coefficients) >= 0.0 for fit in (*predictor.kinds.values(), predictor.general))


def test_the_segment_scale_makes_up_for_what_noise_hides() -> None:
    profiles = [profile_of(seed, noise=0.8) for seed in range(8)]
    predictor = fit_machine(profiles, "device")
    ratios = [sum(predictor.layer_s(p.graph)) / sum(p.nodes["device"].layer_s) for p in profiles]
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0)


def test_a_kind_that_was_hardly_seen_takes_the_general_regression() -> None:
    predictor = fit_machine([profile_of(seed) for seed in range(3)], "device")
    graph = profile_of(9).graph
    odd = dataclasses.replace(graph, layers=tuple(dataclasses.replace(x, kind="attention") for x in graph.layers))
    expected = layer_features(odd) @ predictor.general.coefficients * predictor.segment_scale
    assert predictor.layer_s(odd) == pytest.approx(expected)


def test_whole_models_that_are_left_out_are_predicted_nearly_right() -> None:
    errors = leave_models_out([profile_of(seed, noise=0.1) for seed in range(6)], "device")
    assert len(errors) == 6
    assert 0.0 < max(map(abs, errors)) < 0.1


def test_a_model_far_beyond_the_others_or_too_few_others_are_out_of_reach() -> None:
    known = [profile_of(seed).graph for seed in range(MIN_MODELS)]
    assert is_within_reach(known[0], known)
    assert not is_within_reach(known[0], known[1:])
    large = dataclasses.replace(
        known[0], layers=tuple(dataclasses.replace(x, flops=1.01 * REACH * 10**9) for x in known[0].layers)
    )
    assert not is_within_reach(large, known)


def test_too_few_profiles_are_refused() -> None:
    with pytest.raises(ConfigError, match="measure a model on it"):
        fit_machine([profile_of(1)], "cloud")
    with pytest.raises(ConfigError, match="two profiles"):
        leave_one_out([profile_of(1)], "device")
