"""Before PPO: policy iteration in the twin, by looking up what plans bring to this request and to those that follow.

A round plays episodes by the network as it stands. At every request several plans are tried, each in a fork of its world,
where the network goes on to decide for the next requests; the sums of terms less that of the network's own choice are the
advantages. What nobody can foresee is the same in all forks of a request, and averages out over requests: the result
knows no more than an observation holds. Then the network moves so that the plans it would draw have the greatest
advantage, not far from where it stood. The next round sees the states that the new network leads to. The first round's
network is the planner.

References:
    Schulman, Levine, Moritz, Jordan, Abbeel, "Trust Region Policy Optimization" (ICML 2015), section 5.2, the vine
    procedure with common random numbers, as reconstructed. Differs: forks at every request of an episode; a penalty on
    the divergence instead of a constraint; the sums end after a horizon, where forks have mostly come together again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from agent.frozen import PLANNER_SCALE, FrozenNetwork
from agent.network import CandidatePolicy, export_weights
from agent.train.config import TrainConfig
from agent.train.evaluate import best_actions, masked_logits
from agent.train.facts import Facts
from agent.train.worlds import Worlds
from env.episodes import Episodes
from env.spaces import Observation
from env.traces import FloatArray
from env.twin import BoolArray, IntArray
from runtime.planning.candidates import NUM_CANDIDATES

SEED = 2**30
"""First of a rehearsal's seeds: those of the environments that PPO steps are smaller."""

STRAY = 0.05
"""Share of the decisions that are not the network's, so that states are seen to which only others lead. Guess."""

DRAW_SCALE = 2.0
"""Plans are drawn with the odds of an untrained network, predicted^-2: near the best more often, far ones now and then.
Guess."""

ADVANTAGE_MAX = 3.0
"""Greater sums are cut: e^3 times faster or slower over all is far beyond what decides. Guess."""

BEFORE = 8
"""Requests before the one at hand whose terms count too: a choice may hold up what is still under way."""

BATCH_SIZE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """Decisions whose outcomes were looked up."""

    candidates: npt.NDArray[np.float16]  # (N, K * F) as observed; halves keep half a million in 2 GB
    context: npt.NDArray[np.float32]  # (N, G)
    mask: npt.NDArray[np.int8]  # (N, K)
    actions: npt.NDArray[np.int8]  # (N, A) what was tried, the network's choice first
    advantage: npt.NDArray[np.float32]  # (N, A) sum of terms less that of the network's choice; NaN: not tried

    def __len__(self) -> int:
        """Decisions."""
        return len(self.actions)

    @classmethod
    def join(cls, parts: list["Tried"]) -> "Tried":
        """Put parts behind one another."""
        names = ("candidates", "context", "mask", "actions", "advantage")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class LookUp:
    """Episodes that go on from round to round, with a fork for every plan that is tried.

    Args:
        config: `rehearsal` and its companions.
        worlds: what is learnt on.
        facts: takes what was seen.
        done: decisions of an earlier run; other episodes follow than that one played.
    """

    def __init__(self, config: TrainConfig, worlds: Worlds, facts: Facts, done: int = 0) -> None:
        self._config, self._facts = config, facts
        num_lanes, width = config.num_envs, config.rehearsal_width
        self._lanes = np.arange(num_lanes)
        self._episodes = Episodes(
            worlds.sites,
            tuple(worlds.scenarios.values()),
            num_lanes=num_lanes,
            num_requests=config.num_requests,
            excess_weight=config.excess_weight,
            num_forks=num_lanes * width,
        )
        self._rng = np.random.default_rng((config.seed, 0, done))
        self._started = done
        self._start(self._lanes)
        self._ages = self._lanes * config.num_requests // num_lanes  # not all episodes are to end at once

    def _start(self, lanes: IntArray) -> None:
        seeds = [(SEED + self._config.seed, self._started + at) for at in range(len(lanes))]
        self._episodes.start(lanes, seeds)
        self._started += len(lanes)

    def steps(self, network: FrozenNetwork) -> Iterator[Tried]:
        """Play all episodes by a network, and try plans at every request: one part a step."""
        for _ in range(self._config.rehearsal_steps):
            yield self._step(network)

    def _step(self, network: FrozenNetwork) -> Tried:
        episodes, lanes = self._episodes, self._lanes
        seen = {name: rows[: len(lanes)].copy() for name, rows in episodes.observations.items()}
        self._facts.observe({name: rows[None] for name, rows in seen.items()})
        tried, is_allowed = self._draw(network, seen)
        total = self._try(network, tried, is_allowed)
        strays = self._rng.integers(tried.shape[1], size=len(lanes)) * (self._rng.random(len(lanes)) < STRAY)
        strays = np.where(is_allowed[lanes, strays], strays, 0)
        _, is_over, _ = episodes.step(lanes, tried[lanes, strays])
        self._ages += 1
        over = lanes[is_over | (self._ages >= self._config.num_requests)]
        if len(over):
            self._start(over)
            self._ages[over] = 0
        return Tried(
            candidates=seen["candidates"].astype(np.float16),
            context=seen["context"],
            mask=seen["mask"],
            actions=tried.astype(np.int8),
            advantage=(total - total[:, :1]).astype(np.float32),
        )

    def _draw(self, network: FrozenNetwork, seen: Observation) -> tuple[IntArray, BoolArray]:
        """The network's choice, then others without repetition, shape (lanes, A), and whether the mask allows them."""
        logits = masked_logits(network, seen)
        score = DRAW_SCALE / PLANNER_SCALE * logits + self._rng.gumbel(size=logits.shape)
        score[self._lanes, logits.argmax(axis=1)] = np.inf
        tried: IntArray = np.argsort(-score, axis=1, kind="stable")[:, : self._config.rehearsal_width]
        return tried, np.take_along_axis(seen["mask"], tried, axis=1) > 0

    def _try(self, network: FrozenNetwork, tried: IntArray, is_allowed: BoolArray) -> FloatArray:
        """Sum of terms under every plan that is tried, shape (lanes, A); NaN where the mask forbids it."""
        episodes, horizon = self._episodes, self._config.rehearsal_horizon
        place = np.flatnonzero(is_allowed)
        lanes = place // tried.shape[1]
        first, forks, actions = episodes.number(lanes), episodes.fork(lanes), tried.ravel()[place]
        going = forks
        for later in range(1 + horizon):
            _, is_over, _ = episodes.step(going, actions)
            going = going[~is_over]
            if later == horizon or not len(going):
                break
            actions = best_actions(network, {name: rows[going] for name, rows in episodes.observations.items()})
        episodes.finish(going)
        numbers = first[:, None] + np.arange(-BEFORE, 1 + horizon)
        is_there = (numbers >= 0) & (numbers < episodes.num_requests)
        each = np.broadcast_to(forks[:, None], numbers.shape)
        terms = np.zeros(numbers.shape)
        terms[is_there] = episodes.outcomes(each[is_there], numbers[is_there]).term
        weights = self._config.rehearsal_gamma ** np.maximum(np.arange(-BEFORE, 1 + horizon), 0)
        total = np.full(tried.size, np.nan)
        total[place] = terms @ weights
        return total.reshape(tried.shape)


