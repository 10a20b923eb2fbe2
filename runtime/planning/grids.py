"""The tiles that an edge share may be given: worked out once, fitted to every plan, priced as rows.

Papers: D3 (VSM), as in `runtime.planning.tiles`. Differs: when tiles are chosen no request is there yet, so the choice is
made for idle nodes and a few rates of the links between them; which of these fits a state, and whether any does, is left
to the cost model.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from runtime.errors import PlanError
from runtime.planning.arrays import FloatArray, IntArray, Layout
from runtime.planning.chains import find_chains, plan_chain
from runtime.planning.problem import ById, PlanningProblem, check_plan
from runtime.planning.tile_search import choose_tiles, fit_lines
from runtime.planning.tiles import TileNode, tile_node, tile_seconds
from runtime.planning.tiling import find_spans, scale_lines
from runtime.types import GraphSpec, NodeProfile, Plan, Tier, TileSpan

RATES_BPS = (1e8, 1e9)
"""Between edge nodes: wireless, wired. Guess; each costs a search, seconds for a network of hundreds of layers."""

RTT_S = 5e-4
"""Between edge nodes in one place. Guess."""

MAX_NODES = 4
"""Grids of more nodes are not looked at: overlap eats what they win. D3's own experiments stop there."""


@dataclass(frozen=True, slots=True)
class TileOption:
    """Tiles for all that an edge head may ever be given."""

    edge_nodes: tuple[str, ...]
    spans: tuple[TileSpan, ...]


@lru_cache(maxsize=256)
def tile_options(problem: PlanningProblem, head: str) -> tuple[TileOption, ...]:
    """Choose tiles for a head and its peers, the faster ones first; empty where none pay or no peer has a profile."""
    profiles = problem.profile.nodes
    peers = [node.name for node in problem.deployment.edges if node.name != head and node.name in profiles]
    limits = problem.constraints
    if not peers or head not in profiles or Tier.EDGE not in limits.allowed_tiers or not limits.tiles:
        return ()
    names = (head, *sorted(peers, key=lambda name: sum(profiles[name].layer_s)))[:MAX_NODES]
    found = []
    for bps in RATES_BPS:
        nodes = _tile_nodes([profiles[name] for name in names], bps)
        if problem.average_edge is None:
            spans = _choose_spans(ById(problem.graph), nodes, problem.entry)
        else:
            chosen = _choose_spans(
                ById(problem.graph), _tile_nodes([problem.average_edge] * len(names), bps), problem.entry
            )
            spans = fit_lines(problem.graph, chosen, nodes)
        if spans:
            used = max(span.num_tiles for span in spans)
            found.append(TileOption(names[:used], spans))
    return tuple(dict.fromkeys(found))


def _tile_nodes(profiles: Sequence[NodeProfile], bps: float) -> tuple[TileNode, ...]:
    """A head and its peers, idle."""
    return tuple(tile_node(profile, bps, bps, RTT_S if index else 0.0) for index, profile in enumerate(profiles))


@lru_cache(maxsize=256)
def _choose_spans(graph: ById, nodes: tuple[TileNode, ...], start: int) -> tuple[TileSpan, ...]:
    """Cached beyond one problem: a session makes a new one whenever a node comes or goes, and sites share average nodes."""
    return choose_tiles(graph.spec, nodes, start).spans


def tiled_plans(problem: PlanningProblem, plan: Plan) -> tuple[Plan, ...]:
    """The same plan with every choice of tiles that its edge share has room for; empty where there is none."""
    if plan.head is None or not plan.uses(Tier.EDGE):
        return ()
    found = []
    for option in tile_options(problem, plan.head):
        fitted = [_fit(problem.graph, plan, span) for span in option.spans]
        spans = tuple(span for span in fitted if span is not None)
        if not spans:
            continue
        used = max(span.num_tiles for span in spans)
        try:
            found.append(check_plan(problem, replace(plan, edge_nodes=option.edge_nodes[:used], tiles=spans)))
        except PlanError:  # lines that meet in a smaller map
            continue
    return tuple(dict.fromkeys(found))


def _fit(graph: GraphSpec, plan: Plan, span: TileSpan) -> TileSpan | None:
    """Cut a span down to the longest run of its layers that the edge has; None where nothing is left."""
    is_edge = [tier is Tier.EDGE for tier in plan.tiers[span.start : span.stop]]
    if all(is_edge):
        return span
    runs = []
    for own, run in itertools.groupby(range(span.start, span.stop), key=lambda layer: is_edge[layer - span.start]):
        layers = list(run)
        if own:
            runs.append((layers[0], layers[-1] + 1))
    if not runs:
        return None
    start, stop = max(runs, key=lambda ends: ends[1] - ends[0])
    stops = [end for stretch in find_spans(graph) for end in stretch.stops if start < end <= stop]
    if not stops:
        return None
    sizes = {value.name: value.tensor.shape[2:] for value in graph.values}
    before, after = (sizes[graph.layers[end - 1].outputs[-1]] for end in (span.stop, stops[-1]))
    rows = scale_lines(span.row_lines, before[0], after[0])
    cols = scale_lines(span.col_lines, before[1], after[1])
    return TileSpan(start, stops[-1], rows, cols)


