import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from agent.cli import parse
from agent.config import MeasureConfig
from agent.measure import (
    find_prediction_errors,
    list_models,
    make_error_table,
    make_model_table,
    make_node_table,
    measure_model,
    run_measure,
)
from agent.node_times import NodeTimes, measure_nodes
from agent.photos import sample_photo, sample_photos
from agent.ship import ShipConfig, merge_models, round_model, run_ship
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.errors import ConfigError
from runtime.planning.policies.registry import load_policy
from runtime.profiles.cache import cache_folder, write_graph
from runtime.profiles.record import MeasuredModel, Measurement
from runtime.profiles.shipped import decode_profile, load_shipped_profile
from runtime.testbed.cluster import Cluster
from runtime.types import Constraints
from tests.graphs import make_deployment

CHAIN = ModelConfig(spec="tests.models:chain_image")


def shown(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_one_of_a_deployment_and_models_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["measure", "--model", "a:b", "c:d", "--threads", "2"]) == MeasureConfig(
        model=("a:b", "c:d"), threads=2
    )
    assert parse(["measure", "deployment.toml"]) == MeasureConfig(deployment=Path("deployment.toml"))
    for arguments in (["measure"], ["measure", "deployment.toml", "--model", "a:b"]):
        with pytest.raises(SystemExit) as done:
            parse(arguments)
        assert done.value.code == 2
        assert "expected a deployment.toml" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--batch-size"):
        MeasureConfig(model=("a:b",), batch_size=0)


def test_the_error_of_predicting_a_model_from_the_others_is_told_by_kind(tmp_path: Path) -> None:
    specs = ("alexnet", "squeezenet1_1", "resnet18", "googlenet", "mobilenet_v3_large")
    models = [load_shipped_profile(f"torchvision:{name}") for name in specs]
    for model in models:  # as if this machine had measured them
        assert find_prediction_errors(models, folder=tmp_path) is None  # from too few
        path = tmp_path / f"{model.graph.graph_id}.json"
        path.write_bytes(msgspec.json.encode(model.measurement))
        write_graph(path, model.graph)
    errors = find_prediction_errors(models, folder=tmp_path)
    assert errors is not None
    assert {kind.kind for kind in errors.kinds} == {layer.kind for model in models for layer in model.graph.layers}
    assert 0 < statistics.median(map(abs, errors.models)) < 0.5
    text = shown(make_error_table(errors))
    assert "from the 4 others" in text
    assert "depthwise_conv" in text
    assert "whole models" in text


def test_a_device_without_the_model_measures_none() -> None:
    deployment = make_deployment(constraints=Constraints(device_has_model=False, deadline_s=1.0))
    assert list_models(MeasureConfig(deployment=Path("x")), deployment) == []
    assert list_models(MeasureConfig(deployment=Path("x")), make_deployment()) == [make_deployment().model]


def test_the_photographs_are_real_files() -> None:
    assert len(sample_photos()) >= 5
    assert all(photo.stat().st_size > 50_000 for photo in sample_photos())
    assert sample_photo() == sample_photos()[0]


def test_measuring_that_was_broken_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def break_off(text: str) -> None:
        if "of 7 pictures" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_model(CHAIN, folder=tmp_path, show=break_off)
    [path] = tmp_path.glob("*.json")
    kept = msgspec.json.decode(path.read_bytes(), type=Measurement)
    kept = replace(kept, whole_s=kept.whole_s / 100)  # no run is faster, so what comes back was not measured again
    path.write_bytes(msgspec.json.encode(kept))
    steps: list[str] = []
    first = measure_model(CHAIN, folder=tmp_path, show=steps.append)
    assert first.measurement == kept
    assert [text for text in steps if "pictures" in text]
    steps.clear()
    assert measure_model(CHAIN, folder=tmp_path, show=steps.append) == first
    assert not [text for text in steps if "pictures" in text]
    assert first.ratios.pictures == 7
    assert first.ratios.weights == "factory"


def test_a_model_without_pictures_is_measured_on_its_example(tmp_path: Path) -> None:
    measured = measure_model(ModelConfig(spec="tests.models:tokens"), folder=tmp_path)
    assert measured.ratios.pictures == 0
    assert "tokens" in shown(make_model_table([measured]))


def test_the_report_holds_layers_segments_and_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    run_measure(MeasureConfig(model=(CHAIN.spec,), json=path))
    [entry] = json.loads(path.read_bytes())["models"]
    cuts = entry.pop("cuts")
    measured = msgspec.convert(entry, MeasuredModel)
    assert [cut["layer"] for cut in cuts] == list(range(1, measured.graph.num_layers))
    assert all(cut["ratio"] >= 1 for cut in cuts)
    assert len(list(cache_folder().glob("*.ratios.json"))) >= 1  # where workers of this machine look
    out = capsys.readouterr().out
    assert "chain_image" in out
    assert "7 photographs" in out


# --- nodes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.local(CHAIN.spec) as running:
        yield running


@pytest.mark.integration
@pytest.mark.slow
def test_nodes_tell_their_profiles_and_run_segments(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'[model]\nspec = "{CHAIN.spec}"\n'
    for node in cluster.deployment.nodes:
        text += f'[[node]]\nname = "{node.name}"\ntier = "{node.tier.label}"\naddress = "{node.address}"\n'
    (tmp_path / "deployment.toml").write_text(text)
    run_measure(MeasureConfig(deployment=tmp_path / "deployment.toml", json=tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_bytes())
    n = len(report["models"][0]["graph"]["layers"])
    nodes = {node.name: node for node in msgspec.convert(report["nodes"], tuple[NodeTimes, ...])}
    assert set(nodes) == {"edge0", "cloud"}
    for node in nodes.values():
        assert node.problem == ""
        assert node.profile is not None
        assert len(node.profile.layer_s) == n
        assert all(0 < s.measured_s < 60 and s.predicted_s > 0 for s in node.segments)
    assert {(s.start, s.stop) for s in nodes["cloud"].segments} == {(0, n), (2, n), (4, n), (6, n)}
    assert {(0, n), (2, 4)} <= {(s.start, s.stop) for s in nodes["edge0"].segments}
    out = capsys.readouterr().out
    assert "edge0" in out
    assert "measured / predicted" in out


@pytest.mark.integration
def test_a_node_that_is_not_there_is_a_row_that_says_so() -> None:
    with Session(make_deployment(edges=0), load_policy("device-only"), connect_timeout_s=0.1) as session:
        [node] = measure_nodes(session, [[0.0]])
    assert node.profile is None
    assert "not up" in node.problem
    assert "not up" in shown(make_node_table((node,)))


# --- shipping ---------------------------------------------------------------------------------------------------------


def test_shipping_again_only_lowers_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ShipConfig(models=(CHAIN.spec,), folder=tmp_path)
    run_ship(config)
    [path] = tmp_path.iterdir()
    first = decode_profile(path.read_bytes())
    run_ship(config)
    second = decode_profile(path.read_bytes())
    assert second.measurement.rounds > first.measurement.rounds
    assert second.measurement.whole_s <= first.measurement.whole_s
    pairs = zip(second.measurement.raw_layer_s, first.measurement.raw_layer_s, strict=True)
    assert all(new <= old for new, old in pairs)
    assert "chain_image" in capsys.readouterr().out


def test_a_changed_graph_is_not_merged() -> None:
    old, new = load_shipped_profile("torchvision:alexnet"), load_shipped_profile("torchvision:vgg16")
    assert merge_models(old, new) == new
    assert merge_models(None, new) == new
    assert round_model(new) == new
