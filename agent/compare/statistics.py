"""Statistics of episodes and what chance there may be in them: plain arithmetic, no plotting, no text.

The unit is the episode: requests of one episode share its machines, links and load, so they are not drawn
independently. Every statistic is worked out for the episodes as they are and for `resamples` draws of as many episodes
with replacement; all policies use the same draws, so their ratios are paired.

References:
    Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13: percentile intervals.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_one(self) -> bool:
        """Whether a ratio is certainly below or above 1."""
        return self.high < 1.0 or self.low > 1.0


def draw_counts(num_episodes: int, resamples: int, seed: int = 0) -> IntArray:
    """How often each episode is in each draw, shape (1 + resamples, episodes); the first is the episodes as they are."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_episodes, np.full(num_episodes, 1.0 / num_episodes), size=resamples)
    return np.concatenate([np.ones((1, num_episodes), dtype=np.int64), counts])


def means(values: FloatArray, counts: IntArray) -> FloatArray:
    """Mean over the requests of every draw, shape (draws,); `values` has shape (episodes, requests)."""
    total: FloatArray = (counts @ values.mean(axis=1)) / counts.sum(axis=1)
    return total


def geometric_means(values: FloatArray, counts: IntArray) -> FloatArray:
    """Geometric mean over the requests of every draw, shape (draws,)."""
    result: FloatArray = np.exp(means(np.log(values), counts))
    return result


def quantiles(values: FloatArray, counts: IntArray, share: float) -> FloatArray:
    """The value below or at which `share` of the requests of every draw lie, shape (draws,)."""
    order = values.ravel().argsort(kind="stable")
    ranked, episode = values.ravel()[order], order // values.shape[1]
    found = np.empty(len(counts))
    for draw, count in enumerate(counts):
        below = count[episode].cumsum()
        found[draw] = ranked[np.searchsorted(below, share * below[-1] - 1e-9)]
    return found


def interval(draws: FloatArray) -> Interval:
    """The statistic of the episodes as they are, and the percentiles of the draws around it."""
    tail = (1.0 - CONFIDENCE) / 2.0
    rest = draws[1:] if len(draws) > 1 else draws
    low, high = np.quantile(rest, (tail, 1.0 - tail))
    return Interval(float(draws[0]), float(low), float(high))
