"""A profile of this machine: idle seconds per layer, coding speed; cached by graph and machine.

A profile says what an idle machine needs. Other work on the machine only ever adds, so every time is a minimum over many
runs, and a node with one CPU thread counts the processor time of that thread, which stands still while others run. A
profile that was too slow all the same would steer plans and deadlines for ever: each time it is loaded a few runs of the
whole model are compared with it, and when they are clearly faster it is measured again.
"""

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch

from runtime.model.graph import LayerGraph
from runtime.model.inputs import sample_inputs
from runtime.model.segment import Segment, SegmentCache
from runtime.planning.predictors import fit_machine, is_within_reach
from runtime.planning.problem import make_stage
from runtime.profiles.cache import (
    cache_folder,
    measuring_alone,
    read_known,
    read_measurement,
    write_atomically,
    write_graph,
)
from runtime.profiles.record import FASTER_FRAC, Machine, Measurement, SegmentTime, calibrate, merge, pick_segments
from runtime.tile_times import TileTimer, find_timed, with_tiles
from runtime.types import DEVICE_NODE, NodeProfile, Tier
from runtime.wire.codec import AutoCodec

FORMAT = 3
"""Version of the cached files; other versions are not read."""

MIN_ROUNDS = 3
SETTLED_FRAC = 0.01
"""A round that brings the minimum down by less than this is a calm one."""

CHECK_RUNS = 2
"""Whole runs, after one that warms up, that a cached profile is compared with; a faster one has it measured again."""

FIXED_S = 0.0005
"""Seconds per message that no byte explains: hand-overs between threads, parsing. Guess: on a busy machine the fastest of
150 requests of a tiny model over loopback left 0.5 to 1.0 ms per node, two messages, to no other part."""


@dataclass(frozen=True, slots=True)
class Effort:
    """When measuring one model ends: after so many calm rounds in a row, or when the time is up."""

    calm_rounds: int
    budget_s: float
    has_segments: bool
    """False: layer times agree with the whole run only."""


QUICK = Effort(calm_rounds=3, budget_s=3.0, has_segments=False)
"""At the start of a node or session, which somebody waits for."""

THOROUGH = Effort(calm_rounds=8, budget_s=60.0, has_segments=True)
"""For `offcut measure`."""


# --- from the cache, or measured --------------------------------------------------------------------------------------------------------


def describe_machine(graph: LayerGraph) -> Machine:
    """What this process measures on."""
    is_cuda = graph.device.type == "cuda"
    return Machine(
        processor=_find_processor(),
        cores=os.cpu_count() or 1,
        device=torch.cuda.get_device_name(graph.device) if is_cuda else str(graph.device),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
    )


def _find_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_key(graph: LayerGraph) -> str:
    """Name of a cached profile: same graph, machine, library and thread count give the same name.

    Data types and batch size are part of the graph's fingerprint. Two machines of one kind that share a home differ by
    their host's name, which only this hash sees.
    """
    parts = (FORMAT, graph.spec.graph_id, platform.node(), repr(describe_machine(graph)))
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
    return load_measurement(graph, segments, example, auto, folder=folder).profile


