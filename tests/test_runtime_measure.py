import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from runtime.measure import (
    FIXED_S,
    QUICK,
    THOROUGH,
    Effort,
    load_measurement,
    load_profile,
    machine_key,
    predict_profile,
    repeat_until_settled,
    run_all_values,
)
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import admit, sample_inputs
from runtime.model.samples import sample_images
from runtime.model.segment import SegmentCache
from runtime.model.zoo import Model, load_model
from runtime.planning.problem import make_stage
from runtime.planning.tiling import find_spans
from runtime.profiles.record import Measurement, pick_segments
from runtime.ratios import load_ratios
from runtime.types import Tier
from runtime.wire.codec import AutoCodec, CodecRates
from tests.together import run_together

RATES = CodecRates(200e6, 800e6)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tests.models:chain_image")


@pytest.fixture(scope="module")
def graph(model: Model) -> LayerGraph:
    return trace(model)


@pytest.fixture
def load(model: Model, graph: LayerGraph, tmp_path: Path) -> Callable[..., Measurement]:
    def call(effort: Effort = QUICK, *, is_anew: bool = False) -> Measurement:
        auto = AutoCodec(RATES)
        return load_measurement(
            graph, SegmentCache(graph), model.example, auto, folder=tmp_path, effort=effort, is_anew=is_anew
        )

    return call


def cached_file(folder: Path, graph: LayerGraph) -> Path:
    return folder / f"{machine_key(graph)}.json"


def plant(folder: Path, graph: LayerGraph, measurement: Measurement, factor: float) -> Measurement:
    """Cache a measurement as a machine `factor` times slower would have made it."""
    planted = replace(
        measurement,
        whole_s=measurement.whole_s * factor,
        raw_layer_s=tuple(s * factor for s in measurement.raw_layer_s),
        segments=tuple(replace(s, seconds=s.seconds * factor) for s in measurement.segments),
        profile=replace(measurement.profile, layer_s=tuple(s * factor for s in measurement.profile.layer_s)),
    )
    cached_file(folder, graph).write_bytes(msgspec.json.encode(planted))
    return planted


def test_a_profile_has_a_time_for_every_layer_and_adds_up_to_the_whole(load, graph: LayerGraph) -> None:
    found = load()
    assert len(found.profile.layer_s) == graph.num_layers
    assert all(s > 0 for s in found.profile.layer_s)
    assert sum(found.profile.layer_s) == pytest.approx(found.whole_s, rel=1e-3)
    assert found.profile.encode_bytes_per_s == RATES.encode_bytes_per_s
    assert (found.machine.threads, found.machine.device, found.segments) == (1, "cpu", ())


def test_a_layer_that_can_be_tiled_has_a_time_with_tiles_kernels_too(load, graph: LayerGraph) -> None:
    profile = load().profile
    inside = {layer for span in find_spans(graph.spec) for layer in range(span.start, span.stop)}
    assert inside
    assert len(profile.tile_layer_s) == graph.num_layers
    assert all(0 < seconds < math.inf for seconds in profile.tile_layer_s)
    outside = set(range(graph.num_layers)) - inside
    assert all(profile.tile_layer_s[layer] == profile.layer_s[layer] for layer in outside)
    assert any(profile.tile_layer_s[layer] != profile.layer_s[layer] for layer in inside)


def test_what_was_measured_is_read_back(load, model: Model, graph: LayerGraph, tmp_path: Path) -> None:
    first = load()
    assert msgspec.json.decode(cached_file(tmp_path, graph).read_bytes(), type=Measurement) == first
    plant(tmp_path, graph, first, 0.01)  # no run can be faster, so whatever comes back was not measured now
    planted = load()
    assert planted.whole_s == first.whole_s * 0.01
    again = load_profile(graph, SegmentCache(graph), model.example, AutoCodec(RATES), folder=tmp_path)
    assert again == planted.profile


