"""`offcut/SplitInferenceLive-v0`: the same environment on the real runtime."""

from collections.abc import Sequence
from pathlib import Path

from env.live import LiveBackend
from env.live_site import LiveSite, make_live_sites
from env.reward import EXCESS_WEIGHT
from env.scenario import Scenario
from env.split_inference import NUM_REQUESTS, BackendEnv, check_sizes
from runtime.planning.policies.guard import GuardSettings


class SplitInferenceLiveEnv(BackendEnv):
    """`BackendEnv` whose every step is a real request through device, edge nodes and cloud (`env.live`).

    `info["paused_s"]` tells by how much the world's clock was set back because a step came later than the next request.
    A step takes as long as the gap between two requests; several devices on one edge are played as background requests.

    Args:
        models: specs, as `env.live_site.make_live_sites` takes them.
        scenario: as `BackendEnv`.
        num_requests: steps of an episode.
        sites: made before, instead of models.
        log_folder: where the device's events go, one line per request; None writes none.
        guard, excess_weight: as `LiveBackend`.
        render_mode: none is known.

    Raises:
        ConfigError: when there is no such model or scenario, or a number is not positive.
        ModelError: when a model cannot be loaded.
    """

    def __init__(
        self,
        models: Sequence[str] | None = None,
        scenario: str | Scenario | Sequence[str | Scenario] = "both",
        *,
        num_requests: int = NUM_REQUESTS,
        sites: Sequence[LiveSite] | None = None,
        log_folder: Path | None = None,
        guard: GuardSettings | None = None,
        excess_weight: float = EXCESS_WEIGHT,
        render_mode: str | None = None,
    ) -> None:
        check_sizes(num_requests, 1)
        places = make_live_sites(models) if sites is None else tuple(sites)
        backend = LiveBackend(
            places, num_requests=num_requests, log_folder=log_folder, guard=guard, excess_weight=excess_weight
        )
        super().__init__(backend, scenario, render_mode=render_mode)
