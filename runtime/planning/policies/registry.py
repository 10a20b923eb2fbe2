"""The one table of rule names: `load_policy(name)` gives a spec, `spec.build(problem)` the policy."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.errors import ConfigError
from runtime.planning.estimators import Estimator, last_value, tuned
from runtime.planning.policies import d3, dads, loadpart, neurosurgeon, optimal, planner, static
from runtime.planning.problem import PlanningProblem, Policy
from runtime.types import Plan, Tier

_RULES: dict[str, Callable[[PlanningProblem], Policy]] = {
    "device-only": static.build_device_only,
    "edge-only": static.build_edge_only,
    "cloud-only": static.build_cloud_only,
    "encoded-input-to-cloud": static.build_encoded_input_to_cloud,
    "planner": planner.build_planner,
    "planner-priced": planner.build_priced,
}

_PUBLISHED: dict[str, Callable[[PlanningProblem, Estimator], Policy]] = {
    "neurosurgeon": neurosurgeon.build_neurosurgeon,
    "neurosurgeon-k": neurosurgeon.build_neurosurgeon_k,
    "dads-light": dads.build_light,
    "dads-light-k": dads.build_light_k,
    "dads-heavy": dads.build_heavy,
    "dads-heavy-k": dads.build_heavy_k,
    "dads": dads.build_by_load,
    "dads-k": dads.build_by_load_k,
    "loadpart": loadpart.build_loadpart,
    "d3": d3.build_d3,
    "d3-hpa": d3.build_hpa,
    "optimal": optimal.build_optimal,
}
"""Rules with a choice of estimator; `-k`: the server's load factor counts."""

_TIERS = {"edge": Tier.EDGE, "cloud": Tier.CLOUD}

_RULE = re.compile(r"(?P<rule>[\w-]+)(@(?P<tier>edge|cloud))?(?P<tuned>\+tuned)?")

_FIXED = re.compile(r"fixed:(?P<i>\d+),(?P<j>\d+)(@(?P<edge>[\w.-]+))?")


@dataclass(frozen=True)
class PolicySpec:
    """A policy by name, not yet bound to a model and a deployment."""

    name: str
    build: Callable[[PlanningProblem], Policy]
    """Builds the policy for one problem; `PlanError` when no plan of this rule is legal there."""


def policy_names() -> tuple[str, ...]:
    """Names that `load_policy` knows, without the suffixes that it takes; `fixed` in its written form last."""
    return (*_RULES, *_PUBLISHED, "fixed:I,J[@EDGE]")


def load_policy(name: str) -> PolicySpec:
    """Find a rule by name.

    Args:
        name: one of `policy_names()`; `fixed:10,20@edge0` runs layers `[0, 10)` on the device, `[10, 20)` on edge0
            and the rest in the cloud. The published rules take suffixes: `loadpart@cloud` uses no tier but
            the device and the cloud (`@edge` likewise), `loadpart+tuned` believes tuned readings instead of the last.

    Raises:
        ConfigError: for a name that is not there, with the nearest that is.
    """
    if name in _RULES:
        return PolicySpec(name, _RULES[name])
    match = _RULE.fullmatch(name)
    if match and match["rule"] in _PUBLISHED:
        build, estimator = _PUBLISHED[match["rule"]], tuned if match["tuned"] else last_value
        tier = _TIERS.get(match["tier"])
        return PolicySpec(name, lambda problem: build(_restrict(problem, tier), estimator))
    match = _FIXED.fullmatch(name)
    if match:
        i, j, edge = int(match["i"]), int(match["j"]), match["edge"]
        return PolicySpec(name, lambda problem: static.build_split(problem, i, j, edge))
    near = difflib.get_close_matches(name, (*_RULES, *_PUBLISHED), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"expected a policy among {', '.join(policy_names())}, got {name!r}{hint}")


def _restrict(problem: PlanningProblem, tier: Tier | None) -> PlanningProblem:
    """Allow no tier but the device and `tier`."""
    if tier is None:
        return problem
    allowed = tuple(t for t in problem.constraints.allowed_tiers if t in (Tier.DEVICE, tier))
    return replace(problem, constraints=replace(problem.constraints, allowed_tiers=allowed))


def fixed_policy(plan: Plan) -> PolicySpec:
    """Make the spec of the policy that always answers `plan`."""
    return PolicySpec(f"fixed:{plan.describe()}", lambda problem: static.build_fixed(problem, plan))
