"""A learnt policy behind a guard: whatever it does, the answer is a legal plan that a rule would not call bad."""

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.errors import PlanError
from runtime.planning.arrays import encode_states
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.problem import PlanningProblem, Policy, check_plan
from runtime.planning.rows import compile_plan
from runtime.types import Plan, SystemState

logger = logging.getLogger(__name__)

REASONS = ("error", "raised", "late", "resting", "illegal", "down", "range", "worse")
"""Why the fallback answered: prediction errors out of range, the primary raised, was late, rests after it was late,
proposed an illegal plan, one that needs a node that is down, saw a state outside its training range, or would be much
slower than the fallback."""


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """Limits of `GuardedPolicy`."""

    decision_s: float = 0.02
    """A decision that takes longer is late. Guess: a tenth of a slow request."""
    rest_decisions: int = 50
    """A primary that was late is not asked for so many decisions: it can be ignored, but not interrupted. Guess."""
    worse_factor: float = 2.0
    """A plan predicted to take more than this many times the fallback's is refused."""
    error_range: tuple[float, float] = (-0.7, 1.5)
    """Calibrated range of the median of the recent prediction errors (measured / predicted - 1). Guess, until a
    checkpoint brings its own."""
    min_errors: int = 4
    """Fewer recent errors than this say nothing."""


_DEFAULTS = GuardSettings()


@dataclass(slots=True)
class GuardedPolicy:
    """Asks the primary, and the fallback whenever a reason of `REASONS` speaks against the primary.

    Args:
        problem: what both were built for.
        primary: the policy to guard. If it has a method `out_of_range(state) -> str`, a text that is not empty names
            what is outside the range that it was trained in.
        fallback: the rule to fall back to.
        settings: limits.
        clock: seconds, for the time a decision takes.
    """

    problem: PlanningProblem
    primary: Policy
    fallback: Policy
    settings: GuardSettings = _DEFAULTS
    clock: Callable[[], float] = time.perf_counter
    reasons: Counter[str] = field(default_factory=Counter)
    """How often the fallback answered, by reason."""
    decisions: int = 0
    last_reason: str = ""
    """Why the fallback gave the last answer; empty when the primary did."""
    _resting: int = 0

    @property
    def is_stateful(self) -> bool:
        """Whether earlier states change what it answers."""
        return self.primary.is_stateful or self.fallback.is_stateful

    def plan(self, state: SystemState) -> Plan:
        """Pick the primary's plan, or the fallback's where the guard objects."""
        self.decisions += 1
        fallback = self.fallback.plan(state)
        plan, self.last_reason = self._ask(state, fallback)
        if plan is None:
            self.reasons[self.last_reason] += 1
            return fallback
        return plan

    def reset(self) -> None:
        """Reset both policies; the counts stay."""
        self.primary.reset()
        self.fallback.reset()
        self._resting = 0

    def _ask(self, state: SystemState, fallback: Plan) -> tuple[Plan | None, str]:
        """The primary's plan and no reason, or no plan and the reason."""
        if self._is_miscalibrated(state):
            return None, "error"
        if self._resting:
            self._resting -= 1
            return None, "resting"
        started_s = self.clock()
        try:
            out_of_range: Callable[[SystemState], str] | None = getattr(self.primary, "out_of_range", None)
            if out_of_range is not None and out_of_range(state):
                return None, "range"
            plan = self.primary.plan(state)
        except Exception:
            logger.exception("the guarded policy raised; the fallback answers")
            return None, "raised"
        if self.clock() - started_s > self.settings.decision_s:
            self._resting = self.settings.rest_decisions
            return None, "late"
        return self._check(state, plan, fallback)

    def _check(self, state: SystemState, plan: Plan, fallback: Plan) -> tuple[Plan | None, str]:
        if plan == fallback:
            return plan, ""
        try:
            plan = check_plan(self.problem, plan)
        except PlanError as error:
            logger.warning("the guarded policy proposed an illegal plan: %s", error)
            return None, "illegal"
        costs, other = compile_plan(self.problem, plan), compile_plan(self.problem, fallback)
        arrays = encode_states(costs.layout, (state,))
        if (~arrays.is_up @ costs.needs.T > 0).any():
            return None, "down"
        readings = tuned_arrays(arrays)
        limit_s = self.settings.worse_factor * predict_total(other, readings, arrays)[0, 0]
        # Written so that a prediction that is not a number counts as worse.
        if not predict_total(costs, readings, arrays)[0, 0] <= limit_s:
            return None, "worse"
        return plan, ""

    def _is_miscalibrated(self, state: SystemState) -> bool:
        if len(state.recent_errors) < self.settings.min_errors:
            return False
        low, high = self.settings.error_range
        return not low <= statistics.median(state.recent_errors) <= high
