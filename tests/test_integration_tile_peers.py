"""A head and a peer that does as it is told: what crosses between them, and what the head makes of a bad peer."""

import math
import threading
from collections.abc import Iterator

import pytest
import torch

import runtime
from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import Session
from runtime.model.graph import LayerGraph, trace
from runtime.model.halo import TileState
from runtime.model.inputs import admit
from runtime.model.tiles import TileSegment
from runtime.planning.chains import find_parts, plan_chain
from runtime.planning.tiles import TileNode, cost_tiles
from runtime.planning.tiling import plan_tiles
from runtime.testbed.process import ManagedProcess
from runtime.types import Plan, Tier, TileSpan
from runtime.wire import events
from runtime.wire.channel import Hub
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits, Received, ReceivedData
from runtime.wire.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Cancel,
    Failure,
    Hello,
    Result,
    Status,
    Submit,
    TileRef,
    Welcome,
)
from runtime.wire.pack import Packed, pack, unpack
from tests.splitting import all_values
from tests.test_integration_tiles import CHAINED, FAR_S, MODEL, TOLERANCE, error, wait_for_peer
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

QUEUE = 4
"""Of the real node."""

SPANS = (TileSpan(0, 2, (13,), ()), TileSpan(3, 6, (), (7,)))


class Peer:
    """An edge node that counts what it gets and sends, and behaves as `mood` says: right, holds, busy, broken or error."""

    def __init__(self, graph: LayerGraph) -> None:
        self.mood = "right"
        self.bad_from = 0  # index of the first span that the mood is about
        self.received: list[tuple[Submit, int]] = []
        self.sent_bytes: list[int] = []
        self._spec = graph.spec
        self._model = graph
        self._states: dict[int, TileState] = {}
        self.cancelled: list[int] = []
        self._answers: list[tuple[events.Peer, int, Packed]] = []
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
                    elif isinstance(event, Received) and isinstance(event.message, Cancel):
                        self.cancelled.append(event.message.request)

    def _answer(self, event: ReceivedData, submit: Submit) -> None:
        self.received.append((submit, sum(len(frame) for frame in event.frames)))
        assert submit.tile is not None
        at = submit.tile.span
        self._send_answers()  # what was held back until more came
        if self.mood in ("busy", "error") and at >= self.bad_from:
            self._hub.send(event.peer, Failure(submit.request, self.mood, "as told", "edge1"))
            return
        chain, first = next(
            (part.chain, part.first)
            for part in find_parts(self._spec, submit.plan, "tensor")
            if part.chain and 0 <= at - part.first < len(part.chain.steps)
        )
        step, tile = chain.steps[at - first], submit.tile.tile
        if at == first:
            assert submit.tile.run == submit.request
            self._states[submit.request] = TileState(self._model, tile)
        state = self._states[submit.tile.run]
        labels = [piece.label for piece in step.takes[tile]]
        given = state.take(step, unpack(Packed(submit.tensors, event.frames), labels, Limits()))
        state.keep(step, TileSegment(self._model, step.tiling, tile).run(given))
        made = state.give(step.gives[tile])
        if self.mood == "broken" and at >= self.bad_from:
            made = {name: value[:, :, 1:] for name, value in made.items()}
        packed = pack(made, tuple(made), "raw", AutoCodec(), float("nan"))
        self.sent_bytes.append(packed.nbytes)
        self._answers.append((event.peer, submit.request, packed))
        if self.mood != "holds" or step is chain.steps[-1]:
            self._send_answers()

    def _send_answers(self) -> None:
        while self._answers:
            peer, request, packed = self._answers.pop(0)
            self._hub.send_data(peer, Result(request, (), packed.headers), packed.frames, request)

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
    options = ("--tier", "edge", "--name", "edge0", "--model", MODEL, "--queue", str(QUEUE))
    options += ("--connect", f"edge1={peer.address}")
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
    peer.mood, peer.bad_from = "right", 0
    peer.received.clear()
    peer.sent_bytes.clear()
    peer.cancelled.clear()


def plan(session: Session, spans: tuple[TileSpan, ...] = SPANS) -> Plan:
    return Plan((Tier.EDGE,) * session.graph.num_layers, ("edge0", "edge1"), spans, "raw")