def test_a_profile_that_runs_beat_is_corrected_downwards_and_stays_so(load, graph: LayerGraph, tmp_path: Path) -> None:
    slow = plant(tmp_path, graph, load(THOROUGH), 100.0)
    mended = load()
    assert mended.whole_s < slow.whole_s / 2
    assert all(a < b for a, b in zip(mended.profile.layer_s, slow.profile.layer_s, strict=True))
    assert msgspec.json.decode(cached_file(tmp_path, graph).read_bytes(), type=Measurement) == mended


def test_measuring_anew_forgets_what_was_too_fast(load, graph: LayerGraph, tmp_path: Path) -> None:
    fast = plant(tmp_path, graph, load(), 0.01)
    assert load(is_anew=True).whole_s > 2 * fast.whole_s


def test_segments_are_measured_once_and_kept(load, graph: LayerGraph) -> None:
    coarse = load()
    fine = load(THOROUGH)
    assert {(s.start, s.stop): s.is_fitted for s in fine.segments} == pick_segments(graph.num_layers)
    assert len(fine.errors()) == sum(not s.is_fitted for s in fine.segments) > 0
    assert fine.whole_s <= coarse.whole_s
    assert load().segments == fine.segments  # a quick start does not throw them away


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"layer_s": [1.0], "encode_bytes_per_s": 1, "decode_bytes_per_s": 1}', b"\xff" * 100],
)
def test_a_broken_file_in_the_cache_is_replaced(content: bytes, load, graph: LayerGraph, tmp_path: Path) -> None:
    cached_file(tmp_path, graph).write_bytes(content)
    found = load()
    assert msgspec.json.decode(cached_file(tmp_path, graph).read_bytes(), type=Measurement) == found


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf")])
def test_impossible_times_in_the_cache_are_not_believed(wrong: float, load, graph: LayerGraph, tmp_path: Path) -> None:
    first = load()
    profile = replace(first.profile, layer_s=(wrong, *first.profile.layer_s[1:]))
    text = json.dumps(msgspec.to_builtins(replace(first, profile=profile)))
    cached_file(tmp_path, graph).write_text(text)
    assert all(s > 0 for s in load().profile.layer_s)


