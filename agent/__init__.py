"""The agent: policies by name or checkpoint, and the `offcut` command."""

from agent.policies import load_policy
from runtime.planning.policies.registry import PolicySpec

__all__ = ["PolicySpec", "load_policy"]