def load_measurement(
    graph: LayerGraph,
    segments: SegmentCache,
    example: torch.Tensor,
    auto: AutoCodec,
    *,
    folder: Path | None = None,
    effort: Effort = QUICK,
    is_anew: bool = False,
) -> Measurement:
    """Read a measurement from the cache, unless it is missing, too coarse or too slow: then measure and cache it.

    Processes that start together measure one after the other; the later ones find what the first one measured.

    Args:
        graph: what to measure.
        segments: its segments.
        example: input tensor, shape of the model's input.
        auto: gives this machine's coding speed.
        folder: cache folder; None takes the user's.
        effort: how much time measuring may take; one that times segments is not content with a cached profile without.
        is_anew: measure whatever is cached, and forget it.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / f"{machine_key(graph)}.json"
    runner = _Runner(graph, segments, example)

    def find() -> Measurement | None:
        known = None if is_anew else read_measurement(path, graph.num_layers)
        is_fit = known is not None and (known.segments or not effort.has_segments) and not runner.is_faster_than(known)
        return known if is_fit else None

    found = find()
    if found is not None:
        write_graph(path, graph.spec)
        return found
    with measuring_alone(folder):
        found = find()
        if found is not None:
            return found
        measured = runner.measure(auto, effort)
        known = None if is_anew else read_measurement(path, graph.num_layers)
        measured = measured if known is None else merge(known, measured)
        write_atomically(path, msgspec.json.encode(measured))
        write_graph(path, graph.spec)
    return measured


def predict_profile(graph: LayerGraph, auto: AutoCodec, *, folder: Path | None = None) -> NodeProfile | None:
    """Predict this machine's profile of a graph that it has not measured from those that it has.

    None where it has measured this one, or too little to predict from.

    Args:
        graph: what to predict.
        auto: gives this machine's coding speed.
        folder: cache folder; None takes the user's.
    """
    folder = cache_folder() if folder is None else folder
    if read_measurement(folder / f"{machine_key(graph)}.json", graph.num_layers) is not None:
        return None
    known = read_known(folder, describe_machine(graph))
    if not is_within_reach(graph.spec, [profile.graph for profile in known]):
        return None
    return NodeProfile(
        layer_s=fit_machine(known, DEVICE_NODE).layer_s(graph.spec),
        encode_bytes_per_s=auto.rates.encode_bytes_per_s,
        decode_bytes_per_s=auto.rates.decode_bytes_per_s,
        fixed_s=FIXED_S,
        is_predicted=True,
    )


# --- measuring --------------------------------------------------------------------------------------------------------


class _Runner:
    """Runs one model's segments on values made once."""

    def __init__(self, graph: LayerGraph, segments: SegmentCache, example: torch.Tensor) -> None:
        self._graph = graph
        self._whole = segments.get(make_stage(graph.spec, Tier.DEVICE, range(graph.num_layers)))
        self._inputs = sample_inputs(graph.spec, example)
        is_one_thread = graph.device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if is_one_thread else time.perf_counter

    def is_faster_than(self, known: Measurement) -> bool:
        """Tell whether this machine now runs the model clearly faster than was measured."""
        self._whole.run(self._inputs)
        return any(self._time_whole() < FASTER_FRAC * known.whole_s for _ in range(CHECK_RUNS))

    def _time_whole(self, layer_s: list[float] | None = None) -> float:
        return self._whole.run_timed(self._inputs, layer_s=layer_s, clock=self._clock)[1]

    def measure(self, auto: AutoCodec, effort: Effort) -> Measurement:
        """Measure the whole model, its layers and segments, in turn, so that all of them meet the same conditions."""
        layer_s = [math.inf] * self._graph.num_layers
        whole: list[float] = []
        picked = pick_segments(self._graph.num_layers) if effort.has_segments else {}
        timed = find_timed(self._graph)
        values = run_all_values(self._graph, self._inputs) if picked or timed else {}
        cases = self._make_cases(picked, values)
        segment_s = [math.inf] * len(cases)
        tiles = [TileTimer(self._graph, stretch, values) for stretch in timed]

        def run_round() -> float:
            now_s = [0.0] * self._graph.num_layers
            self._time_whole(now_s)
            layer_s[:] = map(min, layer_s, now_s)
            whole.append(self._time_whole())
            for index, (segment, needs) in enumerate(cases):
                segment_s[index] = min(segment_s[index], segment.run_timed(needs, clock=self._clock)[1])
            for tile in tiles:
                tile.run(self._clock)
            return min(whole) + math.fsum(segment_s) + math.fsum(tile.least_s for tile in tiles)

        self._time_whole()
        repeat_until_settled(run_round, effort.calm_rounds, effort.budget_s)
        segments = tuple(
            SegmentTime(start, stop, seconds, is_fitted)
            for ((start, stop), is_fitted), seconds in zip(picked.items(), segment_s, strict=True)
        )
        calibrated_s = calibrate(layer_s, min(whole), segments)
        return Measurement(
            machine=describe_machine(self._graph),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            rounds=len(whole),
            spread_frac=statistics.median(whole) / min(whole) - 1,
            whole_s=min(whole),
            raw_layer_s=tuple(layer_s),
            segments=segments,
            profile=NodeProfile(
                layer_s=calibrated_s,
                encode_bytes_per_s=auto.rates.encode_bytes_per_s,
                decode_bytes_per_s=auto.rates.decode_bytes_per_s,
                fixed_s=FIXED_S,
                tile_layer_s=with_tiles(calibrated_s, tiles),
            ),
        )

    def _make_cases(
        self, picked: Iterable[tuple[int, int]], values: Mapping[str, torch.Tensor]
    ) -> list[tuple[Segment, dict[str, torch.Tensor]]]:
        """Segments, each with the values that cross to it."""
        cases = []
        for start, stop in picked:
            stage = make_stage(self._graph.spec, Tier.DEVICE, range(start, stop))
            cases.append((Segment(self._graph, stage), {name: values[name] for name in stage.needs}))
        return cases


def run_all_values(graph: LayerGraph, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the model once on a request's values and keep every value that could cross between two nodes, those included."""
    first = 1 + next(value.producer for value in graph.spec.values if value.name in given)
    stage = make_stage(graph.spec, Tier.DEVICE, range(first, graph.num_layers))
    made = tuple(value.name for value in graph.spec.values if value.producer >= first)
    return dict(given) | Segment(graph, replace(stage, makes=made)).run(given)


def repeat_until_settled(run: Callable[[], float], calm_rounds: int, budget_s: float) -> None:
    """Call `run` until the least of what it returns settles or the time is up, `MIN_ROUNDS` times at least."""
    until_s = time.perf_counter() + budget_s
    least, calm, rounds = math.inf, 0, 0
    while rounds < MIN_ROUNDS or (calm < calm_rounds and time.perf_counter() < until_s):
        seconds = run()
        rounds += 1
        calm = calm + 1 if seconds > (1 - SETTLED_FRAC) * least else 0
        least = min(least, seconds)
