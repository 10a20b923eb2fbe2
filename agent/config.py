"""What the sub-commands of `offcut` take: the fields and their texts are the `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from runtime.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysConfig:
    """Make CURVE key pairs: one for the device, one for each node."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Where to put them; give it to `offcut worker --keys`."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names of the device and the nodes, such as: device edge0 cloud."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig:
    """Run pictures through a deployment and print answers, plans and where the time went."""

    deployment: Annotated[Path, tyro.conf.Positional]
    """A deployment.toml."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JPEG or PNG files."""

    policy: str = "cloud-only"
    """Rule that picks the plan: device-only, edge-only, cloud-only, or fixed:I,J[@EDGE]."""

    codec: str | None = None
    """Codec of the plan: auto, raw, lossless, fp16, int8; the last two need lossless_only = false."""

    deadline_s: float | None = None
    """Seconds each request has; none takes the deployment's, or three times the predicted device-only time."""

    repeat: int = 1
    """Run the inputs this many times: the first use of a plan pays for building its segments."""

    verify: bool = False
    """Also run the whole model here, and print how far the outputs are from it."""

    top: int = 5
    """How many of the largest outputs to print."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        if not self.inputs:
            raise ConfigError("expected at least one picture, got none; name a JPEG or PNG file")
        for name in ("repeat", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected --{name} >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """Show the last session of a deployment and ask its nodes how they are."""

    deployment: Annotated[Path, tyro.conf.Positional]
    """A deployment.toml."""

    timeout_s: float = 2.0
    """How long to wait for nodes."""
