"""Plans compiled for a problem into arrays: what each computes, sends and waits for, before any state is known.

`compile_plan` takes any legal plan. `compile_splits` takes many splits (i, j) at once, from prefix sums over layers and
the bytes that are live at every cut; for a split both give the same row.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from runtime.planning.arrays import BoolArray, FloatArray, IntArray, Layout
from runtime.planning.grids import TileRows, compile_tiles
from runtime.planning.problem import PlanningProblem, find_route
from runtime.types import DEVICE_NODE, LOSSY_CODECS, ModelProfile, NodeProfile, Plan, Tier, ValueSpec, result_codec

NUM_HOPS = 4
"""Directed transfers of a plan: out to the first node, on to the cloud, back from it, back to the device."""

_SHRINK = {"fp16": 0.5, "int8": 0.25}
_FLOAT_ITEMSIZE = 4
_NO_PROFILE = NodeProfile((), np.inf, np.inf)


@dataclass(frozen=True, slots=True, eq=False)
class PlanCosts:
    """Rows of plans. K: plans; 3: device, head, cloud; H: `NUM_HOPS` transfers. Any first axis may be 1 for K.

    Bytes leave out the encoded input, whose size a state tells. The codec of a transfer is the cheaper of two ways: the
    plain one, and the coded one with `saved_bytes` less and `coding_s` more.
    """

    layout: Layout
    node: IntArray  # (K, 3) slot of each tier's node, the device's where the plan has none
    idle_s: FloatArray  # (K, 3) NaN where the node's profile is not known; without tiled layers
    has_layers: FloatArray  # (K, 3) 1 where the plan runs layers, else 0
    link: IntArray  # (K, H) slot of each transfer's link, 0 where there is none
    has_hop: FloatArray  # (K, H) 1 where there is a transfer, else 0
    plain_bytes: FloatArray  # (K, H)
    saved_bytes: FloatArray  # (K, H)
    plain_codec_s: FloatArray  # (K,) codec seconds that no choice avoids
    coding_s: FloatArray  # (K, H)
    has_input: FloatArray  # (K, H) 1 where the encoded input is among what is sent
    is_relayed: BoolArray  # (K,) where the head passes everything on as it came
    message_s: FloatArray  # (K,) fixed seconds of all messages
    needs: FloatArray  # (K, N) 1 for every node that must be up
    needs_links: FloatArray  # (K, L) 1 for every link from a head to a node that runs tiles for it

    has_relays: bool
    sends_input: bool
    used_links: IntArray  # slots in `link` and in `tiles`
    tiles: TileRows | None  # what the edge needs beside `idle_s`; None where no plan is tiled

    @property
    def num_plans(self) -> int:
        """K."""
        return len(self.idle_s)

    def full(self, name: str) -> Any:
        """One of the arrays with all K rows."""
        column = getattr(self, name)
        return np.broadcast_to(column, (self.num_plans, *column.shape[1:]))

    def take(self, rows: IntArray) -> "PlanCosts":
        """Pick rows."""
        tiles = None if self.tiles is None else self.tiles.take(rows)
        return _make_costs(self.layout, {name: self.full(name)[rows] for name in ROW_FIELDS}, tiles)

    @classmethod
    def stack(cls, parts: Sequence["PlanCosts"]) -> "PlanCosts":
        """Put the rows of several on top of each other; all must have the same layout."""
        columns = {name: np.concatenate([part.full(name) for part in parts]) for name in ROW_FIELDS}
        return _make_costs(parts[0].layout, columns, TileRows.stack([(part.tiles, part.num_plans) for part in parts]))


_NOT_ROWS = ("layout", "has_relays", "sends_input", "used_links", "tiles")
ROW_FIELDS = tuple(field.name for field in fields(PlanCosts) if field.name not in _NOT_ROWS)


def _make_costs(layout: Layout, columns: dict[str, Any], tiles: TileRows | None = None) -> PlanCosts:
    links = columns["link"].ravel()
    return PlanCosts(
        layout=layout,
        has_relays=bool(columns["is_relayed"].any()),
        sends_input=bool(columns["has_input"].any()),
        used_links=np.unique(links if tiles is None else np.concatenate([links, tiles.links])),
        tiles=tiles,
        **columns,
    )


@dataclass(frozen=True, slots=True)
class _Coded:
    """What one value costs on the wire: bytes both ways, and the bytes that pass through the codec both ways."""

    plain_bytes: float
    coded_bytes: float
    plain_work_bytes: float
    coded_work_bytes: float


def _code(value: ValueSpec, codec: str, ratio: float) -> _Coded:
    """Bytes of a value under a codec. An encoded input is sent as it is and counted by the state."""
    if not value.is_sized:
        return _Coded(0.0, 0.0, 0.0, 0.0)
    raw = float(value.tensor.nbytes)
    if codec in LOSSY_CODECS and value.tensor.dtype.startswith(("float", "bfloat")):
        small = raw * min(_SHRINK[codec] * _FLOAT_ITEMSIZE / value.tensor.itemsize, 1.0)
        return _Coded(small, small, raw, raw)
    if codec == "lossless":
        return _Coded(raw / max(ratio, 1.0), raw / max(ratio, 1.0), raw, raw)
    if codec == "auto" and ratio > 1.0:
        return _Coded(raw, raw / ratio, 0.0, raw)
    return _Coded(raw, raw, 0.0, 0.0)


def layout_of(problem: PlanningProblem) -> Layout:
    """Slots of the problem's nodes and links."""
    return Layout.of_deployment(problem.deployment)


