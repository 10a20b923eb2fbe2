"""A head and a peer that does as it is told: what crosses between them, and what the head makes of a bad peer."""

import threading
from collections.abc import Iterator

import pytest
import torch

import runtime
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import Session
from runtime.model.graph import LayerGraph, trace
from runtime.model.tiles import TileCache
from runtime.planning.tiles import TileNode, cost_tiles
from runtime.planning.tiling import plan_tiles, region_bytes
from runtime.testbed.process import ManagedProcess
from runtime.types import Plan, Tier, TileSpan
from runtime.wire.channel import Hub
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits, Received, ReceivedData
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Failure, Hello, Result, Status, Submit, Welcome
from runtime.wire.pack import Packed, pack, unpack
from tests.test_integration_tiles import FAR_S, MODEL, TOLERANCE, error, wait_for_peer
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

SPANS = (TileSpan(0, 2, (13,), ()), TileSpan(3, 6, (), (7,)))


class Peer:
    """An edge node that counts what it gets and sends, and behaves as `mood` says: right, busy, broken or error."""

    def __init__(self, graph: LayerGraph) -> None:
        self.mood = "right"
        self.received: list[tuple[Submit, int]] = []
        self.sent_bytes: list[int] = []
        self._spec = graph.spec
        self._tiles = TileCache(graph)
        self._hub = Hub("edge1")
        self.address = self._hub.bind("tcp://127.0.0.1:*", self._welcome)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _welcome(self, hello: Hello) -> Welcome:
        return Welcome(PROTOCOL_VERSION, "edge1", Tier.EDGE, (), CAPABILITIES)

    def _serve(self) -> None:
        with self._hub as hub:
            while not self._is_closed.is_set():
                for event in hub.poll(0.5):
                    if isinstance(event, ReceivedData) and isinstance(event.body, Submit):
                        self._answer(event, event.body)

    def _answer(self, event: ReceivedData, submit: Submit) -> None:
        self.received.append((submit, sum(len(frame) for frame in event.frames)))
        if self.mood in ("busy", "error"):
            self._hub.send(event.peer, Failure(submit.request, self.mood, "as told", "edge1"))
            return
        assert submit.tile is not None
        segment = self._tiles.get(submit.plan.tiles[submit.tile.span], submit.tile.tile)
        made = segment.run(unpack(Packed(submit.tensors, event.frames), segment.needs, Limits()))
        if self.mood == "broken":
            made = {name: value[:, :, 1:] for name, value in made.items()}
        packed = pack(made, segment.makes, "raw", AutoCodec(), float("nan"))
        self.sent_bytes.append(packed.nbytes)
        self._hub.send_data(event.peer, Result(submit.request, (), packed.headers), packed.frames, submit.request)

    def close(self) -> None:
        self._is_closed.set()
        self._hub.wake()
        self._thread.join()


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load_model(MODEL)


@pytest.fixture(scope="module")
def graph(model: runtime.Model) -> LayerGraph:
    return trace(model)


@pytest.fixture(scope="module")
def peer(graph: LayerGraph) -> Iterator[Peer]:
    peer = Peer(graph)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def session(peer: Peer, model: runtime.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    options = ("--tier", "edge", "--name", "edge0", "--model", MODEL, "--connect", f"edge1={peer.address}")
    worker = ManagedProcess("edge0", "runtime.node", (*options, "--exit-with-stdin"), tmp_path_factory.mktemp("log"))
    try:
        edge0 = NodeConfig(name="edge0", tier=Tier.EDGE, address=worker.wait_line("READY", 100.0))
        # The device needs no peer of the head: at this address nobody listens.
        edge1 = NodeConfig(name="edge1", tier=Tier.EDGE, address="tcp://127.0.0.1:11")
        deployment = Deployment(model=ModelConfig(spec=MODEL, input_kind="tensor"), nodes=(edge0, edge1))
        with Session(deployment, runtime.load_policy("device-only"), connect_timeout_s=2.0) as session:
            wait_for_peer(session, plan(session), model.example)
            yield session
    finally:
        worker.ask_to_stop()
        worker.wait()


@pytest.fixture(autouse=True)
def fresh(peer: Peer) -> None:
    peer.mood = "right"
    peer.received.clear()
    peer.sent_bytes.clear()


def plan(session: Session, spans: tuple[TileSpan, ...] = SPANS) -> Plan:
    return Plan((Tier.EDGE,) * session.graph.num_layers, ("edge0", "edge1"), spans, "raw")


def test_just_the_regions_cross_that_the_formula_says(session: Session, peer: Peer, model: runtime.Model) -> None:
    with torch.inference_mode():
        whole = model.module(model.example)
    result = session.infer(model.example, plan=plan(session), deadline_s=FAR_S)
    assert error(result.output, whole) <= TOLERANCE
    assert result.reason == ""
    tilings = [plan_tiles(session.graph, span) for span in SPANS]
    assert [nbytes for _, nbytes in peer.received] == [region_bytes(session.graph, t.tiles[1].inputs) for t in tilings]
    assert peer.sent_bytes == [region_bytes(session.graph, t.tiles[1].outputs) for t in tilings]
    nodes = [TileNode((1e-3,) * session.graph.num_layers)] * 2
    costs = [cost_tiles(session.graph, span, nodes) for span in SPANS]
    assert [nbytes for _, nbytes in peer.received] == [cost.scatter_bytes[1] for cost in costs]
    assert peer.sent_bytes == [cost.gather_bytes[1] for cost in costs]


@pytest.mark.parametrize(
    ("mood", "reason"), [("busy", "edge1: busy: as told"), ("error", "edge1: error"), ("broken", "sent a broken tile")]
)
def test_a_peer_that_does_not_do_its_tile_is_replaced_by_the_head(
    mood: str, reason: str, session: Session, peer: Peer, model: runtime.Model
) -> None:
    with torch.inference_mode():
        whole = model.module(model.example)
    peer.mood = mood
    result = session.infer(model.example, plan=plan(session), deadline_s=FAR_S)
    assert error(result.output, whole) <= TOLERANCE
    assert result.outcome == "remote"
    assert reason in result.reason
    assert "edge0 ran its tile" in result.reason
    assert len(peer.received) == len(SPANS)


def test_a_tile_carries_the_time_that_is_left_and_names_its_place(
    session: Session, peer: Peer, model: runtime.Model
) -> None:
    session.infer(model.example, plan=plan(session), deadline_s=FAR_S)
    places = []
    for submit, _ in peer.received:
        assert submit.tile is not None
        assert 0 < submit.remaining_s < FAR_S
        places.append((submit.tile.span, submit.tile.tile))
    assert places == [(0, 1), (1, 1)]


def test_a_status_tells_the_link_to_an_edge_node_that_calls_back_once(session: Session) -> None:
    head = session.deployment.nodes[0]
    with Hub("edge1") as hub:
        hub.connect("edge0", head.address, Hello(PROTOCOL_VERSION, "edge1", "", CAPABILITIES))
        statuses: list[Status] = []

        def is_told() -> bool:
            received = [event.message for event in hub.poll(1.0) if isinstance(event, Received)]
            statuses.extend(message for message in received if isinstance(message, Status))
            return bool(statuses)

        wait_for(is_told)
    assert {tuple(link.target for link in status.links) for status in statuses} == {("edge1",)}
