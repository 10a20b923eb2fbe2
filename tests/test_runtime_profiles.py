import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.model.graph import trace
from runtime.model.zoo import load_model
from runtime.profiles import cache
from runtime.profiles.record import (
    Machine,
    Measurement,
    SegmentTime,
    calibrate,
    list_cuts,
    merge,
    pick_segments,
)
from runtime.profiles.shipped import (
    decode_profile,
    encode_profile,
    load_profiles,
    load_shipped_profile,
    shipped_folder,
    shipped_specs,
)
from runtime.types import NodeProfile
from tests.graphs import RESIDUAL, chain, make_graph
from tests.together import run_together

SMALLEST = [
    "torchvision:squeezenet1_1",
    pytest.param("torchvision:alexnet", marks=pytest.mark.slow),
    pytest.param("torchvision:resnet18", marks=pytest.mark.slow),
]
MACHINE = Machine("a processor", 2, "cpu", 1, "2.0")
seconds = st.floats(1e-5, 1.0)


def time_segments(layer_s: list[float]) -> tuple[SegmentTime, ...]:
    """Segments that take exactly the sum of their layers."""
    picked = pick_segments(len(layer_s))
    return tuple(SegmentTime(i, j, sum(layer_s[i:j]), is_fitted) for (i, j), is_fitted in picked.items())


def make_measurement(layer_s: list[float], machine: Machine = MACHINE) -> Measurement:
    segments = time_segments(layer_s)
    profile = NodeProfile(calibrate(layer_s, sum(layer_s), segments), 1e8, 1e9, 1e-4)
    return Measurement(machine, "2026-01-01T00:00:00+00:00", 3, 0.1, sum(layer_s), tuple(layer_s), segments, profile)


# --- calibration ------------------------------------------------------------------------------------------------------


@given(st.lists(seconds, min_size=1, max_size=60))
def test_layers_that_add_up_are_left_alone(layer_s: list[float]) -> None:
    assert calibrate(layer_s, sum(layer_s), time_segments(layer_s)) == pytest.approx(layer_s, rel=1e-6)


@given(st.lists(seconds, min_size=1, max_size=60), st.floats(0.5, 2.0))
def test_without_segments_layers_are_scaled_to_the_whole_run(layer_s: list[float], factor: float) -> None:
    found = calibrate(layer_s, factor * sum(layer_s), ())
    assert found == pytest.approx([factor * s for s in layer_s], rel=1e-6)


@given(st.integers(16, 80), st.integers(0, 2**32 - 1))
def test_calibration_brings_unseen_segments_nearer(num_layers: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    true_s = random.uniform(1.0, 2.0, num_layers)
    parts = random.uniform(0.75, 1.25, 4)  # what single layers misjudge is alike among neighbours
    raw_s = true_s * np.repeat(parts, -(-num_layers // 4))[:num_layers]
    segments = time_segments(true_s.tolist())

    def error(layer_s: tuple[float, ...]) -> float:
        return max(abs(sum(layer_s[s.start : s.stop]) / s.seconds - 1) for s in segments if not s.is_fitted)

    whole_s = float(true_s.sum())
    assert error(calibrate(raw_s.tolist(), whole_s, segments)) <= error(calibrate(raw_s.tolist(), whole_s, ())) + 0.02


@given(st.integers(1, 500))
def test_segments_lie_inside_the_model_and_some_are_kept_for_checking(num_layers: int) -> None:
    picked = pick_segments(num_layers)
    assert all(0 <= start < stop <= num_layers and stop - start < num_layers for start, stop in picked)
    if num_layers >= 8:
        assert set(picked.values()) == {True, False}


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=40))
def test_merging_takes_the_lesser_of_every_time(pairs: list[tuple[float, float]]) -> None:
    old, new = (make_measurement(list(times)) for times in zip(*pairs, strict=True))
    merged = merge(old, new)
    assert merged.raw_layer_s == tuple(min(pair) for pair in pairs)
    assert merged.whole_s == min(old.whole_s, new.whole_s)
    segments = zip(merged.segments, old.segments, new.segments, strict=True)
    assert all(kept.seconds <= min(a.seconds, b.seconds) for kept, a, b in segments)
    assert merged.rounds == 6
    assert merge(merged, new).profile == merged.profile


def test_merging_keeps_the_lesser_times_of_tiles_and_forgets_none() -> None:
    plain = make_measurement([0.1, 0.2])
    slow, fast = (replace(plain, profile=replace(plain.profile, tile_layer_s=s)) for s in ((0.3, 0.1), (0.2, 0.2)))
    assert merge(slow, fast).profile.tile_layer_s == (0.2, 0.1)
    assert merge(slow, plain).profile.tile_layer_s == merge(plain, slow).profile.tile_layer_s == (0.3, 0.1)


def test_segments_of_a_busy_machine_do_not_slow_layers_that_were_measured_on_an_idle_one() -> None:
    layer_s = [0.1] * 16
    idle = replace(make_measurement(layer_s), segments=())
    busy = make_measurement([5 * s for s in layer_s])
    assert merge(busy, idle).profile.layer_s == pytest.approx(layer_s)
    assert merge(idle, busy).profile.layer_s == pytest.approx(layer_s)


def test_times_of_another_machine_are_not_merged() -> None:
    old, new = make_measurement([0.1, 0.1]), make_measurement([0.2, 0.2], replace(MACHINE, threads=2))
    assert merge(old, new) == new


# --- cuts -------------------------------------------------------------------------------------------------------------


def test_a_cut_counts_every_value_that_crosses_once() -> None:
    graph = make_graph(RESIDUAL, nbytes=400)
    cuts = list_cuts(graph, {"v0": 2.0, "v1": 4.0})
    assert [cut.layer for cut in cuts] == [1, 2, 3, 4]
    assert [cut.raw_bytes for cut in cuts] == [400, 800, 800, 400]
    assert [cut.coded_bytes for cut in cuts] == [200, 300, 600, 400]
    assert [cut.ratio for cut in cuts] == pytest.approx([2, 800 / 300, 800 / 600, 1])


def test_cuts_of_the_input_stage_are_cuts_too() -> None:
    assert [cut.layer for cut in list_cuts(chain(2, has_stage=True), {})] == [1, 2, 3]


# --- the cache --------------------------------------------------------------------------------------------------------


HOLD_THE_LOCK = """
import sys, threading, time
from pathlib import Path
from runtime.profiles.cache import measuring_alone

print("READY", flush=True)
sys.stdin.readline()
with measuring_alone(Path(sys.argv[1])):
    start_s = time.monotonic()
    threading.Event().wait(0.3)
    print(start_s, time.monotonic(), flush=True)
"""


@pytest.mark.integration
def test_two_processes_measure_one_after_the_other(tmp_path: Path) -> None:
    (_, first_end_s), (second_start_s, _) = run_together(HOLD_THE_LOCK, str(tmp_path / "new"))
    assert first_end_s <= second_start_s


def test_a_process_that_hangs_while_it_measures_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.1)
    with cache.measuring_alone(tmp_path), cache.measuring_alone(tmp_path):
        cache.write_atomically(tmp_path / "a", b"written all the same")
    assert (tmp_path / "a").read_bytes() == b"written all the same"


