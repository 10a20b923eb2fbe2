"""What a site is to compiled functions: its plans and what worlds at it are drawn from, as records made once."""

from functools import lru_cache
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from env.families import load_families
from env.kernel import layout
from env.kernel.layout import ROWS, make_records
from env.site import Site
from env.traces import FloatArray
from env.world import paths_of
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.chains import find_chains
from runtime.planning.cost import sum_layers
from runtime.planning.features import find_slots
from runtime.planning.grids import compile_tiles
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import PlanCosts
from runtime.planning.tiles import tile_node, tile_seconds
from runtime.planning.tiling import plan_tiles
from runtime.types import DEVICE_NODE, Plan, Tier

Segments: TypeAlias = dict[tuple[int, tuple[int, ...]], int]
"""Numbers of the segments of a lane, by node slot and layers."""

_ROW_FIELDS = (
    "node", "idle_s", "has_layers", "link", "has_hop", "plain_bytes", "saved_bytes", "coding_s", "has_input",
    "plain_codec_s", "is_relayed", "message_s",
)  # fmt: skip
_PLANS: "WeakKeyDictionary[Site, SitePlans]" = WeakKeyDictionary()
_PLACES: "WeakKeyDictionary[Site, layout.Place]" = WeakKeyDictionary()


class SitePlans(NamedTuple):
    """All that a lane holds of a site."""

    plans: layout.Plans
    """One record of `PLANS` in an array."""
    tiles: FloatArray
    """(T, TILE_COLUMNS) tiles of the candidates."""
    segments: Segments
    """Those that are numbered in the record."""


def plans_of(site: Site) -> SitePlans:
    """Compile a site's candidates."""
    known = _PLANS.get(site)
    if known is None:
        known = _PLANS[site] = _make_plans(site)
    return known


def place_of(site: Site) -> layout.Place:
    """What worlds at a site are drawn from: one record of `PLACE` in an array."""
    known = _PLACES.get(site)
    if known is None:
        known = _PLACES[site] = _make_place(site)
    return known


def put_rows(plans: layout.Plans, where: slice, costs: PlanCosts) -> None:
    """Write compiled plans into rows of a record."""
    for name in _ROW_FIELDS:
        plans["rows"][name][where] = costs.full(name)
    needs = costs.full("needs").astype(np.uint8)
    plans["rows"]["needs"][where] = needs @ (1 << np.arange(needs.shape[1], dtype=np.uint8))


def put_tiles(plans: layout.Plans, row: int, first: int, site: Site, plan: Plan) -> FloatArray:
    """Write of a plan which tiles it has: from the first-th of the lane on. Returns them, shape (tiles, TILE_COLUMNS)."""
    table = _tiles_of(site.problem, plan)
    one = plans["rows"][row]
    one["num_peers"] = len(plan.edge_nodes) - 1 if len(table) else 0
    one["first_tile"], one["num_tiles"] = first, len(table)
    return table


def _tiles_of(problem: PlanningProblem, plan: Plan) -> FloatArray:
    rows, graph = compile_tiles(problem, plan), problem.graph
    if rows is None:
        return np.zeros((0, layout.TILE_COLUMNS))
    head, left = problem.profile.nodes[plan.edge_nodes[0]], list[FloatArray]()
    for chain in find_chains(plan.tiles):
        tiles_s = np.array([tile_seconds(graph, plan_tiles(graph, span), tile_node(head)) for span in chain])
        replay_s, goes_on = tiles_s.cumsum(axis=0), np.ones(tiles_s.shape)
        tiles_s[:, 0] = [sum_layers(head.layer_s, tuple(range(span.start, span.stop))) for span in chain]
        goes_on[0] = 0.0
        left.append(np.stack([tiles_s.ravel(), replay_s.ravel(), goes_on.ravel()]))
    links = (np.where(rows.is_peer > 0, links, -1) for links in (rows.there, rows.back))
    columns = (rows.node, *links, rows.idle_s, rows.there_bytes, rows.back_bytes, rows.fixed_s)
    return np.column_stack([*columns, *np.concatenate(left, axis=1)]).astype(np.float64)


