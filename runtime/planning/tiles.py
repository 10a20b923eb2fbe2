"""What a tiled span is expected to take: computing with what tiles share, scatter, gather.

Papers: D3 (VSM), as reconstructed: consecutive tileable layers on the edge run on several edge nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.planning.chains import Chain, find_chains, plan_chain
from runtime.planning.tiling import Tiling
from runtime.types import GraphSpec, NodeProfile, TileSpan

Floats = NDArray[np.float64]

WEIGHT_BYTES_PER_S = 2e10
"""How fast a CPU reads a convolution's weights, which every tile does anew; they are laid out once. Measured on one
thread, with 512 channels and halves of maps of 8 to 16 rows: between 7e9 and faster than can be told. A guess for
other machines."""


TILE_HAND_OVER_S = 2.5e-4
"""A message to or from another node takes so much longer than the head's own share of a span, beyond what any message
takes: it passes four threads, which are woken on processors that compute. Measured: halves of Darknet-53 that were cut with
it came together 4 to 10 % sooner than without, with twice as much 2 to 7 % (two processes on two cores, four runs). A head
handles the messages of a span one after the other, so with more nodes each takes so many times as much: four replaying
nodes were 5 to 8 % sooner done when tiles were cut for three times as much."""


@dataclass(frozen=True, slots=True)
class TileNode:
    """An edge node as the tiles see it; the first of several is the head, which cuts, computes and puts together."""

    layer_s: tuple[float, ...]  # (num_layers,), load included
    to_bps: float = math.inf  # from the head to this node
    from_bps: float = math.inf  # back
    rtt_s: float = 0.0
    fixed_s: float = 0.0  # per message
    hand_over_s: float = 0.0  # per message and other node, of another node than the head: `TILE_HAND_OVER_S`
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf
    weight_bytes_per_s: float = WEIGHT_BYTES_PER_S
    tile_layer_s: tuple[float, ...] = ()  # with the kernels that tiles take; empty: as `layer_s`

    @property
    def tiled_s(self) -> tuple[float, ...]:
        """Seconds of each layer in one tile that is the whole map."""
        return self.tile_layer_s or self.layer_s


def tile_node(
    profile: NodeProfile, to_bps: float = math.inf, from_bps: float = math.inf, rtt_s: float = 0.0
) -> TileNode:
    """An idle node by its profile, behind links of these rates."""
    tile_layer_s = profile.tile_layer_s
    return TileNode(
        profile.layer_s, to_bps, from_bps, rtt_s, profile.fixed_s, TILE_HAND_OVER_S, tile_layer_s=tile_layer_s
    )


@dataclass(frozen=True, slots=True)
class TileCost:
    """What a tiled span is expected to take. Tuples have one entry per tile; the head's own crosses no link."""

    compute_s: tuple[float, ...]
    scatter_s: tuple[float, ...]  # coding, link and half the rtt
    gather_s: tuple[float, ...]
    scatter_bytes: tuple[int, ...]
    gather_bytes: tuple[int, ...]

    @property
    def total_s(self) -> float:
        """Seconds from the span's inputs to its outputs, at the head: until the slowest tile is back."""
        return max(map(math.fsum, zip(self.scatter_s, self.compute_s, self.gather_s, strict=True)))


