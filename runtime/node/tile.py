"""A single tile of another head's stage: what it is given, what it keeps for the next span, what it gives."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.errors import PlanError
from runtime.model.halo import TileState
from runtime.node.hosted import HostedModel
from runtime.planning.chains import MAX_TILES, Chain, Step, find_chains, plan_chain
from runtime.types import Plan
from runtime.wire.events import Peer
from runtime.wire.messages import TileRef

ChainKey = tuple[Peer, int]
"""Whose tile, and the number of the `Submit` that began its chain."""


@dataclass(eq=False)
class TileRun:
    """One span's share of a tile."""

    ref: TileRef
    chain: Chain
    first: int  # index of the chain's first span in `Plan.tiles`
    state: TileState | None = None  # what was kept of the span before; None: nothing

    @classmethod
    def of(cls, plan: Plan, ref: TileRef, model: HostedModel) -> "TileRun":
        """Find the tile in a plan.

        Raises:
            PlanError: when the plan has no such tile, or is not one for this model.
        """
        if not 0 <= ref.span < len(plan.tiles) or not 0 <= ref.tile < plan.tiles[ref.span].num_tiles:
            raise PlanError(f"expected one of the tiles of {plan.describe()}, got tile {ref.tile} of span {ref.span}")
        check_grids(plan)
        first = 0
        for spans in find_chains(plan.tiles):
            if ref.span < first + len(spans):
                state = TileState(model.graph, ref.tile) if ref.span == first else None
                return cls(ref, plan_chain(model.graph.spec, spans), first, state)
            first += len(spans)
        raise AssertionError("every span is in a chain")

    @property
    def step(self) -> Step:
        """The span, as a step of its chain."""
        return self.chain.steps[self.ref.span - self.first]

    @property
    def is_first(self) -> bool:
        """Whether nothing was to be kept before it."""
        return self.ref.span == self.first

    @property
    def is_last(self) -> bool:
        """Whether nothing is to be kept after it."""
        return self.step is self.chain.steps[-1]

    @property
    def takes(self) -> tuple[str, ...]:
        """What has to come: labels."""
        return tuple(piece.label for piece in self.step.takes[self.ref.tile])

    @property
    def gives(self) -> tuple[str, ...]:
        """What goes back: labels."""
        return tuple(piece.label for piece in self.step.gives[self.ref.tile])

    def run(
        self, model: HostedModel, pieces: dict[str, torch.Tensor], should_stop: Callable[[], bool]
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Run the layers on this tile.

        Returns:
            What goes back, by label, and the seconds of computing.

        Raises:
            PlanError: when the node did not run the span before, or has forgotten it.
            TensorMismatch: when a piece is not the one that the graph makes.
            Stopped: when `should_stop` said so.
        """
        if self.state is None:
            raise PlanError(
                f"expected tile {self.ref.tile} of span {self.ref.span} where the span before it has run, and nothing "
                "was kept of it here; submit its chain from the start"
            )
        given = self.state.take(self.step, pieces)
        made, seconds = model.run_tile(self.step.tiling.span, self.ref.tile, given, should_stop=should_stop)
        self.state.keep(self.step, made)
        return self.state.give(self.step.gives[self.ref.tile]), seconds


def check_grids(plan: Plan) -> None:
    """Refuse grids of absurd size before any of them is worked out.

    Raises:
        PlanError: when there are more tiles than edge nodes, or than `MAX_TILES`.
    """
    for span in plan.tiles:
        if not 1 <= span.num_tiles <= min(len(plan.edge_nodes), MAX_TILES):
            raise PlanError(
                f"expected an edge node for each tile, and at most {MAX_TILES}, got {span.num_tiles} tiles on "
                f"{len(plan.edge_nodes)} edge nodes"
            )


@dataclass(slots=True)
class _Begun:
    """A chain of which a node runs a tile."""

    chain: Chain
    tile: int
    next_span: int  # index in `Plan.tiles` of the one that is to come next
    until_s: float
    state: TileState | None = None  # None while a span of it waits or runs


class Held:
    """The chains that other heads have begun here, and what is kept of their tiles from span to span.

    Until the last span, the request's deadline, or word that a chain is given up.
    """

    def __init__(self) -> None:
        self._begun: dict[ChainKey, _Begun] = {}

    def __len__(self) -> int:
        """Chains that are begun."""
        return len(self._begun)

    def enter(self, key: ChainKey, run: TileRun, until_s: float) -> None:
        """Note that a span has come.

        Raises:
            PlanError: when it is not the one that its chain goes on with, or nothing is known of the chain here.
        """
        if run.is_first:
            self._begun[key] = _Begun(run.chain, run.ref.tile, run.ref.span, until_s)
        begun = self._begun.get(key)
        expected = None if begun is None else (begun.chain.spans, begun.tile, begun.next_span)
        if begun is None or expected != (run.chain.spans, run.ref.tile, run.ref.span):
            raise PlanError(
                f"expected a chain of spans from its start on, one by one, got tile {run.ref.tile} of span "
                f"{run.ref.span} and nothing was kept of the span before; submit the chain from its start"
            )
        begun.next_span += 1

    def put(self, key: ChainKey, state: TileState) -> None:
        """Keep what a tile has; nothing where its chain was given up meanwhile."""
        if key in self._begun:
            self._begun[key].state = state

    def take(self, key: ChainKey) -> TileState | None:
        """What was kept, for whoever goes on with it; None where nothing was."""
        begun = self._begun.get(key)
        if begun is None:
            return None
        state, begun.state = begun.state, None
        return state

    def drop(self, key: ChainKey) -> None:
        """A chain is at its end, or given up."""
        self._begun.pop(key, None)

    def drop_client(self, client: Peer) -> None:
        """A head is gone."""
        for key in [key for key in self._begun if key[0] == client]:
            del self._begun[key]

    def drop_late(self, now_s: float) -> None:
        """Forget what has outlived its deadline."""
        for key in [key for key, begun in self._begun.items() if now_s > begun.until_s]:
            del self._begun[key]
