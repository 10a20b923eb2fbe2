"""Where the twin's seconds differ from the runtime's, component by component, and a correction fitted to that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from env.scenario import Scenario
from env.site import Site
from env.traces import FloatArray
from env.world import World
from runtime.errors import ConfigError
from runtime.planning.problem import PlanningProblem
from runtime.types import DEVICE_NODE, LatencyBreakdown, ModelProfile, NodeProfile

COMPONENTS = ("device", "uplink", "edge", "backbone", "cloud", "downlink", "codec", "queueing", "fixed")
"""Where a request's time can go: computing on three tiers, transfers out, between nodes and back, coding, waiting, and
what no other component claims."""

TIERS = ("device", "edge", "cloud")
LINKS = ("uplink", "backbone", "downlink")

MIN_PART_S = 0.004
"""Shorter parts tell no factor: what is constant in them outweighs the rest. They count in `fixed`. Guess."""

MIN_SAMPLES = 5
"""With fewer parts of a component its factor stays 1."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Parts:
    """One request's seconds by component; they add up to the latency."""

    seconds: Mapping[str, float]  # by `COMPONENTS`
    messages: int
    """Between nodes, there and back."""

    @property
    def total_s(self) -> float:
        """The latency."""
        return sum(self.seconds.values())


def parts_of(latency: LatencyBreakdown, tier_of: Mapping[str, str]) -> Parts:
    """Sort a breakdown into components.

    Args:
        latency: measured or estimated.
        tier_of: tier (`TIERS`) of every node, the device included.
    """
    seconds = dict.fromkeys(COMPONENTS, 0.0)
    for name, spent_s in latency.compute_s.items():
        seconds[tier_of[name]] += spent_s
    for link, spent_s in latency.transfer_s.items():
        source, target = link.split(">")
        seconds["uplink" if source == DEVICE_NODE else "downlink" if target == DEVICE_NODE else "backbone"] += spent_s
    seconds["codec"] = latency.codec_s
    seconds["queueing"] = latency.queueing_s
    seconds["fixed"] = latency.other_s + latency.decision_s
    return Parts(seconds, len(latency.transfer_s))


@dataclass(frozen=True, slots=True)
class Correction:
    """What turns the twin's arithmetic into this machine's, or this deployment's, seconds. The default changes nothing.

    Factors on computing become contention and those on links become rates: a policy finds them in its readings, as it
    does on the runtime. Coding and messages are constants of the profile.
    """

    compute: Mapping[str, float] = field(default_factory=dict)
    """By tier: seconds it takes over those that the profile tells."""
    transfer: Mapping[str, float] = field(default_factory=dict)
    """By kind of link: seconds that a transfer takes over those at the world's rate."""
    codec: float = 1.0
    """Seconds of coding over those that the profile tells."""
    message_s: float = 0.0
    """Seconds more per message."""
    samples: int = 0
    """Requests that it was fitted to."""
    version: int = _VERSION

    def site(self, site: Site) -> Site:
        """The site whose profile has the corrected constants; plans and their order may differ from before."""
        if self.codec == 1.0 and self.message_s == 0.0:
            return site
        problem = site.problem
        nodes = {name: self._node(profile) for name, profile in problem.profile.nodes.items()}
        profile = ModelProfile(problem.graph, nodes, problem.profile.lossless_ratio)
        corrected = PlanningProblem(profile, problem.deployment, problem.constraints, problem.input_kind)
        return Site(site.name, corrected, site.ranges)

    def _node(self, profile: NodeProfile) -> NodeProfile:
        return replace(
            profile,
            encode_bytes_per_s=profile.encode_bytes_per_s / self.codec,
            decode_bytes_per_s=profile.decode_bytes_per_s / self.codec,
            fixed_s=max(profile.fixed_s + self.message_s, 0.0),
        )

    def world(self, site: Site, world: World) -> World:
        """The world in which nodes and links are as slow as was found."""
        layout = site.candidates.costs.layout
        tier_of = tiers_of(site)
        factors = [self.compute.get(tier_of[name], 1.0) for name in layout.nodes]
        slower = [self.transfer.get(_kind(link), 1.0) for link in layout.links]
        return replace(
            world,
            contention=world.contention * np.array(factors)[:, None],
            scale=world.scale / np.array(slower),
        )

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)))


