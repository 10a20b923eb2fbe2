"""What happens beside the learning: counting, evaluating, keeping the best, saving, stopping."""

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agent.checkpoint import load_checkpoint, save_checkpoint
from agent.frozen import FrozenNetwork
from agent.network import CandidatePolicy, export_weights
from agent.train.buffer import CreditRolloutBuffer
from agent.train.config import TrainConfig
from agent.train.evaluate import Evaluator, Ratios, as_features, score_of
from agent.train.facts import decisions, latencies
from agent.train.state import State, save_state
from agent.train.tell import Teller, results_table
from agent.train.vecenv import LearnerVecEnv
from env.episodes import Completed
from env.spaces import Observation
from runtime.errors import OffcutError

BEST = "best"
"""Folder of the frozen policy."""

_LOGITS_TOLERANCE = 1e-3
"""Between torch and numpy, which sum in another order; logits are of the order of 10."""


class Watch(BaseCallback):
    """Does everything that is not learning, between two updates.

    Args:
        config: the settings.
        state: how far the training is; kept up to date.
        evaluators: on the models that are learnt on, and on those held out (None: there are none).
        teller: shows progress.
        training_facts: for the manifest.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: State,
        evaluators: tuple[Evaluator, Evaluator | None],
        teller: Teller,
        training_facts: dict[str, Any],
    ) -> None:
        super().__init__()
        self.config, self.state, self.teller, self.training_facts = config, state, teller, training_facts
        self.evaluators = evaluators
        self.stop_signal = 0
        self._ended: list[Completed] = []
        self._before_s = state.trained_s
        self._started_s = time.monotonic()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: drop the rollout at hand, save and leave. A second one leaves at once."""
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        self.teller.say("stopping; once more stops at once, without saving")

    def _on_step(self) -> bool:
        env, buffer = self.training_env, self._buffer
        assert isinstance(env, LearnerVecEnv)
        assert env.completed is not None
        if self.config.credit == "decision":
            buffer.note(env.completed)
        self._ended.append(env.completed)
        return not self.stop_signal

    def _on_rollout_start(self) -> None:
        """An update has ended, or training begins."""
        if self.num_timesteps != self.state.steps:
            before, self.state.steps = self.state.decisions, self.num_timesteps
            self._learnt(before)

    def rehearsed(self, done: int, facts: dict[str, float]) -> None:
        """Take what a round of rehearsal came to, and how many decisions were rehearsed in all."""
        before, self.state.rehearsed = self.state.decisions, done
        for name, value in facts.items():
            self.logger.record(f"rehearsal/{name}", value)
        self.logger.dump(done)
        self.teller.tell(self.state.decisions, f"{facts['advantage']:+.4f} a decision")
        self._learnt(before)

    def _learnt(self, before: int) -> None:
        """An update has ended: evaluate and save where it is time."""
        self.state.trained_s = self._before_s + time.monotonic() - self._started_s
        now, every = self.state.decisions, self.config.eval_every
        if now // every > before // every or self._is_last:
            self.evaluate()
        every = self.config.save_every
        if now // every > before // every or self._is_last:
            save_state(self.config.out, self.model, self.state)

    def _on_training_end(self) -> None:
        """SB3 calls no hook after the last update but this one."""
        if self.stop_signal:
            save_state(self.config.out, self.model, self.state)
        else:
            self._on_rollout_start()

    def _on_rollout_end(self) -> None:
        buffer, first = self._buffer, self._buffer.hold
        observations = {name: rows[first:] for name, rows in buffer.observations.items()}
        self.state.facts.observe(observations)
        facts = latencies(self._ended) | decisions(observations, buffer.actions[first:])
        for name, value in facts.items():
            self.logger.record(name, value)
        self.logger.record("reward/step", float(buffer.rewards[first:].mean()))
        self._ended = []
        ratio = facts.get("latency/geometric_ratio", np.nan)
        self.teller.tell(self.state.rehearsed + self.num_timesteps, f"{ratio:.3f} x planner")

    @property
    def _buffer(self) -> CreditRolloutBuffer:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        assert isinstance(buffer, CreditRolloutBuffer)
        return buffer

    @property
    def _is_last(self) -> bool:
        return self.state.decisions >= self.config.num_decisions

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate, and keep the policy if it is the best one so far; one that has learnt nothing is the planner."""
        policy = self.model.policy
        assert isinstance(policy, CandidatePolicy)
        weights = export_weights(policy)
        learnt, held_out = self.evaluators
        results = learnt.run(weights)
        others = [] if held_out is None else held_out.run(weights)
        score = score_of(results)
        decisions = self.state.decisions
        is_trained = decisions > 0 or self.config.start_from is not None
        is_best = score < self.state.best_score and is_trained
        self.state.curve.append(
            {
                "decisions": decisions,
                "score": round(score, 5),
                "learnt": [one.to_json() for one in results],
                "held_out": [one.to_json() for one in others],
            }
        )
        for part, rows in (("eval", results), ("eval_held_out", others)):
            for one in rows:
                for name in ("geometric", "mean", "p95", "missed_frac"):
                    self.logger.record(f"{part}_{name}/{one.scenario}", getattr(one, name))
        self.logger.record("eval/score", score)
        self.logger.dump(decisions)
        self.teller.evaluated(decisions, score, results, others, is_best)
        if is_best:
            self.state.best_score, self.state.best_decisions = score, decisions
            self._keep(policy, results, others, learnt.observations)

    def _keep(self, policy: CandidatePolicy, results: list[Ratios], others: list[Ratios], shown: Observation) -> None:
        """Freeze the policy, and check that what was written decides as what was trained."""
        seen = self.state.facts.seen
        assert seen is not None
        facts = self.training_facts | {
            "rehearsed": self.state.rehearsed,
            "steps": self.state.steps,
            "minutes": round(self.state.trained_s / 60.0, 1),
            "score": round(self.state.best_score, 5),
            "curve": [(point["decisions"], point["score"]) for point in self.state.curve],
            "evaluation": {
                "learnt models": [one.to_json() for one in results],
                "held-out models": [one.to_json() for one in others],
            },
        }
        folder = self.config.out / BEST
        save_checkpoint(
            folder,
            export_weights(policy),
            seen=seen,
            error_range=self.state.facts.error_range(),
            config=self.config.settings(),
            training=facts,
            notes=results_table(results, others),
        )
        check_frozen(folder, policy, shown)


def check_frozen(folder: Path, policy: CandidatePolicy, observations: Observation) -> None:
    """Compare a frozen folder's logits with the trained policy's.

    Raises:
        OffcutError: where they differ by more than rounding.
    """
    import torch

    frozen = FrozenNetwork(load_checkpoint(folder).weights).score(as_features(observations))
    with torch.no_grad():
        features = policy.extract_features(policy.obs_to_tensor(observations)[0])
    assert isinstance(features, torch.Tensor)
    trained = features[:, : frozen.shape[1]].numpy()
    difference = float(np.abs(frozen - trained).max())
    if not difference <= _LOGITS_TOLERANCE:
        raise OffcutError(f"expected {folder} to score as the trained policy, its logits are off by {difference:.3g}")
