"""Evaluation while training: the frozen policy against the planner in the same worlds, all lanes side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.checkpoint import Weights
from agent.frozen import FrozenNetwork
from agent.train.worlds import Worlds
from env.episodes import Episodes
from env.spaces import Observation
from env.traces import FloatArray
from runtime.planning.features import CANDIDATE_COLUMNS, Features

VALIDATION = 2**32
"""First of an evaluation's seeds: a training's are smaller, so that no world is in both."""

_ROWS = 128
"""Observations that are scored at once: their layers stay in the processor's caches."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """A policy's latencies over the planner's for the same requests; below 1 is faster.

    Latencies count up to their deadline. Means and percentiles are over latencies in units of the site's best idle
    latency, so that every model weighs alike.
    """

    scenario: str
    requests: int
    geometric: float
    mean: float
    p95: float
    missed_frac: float
    """Share of the requests past their deadline, or never answered."""
    planner_missed_frac: float

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it, rounded."""
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


class Evaluator:
    """Episodes of every site in every scenario, the same ones each time.

    Args:
        worlds: where.
        episodes: of each site in each scenario.
        num_requests: steps of an episode.
    """

    def __init__(self, worlds: Worlds, *, episodes: int, num_requests: int) -> None:
        self.worlds = worlds
        self._places = [
            (site, scenario)
            for scenario in range(len(worlds.scenarios))
            for site in range(len(worlds.sites))
            for _ in range(episodes)
        ]
        count = len(self._places)
        self._lanes = np.arange(count)
        self._seeds = [(VALIDATION, lane % (count // len(worlds.scenarios)), 0) for lane in range(count)]
        self._num_requests = num_requests
        self._episodes = Episodes(
            worlds.sites, tuple(worlds.scenarios.values()), num_lanes=count, num_requests=num_requests
        )

    def run(self, weights: Weights) -> list[Ratios]:
        """Let the most likely actions of some weights decide, and compare."""
        network = FrozenNetwork(weights)
        self._episodes.start(self._lanes, self._seeds, self._places)
        latency_s = np.zeros((len(self._lanes), self._num_requests))
        for _ in range(self._num_requests):
            actions = best_actions(network, self._episodes.observations)
            _, _, completed = self._episodes.step(self._lanes, actions)
            latency_s[completed.lane, completed.number] = completed.latency_s
        return self._compare(latency_s)

    @property
    def observations(self) -> Observation:
        """The last that were decided on."""
        return self._episodes.observations

    def _compare(self, latency_s: FloatArray) -> list[Ratios]:
        reference_s = np.array([self._episodes.reference_s(lane) for lane in self._lanes.tolist()])
        deadline_s = np.array([self._episodes.deadline_s(lane) for lane in self._lanes.tolist()])
        scale_s = np.array([self._episodes.scale_s(lane) for lane in self._lanes.tolist()])[:, None]
        of_scenario = np.array([scenario for _, scenario in self._places])
        out = []
        for at, name in enumerate(self.worlds.scenarios):
            rows = of_scenario == at
            limit_s = deadline_s[rows]
            out.append(compare(name, latency_s[rows], reference_s[rows], limit_s, scale_s[rows]))
        return out


def compare(
    scenario: str, latency_s: FloatArray, reference_s: FloatArray, deadline_s: FloatArray, scale_s: FloatArray
) -> Ratios:
    """Compare latencies of the same requests, all arrays of one shape or broadcast to it."""
    ours, theirs = np.minimum(latency_s, deadline_s), np.minimum(reference_s, deadline_s)
    a, b = ours / scale_s, theirs / scale_s
    return Ratios(
        scenario=scenario,
        requests=int(ours.size),
        geometric=float(np.exp(np.log(ours / theirs).mean())),
        mean=float(a.mean() / b.mean()),
        p95=float(np.percentile(a, 95) / np.percentile(b, 95)),
        missed_frac=float((latency_s > deadline_s).mean()),
        planner_missed_frac=float((reference_s > deadline_s).mean()),
    )


def best_actions(network: FrozenNetwork, observations: Observation) -> npt.NDArray[np.int64]:
    """The most likely action that the mask allows, for a batch of observations."""
    best: npt.NDArray[np.int64] = masked_logits(network, observations).argmax(axis=1)
    return best


def masked_logits(network: FrozenNetwork, observations: Observation) -> npt.NDArray[np.float32]:
    """Logits for a batch of observations, minus infinity where the mask forbids."""
    features, count = as_features(observations), len(observations["mask"])
    logits = np.empty(features.mask.shape, dtype=np.float32)
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        logits[rows] = network.score(Features(features.candidates[rows], features.context[rows], features.mask[rows]))
    masked: npt.NDArray[np.float32] = np.where(features.mask, logits, np.float32(-np.inf))
    return masked


def as_features(observations: Observation) -> Features:
    """Observations as what a frozen network scores."""
    count = len(observations["mask"])
    rows = observations["candidates"].reshape(count, -1, len(CANDIDATE_COLUMNS))
    return Features(rows, observations["context"], observations["mask"] > 0)


def score_of(results: Sequence[Ratios]) -> float:
    """One number to choose by, lower is better: geometric mean over the scenarios of mean and p95 ratio."""
    return float(np.exp(np.mean([0.5 * (np.log(one.mean) + np.log(one.p95)) for one in results])))