@pytest.mark.parametrize("spans", [SPANS, CHAINED], ids=["apart", "chained"])
def test_just_the_regions_cross_that_the_formula_says(
    spans: tuple[TileSpan, ...], session: Session, peer: Peer, model: runtime.Model
) -> None:
    with torch.inference_mode():
        whole = model.module(model.example)
    result = session.infer(model.example, plan=plan(session, spans), deadline_s=FAR_S)
    assert error(result.output, whole) <= TOLERANCE
    assert result.reason == ""
    if spans == SPANS:
        tilings = [plan_tiles(session.graph, span) for span in SPANS]
        whole_bytes = {value.name: value.tensor.nbytes for value in session.graph.values}
        sizes = {value.name: math.prod(value.tensor.shape[2:]) for value in session.graph.values}
        for (_, nbytes), tiling in zip(peer.received, tilings, strict=True):
            regions = tiling.tiles[1].inputs
            assert nbytes == sum(whole_bytes[name] * region.area // sizes[name] for name, region in regions.items())
    nodes = [TileNode((1e-3,) * session.graph.num_layers)] * 2
    costs = cost_tiles(session.graph, spans, nodes)
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


@pytest.mark.parametrize("mood", ["busy", "error", "broken"])
@pytest.mark.parametrize("bad_from", [1, 3, 4])
def test_a_peer_that_goes_bad_within_a_chain_is_replaced_from_its_start_on_and_asked_no_more(
    mood: str, bad_from: int, session: Session, peer: Peer, model: runtime.Model
) -> None:
    """Spans 0 and 1 are one chain, 2, 3 and 4 the other."""
    with torch.inference_mode():
        whole = model.module(model.example)
    peer.mood, peer.bad_from = mood, bad_from
    result = session.infer(model.example, plan=plan(session, CHAINED), deadline_s=FAR_S)
    assert error(result.output, whole) <= TOLERANCE
    assert result.outcome == "remote"
    assert "edge0 ran its tile" in result.reason
    asked = [submit.tile.span for submit, _ in peer.received if submit.tile is not None]
    later_chains = [2] if bad_from == 1 else []  # a chain is begun anew with every node that is there
    assert set(asked) >= {*range(bad_from + 1), *later_chains}
    # The head sends borders on before it knows what has come of those before.
    assert max(asked) <= (3 if bad_from == 1 else bad_from + 1)


@pytest.mark.parametrize("mood", ["broken", "error"])
@pytest.mark.parametrize("bad_from", [0, 2])
def test_a_peer_is_told_when_what_it_keeps_is_wanted_no_more(
    mood: str, bad_from: int, session: Session, peer: Peer, model: runtime.Model
) -> None:
    peer.mood, peer.bad_from = mood, bad_from
    session.infer(model.example, plan=plan(session, CHAINED), deadline_s=FAR_S)
    (begun,) = [submit.request for submit, _ in peer.received if submit.tile is not None and submit.tile.span == 2]
    wait_for(lambda: begun in peer.cancelled)


def test_borders_of_the_head_leave_before_those_of_others_are_back(
    session: Session, peer: Peer, model: runtime.Model
) -> None:
    """The peer keeps the answer to a span to itself until it has been given the next one's borders."""
    with torch.inference_mode():
        whole = model.module(model.example)
    peer.mood = "holds"
    result = session.infer(model.example, plan=plan(session, CHAINED), deadline_s=FAR_S)
    assert error(result.output, whole) <= TOLERANCE
    assert (result.outcome, result.reason) == ("remote", "")


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


class Head:
    """A head that gives a real node tile 1 of a chain, span by span."""

    def __init__(self, hub: Hub, address: str, graph: LayerGraph, example: torch.Tensor) -> None:
        self.hub, self.graph = hub, graph
        self.plan = Plan((Tier.EDGE,) * graph.num_layers, ("head", "edge0"), CHAINED, "raw")
        self.values = all_values(graph, admit(graph.spec, example))
        self.node = hub.connect("edge0", address, Hello(PROTOCOL_VERSION, "head", "", CAPABILITIES))
        self.said: list[Result | Failure] = []
        wait_for(lambda: self._hear() or self.node.is_up)

    def _hear(self) -> bool:
        for event in self.hub.poll(0.2):
            said = event.body if isinstance(event, ReceivedData) else getattr(event, "message", None)
            if isinstance(said, Result | Failure):
                self.said.append(said)
        return False

    def submit(self, number: int, span: int, run: int) -> None:
        step = plan_chain(self.graph.spec, CHAINED[2:]).steps[span - 2]
        pieces = {
            piece.label: self.values[piece.name][:, :, slice(*piece.region.rows), slice(*piece.region.cols)]
            for piece in step.takes[1]
        }
        packed = pack(pieces, tuple(pieces), "raw", AutoCodec(), float("nan"))
        ref = TileRef(span, 1, run)
        submit = Submit(number, self.graph.model_id, self.plan, "tensor", FAR_S, packed.headers, tile=ref)
        self.hub.send_data(self.node, submit, packed.frames, number)

    def answer(self) -> Result | Failure:
        wait_for(lambda: self._hear() or bool(self.said))
        return self.said.pop(0)


@pytest.fixture
def head(session: Session, graph: LayerGraph, model: runtime.Model) -> Iterator[Head]:
    with Hub("head") as hub:
        yield Head(hub, session.deployment.nodes[0].address, graph, model.example)


def test_a_node_keeps_a_chain_until_it_is_told_that_it_is_given_up(head: Head) -> None:
    for number, span in enumerate((2, 3, 4), 10):
        head.submit(number, span, run=10)
        assert isinstance(head.answer(), Result)
    head.submit(20, 2, run=20)
    assert isinstance(head.answer(), Result)
    head.hub.send(head.node, Cancel(20))
    head.submit(21, 3, run=20)
    answer = head.answer()
    assert isinstance(answer, Failure)
    assert "nothing was kept of the span before; submit the chain from its start" in answer.text


def test_a_node_begins_no_more_chains_than_may_wait_and_goes_on_with_all_of_them(head: Head) -> None:
    capacity = QUEUE
    for number in range(capacity + 1):
        head.submit(number, 2, run=number)
    answers = [head.answer() for _ in range(capacity + 1)]
    refused = [answer for answer in answers if isinstance(answer, Failure)]
    assert [answer.kind for answer in refused] == ["busy"]
    for number in {*range(capacity + 1)} - {answer.request for answer in refused}:
        head.submit(100 + number, 3, run=number)
        assert isinstance(head.answer(), Result)
