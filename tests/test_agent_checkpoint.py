import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

import agent.checkpoint
from agent.checkpoint import SeenRange, Weights, load_checkpoint, save_checkpoint, weight_shapes
from agent.policies import load_policy
from runtime.errors import ConfigError
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS

SEEN = SeenRange(((-1.0, 1.0),) * len(CANDIDATE_COLUMNS), ((0.0, 2.0),) * len(CONTEXT_COLUMNS))


def make_weights(hidden: int = 8) -> Weights:
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in weight_shapes(hidden).items()}


def write(folder: Path, **weights: np.ndarray) -> Path:
    save_checkpoint(
        folder,
        {**make_weights(), **weights},
        seen=SEEN,
        error_range=(-0.4, 0.8),
        config={"gamma": 0.95, "scenarios": ["streaming", "both"]},
        training={"revision": "abc1234", "steps": 1000},
        notes="## Evaluation\n\nNone yet.",
    )
    return folder


def rewrite(folder: Path, **changes: object) -> None:
    """Change fields of a manifest, of any type."""
    path = folder / "manifest.json"
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **changes}))


def replace_weights(folder: Path, data: bytes) -> None:
    """Put other weights there, so that only the weights can be found wrong, not their hash."""
    (folder / "weights.safetensors").write_bytes(data)
    rewrite(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write(tmp_path / "mine"))
    assert checkpoint.name == "mine"
    for name, values in make_weights().items():
        np.testing.assert_array_equal(checkpoint.weights[name], values)
    assert checkpoint.manifest.seen == SEEN
    assert checkpoint.manifest.error_range == (-0.4, 0.8)
    assert checkpoint.manifest.config["scenarios"] == ["streaming", "both"]
    assert checkpoint.manifest.training == {"revision": "abc1234", "steps": 1000}


def test_the_card_tells_what_the_manifest_knows(tmp_path: Path) -> None:
    card = (write(tmp_path / "mine") / "README.md").read_text()
    for text in (
        "# mine",
        'load_policy("checkpoints/mine")',
        "| revision | abc1234 |",
        "| gamma | 0.95 |",
        "None yet.",
    ):
        assert text in card


def test_saving_again_replaces(tmp_path: Path) -> None:
    write(write(tmp_path / "mine"), **{"value.2.bias": np.full(1, 7.0, dtype=np.float32)})
    assert load_checkpoint(tmp_path / "mine").weights["value.2.bias"] == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 1, got 99"),
        ({"num_candidates": 16}, "K = 32, got 16"),
        ({"features_version": "0123456789ab"}, "feature table [0-9a-f]{12}, got 0123456789ab"),
        ({"format_version": 99, "hidden": "many"}, "format version 1, got 99"),  # whatever else a later one says
        ({"hidden": "many"}, "manifest.json, got Expected `int`"),
        ({"unknown": 1}, "unknown field `unknown`"),
        ({"error_range": [0.5, -0.5]}, "error_range"),
        ({"seen": {"candidates": [[0, 1]], "context": [[0, 1]]}}, "got 1 and 1"),
        ({"hidden": 9}, "of shape"),
        ({"weights_sha256": "0" * 64}, "copy the folder again"),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = write(tmp_path / "mine")
    rewrite(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "mine") / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=name):
        load_checkpoint(path.parent)
    path.unlink()
    with pytest.raises(ConfigError, match=f"no readable {name}"):
        load_checkpoint(path.parent)


def test_bytes_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    replace_weights(folder, b"no tensors at all")
    with pytest.raises(ConfigError, match="expected safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_no_damage_is_anything_but_a_named_error(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "mine")
    whole, rng = (folder / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for draw in range(300):
        damaged = bytearray(whole)
        if draw % 3 == 0:
            damaged = damaged[: rng.integers(len(whole))]
        else:
            for _ in range(draw % 3):
                damaged[rng.integers(min(len(whole), 1000))] = rng.integers(256)
        if name == "manifest.json":
            (folder / name).write_bytes(damaged)
        else:
            replace_weights(folder, bytes(damaged))  # also where the hash fits
        try:
            load_checkpoint(folder)
        except ConfigError:
            refused += 1
    assert refused > 150  # of the others some digits differ, or a name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer.mix.weight": np.zeros((8, 9), np.float32)}, r"scorer.mix.weight of shape \(8, 8\)"),
        ({"value.2.bias": np.zeros(1, np.float64)}, "float64"),
        ({"scorer.mix.bias": np.full(8, np.nan, np.float32)}, "NaN or infinity"),
        ({"scorer.residual.weight": np.full((1, 8), np.inf, np.float32)}, "NaN or infinity"),
        ({"more": np.zeros(1, np.float32)}, "not among them: more"),
        ({"value.0.bias": None}, "missing.*value.0.bias"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    folder = write(tmp_path / "mine")
    weights = {name: values for name, values in {**make_weights(), **change}.items() if values is not None}
    replace_weights(folder, save(weights))
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(folder)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the training diverged"):
        write(tmp_path / "mine", **{"value.2.bias": np.full(1, np.nan, dtype=np.float32)})
    assert not (tmp_path / "mine").exists()


def test_the_range_is_that_of_the_allowed_candidates_and_widens() -> None:
    candidates = np.zeros((2, 32, len(CANDIDATE_COLUMNS)), np.float32)
    candidates[0, 3, 0], candidates[1, 4, 0], candidates[1, 5, 0] = -2.0, 1.0, 3.0
    context = np.zeros((2, len(CONTEXT_COLUMNS)), np.float32)
    context[1, 7] = 0.5
    mask = np.ones((2, 32), np.int8)
    mask[1, 5] = 0
    seen = SeenRange.of(candidates, context, mask)
    assert seen == SeenRange.of(candidates.reshape(2, -1), context, mask)
    assert (seen.candidates[0], seen.candidates[1], seen.context[7]) == ((-2.0, 1.0), (0.0, 0.0), (0.0, 0.5))
    both = seen.merge(SeenRange.of(candidates + 1, context - 1, mask))
    assert (both.candidates[0], both.context[7]) == ((-2.0, 2.0), (-1.0, 0.5))


# --- by name ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_found_by_path_and_by_the_name_of_one_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "checkpoints" / "mine")
    monkeypatch.setattr("agent.policies.CHECKPOINTS", tmp_path / "checkpoints")
    for name in ("mine", "checkpoints/mine", str(tmp_path / "checkpoints" / "mine")):
        assert load_policy(name).name == "mine"
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert load_policy("./mine").name == "mine"


def test_a_rule_s_name_is_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "planner")
    monkeypatch.chdir(tmp_path)
    assert load_policy("planner").build.__module__ == "runtime.planning.policies.planner"
    assert load_policy("./planner").build.__module__ == "agent.policies"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planer", r"did you mean planner\?; or the folder of a checkpoint"),
        ("checkpoints/none-such", "no readable manifest.json"),
        ("./none-such", "no readable manifest.json"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(name)


def test_loading_a_policy_takes_no_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine")
    code = (
        f"import sys; from agent import load_policy; load_policy({str(folder)!r});"
        "assert not {'torch', 'zmq', 'gymnasium', 'env'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(agent.checkpoint.__file__).parents[1]
    )
