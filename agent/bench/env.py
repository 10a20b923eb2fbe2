"""Env: steps per second of the vector environment as training uses it, resets and the planner's own runs included.

Each value is the most of five runs by turns, of 64 environments in one thread, beside the time of a fixed numpy loop in the
same runs. Seconds are processor time, so that waiting for a core does not count; caches that others fill still do, and
the loop tells by how much. Actions are the planner's; choosing them is not counted.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agent.bench.report import Bar, Report
from env.catalogue import make_sites
from env.draw import SCENARIOS
from env.site import Site
from env.spaces import Observation
from env.split_inference import NUM_REQUESTS
from env.vector import SplitInferenceVectorEnv
from runtime.planning.features import CANDIDATE_COLUMNS

NUM_ENVS = 64
RUNS = 5
SITES_PER_MODEL = 4
ONE_MODEL = "torchvision:resnet18"
SEED = 3

_TOTAL = CANDIDATE_COLUMNS.index("total:total")
_MIX = "12 models x 4 sites, all scenarios"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """Time the steps of 64 environments, resets included: one site, and all shipped models at several sites each."""

    json: Path | None = None
    """Where to write the report as JSON."""

    quick: bool = False
    """One short run: shows that everything works, not how fast."""


def run_env(config: EnvConfig) -> Report:
    """Measure one site and the mix of models in each scenario; the bar is held to the mix of everything."""
    report = Report("env", f"{NUM_ENVS} environments, episodes of {NUM_REQUESTS} requests; one core, resets included")
    one = make_sites((ONE_MODEL,), seed=SEED)
    many = one if config.quick else make_sites(per_model=SITES_PER_MODEL, seed=SEED)
    cases = {"1 site, both": _Case(one, ("both",)), _MIX: _Case(many, SCENARIOS)}
    if not config.quick:
        cases |= {f"12 models x 4 sites, {kind}": _Case(many, (kind,)) for kind in SCENARIOS}
    most_hz, loop_s = dict.fromkeys(cases, 0.0), math.inf
    for _ in range(1 if config.quick else RUNS):  # by turns: a busy moment slows no case alone
        for name, case in cases.items():
            most_hz[name] = max(most_hz[name], case.time(NUM_REQUESTS // (16 if config.quick else 1)))
        loop_s = min(loop_s, _time_loop())
    for name, hz in most_hz.items():
        report.add(name, "steps", hz, "1/s")
        report.add(name, "step of all", NUM_ENVS / hz * 1e3, "ms")
    report.add("fixed numpy loop", "step of all", loop_s * 1e3, "ms")
    report.bars.append(Bar("env_steps_per_s", most_hz[_MIX], 40_000.0, "higher"))
    return report


class _Case:
    """Environments that go on from one run to the next."""

    def __init__(self, sites: tuple[Site, ...], scenarios: tuple[str, ...]) -> None:
        self._envs = SplitInferenceVectorEnv(NUM_ENVS, sites=sites, scenario=scenarios, staggered=True)
        self._seen, _ = self._envs.reset(seed=SEED)
        self.time(NUM_REQUESTS)  # after this every environment has had its first, shorter episode

    def time(self, num_steps: int) -> float:
        """Steps per second over so many steps of all environments, in which each episode ends as often as ever."""
        spent_s = 0.0
        for _ in range(num_steps):
            actions = _planned(self._seen)
            start_s = time.process_time()
            self._seen, *_ = self._envs.step(actions)
            spent_s += time.process_time() - start_s
        return NUM_ENVS * num_steps / spent_s


def _planned(seen: Observation) -> npt.NDArray[np.int64]:
    """The planner's choice, read from the observation."""
    total = seen["candidates"].reshape(NUM_ENVS, -1, len(CANDIDATE_COLUMNS))[..., _TOTAL]
    chosen: npt.NDArray[np.int64] = np.where(seen["mask"] > 0, total, np.inf).argmin(axis=1)
    return chosen


def _time_loop() -> float:
    """Least seconds of a fixed amount of arithmetic on arrays that the caches hold."""
    values = np.linspace(0.0, 1.0, 4096)
    least_s = math.inf
    for _ in range(20):
        start_s = time.process_time()
        for _ in range(20):
            np.log(values + 1.0).cumsum().sum()
        least_s = min(least_s, time.process_time() - start_s)
    return least_s
