"""A node as another machine: how long a segment takes there, what it tells of itself, what a replayed answer is."""

import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError, TensorMismatch
from runtime.model.graph import trace
from runtime.model.inputs import sample_inputs
from runtime.model.segment import Segment, Stopped
from runtime.model.zoo import load_model
from runtime.node.config import WorkerConfig
from runtime.node.emulation import Emulator
from runtime.node.hosted import HostedModel
from runtime.planning.problem import find_route
from runtime.presets import PRESETS, LinkEmulation, NodeEmulation
from runtime.types import Plan, Tier
from runtime.wire.codec import AutoCodec

MODELS = ["tests.models:chain_image", "tests.models:residual", "tests.models:branching"]


def load(spec: str, emulation: NodeEmulation | None) -> HostedModel:
    emulator = None if emulation is None else Emulator(emulation)
    return HostedModel.load(
        spec, weights="seeded", seed=0, batch_size=1, device="cpu", auto=AutoCodec(), emulator=emulator
    )


def spin(seconds: float) -> str:
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass
    return "made"


# --- what may be pretended ------------------------------------------------------------------------------------------


def test_every_preset_says_where_its_ratio_comes_from_and_works_in_the_mode_that_it_can() -> None:
    assert set(PRESETS) == {"rpi4", "jetson", "desktop", "gpu"}
    for name, preset in PRESETS.items():
        assert "github.com/" in preset.source
        emulation = NodeEmulation(preset=name)
        assert emulation.factor == preset.slow_down
        assert emulation.is_replay == (preset.slow_down < 1.0)
    assert PRESETS["rpi4"].slow_down > 1.0 > PRESETS["desktop"].slow_down > PRESETS["jetson"].slow_down
    assert PRESETS["jetson"].slow_down > PRESETS["gpu"].slow_down


@given(st.floats(0.01, 100.0), st.sampled_from([None, "compute", "replay"]))
def test_only_a_machine_that_is_not_faster_can_be_computed(slow_down: float, mode: str | None) -> None:
    if mode == "compute" and slow_down < 1.0:
        with pytest.raises(ConfigError, match="expected mode to be replay where slow_down is"):
            NodeEmulation(slow_down=slow_down, mode="compute")
    else:
        emulation = NodeEmulation(slow_down=slow_down, mode=mode)  # type: ignore[arg-type]
        assert emulation.label == ("replayed" if mode == "replay" or slow_down < 1.0 else "emulated")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected preset or slow_down"),
        ({"preset": "rpi4", "slow_down": 2.0}, "expected preset or slow_down"),
        ({"preset": "rpi5"}, "expected preset to be one of rpi4, desktop, jetson, gpu, got 'rpi5'"),
        ({"slow_down": 0.0}, "expected slow_down to be a number above 0"),
        ({"slow_down": float("inf")}, "expected slow_down to be a number above 0"),
        ({"slow_down": "3"}, "expected slow_down to be a number above 0"),
        ({"slow_down": 3.0, "mode": "dream"}, "expected mode to be compute or replay"),
    ],
)
def test_an_emulation_that_cannot_be_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NodeEmulation(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate_bps": 1e6, "trace": "a.csv"}, "expected rate_bps or trace, not both"),
        ({"rate_bps": 0}, "expected rate_bps to be a number above 0"),
        ({"rate_bps": True}, "expected rate_bps to be a number above 0"),
        ({"delay_s": -0.1}, "expected delay_s to be a number of at least 0"),
        ({"jitter_s": float("nan")}, "expected jitter_s to be a number of at least 0"),
        ({"trace": ""}, "expected trace to be the path of a file"),
        ({"rate_bps": 1e6, "scale": 0.5}, "expected scale only beside a trace"),
    ],
)
def test_a_link_that_cannot_be_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinkEmulation(**fields)  # type: ignore[arg-type]


def test_a_worker_is_told_on_its_command_line() -> None:
    def emulation(**options: object) -> NodeEmulation | None:
        return WorkerConfig(tier="edge", model=("a:b",), **options).emulation()  # type: ignore[arg-type]

    assert emulation() is None
    assert emulation(preset="gpu") == NodeEmulation(preset="gpu")
    assert emulation(slow_down=3.0, mode="replay") == NodeEmulation(slow_down=3.0, mode="replay")
    with pytest.raises(ConfigError, match="expected --preset or --slow-down beside --mode replay"):
        emulation(mode="replay")
    with pytest.raises(ConfigError, match="expected mode to be replay"):
        emulation(preset="gpu", mode="compute")


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contention", [1.0, 2.5])
def test_service_time_is_the_idle_time_times_contention_and_never_less(contention: float) -> None:
    # 10 % is what a busy machine allows to the best of ten; the slow test and the table below it say 2 %.
    emulator = Emulator(NodeEmulation(slow_down=3.0))
    emulator.set_contention(contention)
    readings = []
    for _ in range(10):
        start_s = time.perf_counter()
        made, seconds = emulator.run(lambda: spin(0.002), 0.02)
        assert made == "made"
        assert 0.02 * contention <= seconds <= time.perf_counter() - start_s
        readings.append(seconds)
    assert min(readings) <= 1.1 * 0.02 * contention


