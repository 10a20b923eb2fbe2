"""A long stream: nothing lost, nothing twice, order kept, and nothing grows."""

from pathlib import Path

import psutil
import pytest
import torch

import runtime
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.testbed.cluster import Cluster
from runtime.types import Plan

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = "tests.models:branching"
REQUESTS = 1000
WARM_UP = 200
"""Requests before the first reading: caches and allocators are full by then."""

GROWTH_BYTES = 8 * 2**20
"""Allocators breathe; a leaked tensor per request would be more than ten times this."""


def holdings(pids: list[int]) -> list[tuple[int, int, int]]:
    """Memory, file descriptors and threads of each process."""
    out = []
    for pid in pids:
        process = psutil.Process(pid)
        out.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    return out


def test_a_thousand_streamed_requests_lose_nothing_and_nothing_grows(tmp_path: Path) -> None:
    model = runtime.load_model(MODEL)
    config = ModelConfig(spec=MODEL, input_kind="tensor")
    generator = torch.Generator().manual_seed(1)
    frames = [torch.randn(model.example.shape, generator=generator) for _ in range(20)]
    with torch.inference_mode():
        expected = [model.module(frame) for frame in frames]
    with (
        Cluster(config, edges=("edge0",)) as cluster,
        Session(cluster.deployment, runtime.load_policy("device-only"), log_folder=tmp_path) as session,
    ):
        n = session.graph.num_layers
        plan = Plan.split(n, 2, n - 2, edge_nodes=("edge0",))
        pids = [psutil.Process().pid, cluster.pid("edge0"), cluster.pid("cloud")]
        before: list[tuple[int, int, int]] = []
        stream = session.stream((frames[i % 20] for i in range(REQUESTS)), in_flight=3, plan=plan, deadline_s=60.0)
        count = 0
        for count, result in enumerate(stream, start=1):
            want = expected[(count - 1) % 20]
            assert torch.equal(result.output["classes"], want["classes"])
            assert torch.equal(result.output["aux"][1][0], want["aux"][1][0])
            assert result.outcome == "remote"
            if count == WARM_UP:
                before = holdings(pids)
        after = holdings(pids)
    assert count == REQUESTS
    for (rss, fds, threads), (rss_later, fds_later, threads_later) in zip(before, after, strict=True):
        assert rss_later - rss < GROWTH_BYTES
        assert fds_later <= fds
        assert threads_later <= threads
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == REQUESTS