# --- what tiles cost ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class TileRows:
    """Tiled spans of rows of plans. G: spans, in the order of their rows; E: tiles, in the order of their spans.

    Bytes are raw: codec `auto` packs only where that is faster, so a prediction is never too good.
    """

    row: IntArray  # (G,) which plan
    first: IntArray  # (G,) first of its tiles
    node: IntArray  # (E,) slot of the tile's node
    there: IntArray  # (E,) slot of the link from the head
    back: IntArray  # (E,)
    is_peer: FloatArray  # (E,) 0 for the head's own tile, else 1
    idle_s: FloatArray  # (E,)
    there_bytes: FloatArray  # (E,)
    back_bytes: FloatArray  # (E,)
    fixed_s: FloatArray  # (E,) of both messages; the head's own tile has none: it takes their time, no hand-over

    @property
    def links(self) -> IntArray:
        """Slots of the links that are used."""
        is_peer = self.is_peer > 0
        return np.concatenate([self.there[is_peer], self.back[is_peer]])

    def seconds(
        self,
        bandwidth_bps: FloatArray,
        rtt_s: FloatArray,
        load_factor: FloatArray,
        queue_delay_s: FloatArray,
        rows: int,
    ) -> FloatArray:
        """Seconds that the tiled spans of every plan take: each until its slowest tile is back.

        Args:
            bandwidth_bps: shape (B, L), known for every link in `links`.
            rtt_s: shape (B, L), likewise.
            load_factor: shape (B, N).
            queue_delay_s: shape (B, N).
            rows: number of plans.

        Returns:
            Shape (B, rows).
        """
        transfer = self.there_bytes * (8.0 / bandwidth_bps).take(self.there, axis=1)
        transfer += self.back_bytes * (8.0 / bandwidth_bps).take(self.back, axis=1)
        transfer += 0.5 * (rtt_s.take(self.there, axis=1) + rtt_s.take(self.back, axis=1)) + self.fixed_s
        transfer += queue_delay_s.take(self.node, axis=1)
        # The head's own tile crosses nothing; where its links stand is any slot, whose reading may be unknown.
        crossing = np.where(self.is_peer > 0, transfer, self.fixed_s)
        spans = np.maximum.reduceat(load_factor.take(self.node, axis=1) * self.idle_s + crossing, self.first, axis=1)
        belongs = (self.row[:, None] == np.arange(rows)).astype(np.float64)
        seconds: FloatArray = spans @ belongs
        return seconds

    def take(self, rows: IntArray) -> "TileRows | None":
        """Pick rows, which may repeat."""
        parts = []
        ends = [*self.first[1:].tolist(), len(self.node)]
        for new, old in enumerate(rows.tolist()):
            for span in np.flatnonzero(self.row == old).tolist():
                parts.append((new, slice(int(self.first[span]), ends[span])))
        if not parts:
            return None
        picked = np.concatenate([np.arange(part.start, part.stop) for _, part in parts])
        lengths = [part.stop - part.start for _, part in parts]
        return TileRows(
            np.array([new for new, _ in parts], dtype=np.intp),
            np.cumsum([0, *lengths[:-1]], dtype=np.intp),
            *(getattr(self, name)[picked] for name in _OF_TILES),
        )

    @classmethod
    def stack(cls, parts: Sequence[tuple["TileRows | None", int]]) -> "TileRows | None":
        """Put the rows of several on top of each other; each with its number of plans."""
        found, row, first = [], [], []
        num_rows = num_tiles = 0
        for tiles, count in parts:
            if tiles is not None:
                found.append(tiles)
                row.append(tiles.row + num_rows)
                first.append(tiles.first + num_tiles)
                num_tiles += len(tiles.node)
            num_rows += count
        if not found:
            return None
        columns = (np.concatenate([getattr(tiles, name) for tiles in found]) for name in _OF_TILES)
        return cls(np.concatenate(row), np.concatenate(first), *columns)


_OF_TILES = ("node", "there", "back", "is_peer", "idle_s", "there_bytes", "back_bytes", "fixed_s")


def compile_tiles(problem: PlanningProblem, plan: Plan) -> TileRows | None:
    """Compile one plan's tiled spans; None where it has none. NaN where a node's profile is not known."""
    if not plan.tiles or plan.head is None:
        return None
    chains = find_chains(plan.tiles)
    spans = [span for chain in chains for span in _compile_chain(problem, plan.edge_nodes, chain)]
    lengths = [span.shape[1] for span in spans]
    node, there, back, *rest = np.concatenate(spans, axis=1)
    slots = (x.astype(np.intp) for x in (node, there, back))
    return TileRows(np.zeros(len(spans), dtype=np.intp), np.cumsum([0, *lengths[:-1]], dtype=np.intp), *slots, *rest)


@lru_cache(maxsize=4096)
def _compile_chain(
    problem: PlanningProblem, names: tuple[str, ...], spans: tuple[TileSpan, ...]
) -> tuple[FloatArray, ...]:
    """The columns of the tiles of every span of a chain, each of shape (8, tiles)."""
    graph, profiles, layout = problem.graph, problem.profile.nodes, Layout.of_deployment(problem.deployment)
    compiled = []
    for step in plan_chain(graph, spans).steps:
        columns = []
        for index, name in enumerate(names[: len(step.takes)]):
            profile, slot = profiles.get(name), layout.node_slot[name]
            known = None if profile is None else tile_node(profile)
            idle_s = np.nan if known is None else tile_seconds(graph, step.tiling, known)[index]
            others = len(step.takes) - 1 if index else 0
            fixed_s = 0.0 if known is None else 2.0 * (known.fixed_s + others * known.hand_over_s)
            if index == 0:
                columns.append((slot, 0, 0, 0.0, idle_s, 0.0, 0.0, fixed_s))
                continue
            there, back = layout.link_slot[names[0], name], layout.link_slot[name, names[0]]
            sent, given = step.take_bytes[index], step.give_bytes[index]
            columns.append((slot, there, back, 1.0, idle_s, sent, given, fixed_s))
        compiled.append(np.array(columns, dtype=np.float64).T)
    return tuple(compiled)