def test_work_that_takes_longer_than_its_service_time_is_an_overrun_and_does_not_wait() -> None:
    emulator = Emulator(NodeEmulation(slow_down=3.0))
    _, seconds = emulator.run(lambda: spin(0.01), 0.001)
    assert seconds >= 0.01
    assert emulator.overruns == 1
    emulator.run(lambda: None, 0.001)
    assert emulator.overruns == 1


def test_a_wait_ends_when_nobody_wants_the_answer_any_more() -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) > 3

    with pytest.raises(Stopped):
        Emulator(NodeEmulation(slow_down=3.0)).run(lambda: None, 3600.0, should_stop)
    assert len(asked) == 4


@pytest.mark.parametrize("contention", [0.99, float("nan"), float("inf"), -1.0])
def test_contention_below_one_is_refused_and_changes_nothing(contention: float) -> None:
    emulator = Emulator(NodeEmulation(slow_down=3.0))
    with pytest.raises(ConfigError, match="expected contention to be a number of at least 1"):
        emulator.set_contention(contention)
    assert emulator.contention == 1.0


def test_an_emulated_model_tells_the_profile_of_the_machine_that_it_pretends_to_be() -> None:
    real = load(MODELS[0], None)
    emulated = load(MODELS[0], NodeEmulation(slow_down=4.0))
    told = Emulator(NodeEmulation(slow_down=4.0)).pretend(real.profile)
    assert told.layer_s == tuple(4.0 * seconds for seconds in real.profile.layer_s)
    assert (told.fixed_s, emulated.profile.fixed_s) == (real.profile.fixed_s,) * 2
    # Each load may find that the machine is faster than was known, and correct the profile.
    assert 2.0 < sum(emulated.profile.layer_s) / sum(real.profile.layer_s) < 6.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("slow_down", [3.0, 5.0, 10.0])
def test_a_real_models_service_time_is_within_two_percent_of_its_definition(slow_down: float) -> None:
    hosted = load("torchvision:resnet18", NodeEmulation(slow_down=slow_down))
    n = hosted.graph.num_layers
    inputs = sample_inputs(hosted.graph.spec, load_model("torchvision:resnet18", weights="seeded").example)
    route = find_route(hosted.graph.spec, Plan.split(n, n, n), "encoded")
    idle_s = sum(hosted.profile.layer_s)
    medians = []
    for _ in range(3):  # the best of three rounds: what else runs here comes and goes
        seconds = sorted(hosted.run(route.device, inputs)[1] for _ in range(9))
        medians.append(seconds[4] / idle_s)
    assert 1.0 <= min(medians) <= 1.02


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", MODELS)
def test_a_replayed_stage_makes_what_the_model_makes_of_the_sample_whatever_was_sent(spec: str) -> None:
    hosted = load(spec, NodeEmulation(slow_down=0.001))
    graph = hosted.graph
    sample: Mapping[str, torch.Tensor] = sample_inputs(graph.spec, load_model(spec, weights="seeded").example)
    kind = "encoded" if graph.spec.preprocessing else "tensor"
    for cut in range(1, graph.num_layers):
        route = find_route(graph.spec, Plan.split(graph.num_layers, cut, graph.num_layers, edge_nodes=("e",)), kind)
        on_device = Segment(graph, route.device).run(sample)
        values = {name: (on_device | sample)[name] for name in route.edge.needs}
        expected = Segment(graph, route.edge).run(values)
        other = {name: torch.zeros_like(value) for name, value in values.items()}
        replayed, _ = hosted.run(route.edge, other)
        assert replayed.keys() == expected.keys()
        assert all(torch.equal(replayed[name], expected[name]) for name in expected)


def test_a_computed_stage_makes_what_its_input_makes() -> None:
    model = load_model(MODELS[1], weights="seeded")
    hosted = load(MODELS[1], NodeEmulation(slow_down=3.0))
    n = trace(model).num_layers
    route = find_route(hosted.graph.spec, Plan((Tier.DEVICE,) * n), "tensor")
    x = torch.randn(model.example.shape, generator=torch.Generator().manual_seed(5))
    made, _ = hosted.run(route.device, {route.device.needs[0]: x})
    with torch.inference_mode():
        assert torch.equal(made[hosted.graph.spec.outputs[0]], model.module(x))


def test_a_replaying_node_still_refuses_tensors_that_the_graph_does_not_make() -> None:
    hosted = load(MODELS[1], NodeEmulation(slow_down=0.5))
    n = hosted.graph.num_layers
    route = find_route(hosted.graph.spec, Plan.split(n, 2, n, edge_nodes=("e",)), "tensor")
    with pytest.raises(TensorMismatch, match="expected the values"):
        hosted.run(route.edge, {})
    wrong = {name: torch.zeros(1, 2) for name in route.edge.needs}
    with pytest.raises(TensorMismatch, match="of shape"):
        hosted.run(route.edge, wrong)
