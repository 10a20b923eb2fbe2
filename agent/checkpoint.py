"""A trained policy as a folder: weights.safetensors, manifest.json and a card. Saved and loaded with numpy alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as parse_weights
from safetensors.numpy import save as pack_weights

from runtime.errors import ConfigError
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS, FEATURES_VERSION

FORMAT_VERSION = 1
"""Changes with the manifest's fields and with what the network computes from its weights."""

WEIGHTS_FILE, MANIFEST_FILE, CARD_FILE = "weights.safetensors", "manifest.json", "README.md"

Weights = dict[str, npt.NDArray[np.float32]]


class SeenRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Least and greatest value that training saw in every column of the feature table."""

    candidates: tuple[tuple[float, float], ...]  # (F,) over the candidates that the mask allowed
    context: tuple[tuple[float, float], ...]  # (G,)

    @classmethod
    def of(
        cls, candidates: npt.NDArray[np.float32], context: npt.NDArray[np.float32], mask: npt.NDArray[Any]
    ) -> "SeenRange":
        """Take the range of a batch of observations.

        Args:
            candidates: shape (B, K, F), or (B, K * F) as the observation has it.
            context: shape (B, G).
            mask: shape (B, K), not 0 where a candidate may be chosen; what others show does not count.
        """
        allowed = candidates.reshape(-1, len(CANDIDATE_COLUMNS))[mask.ravel() > 0]
        return cls(_range_of(allowed), _range_of(context))

    def merge(self, other: "SeenRange") -> "SeenRange":
        """Widen this range by another."""
        return SeenRange(_merge(self.candidates, other.candidates), _merge(self.context, other.context))


def _range_of(rows: npt.NDArray[np.float32]) -> tuple[tuple[float, float], ...]:
    return tuple(zip(rows.min(axis=0).tolist(), rows.max(axis=0).tolist(), strict=True))


def _merge(
    one: tuple[tuple[float, float], ...], other: tuple[tuple[float, float], ...]
) -> tuple[tuple[float, float], ...]:
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True))


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint says of itself."""

    format_version: int
    num_candidates: int
    features_version: str
    """Hash of the feature table that it was trained with."""
    hidden: int
    weights_sha256: str
    error_range: tuple[float, float]
    """Calibrated range of the median of the recent prediction errors (measured / predicted - 1)."""
    seen: SeenRange
    config: dict[str, Any]
    """Settings of the training."""
    training: dict[str, Any]
    """Facts of the training: revision, traces, steps, curve, evaluation."""


class _Versions(msgspec.Struct):
    """The fields that every version of the manifest has."""

    format_version: int
    num_candidates: int
    features_version: str


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    name: str
    weights: Weights
    manifest: Manifest


def weight_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the network (`agent.network`)."""
    return {
        "scorer.from_candidate.weight": (hidden, len(CANDIDATE_COLUMNS)),
        "scorer.from_context.weight": (hidden, len(CONTEXT_COLUMNS)),
        "scorer.from_context.bias": (hidden,),
        "scorer.mix.weight": (hidden, hidden),
        "scorer.mix.bias": (hidden,),
        "scorer.residual.weight": (1, hidden),
        "value.0.weight": (hidden, 2 * hidden),
        "value.0.bias": (hidden,),
        "value.2.weight": (1, hidden),
        "value.2.bias": (1,),
    }


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, npt.NDArray[np.float32]],
    *,
    seen: SeenRange,
    error_range: tuple[float, float],
    config: Mapping[str, Any],
    training: Mapping[str, Any],
    notes: str = "",
) -> Manifest:
    """Write a checkpoint; one that stands there is replaced.

    Args:
        folder: where to; its name is the checkpoint's.
        weights: as `agent.network.export_weights` gives them.
        seen: range of the observations of the training.
        error_range: range of the median prediction error within which the guard trusts the policy.
        config: settings of the training; what JSON can hold.
        training: facts of the training; what JSON can hold.
        notes: Markdown for the end of the card, such as tables of an evaluation.

    Raises:
        ConfigError: for weights that `load_checkpoint` would refuse.
    """
    arrays = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in weights.items()}
    hidden = len(arrays.get("scorer.mix.bias", ()))
    _check_weights(arrays, hidden, "the weights to save")
    packed = pack_weights(arrays)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        num_candidates=NUM_CANDIDATES,
        features_version=FEATURES_VERSION,
        hidden=hidden,
        weights_sha256=hashlib.sha256(packed).hexdigest(),
        error_range=error_range,
        seen=seen,
        config=dict(config),
        training=dict(training),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(packed)
    (folder / CARD_FILE).write_text(_make_card(folder.name, manifest, notes))
    # Last: with its hash of the weights it tells a folder that was written to the end from one that was not.
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    return manifest


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check all of it.

    Raises:
        ConfigError: when a file is missing or damaged, when it was made for another version, number of candidates or
            feature table, or when its weights have the wrong shapes or are not numbers.
    """
    manifest = _read_manifest(folder)
    packed = _read(folder, WEIGHTS_FILE)
    where = str(folder / WEIGHTS_FILE)
    if hashlib.sha256(packed).hexdigest() != manifest.weights_sha256:
        raise ConfigError(f"{where} is not the file that {MANIFEST_FILE} was written for; copy the folder again")
    try:
        weights = parse_weights(packed)
    except SafetensorError as error:
        raise ConfigError(f"expected safetensors in {where}, got {error}; copy the folder again") from error
    _check_weights(weights, manifest.hidden, where)
    return Checkpoint(folder.resolve().name, weights, manifest)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"expected a checkpoint with {MANIFEST_FILE} and {WEIGHTS_FILE} in {folder}, got no readable {name}; "
            "name a folder that `offcut train` wrote"
        ) from error


