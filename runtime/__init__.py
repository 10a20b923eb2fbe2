"""Split inference that runs: models, nodes, plans, sessions.

Importing this package loads no torch; the names below are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.deployment import Deployment, load_deployment
    from runtime.device.connect import connect
    from runtime.device.session import InferenceResult, Session
    from runtime.errors import OffcutError
    from runtime.model.graph import LayerGraph, trace
    from runtime.model.segment import run_local
    from runtime.model.zoo import Model, load_model
    from runtime.planning.policies.registry import PolicySpec, fixed_policy, load_policy, policy_names
    from runtime.profiles.record import MeasuredModel
    from runtime.profiles.shipped import load_profiles, load_shipped_profile
    from runtime.testbed.cluster import Cluster
    from runtime.types import Constraints, Plan, SystemState, Tier

_HOMES = {
    "Cluster": "runtime.testbed.cluster",
    "Constraints": "runtime.types",
    "Deployment": "runtime.deployment",
    "InferenceResult": "runtime.device.session",
    "LayerGraph": "runtime.model.graph",
    "MeasuredModel": "runtime.profiles.record",
    "Model": "runtime.model.zoo",
    "OffcutError": "runtime.errors",
    "Plan": "runtime.types",
    "PolicySpec": "runtime.planning.policies.registry",
    "Session": "runtime.device.session",
    "SystemState": "runtime.types",
    "Tier": "runtime.types",
    "connect": "runtime.device.connect",
    "fixed_policy": "runtime.planning.policies.registry",
    "load_deployment": "runtime.deployment",
    "load_model": "runtime.model.zoo",
    "load_policy": "runtime.planning.policies.registry",
    "load_profiles": "runtime.profiles.shipped",
    "load_shipped_profile": "runtime.profiles.shipped",
    "policy_names": "runtime.planning.policies.registry",
    "run_local": "runtime.model.segment",
    "trace": "runtime.model.graph",
}

__all__ = [
    "Cluster",
    "Constraints",
    "Deployment",
    "InferenceResult",
    "LayerGraph",
    "MeasuredModel",
    "Model",
    "OffcutError",
    "Plan",
    "PolicySpec",
    "Session",
    "SystemState",
    "Tier",
    "connect",
    "fixed_policy",
    "load_deployment",
    "load_model",
    "load_policy",
    "load_profiles",
    "load_shipped_profile",
    "policy_names",
    "run_local",
    "trace",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
