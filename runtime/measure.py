"""A quick profile of this machine: idle seconds per layer, coding speed; cached by graph and machine."""

import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

import msgspec
import torch

from runtime.model.graph import LayerGraph
from runtime.model.inputs import sample_inputs
from runtime.model.segment import SegmentCache
from runtime.planning.problem import make_stage
from runtime.types import NodeProfile, Tier
from runtime.wire.codec import AutoCodec

logger = logging.getLogger(__name__)

REPEATS = 3
"""Runs after the first; the minimum counts, since noise of a shared machine only ever adds."""

FIXED_S = 0.0005
"""Seconds per message that no byte explains: one hand-over between threads and one wake-up at both ends. Guess."""


def cache_folder() -> Path:
    """Folder of this user's cached profiles."""
    return Path.home() / ".cache" / "offcut" / "profiles"


def machine_key(graph: LayerGraph) -> str:
    """Name of a cached profile: same graph, machine, library and thread count give the same name."""
    parts = (
        graph.spec.graph_id,
        platform.node(),
        platform.processor() or platform.machine(),
        os.cpu_count(),
        torch.__version__,
        torch.get_num_threads(),
        str(graph.device),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def load_profile(
    graph: LayerGraph, segments: SegmentCache, example: torch.Tensor, auto: AutoCodec, *, folder: Path | None = None
) -> NodeProfile:
    """Read this machine's profile of a graph from the cache, or measure and cache it.

    Args:
        graph: what to profile.
        segments: its segments, so that the whole model is built once.
        example: input tensor, shape of the model's input.
        auto: gives this machine's coding speed.
        folder: cache folder; None takes the user's.
    """
    path = (cache_folder() if folder is None else folder) / f"{machine_key(graph)}.json"
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=NodeProfile)
        if len(profile.layer_s) == graph.num_layers:
            return profile
    except (OSError, msgspec.MsgspecError) as error:
        logger.debug("no cached profile at %s: %s", path, error)
    profile = measure_profile(graph, segments, example, auto)
    _write(path, profile)
    return profile


def measure_profile(graph: LayerGraph, segments: SegmentCache, example: torch.Tensor, auto: AutoCodec) -> NodeProfile:
    """Measure idle seconds of every layer on this machine, input stage included.

    The layers are timed one by one inside one whole run, which reads a little more than the run itself; they are
    scaled so that their sum is the whole run's time.
    """
    stage = make_stage(graph.spec, Tier.DEVICE, range(graph.num_layers))
    segment = segments.get(stage)
    inputs = sample_inputs(graph.spec, example)
    best = [float("inf")] * graph.num_layers
    whole_s = float("inf")
    for repeat in range(1 + REPEATS):
        layer_s = [0.0] * graph.num_layers
        segment.run(inputs, layer_s=layer_s)
        _, total_s = segment.run_timed(inputs)
        if repeat:
            best = [min(pair) for pair in zip(best, layer_s, strict=True)]
            whole_s = min(whole_s, total_s)
    scale = whole_s / sum(best)
    rates = auto.rates
    return NodeProfile(
        layer_s=tuple(scale * s for s in best),
        encode_bytes_per_s=rates.encode_bytes_per_s,
        decode_bytes_per_s=rates.decode_bytes_per_s,
        fixed_s=FIXED_S,
    )


def _write(path: Path, profile: NodeProfile) -> None:
    """Write atomically, so that workers that start together never read half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.encode(profile))
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("cannot cache the profile at %s: %s", path, error)