class Rehearsal:
    """Rounds, each of looking up and of learning. Equal settings and seed give equal weights.

    Args:
        config: `rehearsal` and its companions.
        worlds: what is learnt on.
        policy: its actor is changed; the critic is PPO's to learn.
        facts: takes what was seen.
        done: decisions of an earlier run.
    """

    def __init__(
        self, config: TrainConfig, worlds: Worlds, policy: CandidatePolicy, facts: Facts, done: int = 0
    ) -> None:
        self._config, self._policy, self.done = config, policy, done
        self._look_up = LookUp(config, worlds, facts, done)
        self._kept: list[Tried] = []
        self._rng = np.random.default_rng((config.seed, 1, done))
        scorer = policy.features_extractor
        self._parameters = list(scorer.parameters())
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.rehearsal_rate)

    def round(self, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Look up, learn, and tell what came of it.

        Args:
            is_stopped: asked after each step; once it is, the round is dropped.

        Returns:
            None for a round that was dropped. Else
            `advantage`: of what the network would now draw over what it chose before, mean of the decisions learnt from;
            `divergence`: from the network before; `hindsight`: advantage of the best of what was tried, which nobody
            can know beforehand.
        """
        config = self._config
        parts = []
        for part in self._look_up.steps(FrozenNetwork(export_weights(self._policy))):
            if is_stopped():
                return None
            parts.append(part)
        tried = Tried.join(parts)
        self.done += len(tried)
        self._kept = [*self._kept, tried][-config.rehearsal_keep :]
        for group in self._optimizer.param_groups:
            group["lr"] = config.rehearsal_rate * max(1.0 - self.done / config.rehearsal, 0.05)
        advantage, divergence = self._learn(Tried.join(self._kept))
        hindsight = float(np.nanmax(tried.advantage, axis=1).mean())
        return {"advantage": advantage, "divergence": divergence, "hindsight": hindsight}

    def _learn(self, tried: Tried) -> tuple[float, float]:
        batches = np.array_split(np.arange(len(tried)), -(-len(tried) // BATCH_SIZE))
        with torch.no_grad():
            before = torch.cat([self._log_odds(tried, rows) for rows in batches])
        sums, steps = np.zeros(2), 0
        for _ in range(self._config.rehearsal_epochs):
            for rows in np.array_split(self._rng.permutation(len(tried)), len(batches)):
                log_odds = self._log_odds(tried, rows)
                odds = log_odds.exp()
                advantage = np.clip(np.nan_to_num(tried.advantage[rows]), -ADVANTAGE_MAX, ADVANTAGE_MAX)
                gain = (odds * torch.from_numpy(advantage)).sum(dim=1).mean()
                divergence = (odds * (log_odds - before[rows])).sum(dim=1).mean()
                self._optimizer.zero_grad()
                (self._config.rehearsal_divergence * divergence - gain).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self._parameters, 1.0)
                self._optimizer.step()
                sums += gain.item(), divergence.item()
                steps += 1
        return float(sums[0]) / steps, float(sums[1]) / steps

    def _log_odds(self, tried: Tried, rows: IntArray) -> torch.Tensor:
        """Logarithms of the odds of the plans that were tried, among themselves, shape (rows, A)."""
        observations = {
            "candidates": torch.from_numpy(tried.candidates[rows].astype(np.float32)),
            "context": torch.from_numpy(tried.context[rows]),
            "mask": torch.from_numpy(tried.mask[rows].astype(np.float32)),
        }
        logits = self._policy.features_extractor(observations)[:, :NUM_CANDIDATES]
        picked = logits.gather(1, torch.from_numpy(tried.actions[rows].astype(np.int64)))
        is_tried = torch.from_numpy(~np.isnan(tried.advantage[rows]))
        return torch.log_softmax(picked.masked_fill(~is_tried, _NEVER), dim=1)


_NEVER = -1e9
"""Logit of what was not tried: its odds are 0, and its logarithm is still a number."""
