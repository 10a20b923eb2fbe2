"""Who takes part in a comparison: rules and checkpoints by name, and the bounds that know the future."""

from dataclasses import dataclass

from agent.policies import find_checkpoint, load_policy
from env.world import World
from runtime.errors import ConfigError
from runtime.planning.policies.guard import GuardedPolicy
from runtime.planning.policies.registry import PolicySpec
from runtime.planning.problem import PlanningProblem, Policy

CLAIRVOYANT, ROLLOUT = "clairvoyant", "rollout"
BOUNDS = (CLAIRVOYANT, ROLLOUT)
"""Not policies: they ask the twin what will happen."""

RAW = ":raw"
"""Behind the name of a checkpoint: without its guard."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy under the name that it was asked for by."""

    name: str
    spec: PolicySpec | None
    """None for a bound."""

    def build(self, problem: PlanningProblem, *, has_clock: bool = False) -> Policy:
        """Build the policy for one problem. Without a clock, as in the twin, a guard finds no decision late.

        Raises:
            PlanError: when no plan of the rule is legal there.
        """
        assert self.spec is not None  # bounds are no policies
        policy = self.spec.build(problem)
        if isinstance(policy, GuardedPolicy) and not has_clock:
            policy.clock = _stand_still
        return policy

    def build_others(self, problem: PlanningProblem, world: World) -> list[Policy]:
        """Build the policy for each of the other devices of a world.

        Raises:
            PlanError: when no plan of the rule is legal there.
        """
        return [self.build(problem) for _ in world.shift[1:]]


def _stand_still() -> float:
    return 0.0


def find_contestant(name: str) -> Contestant:
    """Find a rule, a checkpoint (`:raw` behind it: without guard) or a bound.

    Raises:
        ConfigError: for a name that is none of these.
    """
    if name in BOUNDS:
        return Contestant(name, None)
    if name.endswith(RAW):
        checkpoint = name.removesuffix(RAW)
        if find_checkpoint(checkpoint) is None:
            raise ConfigError(f"expected a checkpoint before {RAW}, got {name!r}: rules have no guard")
        return Contestant(name, load_policy(checkpoint, guard=False))
    return Contestant(name, load_policy(name))
