"""Random and mutated messages at a real worker and at a real session, while honest peers are served."""

import random

import psutil
import pytest
import torch
import zmq

import runtime
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import Session
from runtime.testbed.cluster import Cluster
from runtime.types import NodeProfile, Plan, Tier
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Described, Envelope, Offer, Submit, Welcome, encode
from tests.hostile import Attacker, HostileNode, client_messages, mutate
from tests.hubs import headers
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]

MODEL = "tests.models:residual"
FAR_S = 60.0
GROWTH_BYTES = 40 * 2**20
"""A leak of one small message in ten would be more over a hundred thousand of them."""

COUNTS = [2500, pytest.param(50_000, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(ModelConfig(spec=MODEL, input_kind="tensor"), edges=("edge0",), has_cloud=False) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model():
    return runtime.load_model(MODEL)


def check_answer(session: Session, model: runtime.Model, whole: torch.Tensor) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 1, n, edge_nodes=("edge0",))
    result = session.infer(model.example, plan=plan, deadline_s=FAR_S)
    assert torch.equal(result.output, whole)
    assert result.outcome == "remote", result.reason


@pytest.mark.parametrize("count", COUNTS)
def test_a_worker_outlives_hostile_clients_and_serves_honest_ones_meanwhile(cluster, model, count):
    chance = random.Random(count)
    worker = psutil.Process(cluster.pid("edge0"))
    context = zmq.Context()
    address = cluster.deployment.node("edge0").address
    frame = bytes(model.example.nbytes)
    with Session(cluster.deployment, runtime.load_policy("device-only")) as session:
        whole = session.infer(model.example, deadline_s=FAR_S).output
        plan = Plan.split(session.graph.num_layers, 0, session.graph.num_layers, edge_nodes=("edge0",))
        header = headers([frame])[0]
        real = Submit(1, session.model_id, plan, "tensor", 5.0, (header,))
        attacker = Attacker(context, address)
        memory = 0
        for sent in range(count):
            if sent % 150 == 149:  # by now it is out, most likely: another one comes
                attacker.close()
                attacker = Attacker(context, address)
            if chance.random() < 0.1:
                is_control, parts = False, [encode(Envelope(chance.randrange(99), real)), frame]
            else:
                is_control, parts = client_messages(chance)
            attacker.send(attacker.control if is_control else attacker.data, mutate(chance, parts))
            if sent % 250 == 0:
                check_answer(session, model, whole)
            if sent == count // 3:
                memory = worker.memory_info().rss
        attacker.close()
        check_answer(session, model, whole)
        assert worker.memory_info().rss - memory < GROWTH_BYTES
    assert cluster.is_alive("edge0")
    context.destroy(linger=0)


@pytest.mark.parametrize("count", COUNTS)
def test_a_session_outlives_a_hostile_node_and_uses_the_honest_one_meanwhile(cluster, model, count):
    graph = runtime.trace(model)
    welcome = Welcome(
        PROTOCOL_VERSION, "cloud", Tier.CLOUD, (Offer(graph.model_id, MODEL, graph.spec.graph_id),), CAPABILITIES
    )
    profile = NodeProfile((0.001,) * graph.spec.num_layers, 1e9, 1e9)
    described = Described(graph.model_id, graph.spec, profile)
    with HostileNode(welcome, described, random.Random(count)) as hostile:
        nodes = (*cluster.deployment.nodes, NodeConfig(name="cloud", tier=Tier.CLOUD, address=hostile.address))
        deployment = Deployment(model=cluster.deployment.model, nodes=nodes)
        with Session(deployment, runtime.load_policy("device-only")) as session:
            whole = session.infer(model.example, deadline_s=FAR_S).output
            n = session.graph.num_layers
            memory = 0
            while hostile.sent < count:
                check_answer(session, model, whole)
                through = session.infer(model.example, plan=Plan.split(n, 1, 1), deadline_s=0.3)
                assert torch.equal(through.output, whole)  # whatever the hostile node answered
                if not memory and hostile.sent > count // 3:
                    memory = psutil.Process().memory_info().rss
            check_answer(session, model, whole)
            assert psutil.Process().memory_info().rss - memory < GROWTH_BYTES
            assert session._client._hub.num_malformed > count // 30  # they did arrive
            wait_for(lambda: session.uplink_backlog_bytes < 2**20)