def read_correction(path: Path) -> Correction:
    """Read what `Correction.write` wrote.

    Raises:
        ConfigError: when it is none.
    """
    try:
        correction = msgspec.json.decode(path.read_bytes(), type=Correction)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"expected {path} to be a correction by `offcut calibrate`, got: {error}") from error
    if correction.version != _VERSION:
        raise ConfigError(f"expected a correction of version {_VERSION}, got {correction.version}; calibrate anew")
    return correction


def tiers_of(site: Site) -> dict[str, str]:
    """Tier of every node of a site, as `Parts` names it."""
    nodes = site.problem.deployment.nodes
    return {DEVICE_NODE: "device", **{node.name: node.tier.label for node in nodes}}


def _kind(link: tuple[str, str]) -> str:
    return "uplink" if link[0] == DEVICE_NODE else "downlink" if link[1] == DEVICE_NODE else "backbone"


@dataclass(frozen=True)
class CorrectedScenario:
    """A scenario as the corrected machines and links play it."""

    plain: Scenario
    correction: Correction

    @property
    def kind(self) -> str:
        """One of `SCENARIOS`."""
        return self.plain.kind

    def world(self, site: Site, seed: int | Sequence[int], num_requests: int) -> World:
        """Draw an episode's world."""
        return self.correction.world(site, self.plain.world(site, seed, num_requests))


def corrected(
    correction: Correction, sites: Sequence[Site], scenarios: Sequence[Scenario]
) -> tuple[tuple[Site, ...], tuple[Scenario, ...]]:
    """Sites and scenarios of a corrected twin: what its environments are made with, instead of the plain ones."""
    return tuple(map(correction.site, sites)), tuple(CorrectedScenario(one, correction) for one in scenarios)


def fit_correction(pairs: Sequence[tuple[Parts, Parts]]) -> Correction:
    """Fit a correction to requests that were both worked out and measured.

    Factors are medians of ratios over the parts that are long enough to tell one; what then remains of a request, but for
    waiting, is shared out over its messages, and the median is what each needs more.

    Args:
        pairs: worked out, measured; of requests that went as planned.
    """
    factors = {name: _factor(pairs, name) for name in (*TIERS, *LINKS, "codec")}
    rest = [
        (_worked(measured) - _worked(worked, factors)) / worked.messages
        for worked, measured in pairs
        if worked.messages
    ]
    return Correction(
        compute={name: factors[name] for name in TIERS},
        transfer={name: factors[name] for name in LINKS},
        codec=factors["codec"],
        message_s=float(np.median(rest)) if len(rest) >= MIN_SAMPLES else 0.0,
        samples=len(pairs),
    )


def _factor(pairs: Sequence[tuple[Parts, Parts]], name: str) -> float:
    ratios = [
        measured.seconds[name] / worked.seconds[name]
        for worked, measured in pairs
        if worked.seconds[name] >= MIN_PART_S
    ]
    return float(np.median(ratios)) if len(ratios) >= MIN_SAMPLES else 1.0


def _worked(parts: Parts, factors: Mapping[str, float] | None = None) -> float:
    """Seconds without waiting, after the factors."""
    known = factors or {}
    return sum(known.get(name, 1.0) * seconds for name, seconds in parts.seconds.items() if name != "queueing")


@dataclass(frozen=True, slots=True)
class ComponentError:
    """One component over many requests."""

    component: str
    count: int  # requests that have it
    worked_s: float  # median, of those
    measured_s: float

    @property
    def error_frac(self) -> float:
        """Worked out over measured, minus 1; NaN where nothing was measured."""
        return self.worked_s / self.measured_s - 1.0 if self.measured_s > 0.0 else float("nan")


def component_errors(pairs: Sequence[tuple[Parts, Parts]]) -> tuple[ComponentError, ...]:
    """Medians per component, over the requests in which it was worked out or measured at all; then the total."""
    rows = []
    for name in COMPONENTS:
        both = [(a.seconds[name], b.seconds[name]) for a, b in pairs if max(a.seconds[name], b.seconds[name]) > 0.0]
        rows.append(_row(name, np.array(both).reshape(-1, 2)))
    rows.append(_row("total", np.array([(a.total_s, b.total_s) for a, b in pairs]).reshape(-1, 2)))
    return tuple(rows)


def _row(name: str, both: FloatArray) -> ComponentError:
    if not len(both):
        return ComponentError(name, 0, float("nan"), float("nan"))
    worked_s, measured_s = np.median(both, axis=0).tolist()
    return ComponentError(name, len(both), worked_s, measured_s)
