"""A policy that is watched and not obeyed: what it would have done, noted beside every decision that was taken.

It is asked in a thread of its own, from the state that the policy in charge has seen; nothing waits for it, and whatever
goes wrong in it is counted.
"""

import logging
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from runtime.device.telemetry import Opinion
from runtime.planning.cost import estimate
from runtime.planning.policies.guard import GuardedPolicy
from runtime.planning.policies.registry import PolicySpec
from runtime.planning.problem import PlanningProblem, Policy, check_plan
from runtime.types import Plan, SystemState

logger = logging.getLogger(__name__)

MOST_WAITING = 64
"""Decisions that may wait for the shadow; beyond, it is left out: requests come faster than it decides. Guess."""

BEHIND = "behind"
"""Why it gave no plan: so many decisions were waiting."""


@dataclass(slots=True)
class ShadowCounts:
    """What has come of all decisions so far."""

    policy: str
    decisions: int = 0
    agreed: int = 0
    compared: int = 0
    """Decisions for which both plans have a prediction."""
    taken_s: float = 0.0
    """Predicted seconds of the plans that were taken, over these."""
    shadow_s: float = 0.0
    """Predicted seconds of the shadow's plans, over these."""
    failures: Counter[str] = field(default_factory=Counter)
    """How often it gave no plan, by reason."""
    guarded: Counter[str] = field(default_factory=Counter)
    """How often its own guard's fallback decided, by reason."""

    @property
    def agreed_frac(self) -> float:
        """Share of the decisions in which it would have taken the same plan; NaN before the first."""
        return self.agreed / self.decisions if self.decisions else float("nan")

    @property
    def difference_frac(self) -> float:
        """Predicted latency of its plans over those that were taken, less 1; NaN before the first."""
        return self.shadow_s / self.taken_s - 1.0 if self.taken_s > 0.0 else float("nan")

    def add(self, opinion: Opinion, taken_s: float) -> None:
        """Count one."""
        self.decisions += 1
        if opinion.error:
            self.failures[opinion.error.partition(":")[0]] += 1
            return
        self.agreed += opinion.agrees
        if opinion.guard_reason:
            self.guarded[opinion.guard_reason] += 1
        if abs(taken_s) < float("inf") and abs(opinion.predicted_s) < float("inf"):  # False for NaN
            self.compared += 1
            self.taken_s += taken_s
            self.shadow_s += opinion.predicted_s


class Shadow:
    """Asks a policy for its opinion on decisions that others take. `close` it.

    Args:
        spec: the policy to watch.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._spec = spec
        self._counts = ShadowCounts(spec.name)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="offcut-shadow")
        self._known: dict[str, tuple[PlanningProblem, Policy]] = {}
        self._lock = threading.Lock()
        self._waiting, self._is_closed = 0, False

    def ask(self, problem: PlanningProblem, state: SystemState, taken: Plan, taken_s: float) -> "Future[Opinion]":
        """Ask what it would have done; never waits, never raises.

        Args:
            problem: what the decision was for.
            state: what was known.
            taken: the plan that the policy in charge chose.
            taken_s: its predicted latency.
        """
        with self._lock:
            if self._waiting < MOST_WAITING and not self._is_closed:
                self._waiting += 1
                return self._pool.submit(self._answer, problem, state, taken, taken_s)
        opinion: Future[Opinion] = Future()
        opinion.set_result(self._note(Opinion(self._spec.name, error=BEHIND), taken_s))
        return opinion

    @property
    def counts(self) -> ShadowCounts:
        """What has come of all decisions so far, as a copy."""
        with self._lock:
            now = self._counts
            return replace(now, failures=Counter(now.failures), guarded=Counter(now.guarded))

    def close(self) -> None:
        """Wait for all opinions, and end the thread."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown()

    def _answer(self, problem: PlanningProblem, state: SystemState, taken: Plan, taken_s: float) -> Opinion:
        try:
            opinion = self._decide(problem, state, taken)
        except Exception as error:
            logger.debug("the shadow %s gave no plan", self._spec.name, exc_info=True)
            opinion = Opinion(self._spec.name, error=f"{type(error).__name__}: {error}")
        with self._lock:
            self._waiting -= 1
        return self._note(opinion, taken_s)

    def _decide(self, problem: PlanningProblem, state: SystemState, taken: Plan) -> Opinion:
        known = self._known.get(problem.input_kind)
        if known is None or known[0] is not problem:
            known = self._known[problem.input_kind] = (problem, self._spec.build(problem))
        policy = known[1]
        plan = check_plan(problem, policy.plan(state))
        return Opinion(
            policy=self._spec.name,
            plan=plan.describe(),
            predicted_s=estimate(problem, plan, state).total_s,
            agrees=plan == taken,
            guard_reason=policy.last_reason if isinstance(policy, GuardedPolicy) else "",
        )

    def _note(self, opinion: Opinion, taken_s: float) -> Opinion:
        with self._lock:
            self._counts.add(opinion, taken_s)
        return opinion
