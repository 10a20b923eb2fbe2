"""Real models over real sockets: what crosses arrives bit for bit, and nobody changes it while it travels."""

import math
from collections.abc import Iterator

import pytest
import torch

import runtime
from runtime.model.graph import LayerGraph, unflatten_outputs
from runtime.model.inputs import admit
from runtime.model.segment import SegmentCache
from runtime.planning.problem import find_route
from runtime.types import Plan, Tier
from runtime.wire.channel import Hub
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Connected, Event, Limits, Peer, ReceivedData
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Hello, Submit, Welcome
from runtime.wire.pack import Packed, pack, unpack
from tests.models import ALL_MODELS, QUICK_MODELS
from tests.splitting import same_bits, same_output
from tests.waiting import wait_for

SPECS = [
    pytest.param(spec, marks=() if spec in QUICK_MODELS else pytest.mark.slow)  # the rest: make test-all
    for spec in ALL_MODELS
]


class Pair:
    """A device's hub and a node's hub on loopback."""

    def __init__(self) -> None:
        self.node = Hub("node")
        self.device = Hub("device")
        welcome = Welcome(PROTOCOL_VERSION, "node", Tier.CLOUD, (), CAPABILITIES)
        address = self.node.bind("tcp://127.0.0.1:*", lambda hello: welcome)
        self.peer: Peer = self.device.connect("node", address, Hello(PROTOCOL_VERSION, "device", "", CAPABILITIES))
        self.events: list[Event] = []
        self.until(Connected)

    def until(self, kind: type[Event]) -> Event:
        """Turn both loops until one of them reports an event of this kind."""

        def turn() -> bool:
            self.events += self.device.poll(0.0) + self.node.poll(0.0)
            return any(isinstance(event, kind) for event in self.events)

        wait_for(turn)
        found = next(event for event in self.events if isinstance(event, kind))
        self.events = []
        return found

    def close(self) -> None:
        self.device.close()
        self.node.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def spread(num_layers: int, count: int = 12) -> list[int]:
    """Split points, ends included, evenly spread."""
    return sorted({round(k * (num_layers - 1) / (count - 1)) for k in range(count)})


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.timeout(600)
def test_what_crosses_arrives_as_it_was_while_the_device_finishes_the_request_itself(spec: str, pair: Pair) -> None:
    model = runtime.load_model(spec)
    graph = runtime.trace(model)
    with torch.inference_mode():
        whole = model.module(model.example)
        other = model.module(torch.flip(model.example, (-1,)))
    assert not same_output(whole, other), "the output must depend on the input"
    for i in range(graph.num_layers) if spec in QUICK_MODELS else spread(graph.num_layers):
        check_cut(graph, model.example, whole, pair, i, "lossless" if i % 2 else "raw")


def check_cut(graph: LayerGraph, example: torch.Tensor, whole: object, pair: Pair, i: int, codec: str) -> None:
    spec = graph.spec
    i = max(i, spec.entry("tensor"))
    plan = Plan.split(spec.num_layers, i, i)
    route = find_route(spec, plan, "tensor")
    segments = SegmentCache(graph)
    values = dict(admit(spec, example).values)
    values.update(segments.get(route.device).run(values))
    names = route.up[0]
    before = {name: values[name].clone() for name in names}
    packed = pack(values, names, codec, AutoCodec(), math.nan)
    submit = Submit(1, graph.model_id, plan, "tensor", math.inf, packed.headers)
    pair.device.send_data(pair.peer, submit, packed.frames, i)
    local = segments.get(route.cloud).run({name: values[name] for name in route.cloud.needs})
    arrived = pair.until(ReceivedData)
    assert isinstance(arrived, ReceivedData)
    assert isinstance(arrived.body, Submit)
    got = unpack(Packed(arrived.body.tensors, arrived.frames), names, Limits())
    for name in names:
        assert same_bits(values[name], before[name]), f"{name} was changed by local completion at {i}"
        assert same_bits(got[name], before[name]), f"{name} arrived changed at {i}"
    remote = segments.get(route.cloud).run({name: got[name] for name in route.cloud.needs})
    for made in (local, remote):
        assert same_output(unflatten_outputs(spec, {**values, **made}), whole), f"cut at {i} differs"
