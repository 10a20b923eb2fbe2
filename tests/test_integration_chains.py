"""Chains of tiles on three and four edge nodes: borders go by way of the head, and a node that is lost costs no answer."""

import threading
from collections.abc import Iterator

import pytest
import torch

import runtime
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.presets import NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.types import Plan, Tier, TileSpan
from tests.test_integration_tiles import FAR_S, MODEL, SLOW_DOWN, check, wait_for_peer

pytestmark = pytest.mark.integration

EDGES = ("edge0", "edge1", "edge2", "edge3")
ROWS = (
    *(TileSpan(start, start + 1, (9, 20), ()) for start in (0, 1)),
    *(TileSpan(start, start + 1, (5, 11), ()) for start in (3, 4, 5)),
)
SQUARES = (
    *(TileSpan(start, start + 1, (14,), (17,)) for start in (0, 1)),
    TileSpan(3, 4, (8,), (7,)),
    TileSpan(4, 5, (4, 8, 12), ()),  # another grid, as many tiles: all of a map changes hands
    TileSpan(5, 6, (9,), (8,)),
)
PLANS = {"three rows": (EDGES[:3], ROWS), "two by two": (EDGES, SQUARES)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    emulate = {name: NodeEmulation(slow_down=SLOW_DOWN, mode="compute") for name in EDGES}
    with Cluster(ModelConfig(spec=MODEL, input_kind="tensor"), edges=EDGES, emulate=emulate) as cluster:
        yield cluster


@pytest.fixture
def session(cluster: Cluster) -> Iterator[Session]:
    with Session(cluster.deployment, runtime.load_policy("edge-only")) as session:
        yield session
    cluster.heal()


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load_model(MODEL)


@pytest.fixture(scope="module")
def frames(model: runtime.Model) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn_like(model.example) for _ in range(2)]


@pytest.fixture(scope="module")
def whole(model: runtime.Model, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model.module(x) for x in frames]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("codec", ["raw", "auto"])
def test_chains_on_several_nodes_give_the_output_of_the_whole_model(
    name: str, codec: str, session: Session, frames: list[torch.Tensor], whole: list[torch.Tensor]
) -> None:
    nodes, spans = PLANS[name]
    for head in (0, 1):
        plan = Plan((Tier.EDGE,) * session.graph.num_layers, nodes[head:] + nodes[:head], spans, codec)
        wait_for_peer(session, plan, frames[0])
        for x, expected in zip(frames, whole, strict=True):
            result = session.infer(x, plan=plan, deadline_s=FAR_S)
            check(result, expected)
            assert (result.outcome, result.reason) == ("remote", "")


@pytest.mark.parametrize("name", PLANS)
def test_a_node_of_several_that_is_killed_within_a_chain_costs_no_answer(
    name: str, cluster: Cluster, session: Session, frames: list[torch.Tensor], whole: list[torch.Tensor]
) -> None:
    nodes, spans = PLANS[name]
    plan = Plan((Tier.EDGE,) * session.graph.num_layers, nodes, spans, "raw")
    wait_for_peer(session, plan, frames[0])
    latency = session.infer(frames[0], plan=plan, deadline_s=FAR_S).latency
    assert latency is not None
    reasons = []
    for turn, victim in enumerate(nodes[1:]):
        killer = threading.Timer(latency.total_s * (turn + 0.5) / len(nodes), cluster.kill, (victim,))
        killer.start()
        for x, expected in zip(frames, whole, strict=True):
            result = session.infer(x, plan=plan, deadline_s=5.0)
            check(result, expected)
            assert result.deadline_met
            reasons.append(result.reason)
        killer.join()
        cluster.restart(victim)
        wait_for_peer(session, plan, frames[0])
    assert any("edge0 ran its tile" in reason for reason in reasons)
