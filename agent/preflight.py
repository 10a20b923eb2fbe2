"""What `offcut infer` can find wrong before it loads torch and the model, which takes seconds."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from agent import load_policy
from agent.config import InferConfig
from runtime.deployment import PRETRAINED, SEEDED, Deployment, load_deployment
from runtime.errors import ConfigError
from runtime.model.encoded import read_file
from runtime.planning.policies.registry import PolicySpec
from runtime.planning.problem import PlanningProblem, Policy
from runtime.types import LOSSY_CODECS, Plan, SystemState
from runtime.wire.keys import load_keys

Files: TypeAlias = tuple[Path, ...]
"""One request: as many files as the deployment's batch size."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to run, checked as far as that goes without the model."""

    deployment: Deployment
    policy: PolicySpec
    shadow: PolicySpec | None
    requests: tuple[Files, ...]


def prepare(config: InferConfig) -> Prepared:
    """Read and check the deployment, the policy, the codec, the keys and the pictures.

    Raises:
        ConfigError: naming the option or the file.
        InputError: naming the picture.
    """
    deployment = load_deployment(config.deployment)
    policy = _check_arguments(deployment, config)
    shadow = None if config.shadow is None else load_policy(config.shadow)
    if shadow is not None and config.codec is not None:
        shadow = _with_codec(shadow, config.codec)
    return Prepared(deployment, policy, shadow, group_files(config.inputs, deployment.model.batch_size))


def _check_arguments(deployment: Deployment, config: InferConfig) -> PolicySpec:
    """Find every mistake that needs no model to be seen, and the policy."""
    default = "cloud-only" if deployment.cloud is not None else "edge-only"
    policy = load_policy(config.policy or default)
    if policy.name == "cloud-only" and deployment.cloud is None:
        raise ConfigError("expected a cloud node in the deployment for --policy cloud-only, got none; use edge-only")
    if policy.name == "edge-only" and not deployment.edges:
        raise ConfigError("expected an edge node in the deployment for --policy edge-only, got none; use cloud-only")
    edge = policy.name.partition("@")[2]
    edges = [node.name for node in deployment.edges]
    if policy.name.startswith("fixed:") and edge and edge not in edges:
        raise ConfigError(f"expected an edge node among {edges} behind @ in --policy, got {edge!r}")
    if config.codec is not None:
        if config.codec in LOSSY_CODECS and deployment.constraints.lossless_only:
            raise ConfigError(
                f"--codec {config.codec} loses precision; set lossless_only = false under [constraints] of "
                f"{config.deployment} to allow it, or use auto, raw or lossless"
            )
        policy = _with_codec(policy, config.codec)
    for path in config.inputs:
        read_file(path)
    if deployment.security.secret_key is not None:
        load_keys(Path(deployment.security.secret_key))
    _check_weights(deployment)
    return policy


def _check_weights(deployment: Deployment) -> None:
    weights = deployment.model.weights
    is_needed = weights not in (None, SEEDED, PRETRAINED) and deployment.constraints.device_has_model
    if is_needed and not Path(str(weights)).is_file():
        raise ConfigError(f"expected a weights file at {weights}, got none; correct weights under [model]")


def group_files(inputs: Files, batch_size: int) -> tuple[Files, ...]:
    """Group files into requests.

    Raises:
        ConfigError: when the last ones do not fill a batch.
    """
    rest = len(inputs) % batch_size
    if rest:
        raise ConfigError(
            f"expected a multiple of {batch_size} pictures, the batch_size of the deployment, got {len(inputs)}: the "
            f"last {rest} fill no batch; add {batch_size - rest}, or leave {rest} out"
        )
    return tuple(inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size))


def _with_codec(spec: PolicySpec, codec: str) -> PolicySpec:
    """The same rule, with every plan's codec replaced."""

    def build(problem: PlanningProblem) -> Policy:
        return _CodecPolicy(spec.build(problem), codec)

    return PolicySpec(f"{spec.name} ({codec})", build)


@dataclasses.dataclass(frozen=True)
class _CodecPolicy:
    inner: Policy
    codec: str

    @property
    def is_stateful(self) -> bool:
        return self.inner.is_stateful

    def plan(self, state: SystemState) -> Plan:
        return dataclasses.replace(self.inner.plan(state), codec=self.codec)

    def reset(self) -> None:
        self.inner.reset()
