"""A single tile of another head's stage: what it is given, what it keeps for the next span, what it gives."""

from collections import OrderedDict
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

Run = tuple[Peer, int]
"""Whose tile, and the number of the `Submit` that began its chain."""


@dataclass(eq=False)
class TileRun:
    """One span's share of a tile."""

    ref: TileRef
    chain: Chain
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
                chain = plan_chain(model.graph.spec, spans, first)
                return cls(ref, chain, TileState(model.graph, ref.tile) if ref.span == first else None)
            first += len(spans)
        raise AssertionError("every span is in a chain")

    @property
    def step(self) -> Step:
        """The span, as a step of its chain."""
        return self.chain.steps[self.ref.span - self.chain.first]

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


class Held:
    """What is kept of tiles from span to span, until their chains go on or are given up.

    Args:
        capacity: chains at most; of more the one that was kept longest is forgotten, and its head does the tile.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Run, tuple[TileState, float]] = OrderedDict()

    def __len__(self) -> int:
        """Chains of which something is kept."""
        return len(self._kept)

    def put(self, run: Run, state: TileState, until_s: float) -> None:
        """Keep what a tile has, at most until its request's deadline."""
        self._kept[run] = state, until_s
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def take(self, run: Run) -> TileState | None:
        """What was kept; it is kept no more."""
        state, _ = self._kept.pop(run, (None, 0.0))
        return state

    def drop_client(self, client: Peer) -> None:
        """A head is gone."""
        for run in [run for run in self._kept if run[0] == client]:
            del self._kept[run]

    def drop_late(self, now_s: float) -> None:
        """Forget what has outlived its deadline."""
        for run in [run for run, (_, until_s) in self._kept.items() if now_s > until_s]:
            del self._kept[run]
