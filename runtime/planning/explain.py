"""Why this plan: the best candidates of a state, and what the others lose by."""

from dataclasses import dataclass

import numpy as np

from runtime.planning.arrays import encode_states
from runtime.planning.candidates import candidates
from runtime.planning.cost import PARTS, describe, predict, total_s
from runtime.planning.estimators import tuned_arrays
from runtime.planning.problem import PlanningProblem
from runtime.types import LatencyBreakdown, Plan, SystemState


@dataclass(frozen=True, slots=True)
class Explanation:
    """One candidate beside the best one."""

    plan: Plan
    predicted: LatencyBreakdown
    behind_s: float  # predicted total over the winner's, 0 for the winner
    loses_by: str  # the part of `runtime.planning.cost.PARTS` that costs most more than the winner's; empty for it
    loses_by_s: float  # how much more


def explain(problem: PlanningProblem, state: SystemState, top: int = 5) -> tuple[Explanation, ...]:
    """Predict all candidates in a state and give the best ones, the winner first.

    Candidates that need a node that is down are left out.

    Args:
        problem: model, deployment and constraints.
        state: what was measured.
        top: how many, at most.

    Raises:
        PlanError: when no split is legal.
    """
    choices = candidates(problem)
    arrays = encode_states(choices.costs.layout, (state,))
    readings = tuned_arrays(arrays)
    parts = predict(choices.costs, readings, arrays)[0]
    total = np.where(choices.mask(arrays)[0], total_s(parts), np.inf)
    order = [int(row) for row in np.argsort(total, kind="stable")[:top] if np.isfinite(total[row])]
    records = []
    for row in order:
        more = parts[row] - parts[order[0]]
        worst = int(more.argmax())
        is_winner = row == order[0]
        records.append(
            Explanation(
                plan=choices.plans[row],
                predicted=describe(choices.costs, parts[row], readings, row),
                behind_s=float(total[row] - total[order[0]]),
                loses_by="" if is_winner else PARTS[worst],
                loses_by_s=0.0 if is_winner else float(more[worst]),
            )
        )
    return tuple(records)
