"""A learnt policy behind a guard: whatever it does, the answer is a legal plan that a rule would not call bad."""

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.errors import PlanError
from runtime.planning.arrays import BoolArray, FloatArray, StateArrays, encode_states
from runtime.planning.candidates import Candidates
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.problem import PlanningProblem, Policy, check_plan
from runtime.planning.rows import PlanCosts, compile_plan
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
    worse_factor: float = 5.0
    """A plan predicted to take more than this many times the fallback's is refused. Tried on training seeds (agent/README.md):
    at 2 a third of what a trained policy gains is lost, because readings may be stale and its plan right."""
    error_range: tuple[float, float] = (-0.7, 1.5)
    """Calibrated range of the median of the recent prediction errors (measured / predicted - 1). Guess, until a
    checkpoint brings its own."""
    min_errors: int = 4
    """Fewer recent errors than this say nothing."""


_DEFAULTS = GuardSettings()


@dataclass(frozen=True, slots=True, eq=False)
class Objections:
    """What a guard has against plans, shape (B, K) each."""

    is_down: BoolArray  # needs a node that is down, or a link for tiles that does not stand
    is_worse: BoolArray  # would be much slower than the fallback, or nobody can tell

    @property
    def is_refused(self) -> BoolArray:
        """Where either speaks against the plan."""
        return self.is_down | self.is_worse


def object_to(costs: PlanCosts, state: StateArrays, fallback_s: FloatArray, settings: GuardSettings) -> Objections:
    """Judge plans in states: the one place that says which of them a guard lets pass.

    Args:
        costs: K plans.
        state: B states.
        fallback_s: predicted latency of the fallback's plan in each, shape (B,).
        settings: limits.
    """
    missing = ~state.is_up @ costs.full("needs").T + np.isnan(state.rtt_s) @ costs.full("needs_links").T
    # Written so that a prediction that is not a number counts as worse.
    is_near = predict_total(costs, tuned_arrays(state), state) <= settings.worse_factor * fallback_s[:, None]
    return Objections(missing > 0, ~is_near)


def guard_mask(choices: Candidates, state: SystemState, settings: GuardSettings = _DEFAULTS) -> BoolArray:
    """Tell which candidates a `GuardedPolicy` whose fallback is the planner would let pass, shape (K,).

    The planner's own choice always passes; where the recent predictions were wrong nothing else does. So a policy that
    chooses among these is never overridden for what its plan is.
    """
    arrays = encode_states(choices.costs.layout, (state,))
    penalty = choices.penalty(arrays)
    predicted_s = predict_total(choices.costs, tuned_arrays(arrays), arrays)
    fallback = int((predicted_s + penalty).argmin())
    mask: BoolArray = np.zeros(len(choices.plans), dtype=np.bool_)
    if not _is_miscalibrated(state, settings):
        mask = ~object_to(choices.costs, arrays, predicted_s[:, fallback], settings).is_refused[0]
        mask &= penalty[0] <= penalty.min()
    mask[fallback] = True
    return mask


def _is_miscalibrated(state: SystemState, settings: GuardSettings) -> bool:
    """Whether the recent prediction errors are outside the calibrated range."""
    if len(state.recent_errors) < settings.min_errors:
        return False
    low, high = settings.error_range
    return not low <= statistics.median(state.recent_errors) <= high


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
        if _is_miscalibrated(state, self.settings):
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
        fallback_s = predict_total(other, tuned_arrays(arrays), arrays)[:, 0]
        found = object_to(costs, arrays, fallback_s, self.settings)
        if found.is_down.any():
            return None, "down"
        if found.is_worse.any():
            return None, "worse"
        return plan, ""