# --- what ships -------------------------------------------------------------------------------------------------------


def test_profiles_load_without_torch() -> None:
    code = (
        "import sys, runtime; found = runtime.load_profiles(); one = runtime.load_shipped_profile('torchvision:alexnet');"
        "print(len(found), one.graph.num_layers, [m for m in ('torch', 'zmq', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, layers, heavy = found.stdout.split(maxsplit=2)
    assert int(count) == len(shipped_specs()) >= 12
    assert int(layers) > 8
    assert heavy.strip() == "[]"


@pytest.mark.parametrize("spec", shipped_specs())
def test_a_shipped_profile_is_whole(spec: str) -> None:
    model = load_shipped_profile(spec)
    graph, measurement = model.graph, model.measurement
    assert model.spec == spec
    assert graph.num_layers == len(model.profile.layer_s) == len(measurement.raw_layer_s)
    assert all(s > 0 for s in model.profile.layer_s)
    # Wide, because whole runs are the longest and hardest to catch undisturbed where these were taken: a busy machine.
    assert sum(model.profile.layer_s) == pytest.approx(measurement.whole_s, rel=0.25)
    assert set(model.ratios.by_value) == {value.name for value in graph.values if value.producer >= 0}
    assert min(model.ratios.by_value.values()) >= 1.0
    assert model.ratios.weights == "seeded:0"
    assert model.ratios.pictures > 0
    assert (measurement.machine.threads, graph.batch_size) == (1, 1)
    assert {segment.is_fitted for segment in measurement.segments} == {True, False}
    convolutions = [layer for layer in graph.layers if layer.kind == "conv"]
    assert all(layer.weight_bytes > 0 and len(layer.window) == 2 and layer.flops > 0 for layer in convolutions)


@pytest.mark.parametrize("spec", SMALLEST)
def test_a_shipped_graph_is_the_one_that_is_traced_today(spec: str) -> None:
    assert trace(load_model(spec)).spec == load_shipped_profile(spec).graph


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in shipped_folder().iterdir()) < 500_000


def test_a_profile_survives_packing() -> None:
    model = load_profiles()["torchvision:alexnet"]
    data = encode_profile(model)
    assert decode_profile(data) == model
    assert encode_profile(decode_profile(data)) == data


@pytest.mark.parametrize("data", [b"", b"no gzip", encode_profile(load_shipped_profile(shipped_specs()[0]))[:-20]])
def test_a_broken_profile_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="measure it anew"):
        decode_profile(data)


def test_a_model_without_a_profile_is_named_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="offcut measure --model timm:nothing"):
        load_shipped_profile("timm:nothing")
