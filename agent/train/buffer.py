"""The rollout buffer, which can put each request's term at the step that decided on it."""

from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableDictRolloutBufferSamples

from env.episodes import Completed

_HELD = ("actions", "rewards", "values", "log_probs", "episode_starts", "action_masks", "numbers")


class CreditRolloutBuffer(MaskableDictRolloutBuffer):
    """SB3's buffer of masked PPO, which moves terms to their decisions where it is told of ended requests (`note`).

    A request that is still under way when a rollout ends has no term yet. So the last `hold` steps of a rollout are not
    learnt from at once: they stand in front of the next rollout, by whose end nearly all of their requests have ended,
    and are learnt from with it, once. Their actions were drawn by the policy before, whose odds are kept. In the first
    rollout the first `hold` rows are empty and left out. A term whose decision stands no more in the buffer stays
    where the request ended, so that nothing escapes the sum.

    What SB3 adds to a reward for a truncated episode's future stays at that step.

    Args:
        buffer_size: steps of a rollout.
        args, kwargs: as of SB3's buffer.
        hold: steps that wait for the next rollout.
    """

    numbers: npt.NDArray[np.int64]
    """Number in its episode of the request that each row decided on, shape (rows, environments)."""

    def __init__(self, buffer_size: int, *args: Any, hold: int = 0, **kwargs: Any) -> None:
        self.hold = hold
        self.first_row = hold
        self._ended: list[tuple[int, Completed]] = []
        super().__init__(buffer_size + hold, *args, **kwargs)

    def reset(self) -> None:
        """Empty it but for the steps that wait."""
        waiting, numbers = self._waiting(), getattr(self, "numbers", None)
        super().reset()
        self.numbers = np.zeros((self.buffer_size, self.n_envs), dtype=np.int64)
        # What the next row counts on from.
        self.numbers[self.hold - 1] = -1 if numbers is None else numbers[-1]
        for name, rows in waiting.items():
            parts = self.observations if name in self.observations else self.__dict__
            parts[name][: self.hold] = rows
        self.first_row = 0 if waiting else self.hold
        self.pos = self.hold
        self._ended = []

    def _waiting(self) -> dict[str, npt.NDArray[Any]]:
        if not self.hold or not getattr(self, "full", False):
            return {}
        parts = {name: self.__dict__[name] for name in _HELD} | self.observations
        return {name: rows[-self.hold :].copy() for name, rows in parts.items()}

    def note(self, completed: Completed) -> None:
        """Take the requests that ended in the step that is added next."""
        self._ended.append((self.pos, completed))

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add a step of every environment: observations, actions, rewards, episode starts, and so on as SB3 has it."""
        self.numbers[self.pos] = np.where(args[3], 0, self.numbers[self.pos - 1] + 1)
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: npt.NDArray[np.bool_]) -> None:
        """Move the terms, then work out returns and advantages."""
        for row, completed in self._ended:
            decided = row - (self.numbers[row, completed.lane] - completed.number)
            is_here = decided >= self.first_row
            lanes, terms = completed.lane[is_here], completed.term[is_here]
            np.subtract.at(self.rewards, (row, lanes), terms)
            np.add.at(self.rewards, (decided[is_here], lanes), terms)
        super().compute_returns_and_advantage(last_values, dones)

    def get(  # type: ignore[override]  # as SB3 itself declares it
        self, batch_size: int | None = None
    ) -> Generator[MaskableDictRolloutBufferSamples, None, None]:
        """Give the steps that do not wait, in random order."""
        first, last = self.first_row * self.n_envs, (self.buffer_size - self.hold) * self.n_envs
        order = first + np.random.permutation(last - first)
        for start in range(0, len(order), batch_size or len(order)):
            yield self._get_samples(order[start : start + (batch_size or len(order))])

    def _get_samples(  # type: ignore[override]  # as SB3 itself declares it
        self, batch_inds: npt.NDArray[np.int64], env: Any = None
    ) -> MaskableDictRolloutBufferSamples:
        def take(rows: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(rows.reshape(-1, *rows.shape[2:])[batch_inds]).to(self.device)

        observations = {key: take(rows) for key, rows in self.observations.items()}
        return MaskableDictRolloutBufferSamples(
            observations=observations,
            actions=take(self.actions),
            old_values=take(self.values),
            old_log_prob=take(self.log_probs),
            advantages=take(self.advantages),
            returns=take(self.returns),
            action_masks=observations["mask"],
        )
