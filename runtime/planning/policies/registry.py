"""The one table of rule names: `load_policy(name)` gives a spec, `spec.build(problem)` the policy."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import ConfigError
from runtime.planning.policies import planner, static
from runtime.planning.problem import PlanningProblem, Policy
from runtime.types import Plan

_RULES: dict[str, Callable[[PlanningProblem], Policy]] = {
    "device-only": static.build_device_only,
    "edge-only": static.build_edge_only,
    "cloud-only": static.build_cloud_only,
    "encoded-input-to-cloud": static.build_encoded_input_to_cloud,
    "planner": planner.build_planner,
    "planner-priced": planner.build_priced,
}

_FIXED = re.compile(r"fixed:(?P<i>\d+),(?P<j>\d+)(@(?P<edge>[\w.-]+))?")


@dataclass(frozen=True)
class PolicySpec:
    """A policy by name, not yet bound to a model and a deployment."""

    name: str
    build: Callable[[PlanningProblem], Policy]
    """Builds the policy for one problem; `PlanError` when no plan of this rule is legal there."""


def policy_names() -> tuple[str, ...]:
    """Names that `load_policy` knows, `fixed` in its written form last."""
    return (*_RULES, "fixed:I,J[@EDGE]")


def load_policy(name: str) -> PolicySpec:
    """Find a rule by name.

    Args:
        name: one of `policy_names()`; `fixed:10,20@edge0` runs layers `[0, 10)` on the device, `[10, 20)` on edge0
            and the rest in the cloud.

    Raises:
        ConfigError: for a name that is not there, with the nearest that is.
    """
    if name in _RULES:
        return PolicySpec(name, _RULES[name])
    match = _FIXED.fullmatch(name)
    if match:
        i, j, edge = int(match["i"]), int(match["j"]), match["edge"]
        return PolicySpec(name, lambda problem: static.build_split(problem, i, j, edge))
    near = difflib.get_close_matches(name, _RULES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"expected a policy among {', '.join(policy_names())}, got {name!r}{hint}")


def fixed_policy(plan: Plan) -> PolicySpec:
    """Make the spec of the policy that always answers `plan`."""
    return PolicySpec(f"fixed:{plan.describe()}", lambda problem: static.build_fixed(problem, plan))
