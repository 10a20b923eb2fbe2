"""A chain of tiled spans as its head computes it: its own tile, step by step, and whatever other nodes leave to it."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from runtime.errors import ProtocolError, TensorMismatch
from runtime.model.halo import TileState, assemble, check_piece
from runtime.node.hosted import HostedModel
from runtime.planning.chains import HEAD_TILE, Chain, Step
from runtime.types import Plan
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Limits
from runtime.wire.pack import Packed, pack, unpack

HAND_OVER_S = 0.02
"""How long the head waits at most for tiles to be sent before it computes. Guess: several times what a loop takes that does
nothing else."""

Out = tuple[int, int]
"""A tile that another node has: index of its span in `Plan.tiles`, index of the tile."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one tile of another node is given."""

    out: Out
    packed: Packed
    back_bytes: int  # raw, of what it is to give
    is_first: bool  # of its chain: the node has nothing of it yet
    is_last: bool  # the node need keep nothing


@dataclass(frozen=True, slots=True)
class Means:
    """What a run of tiles works with; changes from one piece of a share to the next."""

    auto: AutoCodec  # picks codecs
    limits: Limits  # caps on what other nodes sent
    peers_bps: Mapping[int, float]  # by tile, the rate to its node, NaN where unknown; no entry: the node is down
    should_stop: Callable[[], bool]  # asked before every layer
    scatter: Callable[[tuple[Parcel, ...]], threading.Event]  # sends tiles; set when that is done


