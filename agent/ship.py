"""The profiles that ship: measures the models on this machine and merges them, by minimum, into the package's data.

Run it again on a quiet machine and the profiles only get better. Times of another machine, or of a model whose layers
have changed, replace what was there.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from agent.measure import make_model_table, measure_model
from runtime.deployment import ModelConfig
from runtime.errors import ConfigError
from runtime.profiles.record import MeasuredModel, Measurement, Ratios, merge
from runtime.profiles.shipped import decode_profile, encode_profile, file_name, shipped_folder

MODELS = (
    "torchvision:alexnet",
    "torchvision:vgg16",
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:squeezenet1_1",
    "torchvision:mobilenet_v3_large",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "torchvision:efficientnet_b0",
    "timm:xception",
    "timm:darknet53",
    "timm:inception_v4",
)

DIGITS = 5
"""Significant digits that ship: more are noise, and do not pack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipConfig:
    """Measure the models whose profiles ship, one thread, batch size 1, and merge them by minimum."""

    models: tuple[str, ...] = MODELS
    """Which ones."""

    folder: Path | None = None
    """Where to; none takes the data folder of the package."""


def run_ship(config: ShipConfig) -> None:
    """Measure, merge and write one file per model, each when it is done.

    Raises:
        OffcutError: the first thing that goes wrong.
    """
    torch.set_num_threads(1)
    console = Console()
    folder = shipped_folder() if config.folder is None else config.folder
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    for spec in config.models:
        with TemporaryDirectory() as nothing_cached:  # a minimum over runs at different times is what merging is for
            measured = measure_model(ModelConfig(spec=spec), folder=Path(nothing_cached), show=console.print)
        path = folder / file_name(spec)
        models.append(merge_models(_read(path), measured))
        path.write_bytes(encode_profile(round_model(models[-1])))
    console.print(make_model_table(models))


def _read(path: Path) -> MeasuredModel | None:
    try:
        return decode_profile(path.read_bytes())
    except (OSError, ConfigError):
        return None  # none yet, or of another version


def merge_models(old: MeasuredModel | None, new: MeasuredModel) -> MeasuredModel:
    """The lesser times and the greater codec speeds of two measurements of one model; `new` where they do not compare."""
    if old is None or old.graph.graph_id != new.graph.graph_id or old.measurement.machine != new.measurement.machine:
        return new
    ratios = replace(
        new.ratios,
        encode_bytes_per_s=max(old.ratios.encode_bytes_per_s, new.ratios.encode_bytes_per_s),
        decode_bytes_per_s=max(old.ratios.decode_bytes_per_s, new.ratios.decode_bytes_per_s),
    )
    return replace(new, measurement=merge(old.measurement, new.measurement), ratios=ratios)


def round_model(model: MeasuredModel) -> MeasuredModel:
    """Cut every measured number to `DIGITS` significant digits."""
    return replace(model, measurement=_round_measurement(model.measurement), ratios=_round_ratios(model.ratios))


def _round_measurement(measurement: Measurement) -> Measurement:
    profile = measurement.profile
    return replace(
        measurement,
        spread_frac=_round(measurement.spread_frac),
        whole_s=_round(measurement.whole_s),
        raw_layer_s=tuple(map(_round, measurement.raw_layer_s)),
        segments=tuple(replace(s, seconds=_round(s.seconds)) for s in measurement.segments),
        profile=replace(
            profile,
            layer_s=tuple(map(_round, profile.layer_s)),
            encode_bytes_per_s=_round(profile.encode_bytes_per_s),
            decode_bytes_per_s=_round(profile.decode_bytes_per_s),
        ),
    )


def _round_ratios(ratios: Ratios) -> Ratios:
    return replace(
        ratios,
        by_value={name: _round(ratio) for name, ratio in ratios.by_value.items()},
        encode_bytes_per_s=_round(ratios.encode_bytes_per_s),
        decode_bytes_per_s=_round(ratios.decode_bytes_per_s),
    )


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
