"""One request's share on a node: what came in, what the layers make of it, what goes on and what goes back.

A share is a stage, a stage with tiled spans (`runtime.node.tiling`), or a single tile of another head's stage
(`runtime.node.tile`).
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from runtime.errors import PlanError, ProtocolError
from runtime.node.chain import Means, Parcel
from runtime.node.hosted import HostedModel
from runtime.node.tile import Held, TileRun, check_grids
from runtime.node.tiling import TiledRun
from runtime.planning.chains import find_parts
from runtime.planning.cost import sum_layers
from runtime.planning.problem import Route, Stage, check_monotone, find_route
from runtime.types import Tier
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits, Peer
from runtime.wire.messages import Hop, Submit, TileRef
from runtime.wire.pack import Packed, pack, result_codec, unpack


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the coding of a share is chosen by: the last reading of each link's bandwidth, NaN without one."""

    up_bps: float  # to the next node
    down_bps: float  # to the client
    peers_bps: Mapping[int, float]  # by tile: to the nodes that can run one now


@dataclass(eq=False)
class Job:
    """A request on this node, from its `Submit` to its `Result`."""

    client: Peer
    submit: Submit
    model: HostedModel
    route: Route
    stage: Stage
    received: Packed
    arrived_at_s: float
    received_bytes: int
    predicted_s: float  # idle seconds for this node's share
    tiled: TiledRun | None = None  # of a stage with tiled spans
    tile: TileRun | None = None  # of a tile of another head's stage
    onward: Packed = field(default_factory=Packed)  # what crosses to the next node
    outputs: Packed = field(default_factory=Packed)  # model outputs made here
    queue_s: float = 0.0
    compute_s: float = 0.0
    codec_s: float = 0.0
    tiles_s: float = 0.0
    upload_s: float = 0.0
    started_at_s: float = 0.0
    next_request: int | None = None  # our number for it at the next node
    next_peer: Peer | None = None
    hops_beyond: tuple[Hop, ...] = ()

    @classmethod
    def accept(
        cls, client: Peer, submit: Submit, model: HostedModel, tier: Tier, received: Packed, nbytes: int, now_s: float
    ) -> "Job":
        """Check a submission against the model and work out this node's share.

        Raises:
            PlanError: when the plan does not fit the model.
            ValueError: when there is no such kind of input.
            ProtocolError: when other tensors came than the plan makes cross.
        """
        if submit.tile is not None:
            return cls._accept_tile(client, submit, submit.tile, model, tier, received, nbytes, now_s)
        graph = model.graph.spec
        entry = graph.entry(submit.input_kind)
        check_monotone(graph, submit.plan, entry)
        route = find_route(graph, submit.plan, submit.input_kind)
        if tier not in route.tiers:
            raise PlanError(f"the plan gives nothing to the {tier.label} tier: {submit.plan.describe()}")
        _check_received(received, route.up[route.tiers.index(tier) - 1], tier)
        stage = route.stage(tier)
        predicted_s, tiled = sum_layers(model.profile.layer_s, stage.layers), None
        if submit.plan.tiles and tier is Tier.EDGE:
            check_grids(submit.plan)
            tiled = TiledRun(model, find_parts(graph, submit.plan, submit.input_kind), submit.plan)
            predicted_s = tiled.predicted_s
        return cls(client, submit, model, route, stage, received, now_s, nbytes, predicted_s, tiled)

    @classmethod
    def _accept_tile(
        cls,
        client: Peer,
        submit: Submit,
        ref: TileRef,
        model: HostedModel,
        tier: Tier,
        received: Packed,
        nbytes: int,
        now_s: float,
    ) -> "Job":
        tile = TileRun.of(submit.plan, ref, model)
        if tier is not Tier.EDGE:
            raise PlanError(f"expected tiles on edge nodes, got one for the {tier.label} tier")
        _check_received(received, tile.takes, tier)
        tiling = tile.step.tiling
        stage, predicted_s = tiling.stage, model.tile_s(tiling.span)[ref.tile]
        route = Route(_nothing(Tier.DEVICE), stage, _nothing(Tier.CLOUD), (Tier.DEVICE, Tier.EDGE), (tile.takes,))
        return cls(client, submit, model, route, stage, received, now_s, nbytes, predicted_s, tile=tile)

    @property
    def has_next(self) -> bool:
        """Whether something must go on to the next tier."""
        return self.route.tiers[-1] is not self.stage.tier

    @property
    def crossing(self) -> tuple[str, ...]:
        """Names of the values that go on to the next tier."""
        if not self.has_next:
            return ()
        return self.route.up[self.route.tiers.index(self.stage.tier)]

    @property
    def answers(self) -> tuple[str, ...]:
        """Names of the values that go back to the client, as far as they are made here."""
        if self.tile is not None:
            return self.tile.gives
        made = set(self.stage.makes)
        return tuple(name for name in dict.fromkeys(self.model.graph.spec.outputs) if name in made)

    @property
    def goes_on(self) -> bool:
        """Whether this is a span of a chain that was begun here."""
        return self.tile is not None and not self.tile.is_first

    def enter(self, held: Held) -> None:
        """Note which span of which chain this is, where it is a tile.

        Raises:
            PlanError: when it is not the one that its chain goes on with.
        """
        if self.tile is not None:
            held.enter((self.client, self.tile.ref.run), self.tile, self.arrived_at_s + self.submit.remaining_s)

    def recall(self, held: Held) -> None:
        """Take up what was kept of the span before."""
        if self.tile is not None and self.goes_on:
            self.tile.state = held.take((self.client, self.tile.ref.run))

    def keep(self, held: Held) -> None:
        """Keep what the next span goes on from; nothing after the last."""
        if self.tile is not None and self.tile.is_last:
            self.forget(held)
        elif self.tile is not None and self.tile.state is not None:
            held.put((self.client, self.tile.ref.run), self.tile.state)

    def forget(self, held: Held) -> None:
        """Keep nothing: the request was given up."""
        if self.tile is not None:
            held.drop((self.client, self.tile.ref.run))

    def relay(self) -> None:
        """Pass on what came in: this node has no layers of the plan."""
        self.onward = self.received.pick(self.crossing)
        self.received = Packed()

    def compute(
        self,
        auto: AutoCodec,
        limits: Limits,
        conditions: Conditions,
        should_stop: Callable[[], bool],
        scatter: Callable[[tuple[Parcel, ...]], threading.Event],
    ) -> bool:
        """Run the share and code what leaves the node. Runs in the executor's thread.

        Args:
            auto: picks codecs.
            limits: caps on what came.
            conditions: of the links.
            should_stop: asked before every layer.
            scatter: sends tiles to other nodes, from any thread.

        Returns:
            Whether the share is done. If not, call again once no tile is out any more.

        Raises:
            ProtocolError: when a received tensor breaks a cap.
            PlanError: when nothing was kept of what a tile goes on from.
            TensorMismatch: when it is not the one that the graph makes.
            Stopped: when `should_stop` said so.
        """
        if self.tile is not None:
            pieces = unpack(self.received, self.tile.takes, limits)
            made, self.compute_s = self.tile.run(self.model, pieces, should_stop)
        elif self.tiled is None:
            made, self.compute_s = self.model.run(self.stage, self._decode(limits), should_stop=should_stop)
        else:
            if not self.tiled.has_begun:
                self.tiled.begin(self._decode(limits))
            if not self.tiled.advance(Means(auto, limits, conditions.peers_bps, should_stop, scatter)):
                return False
            made = self.tiled.finish(self.stage)
            self.compute_s, self.predicted_s = self.tiled.compute_s, self.tiled.predicted_s
        came_in = {header.name for header in self.received.headers}
        names, codec = self.crossing, self.submit.plan.codec
        fresh = [name for name in names if name not in came_in]
        self.onward = self.received.pick(names) + pack(made, fresh, codec, auto, conditions.up_bps)
        self.outputs = pack(made, self.answers, result_codec(codec), auto, conditions.down_bps)
        self.received = Packed()
        self.codec_s += self.onward.codec_s + self.outputs.codec_s
        return True

    def _decode(self, limits: Limits) -> dict[str, torch.Tensor]:
        return unpack(self.received.pick(self.stage.needs), self.stage.needs, limits)


def _nothing(tier: Tier) -> Stage:
    return Stage(tier, (), (), ())


def _check_received(received: Packed, expected: tuple[str, ...], tier: Tier) -> None:
    got = sorted(header.name for header in received.headers)
    if got != sorted(expected):
        raise ProtocolError(f"expected the tensors {sorted(expected)} to cross to {tier.label}, got {got}")
