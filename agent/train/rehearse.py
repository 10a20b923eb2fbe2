"""Before PPO: learn from the twin what each plan does to this request and to those that follow.

One step of policy iteration over the planner. The twin tries several plans at the same request, each in a copy of its
world, lets the planner decide on the next requests, and adds up the terms. The network learns the differences to the
planner's own choice. What nobody can foresee is noise in these sums and averages out: unlike a clone of an oracle, the
result knows no more than an observation holds. Terms are logarithms of latencies, and so is the scale of the planner's
logits (`agent.frozen.PLANNER_SCALE` times -ln(predicted)): an untrained network predicts just the planner's view of the
request at hand, and learns what is wrong with it.

References:
    Bertsekas, "Rollout, Policy Iteration, and Distributed Reinforcement Learning" (2020), as reconstructed: rollout with
    a base policy. Differs: the improved policy is kept as a network, not simulated anew for each decision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import nn

from agent.frozen import OVER_BEST, PLANNER_SCALE
from agent.network import CandidatePolicy
from agent.train.config import TrainConfig
from agent.train.facts import Facts
from agent.train.worlds import Worlds
from env.episodes import Episodes
from env.spaces import Observation
from env.traces import FloatArray
from env.twin import IntArray
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import CANDIDATE_COLUMNS

SEED = 2**30
"""First of a rehearsal's seeds: those of the environments that PPO steps are smaller."""

STRAY = 0.15
"""Share of the decisions that are not the planner's, so that states are seen to which only others lead. Guess."""

DRAW_SCALE = 2.0
"""Plans are drawn with the odds predicted^-2: near the best more often, far ones now and then. Guess."""

ADVANTAGE_MAX = 3.0
"""Greater sums are cut: e^3 times faster or slower over all is far beyond what decides. Guess."""

BATCH_SIZE = 1024
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """Decisions whose outcomes were looked up."""

    candidates: npt.NDArray[np.float16]  # (N, K * F) as observed; halves keep half a million in 2 GB
    context: npt.NDArray[np.float32]  # (N, G)
    mask: npt.NDArray[np.int8]  # (N, K)
    actions: npt.NDArray[np.int8]  # (N, A) what was tried, the planner's choice first
    advantage: npt.NDArray[np.float32]  # (N, A) sum of terms less that of the planner's choice; NaN: not tried

    def __len__(self) -> int:
        """Decisions."""
        return len(self.actions)

    @classmethod
    def join(cls, parts: list["Tried"]) -> "Tried":
        """Put parts behind one another."""
        names = ("candidates", "context", "mask", "actions", "advantage")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def rehearse(config: TrainConfig, worlds: Worlds, policy: CandidatePolicy, facts: Facts) -> dict[str, Any]:
    """Look decisions up and let the network of a policy learn them. The same settings give the same weights.

    Args:
        config: `rehearsal` and its companions.
        worlds: what is learnt on.
        policy: its actor is changed; the critic is PPO's to learn.
        facts: takes what was seen.

    Returns:
        Facts for the manifest: decisions, loss before and after on decisions that were not learnt from, and the mean
        advantage of the choices there.
    """
    tried = Tried.join(list(look_up(config, worlds, facts)))
    is_test = np.random.default_rng((config.seed, 1)).random(len(tried)) < 0.05
    before = _assess(policy, tried, np.flatnonzero(is_test))
    _learn(config, policy, tried, np.flatnonzero(~is_test))
    after = _assess(policy, tried, np.flatnonzero(is_test))
    return {"decisions": len(tried), "before": before, "after": after}


