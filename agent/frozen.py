"""A trained policy on a device: numpy alone decides. No torch, no sockets, no environment."""

import numpy as np
import numpy.typing as npt

from agent.checkpoint import Checkpoint, SeenRange, Weights
from runtime.errors import PlanError
from runtime.planning.arrays import FloatArray, IntArray, StateArrays
from runtime.planning.features import (
    CANDIDATE_COLUMNS,
    CANDIDATE_HIGH,
    CANDIDATE_LOW,
    CONTEXT_COLUMNS,
    CONTEXT_HIGH,
    CONTEXT_LOW,
    FeatureEncoder,
    Features,
)
from runtime.planning.problem import PlanningProblem
from runtime.types import Plan, SystemState

Array32 = npt.NDArray[np.float32]

PLANNER_SCALE = 16.0
"""The planner's logits are -PLANNER_SCALE * ln(predicted / least predicted): at 16, a plan of 1.15 times the latency is
drawn 10 times less often. At 4, as in a feasibility study, exploring cost 12 to 16 per cent of latency, and PPO made a
rehearsed policy worse: it learnt to be good at drawing plans, and what is deployed is the most likely one."""

OVER_BEST = CANDIDATE_COLUMNS.index("over_best:over_best")
"""Column that holds log10 of predicted / least predicted."""

RESIDUAL_SCALE = 4.0
"""Logits per unit of the network's output: at 1 it would have to grow to 16 times a logarithm of latency. Whether that
matters is not shown: rehearsals with 4 came to 0.96 to 1.02 of the planner, with 1 to 0.98 to 1.00 (agent/README.md)."""

LOGIT_PER_DECADE = -PLANNER_SCALE * float(np.log(10.0))

_MARGIN_FRAC = 0.05
"""A state counts as seen up to this share of a column's bounds outside the range of the training. Guess."""


class FrozenNetwork:
    """The scorer of `agent.network` in numpy; the value head is not needed to decide."""

    def __init__(self, weights: Weights) -> None:
        def columns(name: str) -> Array32:
            return np.ascontiguousarray(weights[f"scorer.{name}.weight"].T)

        self._from_candidate, self._from_context = columns("from_candidate"), columns("from_context")
        self._mix, self._residual = columns("mix"), columns("residual")
        self._context_bias, self._mix_bias = weights["scorer.from_context.bias"], weights["scorer.mix.bias"]

    def score(self, features: Features) -> Array32:
        """Logits of all candidates, shape (B, K), whatever the mask."""
        batch, num_candidates, width = features.candidates.shape
        hidden = (features.candidates.reshape(-1, width) @ self._from_candidate).reshape(batch, num_candidates, -1)
        hidden += (features.context @ self._from_context + self._context_bias)[:, None, :]
        np.maximum(hidden, 0.0, out=hidden)
        hidden = hidden.reshape(batch * num_candidates, -1) @ self._mix
        hidden += self._mix_bias
        np.maximum(hidden, 0.0, out=hidden)
        logits: Array32 = np.multiply(features.candidates[..., OVER_BEST], LOGIT_PER_DECADE, dtype=np.float32)
        logits += np.float32(RESIDUAL_SCALE) * (hidden @ self._residual).reshape(batch, num_candidates)
        return logits


class FrozenPolicy:
    """Picks the candidate with the greatest logit among those that the mask allows.

    Args:
        problem: what to decide for.
        checkpoint: the trained weights and the range of states that they were trained in.

    Raises:
        PlanError: when no split of the problem is legal.
    """

    is_stateful = False

    def __init__(self, problem: PlanningProblem, checkpoint: Checkpoint) -> None:
        self.encoder = FeatureEncoder(problem)
        self.network = FrozenNetwork(checkpoint.weights)
        self._candidate_range, self._context_range = _widen(checkpoint.manifest.seen)
        self._last: tuple[SystemState, tuple[Features, Array32, int]] | None = None

    def plan(self, state: SystemState) -> Plan:
        """Pick the plan for one state.

        Raises:
            PlanError: when the logits are not numbers.
        """
        _, logits, choice = self._score(state)
        _check(logits)
        return self.encoder.candidates.plans[choice]

    def choose(self, state: StateArrays, current: IntArray | None = None) -> IntArray:
        """Pick a candidate's index for every state of a batch, shape (B,); arguments as of `FeatureEncoder.encode`."""
        return self.pick(self.encoder.encode(state, current=current))

    def pick(self, features: Features) -> IntArray:
        """Pick a candidate's index for every row of features, shape (B,).

        Raises:
            PlanError: when a logit is not a number.
        """
        logits = self.network.score(features)
        _check(logits)
        return _best(features, logits)

    def out_of_range(self, state: SystemState) -> str:
        """Name the first column in which a state is outside the range of the training; empty: it is inside.

        Of the candidates only the one that would be picked is looked at: what the network makes of one that it does not
        pick harms nobody.
        """
        features, _, choice = self._score(state)
        low, high = self._candidate_range
        row = features.candidates[0, choice]
        is_inside = (row >= low) & (row <= high)  # False for what is not a number
        if not is_inside.all():
            column = int(is_inside.argmin())
            return _outside("candidates", CANDIDATE_COLUMNS[column], row[column], low[column], high[column])
        low, high = self._context_range
        context = features.context[0]
        is_inside = (context >= low) & (context <= high)
        if not is_inside.all():
            column = int(is_inside.argmin())
            return _outside("context", CONTEXT_COLUMNS[column], context[column], low[column], high[column])
        return ""

    def reset(self) -> None:
        """Nothing to forget."""

    def _score(self, state: SystemState) -> tuple[Features, Array32, int]:
        """Encode and score once for `out_of_range` and `plan` of the same request; gives the index of the best too."""
        if self._last is None or self._last[0] is not state:
            features = self.encoder.encode_state(state)
            logits = self.network.score(features)
            self._last = state, (features, logits, int(_best(features, logits)[0]))
        return self._last[1]


def _best(features: Features, logits: Array32) -> IntArray:
    choice: IntArray = np.where(features.mask, logits, -np.inf).argmax(axis=1)
    return choice


def _check(logits: Array32) -> None:
    if not np.isfinite(logits).all():
        raise PlanError(
            "expected numbers as the scores of the candidates, got NaN or infinity: some reading of the state is "
            "none; guard the policy, so that the planner answers"
        )


def _widen(seen: SeenRange) -> tuple[tuple[Array32, Array32], tuple[Array32, Array32]]:
    """Least and greatest value that counts as seen, of the candidates' and of the context's columns."""
    tables = ((seen.candidates, CANDIDATE_LOW, CANDIDATE_HIGH), (seen.context, CONTEXT_LOW, CONTEXT_HIGH))
    candidates, context = (_widen_table(np.array(ranges), _MARGIN_FRAC * (high - low)) for ranges, low, high in tables)
    return candidates, context


def _widen_table(ranges: FloatArray, margin: FloatArray) -> tuple[Array32, Array32]:
    return (ranges[:, 0] - margin).astype(np.float32), (ranges[:, 1] + margin).astype(np.float32)


def _outside(part: str, column: str, value: np.float32, low: np.float32, high: np.float32) -> str:
    return f"{part} {column} = {value:.3g} is outside [{low:.3g}, {high:.3g}]"
