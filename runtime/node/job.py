"""One request's share on a node: what came in, what the segment makes of it, what goes on and what goes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from runtime.errors import PlanError, ProtocolError
from runtime.measure import load_profile
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import sample_inputs
from runtime.model.segment import Segment, SegmentCache
from runtime.model.zoo import load_model
from runtime.node.emulation import Emulator
from runtime.planning.cost import sum_layers
from runtime.planning.problem import Route, Stage, check_monotone, find_route
from runtime.types import NodeProfile, Tier
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits, Peer
from runtime.wire.messages import Hop, Submit
from runtime.wire.pack import Packed, pack, result_codec, unpack


@dataclass(frozen=True, eq=False)
class HostedModel:
    """A model that this process can run: its graph, its segments and this machine's profile of it.

    On an emulated node the profile is that of the idle machine it pretends to be.
    """

    spec: str
    graph: LayerGraph
    segments: SegmentCache
    profile: NodeProfile
    emulator: Emulator | None = None
    activations: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Every value that may cross, as one sample makes it; for a node that replays."""

    @classmethod
    def load(
        cls,
        spec: str,
        *,
        weights: str | None,
        seed: int,
        batch_size: int,
        device: str,
        auto: AutoCodec,
        emulator: Emulator | None = None,
    ) -> "HostedModel":
        """Load, trace and profile a model.

        Raises:
            ModelError: when it cannot be found, built or traced.
        """
        model = load_model(spec, weights=weights, seed=seed, batch_size=batch_size, device=device)
        graph = trace(model)
        segments = SegmentCache(graph)
        profile = load_profile(graph, segments, model.example, auto)
        if emulator is None:
            return cls(spec, graph, segments, profile)
        activations = sample_activations(graph, model.example) if emulator.emulation.is_replay else {}
        return cls(spec, graph, segments, emulator.pretend(profile), emulator, activations)

    def run(
        self, stage: Stage, values: Mapping[str, torch.Tensor], *, should_stop: Callable[[], bool] | None = None
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Run a stage, in the time that the machine it is meant for would need.

        Returns:
            The values that the stage makes, and the seconds until they were there.

        Raises:
            TensorMismatch: when a value is not the one that the graph makes.
            Stopped: when `should_stop` said so.
        """
        segment = self.segments.get(stage)
        if self.emulator is None:
            return segment.run_timed(values, should_stop=should_stop)

        def make() -> dict[str, torch.Tensor]:
            if not self.activations:
                return segment.run(values, should_stop=should_stop)
            segment.check(values)
            return {name: self.activations[name] for name in stage.makes}

        return self.emulator.run(make, sum_layers(self.profile.layer_s, stage.layers), should_stop)


def sample_activations(graph: LayerGraph, example: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the whole model once on a fixed sample and keep every value that may cross."""
    inputs = sample_inputs(graph.spec, example)
    names = tuple(value.name for value in graph.spec.values if value.producer >= 0)
    whole = Stage(Tier.DEVICE, tuple(range(graph.num_layers)), tuple(inputs), names)
    return Segment(graph, whole).run(inputs)


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
    onward: Packed = field(default_factory=Packed)  # what crosses to the next node
    outputs: Packed = field(default_factory=Packed)  # model outputs made here
    queue_s: float = 0.0
    compute_s: float = 0.0
    codec_s: float = 0.0
    upload_s: float = 0.0
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
        graph = model.graph.spec
        entry = graph.entry(submit.input_kind)
        check_monotone(graph, submit.plan, entry)
        route = find_route(graph, submit.plan, submit.input_kind)
        if tier not in route.tiers:
            raise PlanError(f"the plan gives nothing to the {tier.label} tier: {submit.plan.describe()}")
        expected = route.up[route.tiers.index(tier) - 1]
        got = sorted(header.name for header in received.headers)
        if got != sorted(expected):
            raise ProtocolError(f"expected the tensors {sorted(expected)} to cross to {tier.label}, got {got}")
        return cls(client, submit, model, route, route.stage(tier), received, now_s, nbytes)

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
    def predicted_s(self) -> float:
        """Idle seconds predicted for this node's share."""
        return sum_layers(self.model.profile.layer_s, self.stage.layers)

    def relay(self) -> None:
        """Pass on what came in: this node has no layers of the plan."""
        self.onward = self.received.pick(self.crossing)
        self.received = Packed()

    def compute(
        self,
        auto: AutoCodec,
        limits: Limits,
        up_bps: float,
        down_bps: float,
        should_stop: Callable[[], bool],
    ) -> float:
        """Run the share and code what leaves the node. Runs in the executor's thread.

        Returns:
            Compute seconds of the segment alone.

        Raises:
            ProtocolError: when a received tensor breaks a cap.
            TensorMismatch: when it is not the one that the graph makes.
        """
        came_in = {header.name for header in self.received.headers}
        decoded = unpack(self.received.pick(self.stage.needs), self.stage.needs, limits)
        made = self._run_segment(decoded, should_stop)
        names = self.crossing
        plan = self.submit.plan
        fresh = [name for name in names if name not in came_in]
        self.onward = self.received.pick(names) + pack(made, fresh, plan.codec, auto, up_bps)
        outputs = [name for name in dict.fromkeys(self.model.graph.spec.outputs) if name in made]
        self.outputs = pack(made, outputs, result_codec(plan.codec), auto, down_bps)
        self.received = Packed()
        self.codec_s += self.onward.codec_s + self.outputs.codec_s
        return self.compute_s

    def _run_segment(self, values: dict[str, torch.Tensor], should_stop: Callable[[], bool]) -> dict[str, torch.Tensor]:
        made, self.compute_s = self.model.run(self.stage, values, should_stop=should_stop)
        return made