@dataclass(frozen=True, slots=True)
class TileLinks:
    """Seconds per byte and per message of every tile's way to its node and back.

    The head's own crosses no link, but cutting and putting together take it as long as two messages' fixed seconds.
    """

    there_s: Floats  # (tiles,) per byte
    back_s: Floats
    fixed_s: Floats  # (tiles,) per message, half the rtt included

    @classmethod
    def of(cls, nodes: Sequence[TileNode]) -> "TileLinks":
        """Links from the head, the first of the nodes, to each of them."""
        head = nodes[0]
        there = [8.0 / n.to_bps + 1.0 / head.encode_bytes_per_s + 1.0 / n.decode_bytes_per_s for n in nodes]
        back = [8.0 / n.from_bps + 1.0 / n.encode_bytes_per_s + 1.0 / head.decode_bytes_per_s for n in nodes]
        peers = len(nodes) - 1
        fixed = [head.fixed_s, *(n.rtt_s / 2.0 + n.fixed_s + peers * n.hand_over_s for n in nodes[1:])]
        is_peer = np.arange(len(nodes)) > 0
        return cls(np.where(is_peer, there, 0.0), np.where(is_peer, back, 0.0), np.array(fixed))

    def times(self, sent_bytes: Floats, back_bytes: Floats) -> tuple[Floats, Floats]:
        """Seconds of scatter and gather, bytes and result of shape (..., tiles)."""
        return self.fixed_s + self.there_s * sent_bytes, self.fixed_s + self.back_s * back_bytes


def cost_tiles(graph: GraphSpec, spans: Sequence[TileSpan], nodes: Sequence[TileNode]) -> tuple[TileCost, ...]:
    """Predict what tiled spans take, each until its slowest tile is back at the head.

    Between spans of a chain only borders cross (`runtime.planning.chains`). They are counted there and back; at run
    time both ways are taken at once where a tile has no neighbour but the head's.

    Args:
        graph: the model.
        spans: layers and grids, ascending.
        nodes: one per tile, the head first.

    Returns:
        One cost per span.

    Raises:
        PlanError: when the graph has no such span or the lines do not cut it.
        ValueError: when there are fewer nodes than tiles.
    """
    return tuple(
        cost for chain in find_chains(spans) for cost in _cost_chain(graph, plan_chain(graph, chain), tuple(nodes))
    )


def _cost_chain(graph: GraphSpec, chain: Chain, nodes: tuple[TileNode, ...]) -> list[TileCost]:
    if len(nodes) < chain.num_tiles:
        raise ValueError(f"expected a node for each of the {chain.num_tiles} tiles, got {len(nodes)}")
    nodes, costs = nodes[: chain.num_tiles], []
    links = TileLinks.of(nodes)
    for step in chain.steps:
        sent, back = ((0, *each[1:]) for each in (step.take_bytes, step.give_bytes))
        compute = [tile_seconds(graph, step.tiling, node)[index] for index, node in enumerate(nodes)]
        scatter, gather = links.times(np.array(sent, float), np.array(back, float))
        costs.append(TileCost(tuple(compute), tuple(scatter.tolist()), tuple(gather.tolist()), sent, back))
    return costs


def tile_seconds(graph: GraphSpec, tiling: Tiling, node: TileNode) -> tuple[float, ...]:
    """Seconds that one node needs for each tile of a span, if it has it to itself."""
    seconds = [0.0] * len(tiling.tiles)
    for layer in tiling.stage.layers:
        for op, (fixed_s, whole_s) in zip(graph.layers[layer].spatial, op_seconds(graph, node, layer), strict=True):
            whole_area = op.size[0] * op.size[1]
            for index, tile in enumerate(tiling.tiles):
                seconds[index] += fixed_s + whole_s * tile.ops[op.name].makes.area / whole_area
    return tuple(seconds)


def op_seconds(graph: GraphSpec, node: TileNode, layer: int) -> list[tuple[float, float]]:
    """Seconds of each operation of a layer: those that no tile is spared, and those that shrink with its area.

    A layer's time is shared out by FLOPs; at most all of an operation's time goes into reading its weights.
    """
    ops = graph.layers[layer].spatial
    total = math.fsum(op.flops for op in ops)
    seconds = []
    for op in ops:
        own_s = node.tiled_s[layer] * (op.flops / total if total else 1.0 / len(ops))
        fixed_s = min(op.weight_bytes / node.weight_bytes_per_s, own_s)
        seconds.append((fixed_s, own_s - fixed_s))
    return seconds
