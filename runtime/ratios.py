"""How well the lossless codec packs every value of a model on real pictures: what a cut costs beyond its raw bytes."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from runtime.measure import machine_key, run_all_values
from runtime.model.graph import LayerGraph
from runtime.profiles.cache import cache_folder, write_atomically
from runtime.profiles.record import Ratios
from runtime.wire.codec import decode, encode
from runtime.wire.events import Limits


def load_ratios(
    graph: LayerGraph,
    weights: str,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    has_pictures: bool,
    folder: Path | None = None,
    is_anew: bool = False,
    on_step: Callable[[int], None] = lambda done: None,
) -> Ratios:
    """Read the ratios of a model on these inputs from the cache, or measure and cache them.

    Args:
        graph: the model.
        weights: label of its weights, see `Ratios.weights`.
        inputs: values of one request each, as `admit` gives them.
        has_pictures: whether they are photographs, or an example that stands for them.
        folder: cache folder; None takes the user's.
        is_anew: measure whatever is cached.
        on_step: told how many inputs are done.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / f"{_key(graph, inputs)}.ratios.json"
    if not is_anew:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Ratios)
        except (OSError, msgspec.MsgspecError):
            pass  # none yet, or one that another version wrote
    ratios = measure_ratios(graph, weights, inputs, has_pictures=has_pictures, on_step=on_step)
    write_atomically(path, msgspec.json.encode(ratios))
    return ratios


def _key(graph: LayerGraph, inputs: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """Name of cached ratios: same weights, machine and inputs give the same name."""
    digest = hashlib.sha256(f"{graph.model_id} {machine_key(graph)}".encode())
    for values in inputs:
        for name, tensor in values.items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def measure_ratios(
    graph: LayerGraph,
    weights: str,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    has_pictures: bool,
    on_step: Callable[[int], None] = lambda done: None,
) -> Ratios:
    """Run the whole model on each input and code everything that could cross.

    Ratios are raw bytes / coded bytes over all inputs; the codec's speed is over all values, each at its fastest.
    """
    raw: dict[str, int] = {}
    coded: dict[str, int] = {}
    encode_s: dict[str, float] = {}
    decode_s: dict[str, float] = {}
    limits = Limits()
    for done, given in enumerate(inputs, 1):
        for name, tensor in run_all_values(graph, given).items():
            if name in given or not tensor.nbytes:
                continue
            start_s = time.thread_time()  # one call of the codec is one thread's work
            header, frame = encode(name, tensor, "lossless")
            encoded_s = time.thread_time()
            decode(header, frame, limits)
            decoded_s = time.thread_time()
            raw[name] = raw.get(name, 0) + tensor.nbytes
            coded[name] = coded.get(name, 0) + header.frame_bytes
            encode_s[name] = min(encode_s.get(name, math.inf), encoded_s - start_s)
            decode_s[name] = min(decode_s.get(name, math.inf), decoded_s - encoded_s)
        on_step(done)
    per_input = sum(raw.values()) / len(inputs)
    return Ratios(
        by_value={name: raw[name] / coded[name] for name in raw},
        weights=weights,
        pictures=len(inputs) if has_pictures else 0,
        encode_bytes_per_s=per_input / math.fsum(encode_s.values()),
        decode_bytes_per_s=per_input / math.fsum(decode_s.values()),
    )
