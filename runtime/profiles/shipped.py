"""Profiles that ship with Offcut: about twelve models on one core of one machine, to plan and simulate without any.

`scripts/measure.py` makes them. One gzip file of JSON per model, so that a change of one shows as a change of one.
"""

import gzip
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

import msgspec

from runtime.errors import ConfigError
from runtime.profiles.record import MeasuredModel

_SUFFIX = ".json.gz"


def file_name(spec: str) -> str:
    """Name of the file that a model's profile ships in."""
    return spec.replace(":", "-") + _SUFFIX


def encode_profile(model: MeasuredModel) -> bytes:
    """Pack a profile; equal profiles give equal bytes."""
    return gzip.compress(msgspec.json.encode(model), mtime=0)


def decode_profile(data: bytes) -> MeasuredModel:
    """Unpack a profile.

    Raises:
        ConfigError: when it is none, or of another version.
    """
    try:
        return msgspec.json.decode(gzip.decompress(data), type=MeasuredModel)
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"expected a profile written by this version of Offcut, got {error}; measure it anew"
        ) from error


def shipped_folder() -> Path:
    """Folder of the profiles inside the package."""
    return Path(str(resources.files("runtime.profiles"))) / "data"


def shipped_specs() -> tuple[str, ...]:
    """Specs of the models whose profiles ship, sorted."""
    names = (path.name.removesuffix(_SUFFIX) for path in shipped_folder().glob(f"*{_SUFFIX}"))
    return tuple(sorted(name.replace("-", ":", 1) for name in names))


@cache
def load_shipped_profile(spec: str) -> MeasuredModel:
    """Read the profile that ships for a model.

    Args:
        spec: as `runtime.load_model` takes it, batch size 1.

    Raises:
        ConfigError: when none ships for it.
    """
    try:
        data = (shipped_folder() / file_name(spec)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"no profile ships for {spec!r}, only for {', '.join(shipped_specs())}; measure it with "
            f"`offcut measure --model {spec}`"
        ) from error
    return decode_profile(data)


def shipped_ratios(spec: str, graph_id: str) -> Mapping[str, float]:
    """Expected lossless ratio of every value of a model, empty where no profile of this very graph ships."""
    if spec not in shipped_specs():
        return {}
    model = load_shipped_profile(spec)
    return model.ratios.by_value if model.graph.graph_id == graph_id else {}


def load_profiles() -> dict[str, MeasuredModel]:
    """Read every profile that ships, by model spec."""
    return {spec: load_shipped_profile(spec) for spec in shipped_specs()}
