"""Which recorded traces are for training and which for validation, and how they are read onto one grid."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.errors import ConfigError
from runtime.testbed.workload import LoadTrace, NetworkTrace, read_load, read_network

FloatArray = npt.NDArray[np.float64]

GRID_S = 0.2
"""Step of the grid on which every world holds rates, round trips and contention."""

FLOOR_BPS = 1000.0
"""Rate of a link in an outage, as the relay of the test bed has it."""

VALIDATION_FRAC = 0.2
"""Share of the trace files that are kept from training."""

_TRAIN_FAMILIES = ("zhugeofficewifi", "zhuge4g", "azurellm2023")
"""Families whose files are cuts of one log: one file tells what the next one does, so they stay together. And a family of
one file."""

_PIECES = re.compile(r"(?P<kept>\d{4}[-.]\d\d[-.]\d\d_\d\d|^trace_\d+(?=_www))|(?P<rest>_s\d+$)")

SPLITS = ("train", "validation", "all")


def split_of(path: str | Path) -> str:
    """Tell whether a trace file is for `train` or `validation`, from its name alone.

    The one rule that fitting, training and comparing share: a hash of the recording's name. Files of one recording stay
    together: what counts is the name without a trailing piece number, up to the hour where it holds an instant, and up
    to the measuring unit. Test traces are in no folder that this function is asked about.
    """
    stem = Path(path).stem
    family, _, name = stem.partition("__")
    if family in _TRAIN_FAMILIES:
        return "train"
    recording = f"{family}__{_recording(name)}"
    digest = hashlib.sha256(recording.encode()).digest()
    return "validation" if int.from_bytes(digest[:4], "big") / 2**32 < VALIDATION_FRAC else "train"


def _recording(name: str) -> str:
    """Cut what tells pieces of one recording apart."""
    match = _PIECES.search(name)
    if match is None:
        return name
    return name[: match.start()] if match["kept"] is None else name[: match.end()]


def trace_files(folder: str | Path, split: str = "train") -> tuple[Path, ...]:
    """List the trace files of a folder that belong to a split, sorted by name.

    Raises:
        ConfigError: when the folder holds none, or there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"expected a split among {', '.join(SPLITS)}, got {split!r}")
    place = Path(folder)
    files = sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith(".")) if place.is_dir() else []
    kept = tuple(p for p in files if split in ("all", split_of(p)))
    if not kept:
        raise ConfigError(f"expected a folder with {split} traces, {place} has {len(files)} files and none of them is")
    return kept


def read_networks(files: Sequence[Path]) -> tuple[NetworkTrace, ...]:
    """Read network traces.

    Raises:
        ConfigError: naming the file that is not one.
    """
    return tuple(read_network(file) for file in files)


def read_loads(files: Sequence[Path]) -> tuple[LoadTrace, ...]:
    """Read load traces.

    Raises:
        ConfigError: naming the file that is not one.
    """
    return tuple(read_load(file) for file in files)


def on_grid(
    starts_s: Sequence[float] | FloatArray,
    values: Sequence[float] | FloatArray,
    period_s: float,
    begin_s: float,
    count: int,
) -> FloatArray:
    """Read a step function at `count` grid instants from `begin_s` on; it starts over after its period."""
    at_s = (begin_s + GRID_S * (np.arange(count) + 0.5)) % period_s
    index = np.searchsorted(np.asarray(starts_s), at_s, side="right") - 1
    return np.asarray(values, dtype=np.float64)[index]
