"""What training saw and did: for the checkpoint's manifest and for TensorBoard."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.checkpoint import SeenRange
from agent.frozen import OVER_BEST
from env.episodes import Completed
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS

_USES = [CANDIDATE_COLUMNS.index(f"uses:{tier}") for tier in ("device", "edge", "cloud")]
_ERRORS = [at for at, name in enumerate(CONTEXT_COLUMNS) if name.startswith("errors:")]
_UNKNOWN = np.log10(1.001)  # how 1 is shown
KINDS = ("device", "edge", "cloud", "device+edge", "device+cloud", "edge+cloud", "device+edge+cloud")
"""Where a plan runs layers."""
_KIND_OF = np.array([0, 0, 1, 3, 2, 4, 5, 6])  # by device + 2 edge + 4 cloud

_BIN, _BINS = 0.01, 400
"""Medians of prediction errors are counted in steps of 0.01 of log10(measured / predicted), from 0.01 to 100."""
_TRUSTED = (0.5, 99.5)
"""Percentiles of the medians between which the guard trusts the policy, before they are widened."""
_WIDER = 1.5
"""Factor by which the trusted range of measured / predicted is widened to each side. Guess: a live system's errors are
somewhat wider than the twin's."""


@dataclass(slots=True)
class Facts:
    """Over a whole training, goes into its state: ranges of the observations, and medians of prediction errors."""

    seen: SeenRange | None = None
    error_counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))

    def observe(self, observations: dict[str, npt.NDArray[Any]]) -> None:
        """Take the observations of a rollout, each of shape (steps, environments, ...)."""
        flat = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in observations.items()}
        seen = SeenRange.of(flat["candidates"], flat["context"], flat["mask"])
        self.seen = seen if self.seen is None else self.seen.merge(seen)
        errors = flat["context"][:, _ERRORS]
        # The first errors of an episode say little.
        medians = np.median(errors[(np.abs(errors - _UNKNOWN) > 1e-6).all(axis=1)], axis=1)
        bins = np.clip((medians / _BIN).astype(np.int64) + _BINS // 2, 0, _BINS - 1)
        self.error_counts += np.bincount(bins, minlength=_BINS)

    def error_range(self) -> tuple[float, float]:
        """Range of the median of measured / predicted - 1 within which the guard is to trust the policy."""
        total = self.error_counts.sum()
        if not total:
            return -0.7, 1.5  # the guard's own, until anything is known
        shares = np.cumsum(self.error_counts) / total
        low, high = (int(np.searchsorted(shares, percent / 100.0)) for percent in _TRUSTED)
        least, most = 10.0 ** ((low - _BINS // 2) * _BIN), 10.0 ** ((high + 1 - _BINS // 2) * _BIN)
        return round(least / _WIDER - 1.0, 3), round(most * _WIDER - 1.0, 3)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        seen = None if self.seen is None else {"candidates": self.seen.candidates, "context": self.seen.context}
        return {"seen": seen, "error_counts": self.error_counts.tolist()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Facts":
        """Read what `to_json` gave."""
        seen = saved["seen"]
        made = None
        if seen is not None:
            made = SeenRange(*(tuple((low, high) for low, high in seen[part]) for part in ("candidates", "context")))
        return cls(made, np.array(saved["error_counts"], dtype=np.int64))


def decisions(observations: dict[str, npt.NDArray[Any]], actions: npt.NDArray[Any]) -> dict[str, float]:
    """Share of the decisions by kind of plan, and of those that the planner would have taken."""
    mask = observations["mask"].reshape(-1, observations["mask"].shape[-1]) > 0
    rows = observations["candidates"].reshape(*mask.shape, -1)
    each, chosen = np.arange(len(mask)), actions.reshape(-1).astype(np.int64)
    kinds = _KIND_OF[(rows[each, chosen][:, _USES] @ np.array([1, 2, 4])).astype(np.int64)]
    counts = np.bincount(kinds, minlength=len(KINDS)) / len(kinds)
    planned = np.where(mask, rows[..., OVER_BEST], np.inf).argmin(axis=1)
    return {
        **{f"decisions/{kind}": float(share) for kind, share in zip(KINDS, counts, strict=True)},
        "decisions/as_planner": float((chosen == planned).mean()),
    }


def latencies(ended: list[Completed]) -> dict[str, float]:
    """Reward and latency against the planner of the requests that ended in a rollout."""
    if not sum(map(len, ended)):
        return {}
    latency_s, deadline_s, reference_s, term = (
        np.concatenate([getattr(one, name) for one in ended])
        for name in ("latency_s", "deadline_s", "reference_s", "term")
    )
    ours, theirs = np.minimum(latency_s, deadline_s), np.minimum(reference_s, deadline_s)
    return {
        "reward/term": float(term.mean()),
        "reward/log": float(-np.log(ours / theirs).mean()),
        "reward/excess": float((term + np.log(ours / theirs)).mean()),
        "latency/geometric_ratio": float(np.exp(np.log(ours / theirs).mean())),
        "latency/mean_ratio": float(ours.mean() / theirs.mean()),
        "latency/p95_ratio": float(np.percentile(ours, 95) / np.percentile(theirs, 95)),
        "latency/missed_frac": float((latency_s > deadline_s).mean()),
        "latency/planner_missed_frac": float((reference_s > deadline_s).mean()),
    }