class ChainRun:
    """Where a chain stands at its head. For the executor's thread.

    A tile of another node that does not come back is done by the head from what that node was given, from the start of
    the chain on, and stays with the head to its end.

    Args:
        model: what runs.
        plan: whose chain it is.
        chain: the spans.
        first: index of the first of them in `plan.tiles`.
        values: what the chain needs.
    """

    def __init__(
        self, model: HostedModel, plan: Plan, chain: Chain, first: int, values: Mapping[str, torch.Tensor]
    ) -> None:
        self.chain = chain
        self.compute_s = 0.0
        self.extra_s = 0.0  # idle seconds of tiles that were taken over
        self.redone: list[str] = []  # why
        self._model = model
        self._plan = plan
        self._first = first
        self._at = 0  # index of the step
        self._has_run = False  # the own tiles of this step
        self._is_sent: threading.Event | None = None  # what was given to the loop last
        self._states = {HEAD_TILE: TileState(model.graph, HEAD_TILE, values)}  # of the tiles that this node runs
        self._given: dict[int, list[dict[str, torch.Tensor]]] = {  # to other nodes, by tile and step
            tile: [] for tile in range(1, chain.num_tiles)
        }
        self._heard: dict[str, torch.Tensor] = {}  # pieces of tiles of other nodes, by label

    @property
    def own(self) -> frozenset[int]:
        """The tiles that this node runs."""
        return frozenset(self._states)

    @property
    def at(self) -> int:
        """The span that is run now, as an index in `Plan.tiles`."""
        return self._first + self._at

    def advance(
        self, means: Means, waiting: set[Out], back: dict[Out, Packed], lost: Mapping[int, str]
    ) -> dict[str, torch.Tensor] | None:
        """Go on to where tiles of other nodes are needed, or to the end.

        Args:
            means: to work with.
            waiting: tiles that are out; those that are sent are added.
            back: what came back; what is used is taken out.
            lost: why a tile will not come back.

        Returns:
            What the chain makes; None while tiles of this step are out.

        Raises:
            TensorMismatch: when a value is not the one that the graph makes.
            Stopped: when `means.should_stop` said so.
        """
        while True:
            if not self._has_run:
                self._run_step(means, waiting)
            if any((self.at, tile) in waiting for tile in self._given):
                return None
            parts = self._hear(means, back, lost)
            if self._at + 1 == len(self.chain.steps):
                break
            self._at, self._has_run = self._at + 1, False
        ordered = [parts[tile] for tile in range(self.chain.num_tiles)]
        return assemble(self._model.graph, self.chain, ordered)

    def remainder_s(self, waiting: set[Out]) -> float:
        """Idle seconds for the tiles of this step that are out, should they be left to this node."""
        tiles = {tile for at, tile in tuple(waiting) if at == self.at} - self.own
        return sum(self._tile_s(step, tile) for step in self.chain.steps[: self._at + 1] for tile in tiles)

    # --- a step -------------------------------------------------------------------------------------------------------

    def _run_step(self, means: Means, waiting: set[Out]) -> None:
        """Send the tiles of other nodes off, run the own ones, and send on what is there for the next step."""
        step = self.chain.steps[self._at]
        for tile in sorted(self._given):
            if tile not in means.peers_bps:
                self._take_over(tile, self._at, f"{self._plan.edge_nodes[tile]} is not connected", means)
        self._send(self._at, [tile for tile in self._given if len(self._given[tile]) == self._at], means, waiting)
        inputs = {tile: state.take(step, self._collect(step, tile)) for tile, state in sorted(self._states.items())}
        if self._is_sent is not None:
            self._is_sent.wait(HAND_OVER_S)  # or the loop stands in line behind this computation: see `Scatter.post`
        for tile, given in inputs.items():
            self._run_tile(self._states[tile], step, given, means)
        self._has_run = True
        if self._at + 1 < len(self.chain.steps):
            early = [tile for tile in self._given if self.chain.steps[self._at + 1].is_early(tile)]
            self._send(self._at + 1, early, means, waiting)

    def _send(self, at: int, tiles: list[int], means: Means, waiting: set[Out]) -> None:
        step, parcels = self.chain.steps[at], []
        for tile in tiles:
            pieces = {label: _detach(piece) for label, piece in self._collect(step, tile).items()}
            self._given[tile].append(pieces)
            packed = pack(pieces, tuple(pieces), self._plan.codec, means.auto, means.peers_bps[tile])
            is_last = at + 1 == len(self.chain.steps)
            parcels.append(Parcel((self._first + at, tile), packed, step.give_bytes[tile], at == 0, is_last))
        if parcels:
            waiting.update(parcel.out for parcel in parcels)
            self._is_sent = means.scatter(tuple(parcels))

    def _collect(self, step: Step, tile: int) -> dict[str, torch.Tensor]:
        """What a tile takes, by label."""
        pieces: dict[str, torch.Tensor] = {}
        for piece in step.takes[tile]:
            state = self._states.get(piece.source)
            pieces |= {piece.label: self._heard[piece.label]} if state is None else state.give([piece])
        return pieces

    def _hear(
        self, means: Means, back: dict[Out, Packed], lost: Mapping[int, str]
    ) -> dict[int, dict[str, torch.Tensor]]:
        """What every tile gives after this step; what did not come back is done here."""
        step, parts = self.chain.steps[self._at], {}
        self._heard.clear()
        for tile in sorted(self._given):
            pieces, why = self._unpack(step, tile, back.pop((self.at, tile), None), means.limits)
            if pieces is None:
                self._take_over(tile, self._at + 1, why or lost.get(tile, ""), means)
            else:
                parts[tile] = pieces
                self._heard |= pieces
        return parts | {tile: state.give(step.gives[tile]) for tile, state in self._states.items()}

    def _unpack(
        self, step: Step, tile: int, packed: Packed | None, limits: Limits
    ) -> tuple[dict[str, torch.Tensor] | None, str]:
        """What a tile gave; None when it did not, or when it is not what it should be, and then why."""
        if packed is None:
            return None, ""
        try:
            pieces = unpack(packed, [piece.label for piece in step.gives[tile]], limits)
            for piece in step.gives[tile]:
                check_piece(self._model.graph, piece, pieces.get(piece.label))
        except (ProtocolError, TensorMismatch) as error:
            return None, f"{self._plan.edge_nodes[tile]} sent a broken tile ({error})"
        return pieces, ""

    def _take_over(self, tile: int, num_steps: int, why: str, means: Means) -> None:
        """Do the first steps of another node's tile from what that was given, and keep the tile."""
        given = self._given.pop(tile)
        state = TileState(self._model.graph, tile)
        for step, pieces in zip(self.chain.steps[:num_steps], given, strict=False):
            self._run_tile(state, step, state.take(step, pieces), means)
        self._states[tile] = state
        self.extra_s += sum(self._tile_s(step, tile) for step in self.chain.steps)
        why = why or f"{self._plan.edge_nodes[tile]} did not answer"
        self.redone.append(f"{why}: {self._plan.head} ran its tile")

    def _run_tile(self, state: TileState, step: Step, given: dict[str, torch.Tensor], means: Means) -> None:
        span = step.tiling.span
        made, seconds = self._model.run_tile(span, state.tile, given, should_stop=means.should_stop)
        self.compute_s += seconds
        state.keep(step, made)

    def _tile_s(self, step: Step, tile: int) -> float:
        return self._model.tile_s(step.tiling.span)[tile]


def _detach(piece: torch.Tensor) -> torch.Tensor:
    """A border as a copy: as a view it would keep its whole map until the end of the chain."""
    return piece.clone() if 2 * piece.nbytes < piece.untyped_storage().nbytes() else piece
