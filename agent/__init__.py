"""The agent: policies by name or checkpoint, and the `offcut` command."""

from runtime.planning.policies.registry import PolicySpec, load_policy

__all__ = ["PolicySpec", "load_policy"]