def _read_manifest(folder: Path) -> Manifest:
    data, where = _read(folder, MANIFEST_FILE), folder / MANIFEST_FILE
    try:
        versions = msgspec.json.decode(data, type=_Versions)
        _check_versions(versions, where)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # the latter for bytes within a string
        raise ConfigError(f"expected the manifest of a checkpoint in {where}, got {error}") from error
    if manifest.hidden < 1 or not manifest.error_range[0] < manifest.error_range[1]:
        raise ConfigError(
            f"expected hidden >= 1 and error_range = [low, high] in {where}, got {manifest.hidden} and "
            f"{list(manifest.error_range)}"
        )
    shown = (len(manifest.seen.candidates), len(manifest.seen.context))
    if shown != (len(CANDIDATE_COLUMNS), len(CONTEXT_COLUMNS)):
        raise ConfigError(
            f"expected the range of {len(CANDIDATE_COLUMNS)} and {len(CONTEXT_COLUMNS)} columns as `seen` in {where}, "
            f"got {shown[0]} and {shown[1]}"
        )
    return manifest


def _check_versions(found: _Versions, where: Path) -> None:
    for what, expected, got in (
        ("of format version", FORMAT_VERSION, found.format_version),
        ("for K candidates, K =", NUM_CANDIDATES, found.num_candidates),
        ("for feature table", FEATURES_VERSION, found.features_version),
    ):
        if got != expected:
            raise ConfigError(
                f"expected a checkpoint {what} {expected}, got {got} in {where}; train it again with this version of "
                "Offcut, or use the version that it was trained with"
            )


def _check_weights(weights: Mapping[str, npt.NDArray[Any]], hidden: int, where: str) -> None:
    expected = weight_shapes(hidden)
    if set(weights) != set(expected):
        names = ", ".join(sorted(set(weights) ^ set(expected)))
        raise ConfigError(f"expected the tensors of the network in {where}, missing or not among them: {names}")
    for name, shape in expected.items():
        values = weights[name]
        if values.shape != shape or values.dtype != np.float32:
            raise ConfigError(
                f"expected {name} of shape {shape} and float32 in {where}, got {values.shape} and {values.dtype}"
            )
        if not np.isfinite(values).all():
            raise ConfigError(f"expected numbers in {name} in {where}, got NaN or infinity; the training diverged")


def _make_card(name: str, manifest: Manifest, notes: str) -> str:
    low, high = manifest.error_range
    lines = [
        f"# {name}",
        "",
        "A policy for Offcut: masked PPO over the candidate plans, frozen. Used behind a guard that falls back to the planner:",
        "",
        "```python",
        "from agent import load_policy",
        "",
        f'policy = load_policy("checkpoints/{name}")',
        "```",
        "",
        f"- Feature table `{manifest.features_version}`, K = {manifest.num_candidates}, hidden {manifest.hidden}.",
        f"- Trusted while the median prediction error is within [{low:g}, {high:g}], and in states within the range of "
        "the training.",
        "",
    ]
    for title, facts in (("Training", manifest.training), ("Settings", manifest.config)):
        lines += [f"## {title}", "", "| what | value |", "|---|---|"]
        lines += [f"| {key} | {_show(value)} |" for key, value in facts.items()] + [""]
    return "\n".join([*lines, notes.strip(), ""]).rstrip() + "\n"


def _show(value: object) -> str:
    """A fact in one cell; long ones stay in the manifest."""
    text = msgspec.json.encode(value).decode() if isinstance(value, dict | list | tuple) else str(value)
    return text if len(text) <= 200 else f"see {MANIFEST_FILE}"
