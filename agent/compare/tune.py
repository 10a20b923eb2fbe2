"""Search the rules' settings: the tuned estimator's constants and the priced planner's price, on training seeds only.

`python -m scripts.tune --out FILE` writes the report. One setting after the other is tried over a grid while the others
stay; what is best by the mean of ln(latency) over all training models and scenarios is kept, until nothing changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from agent.compare.contestants import Contestant
from agent.compare.play import Ground
from agent.report import markdown_table
from agent.train.config import HELD_OUT
from env.catalogue import make_sites
from env.draw import SCENARIOS
from env.scenario import SyntheticScenario
from runtime.planning.candidates import candidates
from runtime.planning.estimators import TunedSettings
from runtime.planning.policies.planner import DEFAULT_PRICE, PlannerPolicy
from runtime.planning.policies.registry import PolicySpec
from runtime.profiles.shipped import shipped_specs

GRID = {
    "bandwidth_time_s": (0.5, 1.0, 2.0, 4.0, 8.0),
    "mean_weight": (0.01, 0.03, 0.1, 0.3, 1.0),
    "stale_after_s": (0.75, 1.5, 3.0),
    "load_time_s": (1.0, 5.0, 20.0),
    "price": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
}

SEED = 500_000
"""Below 1000000, where comparisons begin, and above the seeds of trainings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """Search the settings of the tuned estimator and of the priced planner on training seeds."""

    out: Path = Path("runs/tune.md")
    """The report."""

    episodes: int = 3
    """Worlds of each model and scenario."""

    num_requests: int = 96
    """Requests of each."""

    rounds: int = 2
    """How often every setting is tried again."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is searched."""

    tuned: TunedSettings = field(default_factory=TunedSettings)
    price: float = 0.0

    def with_value(self, name: str, value: float) -> "Settings":
        """The same with one other."""
        if name == "price":
            return replace(self, price=value)
        return replace(self, tuned=replace(self.tuned, **{name: value}))

    def value(self, name: str) -> float:
        """One of them."""
        return self.price if name == "price" else float(getattr(self.tuned, name))

    def contestant(self) -> Contestant:
        """The planner under these settings."""
        return Contestant(
            "tried", PolicySpec("tried", lambda problem: PlannerPolicy(candidates(problem), self.tuned, self.price))
        )


def make_grounds(config: TuneConfig) -> dict[str, list[Ground]]:
    """Training models under every scenario."""
    models = [spec for spec in shipped_specs() if spec not in HELD_OUT]
    sites = [make_sites((spec,), seed=SEED + at)[0] for at, spec in enumerate(models)]
    return {
        kind: [
            Ground(
                site,
                at,
                SyntheticScenario(kind),
                kind,
                [(SEED + episode, at) for episode in range(config.episodes)],
                config.num_requests,
            )
            for at, site in enumerate(sites)
        ]
        for kind in SCENARIOS
    }


def weigh(grounds: dict[str, list[Ground]], settings: Settings) -> dict[str, float]:
    """Geometric mean latency over the sites' scales under every scenario."""
    contestant = settings.contestant()
    return {
        kind: float(np.exp(np.mean([np.log(e.relative).mean() for ground in own for e in ground.play(contestant)])))
        for kind, own in grounds.items()
    }


def search(
    grounds: dict[str, list[Ground]], names: Sequence[str], start: Settings, rounds: int
) -> tuple[Settings, str]:
    """Improve one setting after the other.

    Returns:
        What was best, and a table of everything that was tried.
    """
    known: dict[Settings, dict[str, float]] = {}

    def mean(settings: Settings) -> float:
        if settings not in known:
            known[settings] = weigh(grounds, settings)
        return float(np.log(list(known[settings].values())).mean())

    best = start
    for _ in range(rounds):
        before = best
        for name in names:
            best = min((best.with_value(name, value) for value in GRID[name]), key=mean)
        if best == before:
            break
    rows = [
        (
            *(f"{settings.value(name):g}" for name in names),
            *(f"{value:.4f}" for value in found.values()),
            f"{np.exp(mean(settings)):.4f}" + (" (best)" if settings == best else ""),
        )
        for settings, found in known.items()
    ]
    return best, markdown_table((*names, *grounds, "all"), rows)


def run_tune(config: TuneConfig) -> Path:
    """Search, and write the report."""
    grounds = make_grounds(config)
    names = [name for name in GRID if name != "price"]
    best, tried = search(grounds, names, Settings(), config.rounds)
    _, prices = search(grounds, ["price"], replace(best, price=DEFAULT_PRICE), 1)
    parts = [
        "# Settings of the rules, searched on training seeds",
        f"Geometric mean latency over the sites' scales; {len(grounds['static'])} training models, {config.episodes} "
        f"worlds of {config.num_requests} requests of each and scenario, seeds from {SEED} on.",
        "## Tuned estimator, planner without a price",
        tried,
        "## Price of the priced planner, under the best estimator",
        prices,
    ]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return config.out
