"""How far a training is, and the files that it goes on from."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from agent.train.config import TrainConfig
from agent.train.facts import Facts
from runtime.errors import ConfigError

CONFIG_FILE, STATE_FILE = "config.json", "state.json"


@dataclass(slots=True)
class State:
    """What is known of a training besides the weights."""

    steps: int = 0
    """Decisions that PPO learnt from."""
    rehearsed: int = 0
    """Decisions that were learnt from before."""
    trained_s: float = 0.0
    best_score: float = float("inf")
    best_decisions: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Every evaluation."""
    facts: Facts = field(default_factory=Facts)

    @property
    def decisions(self) -> int:
        """Decisions that were learnt from in all."""
        return self.rehearsed + self.steps


def save_config(config: TrainConfig) -> None:
    """Write the settings where `load_config` finds them."""
    config.out.mkdir(parents=True, exist_ok=True)
    _write(config.out / CONFIG_FILE, config.to_json())


def load_config(config: TrainConfig) -> TrainConfig:
    """Read the settings of the training to go on with.

    Raises:
        ConfigError: when there is none in the folder.
    """
    saved = _read(config.out / CONFIG_FILE)
    return TrainConfig.from_json(saved, out=config.out, resume=True, threads=config.threads)


def save_state(folder: Path, model: BaseAlgorithm, state: State) -> None:
    """Write weights, optimiser and state; what was there is replaced only when the new is whole."""
    weights = folder / f"state-{state.decisions}.zip"
    model.save(weights)
    saved = {
        "weights": weights.name,
        "steps": state.steps,
        "rehearsed": state.rehearsed,
        "updates": model._n_updates,
        "trained_s": state.trained_s,
        "best_score": state.best_score if math.isfinite(state.best_score) else None,
        "best_decisions": state.best_decisions,
        "curve": state.curve,
        "facts": state.facts.to_json(),
    }
    _write(folder / STATE_FILE, saved)
    for old in folder.glob("state-*.zip"):
        if old != weights:
            old.unlink()


def load_state(folder: Path, model: BaseAlgorithm) -> State:
    """Put weights and optimiser into a model made from the same settings, and give the state.

    Raises:
        ConfigError: when there is nothing to go on from.
    """
    saved = _read(folder / STATE_FILE)
    weights = folder / saved["weights"]
    if not weights.is_file():
        raise ConfigError(f"expected {weights}, which {STATE_FILE} names; start anew without --resume")
    model.set_parameters(str(weights), device="cpu")
    model.num_timesteps = saved["steps"]
    model._n_updates = saved["updates"]
    best = saved["best_score"]
    return State(
        steps=saved["steps"],
        rehearsed=saved["rehearsed"],
        trained_s=saved["trained_s"],
        best_score=float("inf") if best is None else best,
        best_decisions=saved["best_decisions"],
        curve=saved["curve"],
        facts=Facts.from_json(saved["facts"]),
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected a training to go on with in {path.parent}, got no readable {path.name} ({error}); name its folder "
            "with --out, or start anew without --resume"
        ) from error
    return read
