"""LoADPart does not get stuck on the device: once the server is idle, the watcher takes k back and requests return.

`papers.md`, section 6, item 3: high load, the policy goes local, the load is removed; recovery within the watcher's window
and the period of a status.
"""

import time

import pytest

import runtime
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.node.load import WINDOW_S
from runtime.node.worker import STATUS_PERIOD_S
from runtime.presets import NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.types import DEVICE_NODE, Tier
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

# A device so slow that the server is worth asking even where this machine is busy and a round trip takes long.
EMULATE = {DEVICE_NODE: NodeEmulation(slow_down=3000.0), "edge0": NodeEmulation(slow_down=60.0)}
FAR_S = 60.0
BUSY_MACHINE_S = 60.0


def test_requests_come_back_to_a_server_whose_load_is_gone() -> None:
    config = ModelConfig(spec="tests.models:chain", input_kind="tensor")
    example = runtime.load_model(config.spec).example
    with (
        Cluster(config, edges=("edge0",), has_cloud=False, emulate=EMULATE) as cluster,
        Session(cluster.deployment, runtime.load_policy("loadpart")) as session,
    ):

        def ask() -> tuple[bool, float]:
            """Send one request; tell whether it went to the server, and the k that is known of it."""
            result = session.infer(example, deadline_s=FAR_S)
            node = session.state("tensor", 0, FAR_S).node("edge0")
            assert node is not None
            assert result.outcome in ("device", "remote")
            return result.plan.uses(Tier.EDGE), node.load_factor

        wait_for(lambda: ask()[0])  # builds its segments
        cluster.set_contention("edge0", 90.0)
        left_at_s = time.perf_counter()
        while ask()[0]:
            left_at_s = time.perf_counter()
        cluster.set_contention("edge0", 1.0)
        is_remote, k = ask()
        assert not is_remote  # the load is gone and nobody has told: without requests no reading can
        assert k > 10.0
        wait_for(lambda: ask()[0], WINDOW_S + STATUS_PERIOD_S + BUSY_MACHINE_S)
        assert time.perf_counter() - left_at_s > 0.5 * WINDOW_S  # it was the watcher, not a reading
