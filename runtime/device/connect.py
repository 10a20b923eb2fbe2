"""A session from a deployment file."""

import dataclasses
from pathlib import Path

from runtime.deployment import Deployment, load_deployment
from runtime.device.session import Session
from runtime.device.telemetry import default_log_folder
from runtime.planning.policies.registry import PolicySpec
from runtime.types import Constraints


def connect(
    deployment: Deployment | str | Path,
    *,
    policy: PolicySpec,
    shadow: PolicySpec | None = None,
    log_folder: Path | None = None,
    constraints: Constraints | None = None,
) -> Session:
    """Open a session on a deployment.

    Args:
        deployment: the record, or the path of a `deployment.toml`.
        policy: from `load_policy`.
        shadow: another that is asked too and never obeyed (`Session`).
        log_folder: for events and status; None means `<file>.offcut` beside a deployment file, else none.
        constraints: instead of the deployment's.

    Raises:
        ConfigError: the file is not valid; names the line.
        OffcutError: as `Session`.
    """
    if not isinstance(deployment, Deployment):
        path = Path(deployment)
        deployment = load_deployment(path)
        log_folder = default_log_folder(path) if log_folder is None else log_folder
    if constraints is not None:
        deployment = dataclasses.replace(deployment, constraints=constraints)
    return Session(deployment, policy, shadow=shadow, log_folder=log_folder)