def test_a_cache_that_cannot_be_written_is_no_error(model: Model, graph: LayerGraph, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    profile = load_profile(graph, SegmentCache(graph), model.example, AutoCodec(RATES), folder=folder)
    assert len(profile.layer_s) == graph.num_layers


OTHERS = ("residual", "branching", "gated", "attention")


def test_a_model_that_was_never_measured_here_is_predicted_from_others_that_were(
    load, graph: LayerGraph, tmp_path: Path
) -> None:
    auto = AutoCodec(RATES)
    assert predict_profile(graph, auto, folder=tmp_path) is None  # from nothing
    for name in OTHERS:
        other = load_model(f"tests.models:{name}")
        other_graph = trace(other)
        load_profile(other_graph, SegmentCache(other_graph), other.example, auto, folder=tmp_path)
    predicted = predict_profile(graph, auto, folder=tmp_path)
    assert predicted is not None
    assert predicted.is_predicted
    assert len(predicted.layer_s) == graph.num_layers
    assert min(predicted.layer_s) > 0
    assert (predicted.encode_bytes_per_s, predicted.fixed_s) == (RATES.encode_bytes_per_s, FIXED_S)
    known = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    for path, data in known.items():  # as another machine would have measured them
        found = msgspec.json.decode(data, type=Measurement)
        path.write_bytes(msgspec.json.encode(replace(found, machine=replace(found.machine, processor="another"))))
    assert predict_profile(graph, auto, folder=tmp_path) is None
    for path, data in known.items():
        path.write_bytes(data)
    assert not load().profile.is_predicted
    assert predict_profile(graph, auto, folder=tmp_path) is None  # measured by now


MEASURE_ON_A_WORD = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from runtime import measure
from runtime.model.graph import trace
from runtime.model.segment import SegmentCache
from runtime.model.zoo import load_model
from runtime.wire.codec import AutoCodec, CodecRates
from tests.together import run_together

class Timed(measure._Runner):
    def measure(self, *arguments):
        start_s = time.monotonic()
        found = super().measure(*arguments)
        print(start_s, time.monotonic(), flush=True)
        return found

measure._Runner = Timed
model = load_model("tests.models:chain_image")
graph = trace(model)
auto, folder = AutoCodec(CodecRates(1e8, 1e8)), Path(sys.argv[1])
print("READY", flush=True)
sys.stdin.readline()
measure.load_measurement(
    graph, SegmentCache(graph), model.example, auto, folder=folder, effort=measure.THOROUGH, is_anew=True
)
"""


@pytest.mark.integration
@pytest.mark.slow
def test_processes_that_start_together_measure_one_after_the_other(tmp_path: Path) -> None:
    (_, first_end_s), (second_start_s, _) = run_together(MEASURE_ON_A_WORD, str(tmp_path))
    assert first_end_s <= second_start_s


def test_rounds_go_on_until_the_minimum_settles() -> None:
    times = iter([9.0, 5.0, 5.0, 4.0, 6.0, 4.0, 3.99, 1.0])
    repeat_until_settled(lambda: next(times), calm_rounds=3, budget_s=1e9)
    assert list(times) == [1.0]  # the three after 4.0 brought it down by less than a hundredth


def test_without_time_left_three_rounds_are_run() -> None:
    times = iter([9.0, 8.0, 7.0, 6.0])
    repeat_until_settled(lambda: next(times), calm_rounds=3, budget_s=0.0)
    assert list(times) == [6.0]


@pytest.mark.parametrize("name", ["chain_image", "residual", "branching", "views"])
def test_every_value_that_can_cross_is_kept_with_the_whole_models_bits(name: str) -> None:
    model = load_model(f"tests.models:{name}")
    graph = trace(model)
    inputs = sample_inputs(graph.spec, model.example)
    values = run_all_values(graph, inputs)
    assert set(values) == {value.name for value in graph.spec.values}
    whole = SegmentCache(graph)
    for stop in range(1, graph.num_layers + 1):
        made = whole.get(make_stage(graph.spec, Tier.DEVICE, range(stop))).run(inputs)
        assert all(torch.equal(values[key], made[key]) for key in made)


# --- ratios -----------------------------------------------------------------------------------------------------------


def make_pictures(graph: LayerGraph, count: int) -> list[dict[str, torch.Tensor]]:
    return [dict(admit(graph.spec, picture).values) for picture in sample_images(count, 60, 80, seed=1)]


def test_ratios_cover_every_value_and_never_grow(graph: LayerGraph, tmp_path: Path) -> None:
    pictures = make_pictures(graph, 2)
    ratios = load_ratios(graph, "factory", pictures, has_pictures=True, folder=tmp_path)
    assert set(pictures[0]) == {"input.image"}
    assert set(ratios.by_value) == {value.name for value in graph.spec.values if value.producer >= 1}
    assert all(ratio >= 1.0 for ratio in ratios.by_value.values())
    relu = graph.spec.layers[graph.spec.num_stage_layers].outputs[0]
    assert ratios.by_value[relu] > 1.2  # half of it is zeros
    assert (ratios.weights, ratios.pictures) == ("factory", 2)
    assert ratios.encode_bytes_per_s > 0
    assert ratios.decode_bytes_per_s > 0


def test_ratios_are_measured_once_per_set_of_pictures(graph: LayerGraph, tmp_path: Path) -> None:
    steps: list[int] = []
    for count in (2, 2, 1):
        pictures = make_pictures(graph, count)
        load_ratios(graph, "factory", pictures, has_pictures=True, folder=tmp_path, on_step=steps.append)
    assert steps == [1, 2, 1]
