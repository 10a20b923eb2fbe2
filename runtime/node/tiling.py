"""A stage with tiled spans, as the head computes it: its own tile of every span, and whatever other nodes leave to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from runtime.errors import ProtocolError, TensorMismatch
from runtime.model.tiles import assemble, check_part, slice_inputs
from runtime.node.hosted import HostedModel
from runtime.planning.cost import sum_layers
from runtime.planning.problem import Stage
from runtime.planning.tiling import Part, Tiling
from runtime.types import Plan, TileSpan
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits
from runtime.wire.pack import Packed, pack, unpack

HEAD_TILE = 0
"""The tile that the head runs: `Plan.edge_nodes[0]` is the head."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one tile of another node needs."""

    tile: int
    packed: Packed


@dataclass(eq=False)
class TiledRun:
    """Where a stage with tiled spans stands.

    `begin`, `advance` and `finish` belong to the executor's thread. `waiting`, `back` and `lost` are changed by the loop
    while tiles are out; `advance` reads them only when none is.
    """

    model: HostedModel
    parts: tuple[Part, ...]
    plan: Plan
    waiting: set[int] = field(default_factory=set)  # tiles that are out
    back: dict[int, Packed] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # why a tile will not come back
    redone: list[str] = field(default_factory=list)  # why the head ran tiles of other nodes
    compute_s: float = 0.0
    predicted_s: float = 0.0  # idle seconds of the head's share; grows with every tile that it takes over
    has_begun: bool = False
    _values: dict[str, torch.Tensor] = field(default_factory=dict)
    _next: int = 0
    _open: Tiling | None = None
    _own: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Predict the head's share."""
        for part in self.parts:
            if part.tiling is None:
                self.predicted_s += sum_layers(self.model.profile.layer_s, part.stage.layers)
            else:
                self.predicted_s += self.model.tile_s(part.tiling.span)[HEAD_TILE]

    @property
    def remainder_s(self) -> float:
        """Idle seconds that the head needs for the rest of the stage, should every tile that is out be left to it."""
        seconds = 0.0 if self._open is None else sum(self.model.tile_s(self._open.span)[i] for i in set(self.waiting))
        for part in self.parts[self._next :]:
            seconds += sum_layers(self.model.profile.layer_s, part.stage.layers)
        return seconds

    @property
    def reason(self) -> str:
        """Why tiles did not run where the plan says; empty when they did."""
        return "; ".join(dict.fromkeys(self.redone))

    def begin(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take what the stage needs."""
        self.has_begun = True
        self._values.update(values)

    def advance(
        self,
        auto: AutoCodec,
        limits: Limits,
        peers_bps: Mapping[int, float],
        should_stop: Callable[[], bool],
        scatter: Callable[[TileSpan, tuple[Parcel, ...]], None],
    ) -> bool:
        """Run the stage up to where tiles of other nodes are needed, or to its end.

        Args:
            auto: picks codecs.
            limits: caps on what other nodes sent.
            peers_bps: by tile, the rate to its node, NaN where that is not known; no entry: the node is down.
            should_stop: asked before every layer.
            scatter: sends tiles.

        Returns:
            Whether the stage is done.

        Raises:
            TensorMismatch: when a value is not the one that the graph makes.
            Stopped: when `should_stop` said so.
        """
        if self._open is not None:
            self._close_span(self._open, limits, should_stop)
        while self._next < len(self.parts):
            part = self.parts[self._next]
            self._next += 1
            tiling = part.tiling
            if tiling is not None and any(tile in peers_bps for tile in range(1, len(tiling.tiles))):
                self._open_span(tiling, auto, peers_bps, should_stop, scatter)
                return False
            if tiling is not None:
                self._note_down(tiling)
            given = {name: self._values[name] for name in part.stage.needs}
            made, seconds = self.model.run(part.stage, given, should_stop=should_stop)
            self._values.update(made)
            self.compute_s += seconds
        return True

    def finish(self, stage: Stage) -> dict[str, torch.Tensor]:
        """What the stage makes."""
        return {name: self._values[name] for name in stage.makes}

    def _open_span(
        self,
        tiling: Tiling,
        auto: AutoCodec,
        peers_bps: Mapping[int, float],
        should_stop: Callable[[], bool],
        scatter: Callable[[TileSpan, tuple[Parcel, ...]], None],
    ) -> None:
        """Send the tiles of other nodes off, then run the own one."""
        self._open = tiling
        self.back.clear()
        self.lost.clear()
        parcels = []
        for index, tile in enumerate(tiling.tiles):
            if index == HEAD_TILE:
                continue
            if index in peers_bps:
                slices = slice_inputs(self._values, tile.inputs)
                parcels.append(Parcel(index, pack(slices, tuple(slices), self.plan.codec, auto, peers_bps[index])))
            else:
                self.lost[index] = f"{self.plan.edge_nodes[index]} is not connected"
        self.waiting.update(parcel.tile for parcel in parcels)
        scatter(tiling.span, tuple(parcels))
        self._own = self._run_tile(tiling, HEAD_TILE, should_stop)

    def _close_span(self, tiling: Tiling, limits: Limits, should_stop: Callable[[], bool]) -> None:
        """Run what did not come back, and put the tiles together."""
        parts = []
        for index in range(len(tiling.tiles)):
            part = self._own if index == HEAD_TILE else self._unpack(tiling, index, limits)
            if part is None:
                self.predicted_s += self.model.tile_s(tiling.span)[index]
                part = self._run_tile(tiling, index, should_stop)
                why = self.lost.get(index, f"{self.plan.edge_nodes[index]} did not answer")
                self.redone.append(f"{why}: {self.plan.head} ran its tile")
            parts.append(part)
        self._values.update(assemble(self.model.graph, tiling, parts))
        self._open, self._own = None, {}

    def _unpack(self, tiling: Tiling, index: int, limits: Limits) -> dict[str, torch.Tensor] | None:
        """A tile that came back; None when it did not, or is not what it should be."""
        packed = self.back.pop(index, None)
        if packed is None:
            return None
        try:
            part = unpack(packed, tiling.stage.makes, limits)
            for name in tiling.stage.makes:
                check_part(self.model.graph, tiling.tiles[index], index, name, part)
        except (ProtocolError, TensorMismatch) as error:
            self.lost[index] = f"{self.plan.edge_nodes[index]} sent a broken tile ({error})"
            return None
        return part

    def _run_tile(self, tiling: Tiling, index: int, should_stop: Callable[[], bool]) -> dict[str, torch.Tensor]:
        slices = slice_inputs(self._values, tiling.tiles[index].inputs)
        made, seconds = self.model.run_tile(tiling.span, index, slices, should_stop=should_stop)
        self.compute_s += seconds
        return made

    def _note_down(self, tiling: Tiling) -> None:
        """Nobody is there to help: the span runs in one piece."""
        span = tiling.span
        names = ", ".join(self.plan.edge_nodes[1 : len(tiling.tiles)])
        self.redone.append(f"not connected to {names}: {self.plan.head} ran tiled layers in one piece")
        whole_s = sum_layers(self.model.profile.layer_s, tiling.stage.layers)
        self.predicted_s += whole_s - self.model.tile_s(span)[HEAD_TILE]
