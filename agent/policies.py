"""Policies by name: the rules, and checkpoints behind a guard."""

from dataclasses import replace
from pathlib import Path

from agent.checkpoint import MANIFEST_FILE, Checkpoint, load_checkpoint
from agent.frozen import FrozenPolicy
from runtime.errors import ConfigError
from runtime.planning.policies import registry
from runtime.planning.policies.guard import GuardedPolicy, GuardSettings
from runtime.planning.policies.planner import build_planner
from runtime.planning.policies.registry import PolicySpec
from runtime.planning.problem import PlanningProblem, Policy

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
"""The checkpoints that ship: the repository's folder, and where an installed Offcut has it."""


def load_policy(name: str, *, guard: bool = True) -> PolicySpec:
    """Find a rule or a checkpoint.

    Args:
        name: a rule's name (`runtime.load_policy`), the folder of a checkpoint, or the name of one that ships, with or
            without `checkpoints/` before it.
        guard: whether a checkpoint's policy is built behind a `GuardedPolicy` whose fallback is the planner. Rules need
            no guard.

    Raises:
        ConfigError: for a name that is neither, or a checkpoint that cannot be used: which file, and why.
    """
    folder = find_checkpoint(name)
    if folder is None:
        try:
            return registry.load_policy(name)
        except ConfigError as error:
            shipped = ", ".join(shipped_checkpoints()) or "none"
            raise ConfigError(f"{error}; or the folder of a checkpoint (those that ship: {shipped})") from error
    checkpoint = load_checkpoint(folder)

    def build(problem: PlanningProblem) -> Policy:
        return _build(problem, checkpoint, guard)

    return PolicySpec(checkpoint.name, build)


def _build(problem: PlanningProblem, checkpoint: Checkpoint, guard: bool) -> Policy:
    policy = FrozenPolicy(problem, checkpoint)
    if not guard:
        return policy
    settings = replace(GuardSettings(), error_range=checkpoint.manifest.error_range)
    return GuardedPolicy(problem, policy, build_planner(problem), settings)


def find_checkpoint(name: str) -> Path | None:
    """Folder of the checkpoint that a name means; None where it can only be a rule.

    A rule's name is the rule even beside a folder of that name; `./NAME` is the folder.
    """
    given = Path(name)
    is_path = len(given.parts) > 1 or name.startswith(".")
    if not is_path and name in registry.policy_names():
        return None
    # Only a folder that holds a manifest wins over what ships, but a path that leads nowhere is an error of its own.
    for folder in (given, CHECKPOINTS.parent / given, CHECKPOINTS / given):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    return given if is_path else None


def shipped_checkpoints() -> tuple[str, ...]:
    """Names of the checkpoints that ship, sorted."""
    return tuple(sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{MANIFEST_FILE}")))
