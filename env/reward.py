"""What a request is worth: its latency against the planner's in the same world."""

import numpy as np

from env.traces import FloatArray

EXCESS_WEIGHT = 0.1
"""Of the linear part, unless training says otherwise."""
EXCESS_MAX = 5.0


def reward_terms(
    latency_s: FloatArray,
    deadline_s: FloatArray,
    reference_s: FloatArray,
    scale_s: FloatArray,
    excess_weight: float = EXCESS_WEIGHT,
) -> FloatArray:
    """Weigh requests that ended: -log(l / l_ref) - excess_weight min((l - l_ref) / scale, 5).

    The logarithm makes shares count alike for every model; the second part makes long waits count in the mean.

    Args:
        latency_s: l; a request that was later than its deadline, or never answered (inf), counts as its deadline.
        deadline_s: of each request.
        reference_s: l_ref, the planner's latency for the same request of the same world; capped in the same way.
        scale_s: the problem's best latency on idle nodes at nominal rates.
        excess_weight: of the second part.
    """
    counted_s = np.minimum(latency_s, deadline_s)
    expected_s = np.minimum(reference_s, deadline_s)
    excess = np.minimum((counted_s - expected_s) / scale_s, EXCESS_MAX)
    terms: FloatArray = -np.log(counted_s / expected_s) - excess_weight * excess
    return terms
