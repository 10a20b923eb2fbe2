"""The measurements that a machine keeps of itself: files of the user's cache, and one process that measures at a time."""

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import msgspec

from runtime.profiles.record import Machine, Measurement
from runtime.types import DEVICE_NODE, GraphSpec, ModelProfile

logger = logging.getLogger(__name__)

_GRAPH_SUFFIX = ".graph"

LOCK_TIMEOUT_S = 120.0
"""How long a process waits for others that measure; then it goes on beside them."""


def cache_folder() -> Path:
    """Folder of this user's cached profiles."""
    return Path.home() / ".cache" / "offcut" / "profiles"


def read_measurement(path: Path, num_layers: int) -> Measurement | None:
    """Read a measurement; None where there is none, or one that cannot be of a model with so many layers."""
    try:
        measurement = msgspec.json.decode(path.read_bytes(), type=Measurement)
    except (OSError, msgspec.MsgspecError) as error:
        logger.debug("no cached profile at %s: %s", path, error)
        return None
    profile = measurement.profile
    times = (measurement.whole_s, *measurement.raw_layer_s, *profile.layer_s, *profile.tile_layer_s)
    is_fit = len(measurement.raw_layer_s) == len(profile.layer_s) == num_layers
    is_fit &= len(profile.tile_layer_s) in (0, num_layers)
    return measurement if is_fit and all(0 < s < math.inf for s in times) else None


def write_graph(path: Path, graph: GraphSpec) -> None:
    """Keep the graph beside a measurement of it, so that other models can be predicted from it."""
    beside = path.with_suffix(_GRAPH_SUFFIX)
    if not beside.exists():
        write_atomically(beside, msgspec.json.encode(graph))


def read_known(folder: Path, machine: Machine) -> list[ModelProfile]:
    """Read every model that this very kind of machine has measured; the machine is called `device` in them."""
    known = []
    for path in sorted(folder.glob(f"*{_GRAPH_SUFFIX}")):
        try:
            graph = msgspec.json.decode(path.read_bytes(), type=GraphSpec)
        except (OSError, msgspec.MsgspecError) as error:
            logger.debug("no graph at %s: %s", path, error)
            continue
        measurement = read_measurement(path.with_suffix(".json"), graph.num_layers)
        if measurement is not None and measurement.machine == machine:
            known.append(ModelProfile(graph, {DEVICE_NODE: measurement.profile}))
    return known


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file of the cache so that nobody ever reads half of it; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("cannot cache the profile at %s: %s", path, error)


@contextlib.contextmanager
def measuring_alone(folder: Path) -> Iterator[None]:
    """Let one process of this user measure at a time, whatever the model: two would slow each other."""
    lock = filelock.FileLock(folder / "measuring.lock", timeout=LOCK_TIMEOUT_S)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, filelock.Timeout) as error:
        logger.warning("measuring without waiting for others: %s", error)
    try:
        yield
    finally:
        lock.release()
