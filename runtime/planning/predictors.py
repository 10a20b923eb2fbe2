"""Layer times of models that a machine has never run, from those that it has: one regression per layer kind.

References:
    Liu, Zheng, Li, Guo, "LoADPart", ICDCS 2022: one regression per node type and machine, as reconstructed.
    Differs: non-negative least squares on four features (FLOPs, input and output bytes, one call), weighted so that
    relative errors count; the paper's feature lists are not known to us.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from runtime.errors import ConfigError
from runtime.planning.arrays import FloatArray
from runtime.types import GraphSpec, ModelProfile

FEATURE_NAMES = ("flops", "input_bytes", "output_bytes", "constant")

MIN_LAYERS = 8
"""A kind seen in fewer layers is predicted by the regression over all kinds. Guess: twice the number of features."""

MIN_MODELS = 4
"""A model is predicted from so many others at least. Guess: with fewer one odd model sets all."""

REACH = 4.0
"""A model is predicted from others only if it has at most so many times the FLOPs of the largest of them. Guess: a
regression over small models knows the cost of a call, and little of the cost of a FLOP."""

_MIN_LAYER_S = 1e-7
"""Layers faster than this weigh as much as one that takes this long: below it a timer reads noise."""


@dataclass(frozen=True, slots=True)
class LayerRegression:
    """Seconds per FLOP, per input byte, per output byte and per call of one layer kind; none is negative."""

    coefficients: tuple[float, ...]  # (len(FEATURE_NAMES),)
    num_layers: int  # that it was fitted to


@dataclass(frozen=True, slots=True)
class MachinePredictor:
    """What one machine needs for a layer, by kind."""

    kinds: Mapping[str, LayerRegression]
    general: LayerRegression
    """Over all layers, for kinds that were hardly seen."""
    segment_scale: float
    """Measured seconds of whole models over the sum of their predicted layers: frameworks fuse and overlap."""

    def layer_s(self, graph: GraphSpec) -> tuple[float, ...]:
        """Predict idle seconds of every layer, calibrated so that their sum is the whole model's time."""
        features = layer_features(graph)
        rows = [self.kinds.get(layer.kind, self.general).coefficients for layer in graph.layers]
        seconds = (features * np.array(rows)).sum(axis=1) * self.segment_scale
        return tuple(np.maximum(seconds, _MIN_LAYER_S).tolist())


@dataclass(frozen=True, slots=True)
class KindError:
    """Error of one kind on models that were left out of the fit."""

    kind: str
    num_layers: int
    median_frac: float  # median over layers of |predicted / measured - 1|
    total_frac: float  # predicted / measured - 1 of all its layers' seconds together


def layer_features(graph: GraphSpec) -> FloatArray:
    """Features of every layer, shape (num_layers, len(FEATURE_NAMES))."""
    nbytes = {value.name: value.tensor.nbytes for value in graph.values}
    rows = [
        (
            layer.flops,
            sum(nbytes.get(name, 0) for name in layer.inputs),
            sum(nbytes.get(name, 0) for name in layer.outputs),
            1.0,
        )
        for layer in graph.layers
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, len(FEATURE_NAMES))


def fit_machine(profiles: Sequence[ModelProfile], node: str) -> MachinePredictor:
    """Fit one machine from the profiles of several models on it.

    Args:
        profiles: profiles of different models; those without the node are left out.
        node: name of the machine in them.

    Raises:
        ConfigError: when no profile holds the node.
    """
    known = [profile for profile in profiles if node in profile.nodes]
    if not known:
        raise ConfigError(f"expected a profile of node {node!r} among {len(profiles)}, got none; measure a model on it")
    features = np.concatenate([layer_features(profile.graph) for profile in known])
    seconds = np.concatenate([np.asarray(profile.nodes[node].layer_s) for profile in known])
    kinds = np.array([layer.kind for profile in known for layer in profile.graph.layers])
    fits = {str(kind): _fit(features[kinds == kind], seconds[kinds == kind]) for kind in np.unique(kinds)}
    plain = MachinePredictor(
        kinds={kind: fit for kind, fit in fits.items() if fit.num_layers >= MIN_LAYERS},
        general=_fit(features, seconds),
        segment_scale=1.0,
    )
    ratios = [sum(profile.nodes[node].layer_s) / max(sum(plain.layer_s(profile.graph)), 1e-12) for profile in known]
    scale = float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-6)))))
    return replace(plain, segment_scale=scale)


def is_within_reach(graph: GraphSpec, known: Sequence[GraphSpec]) -> bool:
    """Whether enough models are known to predict this one, and large enough ones."""
    most_flops = max((_flops(other) for other in known), default=0.0)
    return len(known) >= MIN_MODELS and _flops(graph) <= REACH * most_flops


def _flops(graph: GraphSpec) -> float:
    return sum(layer.flops for layer in graph.layers)


def _fit(features: FloatArray, seconds: FloatArray) -> LayerRegression:
    """Non-negative least squares on relative errors, columns scaled so that none drowns the others."""
    weight = 1.0 / np.maximum(seconds, _MIN_LAYER_S)
    weighted = features * weight[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    scale[scale == 0.0] = 1.0
    solution, _ = nnls(weighted / scale, seconds * weight)
    return LayerRegression(tuple((solution / scale).tolist()), len(seconds))


def leave_one_out(profiles: Sequence[ModelProfile], node: str) -> tuple[KindError, ...]:
    """Predict every model from all others and compare, by kind.

    Args:
        profiles: profiles of at least two models that hold the node.
        node: name of the machine in them.

    Raises:
        ConfigError: when fewer than two profiles hold the node.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for left_out, predicted in _predict_each(profiles, node):
        for layer, guess, truth in zip(left_out.graph.layers, predicted, left_out.nodes[node].layer_s, strict=True):
            pairs.setdefault(layer.kind, []).append((guess, truth))
    return tuple(_kind_error(kind, np.array(rows)) for kind, rows in sorted(pairs.items()))


def leave_models_out(profiles: Sequence[ModelProfile], node: str) -> tuple[float, ...]:
    """Predict every model from all others: predicted / measured - 1 of the whole model.

    Args:
        profiles: as of `leave_one_out`.
        node: likewise.

    Raises:
        ConfigError: when fewer than two profiles hold the node.
    """
    return tuple(
        sum(predicted) / sum(left_out.nodes[node].layer_s) - 1.0
        for left_out, predicted in _predict_each(profiles, node)
    )


def _predict_each(profiles: Sequence[ModelProfile], node: str) -> Iterator[tuple[ModelProfile, tuple[float, ...]]]:
    """Every profile, and its layer times as the others tell them."""
    known = [profile for profile in profiles if node in profile.nodes]
    if len(known) < 2:
        raise ConfigError(f"expected two profiles of node {node!r} to leave one out, got {len(known)}")
    for left_out in known:
        others = [profile for profile in known if profile is not left_out]
        yield left_out, fit_machine(others, node).layer_s(left_out.graph)


def _kind_error(kind: str, rows: FloatArray) -> KindError:
    guess, truth = rows[:, 0], np.maximum(rows[:, 1], _MIN_LAYER_S)
    return KindError(
        kind=kind,
        num_layers=len(rows),
        median_frac=float(np.median(np.abs(guess / truth - 1.0))),
        total_frac=float(guess.sum() / truth.sum() - 1.0),
    )
