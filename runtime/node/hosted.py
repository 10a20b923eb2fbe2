"""A model as a process hosts it: what it can run of it, and how long that takes there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from runtime.measure import load_profile, predict_profile
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import sample_inputs
from runtime.model.segment import Segment, SegmentCache
from runtime.model.tiles import TileCache, slice_inputs
from runtime.model.zoo import load_model
from runtime.node.emulation import Emulator
from runtime.planning.cost import sum_layers
from runtime.planning.problem import Stage
from runtime.planning.tiles import tile_node, tile_seconds
from runtime.types import NodeProfile, Tier, TileSpan
from runtime.wire.codec import AutoCodec

KNOWN_SPANS = 1024
"""Spans whose tiles' seconds are kept; more than any policy goes back and forth between."""


@dataclass(frozen=True, eq=False)
class HostedModel:
    """A model that this process can run: its graph, its segments and this machine's profile of it.

    On an emulated node the profile is that of the idle machine it pretends to be.
    """

    spec: str
    graph: LayerGraph
    example: torch.Tensor
    segments: SegmentCache
    tiles: TileCache
    profile: NodeProfile
    emulator: Emulator | None = None
    activations: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Every value that may cross, as one sample makes it; for a node that replays."""
    _tile_s: dict[TileSpan, tuple[float, ...]] = field(default_factory=dict)

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
        may_predict: bool = False,
    ) -> "HostedModel":
        """Load, trace and profile a model.

        Args:
            spec: as `load_model` takes it.
            weights: likewise.
            seed: likewise.
            batch_size: likewise.
            device: likewise.
            auto: gives this machine's coding speed.
            emulator: what the machine pretends to be; its times follow from measured ones.
            may_predict: take predicted times where the model was never measured here and others were; see `measured`.

        Raises:
            ModelError: when it cannot be found, built or traced.
        """
        model = load_model(spec, weights=weights, seed=seed, batch_size=batch_size, device=device)
        graph = trace(model)
        segments, tiles = SegmentCache(graph), TileCache(graph)
        profile = predict_profile(graph, auto) if may_predict else None
        if profile is None:
            profile = load_profile(graph, segments, model.example, auto)
        if emulator is None:
            return cls(spec, graph, model.example, segments, tiles, profile)
        activations = sample_activations(graph, model.example) if emulator.emulation.is_replay else {}
        return cls(spec, graph, model.example, segments, tiles, emulator.pretend(profile), emulator, activations)

    def measured(self, auto: AutoCodec) -> "HostedModel":
        """Measure the model, and return it with measured times instead of predicted ones.

        It may go on serving meanwhile, in another thread.
        """
        profile = load_profile(self.graph, SegmentCache(self.graph), self.example, auto)
        return replace(self, profile=profile, _tile_s={})

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

    def run_tile(
        self,
        span: TileSpan,
        index: int,
        values: Mapping[str, torch.Tensor],
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Run one tile of a span on its slices, as `run` does.

        Raises:
            PlanError: when the graph has no such span or the lines do not cut it.
            TensorMismatch: when a slice is not the one that the graph makes.
            Stopped: when `should_stop` said so.
        """
        tile = self.tiles.get(span, index)
        if self.emulator is None:
            return tile.run_timed(values, should_stop=should_stop)

        def make() -> dict[str, torch.Tensor]:
            if not self.activations:
                return tile.run(values, should_stop=should_stop)
            tile.check(values)
            return slice_inputs(self.activations, self.tiles.tiling(span).tiles[index].outputs)

        return self.emulator.run(make, self.tile_s(span)[index], should_stop)

    def tile_s(self, span: TileSpan) -> tuple[float, ...]:
        """Idle seconds that this node needs for each tile of a span.

        Raises:
            PlanError: when the graph has no such span or the lines do not cut it.
        """
        known = self._tile_s.get(span)
        if known is None:
            if len(self._tile_s) >= KNOWN_SPANS:
                self._tile_s.clear()
            tiling = self.tiles.tiling(span)
            known = self._tile_s[span] = tile_seconds(self.graph.spec, tiling, tile_node(self.profile))
        return known


def sample_activations(graph: LayerGraph, example: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the whole model once on a fixed sample and keep every value that may cross."""
    inputs = sample_inputs(graph.spec, example)
    names = tuple(value.name for value in graph.spec.values if value.producer >= 0)
    whole = Stage(Tier.DEVICE, tuple(range(graph.num_layers)), tuple(inputs), names)
    return Segment(graph, whole).run(inputs)
