"""The network of masked PPO: one scorer shared over the candidates, residual on the planner's logits.

Pointer style (Vinyals, Fortunato, Jaitly, "Pointer Networks", NeurIPS 2015, as reconstructed): every candidate is scored
by the same layers from its own features and the context, so neither order nor number of plans is learnt by heart. The
layer that makes the residual starts at zero: an untrained policy is a softmax of the planner's predictions.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agent.frozen import LOGIT_PER_DECADE, OVER_BEST, RESIDUAL_SCALE
from runtime.planning.features import CANDIDATE_COLUMNS

HIDDEN = 64
"""Width of every layer (from a feasibility study)."""

CHUNK = 512
"""Observations that are scored at a time. What the layers make of a whole batch fits no cache of a processor: 8192 at a time
take two to three times as long, forwards and backwards (measured)."""


class CandidateScorer(BaseFeaturesExtractor):
    """Scores the candidates and pools what it saw of them.

    Takes the observation (B: batch): `candidates` (B, K * F), `context` (B, G), `mask` (B, K). Gives one tensor
    (B, K + 2 * hidden): the logits, then mean and maximum of the hidden layer over the candidates that the mask allows.
    """

    def __init__(self, observation_space: spaces.Dict, hidden: int = HIDDEN) -> None:
        num_candidates, num_context = (_width(observation_space, key) for key in ("mask", "context"))
        super().__init__(observation_space, num_candidates + 2 * hidden)
        self.num_candidates, self.hidden = num_candidates, hidden
        # No bias here and behind the residual: the context's bias adds to the first, a softmax ignores the second.
        self.from_candidate = nn.Linear(len(CANDIDATE_COLUMNS), hidden, bias=False)
        self.from_context = nn.Linear(num_context, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.residual = nn.Linear(hidden, 1, bias=False)

    def forward(self, observations: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Score and pool."""
        chunks = zip(*(torch.split(observations[key], CHUNK) for key in ("candidates", "context", "mask")), strict=True)
        return torch.cat([self._score(*chunk) for chunk in chunks])

    def _score(self, candidates: torch.Tensor, context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        candidates = candidates.view(-1, self.num_candidates, len(CANDIDATE_COLUMNS))
        mask = mask.unsqueeze(-1)
        context = self.from_context(context).unsqueeze(1)
        hidden = torch.relu(self.mix(torch.relu(self.from_candidate(candidates) + context)))
        residual = RESIDUAL_SCALE * self.residual(hidden).squeeze(-1)
        logits = LOGIT_PER_DECADE * candidates[..., OVER_BEST] + residual
        # The critic learns from what the actor sees, but does not shape it: its gradients are by far the longer ones.
        allowed = hidden.detach() * mask  # at least 0, so that what is masked never is the maximum
        mean = allowed.sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        return torch.cat([logits, mean, allowed.amax(dim=1)], dim=1)


def _width(space: spaces.Dict, key: str) -> int:
    shape = space[key].shape
    assert shape is not None
    return int(shape[0])


class _Split(nn.Module):
    """What SB3 calls `mlp_extractor`: the actor gets the logits, the critic the pooled rest."""

    def __init__(self, num_candidates: int, hidden: int) -> None:
        super().__init__()
        self.num_candidates = num_candidates
        self.latent_dim_pi, self.latent_dim_vf = num_candidates, 2 * hidden

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, : self.num_candidates]

    def forward_critic(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, self.num_candidates :]


class CandidatePolicy(MaskableActorCriticPolicy):
    """The policy to give `MaskablePPO`: `MaskablePPO(CandidatePolicy, env, policy_kwargs={"hidden": 64})`.

    Args:
        observation_space: Dict of `candidates`, `context` and `mask`, one-dimensional boxes.
        action_space: Discrete(K).
        lr_schedule: learning rate by progress left.
        hidden: width of every layer.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Callable[[float], float],
        hidden: int = HIDDEN,
    ) -> None:
        self.hidden = hidden
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=CandidateScorer,
            features_extractor_kwargs={"hidden": hidden},
        )

    def _build(self, lr_schedule: Callable[[float], float]) -> None:
        """Make the heads on top of the scorer, the weights and the optimiser."""
        scorer = self.features_extractor
        assert isinstance(scorer, CandidateScorer)
        hidden = scorer.hidden
        self.mlp_extractor = _Split(scorer.num_candidates, hidden)  # type: ignore[assignment]
        self.action_net = nn.Identity()
        self.value_net = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))  # type: ignore[assignment]
        for module in (scorer, self.value_net[0]):  # type: ignore[index]
            module.apply(partial(self.init_weights, gain=float(np.sqrt(2.0))))
        self.init_weights(self.value_net[2], gain=1.0)  # type: ignore[index]
        nn.init.zeros_(scorer.residual.weight)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]


def export_weights(policy: CandidatePolicy) -> dict[str, npt.NDArray[np.float32]]:
    """Copy the weights out, by the names of `agent.checkpoint.weight_shapes`."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in _tensors(policy).items()}


def import_weights(policy: CandidatePolicy, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Copy the weights of a checkpoint in, to train on from there."""
    with torch.no_grad():
        for name, tensor in _tensors(policy).items():
            tensor.copy_(torch.from_numpy(weights[name]))


def _tensors(policy: CandidatePolicy) -> dict[str, torch.Tensor]:
    parts = (("scorer", policy.features_extractor), ("value", policy.value_net))
    return {f"{part}.{name}": tensor for part, module in parts for name, tensor in module.state_dict().items()}