def look_up(config: TrainConfig, worlds: Worlds, facts: Facts) -> Iterator[Tried]:
    """Play episodes by the planner, with strays, and try plans at every request: one part a step of all lanes."""
    num_lanes = config.num_envs
    episodes = Episodes(
        worlds.sites,
        tuple(worlds.scenarios.values()),
        num_lanes=num_lanes,
        num_requests=config.num_requests,
        excess_weight=config.excess_weight,
    )
    lanes, rng = np.arange(num_lanes), np.random.default_rng((config.seed, 0))
    episodes.start(lanes, [(SEED + config.seed, lane) for lane in lanes.tolist()])
    started = num_lanes
    for _ in track(range(-(-config.rehearsal // num_lanes)), "looking plans up", transient=True):
        seen = episodes.observations
        facts.observe({name: rows[None] for name, rows in seen.items()})
        tried = _draw(seen, config.rehearsal_width, rng)
        yield _try(episodes, seen, tried, config)
        strays = np.where(rng.random(num_lanes) < STRAY, rng.integers(tried.shape[1], size=num_lanes), 0)
        chosen = tried[lanes, strays]
        _, is_over, _ = episodes.step(lanes, np.where(seen["mask"][lanes, chosen] > 0, chosen, tried[:, 0]))
        over = lanes[is_over]
        if len(over):
            episodes.start(over, [(SEED + config.seed, started + at) for at in range(len(over))])
            started += len(over)


def _draw(seen: Observation, width: int, rng: np.random.Generator) -> IntArray:
    """The planner's choice, then others without repetition, shape (lanes, width); masked ones stand last."""
    decades = seen["candidates"].reshape(-1, NUM_CANDIDATES, len(CANDIDATE_COLUMNS))[..., OVER_BEST]
    over_best = np.where(seen["mask"] > 0, np.log(10.0) * decades, np.inf)
    score = -DRAW_SCALE * over_best + rng.gumbel(size=over_best.shape)
    score[np.arange(len(score)), over_best.argmin(axis=1)] = np.inf
    order: IntArray = np.argsort(-score, axis=1, kind="stable")[:, :width]
    return order


def _try(episodes: Episodes, seen: Observation, tried: IntArray, config: TrainConfig) -> Tried:
    terms = episodes.look(tried, config.rehearsal_horizon)
    total: FloatArray = terms @ (config.rehearsal_gamma ** np.arange(terms.shape[2]))
    is_allowed = np.take_along_axis(seen["mask"], tried, axis=1) > 0
    return Tried(
        candidates=seen["candidates"].astype(np.float16),
        context=seen["context"].copy(),
        mask=seen["mask"].copy(),
        actions=tried.astype(np.int8),
        advantage=np.where(is_allowed, total - total[:, :1], np.nan).astype(np.float32),
    )


def _learn(config: TrainConfig, policy: CandidatePolicy, tried: Tried, rows: IntArray) -> None:
    scorer, rng = policy.features_extractor, np.random.default_rng((config.seed, 2))
    optimizer = torch.optim.Adam(scorer.parameters(), lr=LEARNING_RATE)
    per_epoch = -(-len(rows) // BATCH_SIZE)
    steps = config.rehearsal_epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for step in track(range(steps), "learning them", transient=True):
        if step % per_epoch == 0:
            rng.shuffle(rows)
        batch = rows[step % per_epoch * BATCH_SIZE :][:BATCH_SIZE]
        optimizer.zero_grad()
        _loss(_predict(policy, tried, batch), tried.advantage[batch]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _predict(policy: CandidatePolicy, tried: Tried, rows: IntArray) -> torch.Tensor:
    """Advantages over the planner's choice as the logits have them, shape (rows, A)."""
    observations = {
        "candidates": torch.from_numpy(tried.candidates[rows].astype(np.float32)),
        "context": torch.from_numpy(tried.context[rows]),
        "mask": torch.from_numpy(tried.mask[rows].astype(np.float32)),
    }
    logits = policy.features_extractor(observations)[:, :NUM_CANDIDATES]
    actions = torch.from_numpy(tried.actions[rows].astype(np.int64))
    picked: torch.Tensor = logits.gather(1, actions) / PLANNER_SCALE
    return picked - picked[:, :1]


def _loss(predicted: torch.Tensor, advantage: npt.NDArray[np.float32]) -> torch.Tensor:
    """Huber's, over what was tried; the planner's own choice is 0 by definition and does not count."""
    is_known = torch.from_numpy(~np.isnan(advantage))
    is_known[:, 0] = False
    target = torch.from_numpy(np.clip(np.nan_to_num(advantage), -ADVANTAGE_MAX, ADVANTAGE_MAX))
    errors = nn.functional.smooth_l1_loss(predicted, target, reduction="none")
    loss: torch.Tensor = (errors * is_known).sum() / is_known.sum().clamp(min=1)
    return loss


def _assess(policy: CandidatePolicy, tried: Tried, rows: IntArray) -> dict[str, float]:
    """Loss, and the mean advantage of what the network would choose among the plans that were tried."""
    loss, gain = 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            predicted, advantage = _predict(policy, tried, batch), tried.advantage[batch]
            loss += float(_loss(predicted, advantage)) * len(batch)
            best = np.where(np.isnan(advantage), -np.inf, predicted.numpy()).argmax(axis=1)
            gain += float(advantage[np.arange(len(batch)), best].sum())
    return {"loss": loss / max(len(rows), 1), "advantage": gain / max(len(rows), 1)}