def number_segments(known: Segments, site: Site, plan: Plan) -> list[int]:
    """Number the segments of a plan: equal ones of a lane get one number."""
    slot = site.candidates.costs.layout.node_slot
    cloud = site.problem.deployment.cloud
    names = {Tier.DEVICE: DEVICE_NODE, Tier.EDGE: plan.head, Tier.CLOUD: None if cloud is None else cloud.name}
    keys = ((slot.get(names[tier] or "", 0), _layers(plan, tier, site.problem.entry)) for tier in Tier)
    return [known.setdefault(key, min(len(known), 3 * ROWS - 1)) for key in keys]


@lru_cache(maxsize=4096)
def _layers(plan: Plan, tier: Tier, entry: int) -> tuple[int, ...]:
    return tuple(i for i in range(entry, len(plan.tiers)) if plan.tiers[i] is tier)


def _make_plans(site: Site) -> SitePlans:
    records, segments, tiles = make_records(layout.PLANS, 1), Segments(), [np.zeros((0, layout.TILE_COLUMNS))]
    plans, slots = records[0], site.candidates.costs.layout
    plans.num_links, plans.num_nodes = len(slots.links), len(slots.nodes)
    for at, (source, target) in enumerate(slots.links):
        plans.link_source[at], plans.link_target[at] = slots.node_slot[source], slots.node_slot[target]
        if plans.link_target[at] == 0:
            plans.back_link[plans.link_source[at]] = at
    plans.reverse[: len(slots.links)] = slots.reverse
    cloud = site.problem.deployment.cloud
    plans.path[: len(slots.links)] = paths_of(slots, None if cloud is None else cloud.name)
    has_model = site.problem.constraints.device_has_model and DEVICE_NODE in site.problem.profile.nodes
    plans.local_s = site.model_s(DEVICE_NODE) if has_model else np.inf
    plans.rows["padding"][:NUM_CANDIDATES] = np.arange(NUM_CANDIDATES) >= site.candidates.num_plans
    plans.rows["padding"][NUM_CANDIDATES:] = 1
    put_rows(plans, slice(0, NUM_CANDIDATES), site.candidates.costs)
    for at, plan in enumerate(site.candidates.plans):
        plans.rows["segment"][at] = number_segments(segments, site, plan)
        if plan.tiles and at < site.candidates.num_plans:
            tiles.append(put_tiles(plans, at, sum(map(len, tiles)), site, plan))
    plans.num_rows, plans.num_tiled = NUM_CANDIDATES, len(tiles) - 1
    shown = find_slots(site.problem, site.candidates)
    plans.shown_node, plans.shown_link = shown.nodes, shown.links
    plans.reference_s, plans.reference_bytes = shown.reference_s, shown.reference_bytes
    return SitePlans(records, np.concatenate(tiles), segments)


def _make_place(site: Site) -> layout.Place:
    places, ranges = make_records(layout.PLACE, 1), site.ranges
    place, nodes = places[0], site.candidates.costs.layout.nodes
    for name in (*layout.BOUNDED.split(), *layout.SINGLE.split(), "clients"):
        place[name] = getattr(ranges, name)
    place.num_edges, place.num_plans = site.num_edges, site.candidates.costs.num_plans
    names = list(load_families())
    place.num_families = len(ranges.families)
    place.families[: len(ranges.families)] = [names.index(name) for name in ranges.families]
    place.typical_bytes = site.typical_bytes
    if site.problem.input_kind != "encoded":
        place.input_sigma = 0.0
    place.local_s = site.model_s(DEVICE_NODE) if DEVICE_NODE in site.problem.profile.nodes else 1.0
    deadline_s = site.problem.constraints.deadline_s
    place.deadline_s = np.nan if deadline_s is None else deadline_s
    for slot, name in enumerate(nodes[1:], start=1):
        place.model_s[slot] = site.model_s(name)
    return places
