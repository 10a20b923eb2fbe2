"""A node that has never measured a model serves at once, with times told by other models, and measures it beside."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import runtime
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.device.telemetry import read_status
from runtime.measure import load_profile
from runtime.model.graph import trace
from runtime.model.segment import SegmentCache
from runtime.profiles.cache import cache_folder, measuring_alone
from runtime.testbed.cluster import Cluster
from runtime.types import Constraints
from runtime.wire.codec import AutoCodec
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SPEC = "tests.models:chain"
OTHERS = ("residual", "branching", "gated", "attention")


def test_predicted_times_serve_until_measured_ones_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # a machine that has measured the others alone
    torch.set_num_threads(1)
    for name in OTHERS:
        other = runtime.load_model(f"tests.models:{name}")
        graph = trace(other)
        load_profile(graph, SegmentCache(graph), other.example, AutoCodec())
    model = runtime.load_model(SPEC)
    with torch.inference_mode():
        expected = model.module(model.example)
    limits = Constraints(device_has_model=False, deadline_s=60.0)
    with ExitStack() as stack:
        with measuring_alone(cache_folder()):  # the node cannot measure yet
            config = ModelConfig(spec=SPEC, input_kind="tensor")
            cluster = stack.enter_context(Cluster(config, edges=("edge0",), has_cloud=False))
            deployment = dataclasses.replace(cluster.deployment, constraints=limits)
            policy, log = runtime.load_policy("edge-only"), tmp_path / "log"
            session = stack.enter_context(Session(deployment, policy, log_folder=log))
            predicted = session.problem("tensor").profile.nodes["edge0"]
            assert predicted.is_predicted
            assert torch.equal(session.infer(model.example).output, expected)
            wait_for(lambda: read_status(log)["predicted"] == ["edge0"])
        wait_for(lambda: not session.problem("tensor").profile.nodes["edge0"].is_predicted)
        assert session.problem("tensor").profile.nodes["edge0"].layer_s != predicted.layer_s
        wait_for(lambda: read_status(log)["predicted"] == [])
        assert torch.equal(session.infer(model.example).output, expected)
