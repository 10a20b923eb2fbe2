"""A stage with tiled spans, as its head runs it: segments and chains of spans, one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from runtime.node.chain import ChainRun, Means, Out
from runtime.node.hosted import HostedModel
from runtime.planning.chains import HEAD_TILE, Chain, Part
from runtime.planning.cost import sum_layers
from runtime.planning.problem import Stage
from runtime.types import Plan
from runtime.wire.pack import Packed


@dataclass(eq=False)
class TiledRun:
    """Where a stage with tiled spans stands.

    `begin`, `advance` and `finish` belong to the executor's thread. `waiting`, `back` and `lost` are changed by the loop,
    too, while tiles are out: one entry at a time.
    """

    model: HostedModel
    parts: tuple[Part, ...]
    plan: Plan
    waiting: set[Out] = field(default_factory=set)  # tiles that are out
    back: dict[Out, Packed] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # by tile: why it will not come back
    redone: list[str] = field(default_factory=list)  # why the head ran tiles of other nodes
    compute_s: float = 0.0
    predicted_s: float = 0.0  # idle seconds of the head's share; grows with every tile that it takes over
    has_begun: bool = False
    _values: dict[str, torch.Tensor] = field(default_factory=dict)
    _next: int = 0
    _open: ChainRun | None = None

    def __post_init__(self) -> None:
        """Predict the head's share."""
        for part in self.parts:
            if part.chain is None:
                self.predicted_s += sum_layers(self.model.profile.layer_s, part.stage.layers)
            else:
                self.predicted_s += self._own_s(part.chain)

    @property
    def at(self) -> int | None:
        """The span that is run tile by tile now, as an index in `Plan.tiles`."""
        return None if self._open is None else self._open.at

    @property
    def own(self) -> frozenset[int]:
        """The tiles that the head runs of the chain that is open."""
        return frozenset() if self._open is None else self._open.own

    @property
    def is_waiting(self) -> bool:
        """Whether tiles are out without which the head cannot go on."""
        return any(at == self.at and tile not in self.own for at, tile in tuple(self.waiting))

    @property
    def remainder_s(self) -> float:
        """Idle seconds that the head needs for the rest of the stage, should every tile that is out be left to it."""
        run, layers = self._open, [layer for part in self.parts[self._next :] for layer in part.stage.layers]
        seconds = 0.0
        if run is not None:
            seconds += run.remainder_s(self.waiting)
            stop = self.plan.tiles[run.at].stop
            layers += [layer for layer in run.chain.stage.layers if layer >= stop]
        return seconds + sum_layers(self.model.profile.layer_s, tuple(layers))

    @property
    def reason(self) -> str:
        """Why tiles did not run where the plan says; empty when they did."""
        return "; ".join(dict.fromkeys(self.redone))

    def begin(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take what the stage needs."""
        self.has_begun = True
        self._values.update(values)

    def advance(self, means: Means) -> bool:
        """Run the stage up to where tiles of other nodes are needed, or to its end.

        Returns:
            Whether the stage is done.

        Raises:
            TensorMismatch: when a value is not the one that the graph makes.
            Stopped: when `means.should_stop` said so.
        """
        while self._open is not None or self._next < len(self.parts):
            if self._open is None:
                self._start_part(self.parts[self._next], means)
                self._next += 1
            if self._open is not None:
                made = self._open.advance(means, self.waiting, self.back, self.lost)
                if made is None:
                    return False
                self._close_chain(self._open, made)
        return True

    def finish(self, stage: Stage) -> dict[str, torch.Tensor]:
        """What the stage makes."""
        return {name: self._values[name] for name in stage.makes}

    def _start_part(self, part: Part, means: Means) -> None:
        """Run a segment, or begin a chain; with nobody to help that is a segment, too."""
        given = {name: self._values[name] for name in part.stage.needs}
        if part.chain is not None:
            if any(tile in means.peers_bps for tile in range(1, part.chain.num_tiles)):
                self._open = ChainRun(self.model, self.plan, part.chain, part.first, given)
                return
            self._note_down(part.chain)
        made, seconds = self.model.run(part.stage, given, should_stop=means.should_stop)
        self._values.update(made)
        self.compute_s += seconds

    def _close_chain(self, run: ChainRun, made: Mapping[str, torch.Tensor]) -> None:
        self._values.update(made)
        self.compute_s += run.compute_s
        self.predicted_s += run.extra_s
        self.redone += run.redone
        self._open = None
        self.lost.clear()

    def _note_down(self, chain: Chain) -> None:
        names = ", ".join(self.plan.edge_nodes[1 : chain.num_tiles])
        self.redone.append(f"not connected to {names}: {self.plan.head} ran tiled layers in one piece")
        self.predicted_s += sum_layers(self.model.profile.layer_s, chain.stage.layers) - self._own_s(chain)

    def _own_s(self, chain: Chain) -> float:
        return sum(self.model.tile_s(span)[HEAD_TILE] for span in chain.spans)