@lru_cache(maxsize=256)
def compile_plan(problem: PlanningProblem, plan: Plan) -> PlanCosts:
    """Compile any legal plan into one row, by walking its route."""
    route = find_route(problem.graph, plan, problem.input_kind)
    profile = problem.profile
    names = tier_names(problem, plan.head)
    tiled = {layer for span in plan.tiles for layer in range(span.start, span.stop)}
    alone = [tuple(layer for layer in route.stage(tier).layers if layer not in tiled) for tier in Tier]
    idle_s = [_idle_s(profile, names[tier], alone[tier]) for tier in Tier]
    outputs = set(problem.graph.outputs)
    crossing: list[Iterable[str]] = [(), (), (), ()]
    for hop, up in enumerate(route.up):
        made = {name for tier in route.tiers[hop + 1 :] for name in route.stage(tier).makes}
        crossing[hop], crossing[NUM_HOPS - 1 - hop] = up, outputs & made
    by_name = {value.name: value for value in problem.graph.values}
    columns = np.zeros((5, NUM_HOPS))
    for hop, crossed in enumerate(crossing):
        codec = plan.codec if hop < 2 else result_codec(plan.codec)
        for name in crossed:
            coded = _code(by_name[name], codec, profile.lossless_ratio.get(name, 1.0))
            columns[:4, hop] += _astuple(coded)
            columns[4, hop] += not by_name[name].is_sized
    return _rows(
        problem,
        [names[tier] for tier in route.tiers],
        idle_s=np.array([idle_s]),
        has_layers=np.array([[bool(route.stage(tier).layers) for tier in Tier]], dtype=np.float64),
        columns=columns[:, None, :],
        peers=plan.edge_nodes[1:] if plan.tiles else (),
        tiles=compile_tiles(problem, plan),
    )


def _astuple(coded: _Coded) -> tuple[float, float, float, float]:
    return coded.plain_bytes, coded.coded_bytes, coded.plain_work_bytes, coded.coded_work_bytes


def tier_names(problem: PlanningProblem, head: str | None) -> dict[Tier, str]:
    """Name of each tier's node under a plan with this head; "" where there is none."""
    cloud = problem.deployment.cloud
    return {Tier.DEVICE: DEVICE_NODE, Tier.EDGE: head or "", Tier.CLOUD: "" if cloud is None else cloud.name}


def _idle_s(profile: ModelProfile, name: str, layers: tuple[int, ...]) -> float:
    if not layers:
        return 0.0
    node = profile.nodes.get(name)
    return float("nan") if node is None else float(np.asarray(node.layer_s)[list(layers)].sum())


def _rows(
    problem: PlanningProblem,
    path: Sequence[str],
    *,
    idle_s: FloatArray,
    has_layers: FloatArray,
    columns: FloatArray,
    peers: Sequence[str] = (),
    tiles: TileRows | None = None,
) -> PlanCosts:
    """Make the rows of plans that take one path.

    Args:
        problem: what the plans are for.
        path: names of the nodes visited, the device first.
        idle_s: shape (K, 3).
        has_layers: shape (K, 3).
        columns: shape (5, K, H): plain, coded, plain work, coded work bytes, and whether the encoded input crosses.
        peers: names of the nodes that run tiles, the head apart.
        tiles: of one plan.
    """
    layout = layout_of(problem)
    profiles = [problem.profile.nodes.get(name, _NO_PROFILE) for name in path]
    node = np.zeros(3, dtype=np.intp)
    link = np.zeros(NUM_HOPS, dtype=np.intp)
    has_hop = np.zeros(NUM_HOPS)
    s_per_byte = np.zeros(NUM_HOPS)
    needs = np.zeros(len(layout.nodes))
    needs[[layout.node_slot[name] for name in (*path, *peers)]] = 1.0
    needs_links = np.zeros(len(layout.links))
    needs_links[[layout.link_slot[path[1], peer] for peer in peers]] = 1.0
    tiers = _tiers_of(problem, path)
    for hop, (near, far) in enumerate(itertools.pairwise(path)):
        back = NUM_HOPS - 1 - hop
        link[hop], link[back] = layout.link_slot[(near, far)], layout.link_slot[(far, near)]
        has_hop[[hop, back]] = 1.0
        s_per_byte[hop] = 1 / profiles[hop].encode_bytes_per_s + 1 / profiles[hop + 1].decode_bytes_per_s
        s_per_byte[back] = 1 / profiles[hop + 1].encode_bytes_per_s + 1 / profiles[hop].decode_bytes_per_s
    for name, tier in zip(path, tiers, strict=True):
        node[tier] = layout.node_slot[name]
    plain, coded, plain_work, coded_work, has_input = columns
    is_relayed = (has_layers[:, Tier.EDGE] == 0) & (len(path) == 3)
    # What the head passes on is neither decoded nor coded there: the cost falls on the ends, once.
    coder = s_per_byte * np.where(is_relayed[:, None], [1.0, 0.0, 1.0, 0.0], 1.0)
    columns_by_name = {
        "node": node[None],
        "idle_s": idle_s,
        "has_layers": has_layers,
        "link": link[None],
        "has_hop": has_hop[None],
        "plain_bytes": plain,
        "saved_bytes": plain - coded,
        "plain_codec_s": (plain_work * coder).sum(axis=1),
        "coding_s": (coded_work - plain_work) * coder,
        "has_input": has_input,
        "is_relayed": is_relayed,
        # Two messages per hop, out and back.
        "message_s": np.array([2.0 * sum(profile.fixed_s for profile in profiles[1:])]),
        "needs": needs[None],
        "needs_links": needs_links[None],
    }
    return _make_costs(layout, columns_by_name, tiles)


