"""What is played where: a task is one site under one scenario, all policies; tasks run in processes side by side."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agent.compare.contestants import Contestant, find_contestant
from agent.compare.play import Episode, Ground
from env.catalogue import make_sites
from env.scenario import Scenario, SyntheticScenario, TraceScenario
from env.site import Site


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a comparison on the twin is made of; goes to the processes as it is."""

    policies: tuple[str, ...]
    scenarios: tuple[str, ...]
    models: tuple[str, ...]
    per_model: int
    episodes: int  # of every site and scenario
    num_requests: int
    input_kind: str
    seed: int
    traces: Path | None
    split: str
    self_play: bool

    @property
    def num_sites(self) -> int:
        """Sites of all models."""
        return len(self.models) * self.per_model

    def tasks(self) -> list[tuple[str, int]]:
        """Scenario and number of the site, of every task."""
        return [(scenario, site) for site in range(self.num_sites) for scenario in self.scenarios]

    def site(self, number: int) -> Site:
        """Build a site. Its machines are drawn from the comparison's seed, which no training uses."""
        model, at = divmod(number, self.per_model)
        return make_sites((self.models[model],), input_kind=self.input_kind, seed=self.seed + model * 1000 + at)[0]

    def world_seed(self, site: int, episode: int) -> tuple[int, int]:
        """Seed of a world; the first part is what no training uses."""
        return self.seed + episode, site

    def scenario(self, kind: str) -> Scenario:
        """Make a scenario: the fitted families, or recorded traces.

        Raises:
            ConfigError: when there is no such kind, or no such traces.
        """
        if self.traces is None:
            return SyntheticScenario(kind)
        return TraceScenario(kind, self.traces / "network", self.traces / "load", split=self.split)

    def ground(self, kind: str, number: int) -> Ground:
        """Draw the worlds of a task."""
        seeds = [self.world_seed(number, episode) for episode in range(self.episodes)]
        return Ground(_site(self, number), number, self.scenario(kind), kind, seeds, self.num_requests)


@lru_cache(maxsize=64)
def _site(plan: Plan, number: int) -> Site:
    return plan.site(number)


@lru_cache(maxsize=64)
def _contestant(name: str) -> Contestant:
    return find_contestant(name)


def play_task(plan: Plan, task: tuple[str, int]) -> list[Episode]:
    """Play one task with every policy."""
    ground = plan.ground(*task)
    contestants = [_contestant(name) for name in plan.policies]
    return [episode for one in contestants for episode in ground.play(one, self_play=plan.self_play)]


def play_all(plan: Plan, workers: int) -> Iterator[tuple[tuple[str, int], list[Episode]]]:
    """Play every task; gives each when it is done, in no order."""
    tasks = plan.tasks()
    if workers == 1:
        for task in tasks:
            yield task, play_task(plan, task)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(play_task, plan, task): task for task in tasks}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def in_order(plan: Plan, found: Sequence[tuple[tuple[str, int], list[Episode]]]) -> list[Episode]:
    """All episodes, by scenario, policy, site and seed: the same order whichever task was done first."""
    episodes = [episode for _, own in found for episode in own]
    scenarios, policies = list(plan.scenarios), list(plan.policies)
    return sorted(episodes, key=lambda e: (scenarios.index(e.scenario), policies.index(e.policy), e.site, e.seed))
