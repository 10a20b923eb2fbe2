"""Where a training learns and where it is evaluated: sites and scenarios made from the settings."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agent.train.config import TrainConfig
from env.catalogue import make_sites
from env.correction import corrected
from env.live_site import LiveSite, make_live_sites
from env.log_scenario import LogScenario, site_from_log
from env.logs import read_log
from env.scenario import Scenario, SyntheticScenario, TraceScenario
from env.site import Site
from env.traces import trace_files
from runtime.profiles.shipped import load_shipped_profile
from runtime.types import INPUT_KINDS


@dataclass(frozen=True, slots=True)
class Worlds:
    """Sites and scenarios; an episode takes place at one of each."""

    sites: tuple[Site, ...]
    scenarios: dict[str, Scenario]
    """By name: the kind, `-traces` behind it where it plays recordings."""
    live: tuple[LiveSite, ...] = ()
    """What it takes to start these sites on this machine; only with `--live`."""


def training_worlds(config: TrainConfig) -> Worlds:
    """Make what is learnt on.

    Raises:
        ConfigError: when there is no such model, scenario or trace.
    """
    if config.from_logs is not None:
        return _logged_worlds(config, config.from_logs)
    if config.live:
        live = _live_sites(config.learnt_models, config.seed)
        return Worlds(tuple(one.site for one in live), _scenarios(config, config.scenarios, "train"), live)
    sites = _sites(config, config.learnt_models, config.per_model, 2 * config.seed + 1)
    return Worlds(sites, _scenarios(config, config.scenarios, "train"))


def validation_worlds(config: TrainConfig, models: tuple[str, ...]) -> Worlds:
    """Make what is evaluated on: one site of each model and input kind, whatever the training's seed.

    A live training is evaluated in the twin, at its own sites.

    Raises:
        ConfigError: when there is no such model, scenario or trace.
    """
    if config.from_logs is not None:
        return _logged_worlds(config, config.from_logs)
    if config.live:
        sites = tuple(one.site for one in _live_sites(models, config.seed))
        return Worlds(sites, _scenarios(config, config.eval_scenarios, "validation"))
    return Worlds(_sites(config, models, 1, 0), _scenarios(config, config.eval_scenarios, "validation"))


@lru_cache(maxsize=1)
def _live_sites(models: tuple[str, ...], seed: int) -> tuple[LiveSite, ...]:
    """Load models once for training and evaluation."""
    return make_live_sites(models, seed=seed)


def _logged_worlds(config: TrainConfig, path: Path) -> Worlds:
    """A user's own deployment, its nodes, links, load and requests as logged; a seed draws where the log begins."""
    log = read_log(path)
    site = site_from_log(log, load_shipped_profile(config.models[0]))
    sites, (scenario,) = corrected(log.correction(), [site], [LogScenario(log)])
    return Worlds(sites, {scenario.kind: scenario})


def _sites(config: TrainConfig, models: tuple[str, ...], per_model: int, seed: int) -> tuple[Site, ...]:
    """Draw machines: odd seeds for training, even ones for evaluation, so that no site is in both."""
    return tuple(
        site
        for at, kind in enumerate(config.input_kinds)
        for site in make_sites(models, per_model=per_model, input_kind=kind, seed=seed * len(INPUT_KINDS) * 2 + at)
    )


def _scenarios(config: TrainConfig, kinds: tuple[str, ...], split: str) -> dict[str, Scenario]:
    made: dict[str, Scenario] = {}
    for at, kind in enumerate(kinds):
        name = f"{kind}.{at}" if kind in kinds[:at] else kind
        if config.synthetic:
            made[name] = SyntheticScenario(kind)
        if config.traces is not None:
            networks, loads = config.traces / "network", config.traces / "load"
            made[f"{name}-traces"] = TraceScenario(kind, networks, loads, split=split)
    return made


def describe_traces(config: TrainConfig) -> dict[str, object] | None:
    """How many training files there are, and a hash of their names: what was learnt from, without a path."""
    if config.traces is None:
        return None
    files = [file for part in ("network", "load") for file in trace_files(config.traces / part, "train")]
    names = "\n".join(f"{file.parent.name}/{file.name}" for file in files)
    return {"files": len(files), "names_sha256": hashlib.sha256(names.encode()).hexdigest()}