def _tiers_of(problem: PlanningProblem, path: Sequence[str]) -> list[Tier]:
    of = {node.name: node.tier for node in problem.deployment.nodes} | {DEVICE_NODE: Tier.DEVICE}
    return [of[name] for name in path]


@dataclass(frozen=True, slots=True, eq=False)
class CutTables:
    """Prefix sums of one problem under one codec; index c is the cut before layer c. n: layers, entry <= c <= n."""

    up: FloatArray  # (5, n + 1) plain, coded, plain work, coded work bytes live at the cut; encoded input crosses
    down: FloatArray  # (5, n + 1) the same of the outputs made at the cut or after it

    @classmethod
    def of(cls, problem: PlanningProblem, codec: str) -> "CutTables":
        """Sum what every value adds to the cuts between its producer and its last consumer."""
        graph, entry = problem.graph, problem.entry
        size = graph.num_layers + 1
        up, down = np.zeros((5, size + 1)), np.zeros((5, size + 1))
        for value in graph.values:
            ratio = problem.profile.lossless_ratio.get(value.name, 1.0)
            first, last = max(value.producer + 1, entry), value.consumers[-1] if value.consumers else -1
            if last >= first:
                column = np.array((*_astuple(_code(value, codec, ratio)), not value.is_sized), dtype=np.float64)
                up[:, first] += column
                up[:, last + 1] -= column
            if value.is_output and value.producer >= entry:
                down[:4, 0] += _astuple(_code(value, result_codec(codec), ratio))
                down[:4, value.producer + 1] -= _astuple(_code(value, result_codec(codec), ratio))
        return cls(up=np.cumsum(up, axis=1)[:, :size], down=np.cumsum(down, axis=1)[:, :size])


def compile_splits(
    problem: PlanningProblem, tables: CutTables, i: IntArray, j: IntArray, head: str | None
) -> PlanCosts:
    """Compile splits that share a head: device `[0, i)`, head `[i, j)`, cloud from `j` on.

    Args:
        problem: what the plans are for.
        tables: its cuts, under the plans' codec.
        i: shape (K,), at least the problem's entry and less than the number of layers.
        j: shape (K,), at least i; all of them the number of layers, or none; without a head equal to i.
        head: the edge node that everything goes through; None: straight to the cloud.
    """
    names = tier_names(problem, head)
    has_cloud = bool(len(j)) and bool((j < problem.graph.num_layers).all())
    path = [DEVICE_NODE] + ([] if head is None else [head]) + ([names[Tier.CLOUD]] if has_cloud else [])
    prefix = {tier: prefix_s(problem, names[tier]) for tier in Tier}
    device_s = prefix[Tier.DEVICE][i] - prefix[Tier.DEVICE][problem.entry]
    edge_s = prefix[Tier.EDGE][j] - prefix[Tier.EDGE][i] if head is not None else np.zeros(len(i))
    cloud_s = prefix[Tier.CLOUD][-1] - prefix[Tier.CLOUD][j] if has_cloud else np.zeros(len(i))
    has_layers = np.stack([i > problem.entry, i < j, np.full(len(i), has_cloud)], axis=1).astype(np.float64)
    columns = np.zeros((5, len(i), NUM_HOPS))
    columns[:, :, 0], columns[:, :, 3] = tables.up[:, i], tables.down[:, i]
    if head is not None and has_cloud:
        columns[:, :, 1], columns[:, :, 2] = tables.up[:, j], tables.down[:, j]
    idle_s = np.where(has_layers > 0, np.stack([device_s, edge_s, cloud_s], axis=1), 0.0)
    return _rows(problem, path, idle_s=idle_s, has_layers=has_layers, columns=columns)


def prefix_s(problem: PlanningProblem, name: str) -> FloatArray:
    """Idle seconds of the layers before each cut on a node, shape (n + 1,); NaN without a profile."""
    node = problem.profile.nodes.get(name)
    if node is None:
        return np.full(problem.graph.num_layers + 1, np.nan)
    return np.concatenate([[0.0], np.cumsum(node.layer_s)])
