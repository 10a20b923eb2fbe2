"""The twin: many environments' dynamics in one process, calibrated by the same profiles that plan.

What is emulated, and where it differs from the runtime: queues are first in, first out; transfers integrate the world's
rates; codec and message times are delays that hold no server; a status tells the state at the instant it arrives; a
probe is a transfer of its bytes; a node that is lost is up again with its next status; decisions take no time.
"""

from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from env.draw import MAX_BACKGROUND, MAX_STEPS
from env.kernel import layout, run
from env.kernel.layout import CLIENTS, NODES, ROWS, make_records
from env.site import Site
from env.traces import FloatArray
from env.world import World
from runtime.errors import ConfigError
from runtime.planning.arrays import StateArrays
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS, find_slots
from runtime.planning.problem import check_plan
from runtime.planning.rows import PlanCosts, compile_plan
from runtime.types import DEVICE_NODE, Plan, Tier

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

EXTRA_ROWS = ROWS - NUM_CANDIDATES
"""Plans besides the candidates that may be under way in one lane; as many as requests may be."""

OUTCOMES = ("under way", "remote", "device", "local", "failed")
"""What became of a request, by its code: `local` is completed by the device instead of as planned."""

_STATE_FIELDS = tuple(field.name for field in fields(StateArrays))
_ROW_FIELDS = (
    "node", "idle_s", "has_layers", "link", "has_hop", "plain_bytes", "saved_bytes", "coding_s", "has_input",
    "plain_codec_s", "is_relayed", "message_s",
)  # fmt: skip

_NOT_LOOKED = np.empty((0, 1))


@lru_cache(maxsize=4096)
def _layers(plan: Plan, tier: Tier, entry: int) -> tuple[int, ...]:
    return tuple(i for i in range(entry, len(plan.tiers)) if plan.tiers[i] is tier)


_Segments: TypeAlias = dict[tuple[int, tuple[int, ...]], int]
"""Numbers of the segments of a lane, by node slot and layers."""


def _plans_of(site: Site) -> tuple[layout.Plans, _Segments]:
    """Work out all that a lane holds of a site."""
    records, segments = make_records(layout.PLANS, 1), _Segments()
    plans, slots = records[0], site.candidates.costs.layout
    plans.num_links, plans.num_nodes = len(slots.links), len(slots.nodes)
    for at, (source, target) in enumerate(slots.links):
        plans.link_source[at], plans.link_target[at] = slots.node_slot[source], slots.node_slot[target]
    plans.reverse[: len(slots.links)] = slots.reverse
    has_model = site.problem.constraints.device_has_model and DEVICE_NODE in site.problem.profile.nodes
    plans.local_s = site.model_s(DEVICE_NODE) if has_model else np.inf
    plans.padding[:NUM_CANDIDATES] = np.arange(NUM_CANDIDATES) >= site.candidates.num_plans
    plans.padding[NUM_CANDIDATES:] = 1
    _put_rows(plans, slice(0, NUM_CANDIDATES), site.candidates.costs)
    for at, plan in enumerate(site.candidates.plans):
        plans.segment[at] = _number_segments(segments, site, plan)
    shown = find_slots(site.problem, site.candidates)
    plans.shown_node, plans.shown_link = shown.nodes, shown.links
    plans.reference_s, plans.reference_bytes = shown.reference_s, shown.reference_bytes
    return plans, segments


def _put_rows(plans: layout.Plans, where: slice, costs: PlanCosts) -> None:
    for name in _ROW_FIELDS:
        plans[name][where] = costs.full(name)
    plans.needs[where, : costs.needs.shape[1]] = costs.full("needs")


def _number_segments(known: _Segments, site: Site, plan: Plan) -> list[int]:
    """Number the segments of a plan: equal ones of a lane get one number."""
    slot = site.candidates.costs.layout.node_slot
    cloud = site.problem.deployment.cloud
    names = {Tier.DEVICE: DEVICE_NODE, Tier.EDGE: plan.head, Tier.CLOUD: None if cloud is None else cloud.name}
    keys = ((slot.get(names[tier] or "", 0), _layers(plan, tier, site.problem.entry)) for tier in Tier)
    return [known.setdefault(key, min(len(known), 3 * ROWS - 1)) for key in keys]


class Twin:
    """Lanes side by side: a site and a world each. A lane's number is its place in every array.

    Behind them there may be forks: lanes that take the state of others, and go on in the same worlds (`fork`).
    """

    def __init__(self, num_lanes: int, num_requests: int, *, num_forks: int = 0) -> None:
        """Allocate.

        Args:
            num_lanes: environments side by side.
            num_requests: most that a world may hold for each client; the last of them is only seen.
            num_forks: most that there may be at once.
        """
        self.num_lanes = num_lanes
        self.num_requests = num_requests
        self._world = layout.World(
            grid=np.ones((num_lanes, layout.GRID_ROWS, MAX_STEPS)),
            background=np.zeros((num_lanes, 2 * NODES, MAX_BACKGROUND + 1)),
            requests=np.zeros((num_lanes + num_forks + 1, CLIENTS, layout.REQUEST_ROWS, num_requests)),
        )
        self._plans = make_records(layout.PLANS, num_lanes)
        num_all = num_lanes + num_forks
        self._homes = np.arange(num_all)
        self._lanes = make_records(layout.LANE, num_all + 1)  # the last one is to look ahead in
        self._states = make_records(layout.STATE, num_all + 1)
        self.seen = layout.Seen(
            candidates=np.zeros((num_all, NUM_CANDIDATES * len(CANDIDATE_COLUMNS)), dtype=np.float32),
            context=np.zeros((num_all, len(CONTEXT_COLUMNS)), dtype=np.float32),
            mask=np.zeros((num_all, NUM_CANDIDATES), dtype=np.int8),
        )
        self._known = self._states.view(np.ndarray)  # reads a field ten times as fast
        self._blank_lane = run.blank_lane()
        self._is_warm = np.zeros((num_lanes, 3 * ROWS), dtype=np.bool_)
        self._ended = np.zeros((2, num_all * num_requests), dtype=np.int64)
        self._sites: list[Site | None] = [None] * num_lanes
        self._of_sites: dict[Site, tuple[layout.Plans, _Segments]] = {}
        self._segments: list[_Segments] = [{} for _ in range(num_lanes)]
        self._extra: list[dict[Plan, int]] = [{} for _ in range(num_lanes)]  # rows of other plans, the oldest first

    def load(self, lane: int, site: Site, world: World) -> None:
        """Put a site and an episode's world into a lane.

        Raises:
            ConfigError: when the site has more edge nodes, or the world more clients or requests, than there is room.
        """
        if site.num_edges > layout.EDGES or len(world.shift) > CLIENTS or world.num_requests > self.num_requests:
            raise ConfigError(
                f"expected at most {layout.EDGES} edge nodes, {CLIENTS} clients and {self.num_requests} requests, "
                f"got {site.num_edges}, {len(world.shift)} and {world.num_requests}"
            )
        if self._sites[lane] is not site:
            self._load_site(lane, site)
        self._extra[lane] = {}
        plans = self._plans[lane]
        plans.padding[NUM_CANDIDATES:] = 1
        self._load_world(lane, world)
        self._is_warm[lane] = False
        self._is_warm[lane, plans.segment[:NUM_CANDIDATES][world.is_warm].ravel()] = True

    def _load_site(self, lane: int, site: Site) -> None:
        if site not in self._of_sites:
            self._of_sites[site] = _plans_of(site)
        plans, segments = self._of_sites[site]
        self._plans[lane] = plans
        self._sites[lane], self._segments[lane] = site, segments.copy()

    def _load_world(self, lane: int, world: World) -> None:
        plans, grid, background = self._plans[lane], self._world.grid[lane], self._world.background[lane]
        num_nodes, (clients, requests) = len(world.background), world.arrivals_s.shape
        grid[: layout.PATHS] = world.rate_bps
        grid[layout.RTT : layout.RTT + layout.PATHS] = world.rtt_s
        grid[layout.CONTENTION : layout.CONTENTION + num_nodes] = world.contention
        grid[layout.DOWN : layout.DOWN + num_nodes] = world.is_down
        for node, of_node in enumerate(world.background):
            count = len(of_node.arrivals_s)
            background[node, :count] = of_node.arrivals_s
            background[NODES + node, :count] = of_node.service_s
            if count and world.background_until_s < np.inf:  # one that never comes: the others do not come again
                background[node, count] = np.inf
                count += 1
            plans.bg_count[node] = count
        plans.path[: len(world.path)], plans.scale[: len(world.path)] = world.path, world.scale
        plans.num_clients, plans.num_requests = clients, requests
        plans.shift[:clients] = world.shift
        table = self._world.requests[lane, :clients, :, :requests]
        table[:, layout.ARRIVES], table[:, layout.INPUT] = world.arrivals_s, world.input_bytes
        table[:, layout.DEADLINE] = world.deadline_s
        table[:, layout.NOISE : layout.NOISE + 3] = world.noise.transpose(0, 2, 1)

    def add_plan(self, lane: int, plan: Plan) -> int:
        """Give any legal plan a row, so that it can be chosen as the candidates are; a lane that stands at a request.

        Returns:
            The row, good until `EXTRA_ROWS` other plans were added.

        Raises:
            PlanError: when the plan is not legal at the lane's site.
        """
        site, extra = self._sites[lane], self._extra[lane]
        assert site is not None  # load comes first
        row = site.candidates.index.get(plan)
        if row is None:
            row = extra.get(plan)
        if row is not None:
            return row
        costs = compile_plan(site.problem, check_plan(site.problem, plan))
        row = NUM_CANDIDATES + len(extra)
        if len(extra) == EXTRA_ROWS:
            row = extra.pop(next(iter(extra)))
        extra[plan] = row
        _put_rows(self._plans[lane], slice(row, row + 1), costs)
        self._plans[lane].segment[row] = _number_segments(self._segments[lane], site, plan)
        self._plans[lane].padding[row] = 2
        # The request at hand was weighed before there was this row.
        state = self.state_arrays(site, np.array([lane]))
        self._states[lane].total_s[row] = predict_total(costs, tuned_arrays(state), state)[0, 0]
        return row

    def plan_of(self, lane: int, row: int) -> Plan:
        """The plan that has a row."""
        site = self._sites[lane]
        assert site is not None  # load comes first
        if row < NUM_CANDIDATES:
            return site.candidates.plans[row]
        return next(plan for plan, known in self._extra[lane].items() if known == row)

    def begin(self, lanes: IntArray) -> None:
        """Start lanes over: each stands at its first request."""
        self._blank(lanes)
        self._run(lanes, lanes[:, None], run.BEGIN)

    def step(self, lanes: IntArray, rows: IntArray) -> tuple[BoolArray, IntArray]:
        """Start the request at hand in some lanes, each under the plan of its row, and go on to the next.

        Returns:
            Where the next one is the world's last: it is not started any more, and every other of the agent's requests
            has ended. And the requests that ended, shape (2, number): place in `lanes`, number in the episode.
        """
        return self._run(lanes, rows[:, None], run.STEP)

    def plan(self, lanes: IntArray) -> FloatArray:
        """Run the planner through whole episodes: latency of every request, shape (lanes, R). `begin` starts over."""
        self._blank(lanes)
        self._run(lanes, lanes[:, None], run.PLAN)
        latency_s: FloatArray = self._world.requests[lanes, 0, layout.LATENCY]
        return latency_s

    def look(self, lanes: IntArray, rows: IntArray) -> FloatArray:
        """See what would become of the requests at hand and of some that follow; nothing changes.

        The world goes on as it will; after the last of these requests none comes any more.

        Args:
            lanes: any, also one several times.
            rows: plan of the request at hand, then of each that follows, shape (lanes, requests); below 0 the planner
                decides.

        Returns:
            Their latencies, shape (lanes, requests): inf without an answer, NaN beyond the episode's end.
        """
        looked_s = np.empty(rows.shape)
        self._run(lanes, rows, run.LOOK, looked_s)
        return looked_s

    def fork(self, lanes: IntArray) -> IntArray:
        """Copy lanes as they stand, any of them, also one several times; what was forked before is forgotten.

        Returns:
            Numbers of the forks, shape (lanes,): `step` and `finish` take them as they take lanes.

        Raises:
            ConfigError: when there is no room for so many.
        """
        room = len(self._homes) - self.num_lanes
        if len(lanes) > room:
            raise ConfigError(f"expected at most {room} forks, got {len(lanes)}; make the twin with more num_forks")
        forks: IntArray = self.num_lanes + np.arange(len(lanes))
        self._homes[forks] = lanes
        self._lanes[forks] = self._lanes[lanes]
        self._states[forks] = self._states[lanes]
        self._world.requests[forks] = self._world.requests[lanes]
        return forks

    def finish(self, lanes: IntArray) -> None:
        """Go on until all earlier requests have ended; the one at hand and later ones never come."""
        self._run(lanes, np.empty((len(lanes), 0), dtype=np.int64), run.FINISH)

    def _blank(self, lanes: IntArray) -> None:
        self._lanes[lanes] = self._blank_lane
        self._lanes["is_warm"][lanes] = self._is_warm[lanes]
        self._world.requests[lanes, 0, layout.LATENCY] = np.nan
        self._world.requests[lanes, 0, layout.OUTCOME] = 0.0

    def _run(
        self, lanes: IntArray, rows: IntArray, mode: int, looked_s: FloatArray = _NOT_LOOKED
    ) -> tuple[BoolArray, IntArray]:
        is_over = np.zeros(len(lanes), dtype=np.bool_)
        lanes, rows = np.ascontiguousarray(lanes), np.ascontiguousarray(rows)  # others would be compiled for once more
        count = run.run_lanes(
            self._world,
            self._plans,
            self._lanes,
            self._states,
            self.seen,
            self._homes,
            lanes,
            rows,
            mode,
            is_over,
            self._ended,
            looked_s,
        )
        return is_over, self._ended[:, :count]

    def requests(self, lanes: IntArray, numbers: IntArray) -> tuple[FloatArray, FloatArray, IntArray]:
        """Latency (NaN while under way, inf without an answer), deadline and outcome code of some requests."""
        table = self._world.requests[lanes, 0, layout.DEADLINE :, numbers]
        outcomes = table[:, layout.OUTCOME - layout.DEADLINE].astype(np.int64)
        return table[:, layout.LATENCY - layout.DEADLINE], table[:, 0], outcomes

    def now_s(self, lane: int) -> float:
        """Instant at which a lane stands."""
        return float(self._lanes[lane].now_s)

    def known(self, name: str, lanes: IntArray) -> Any:
        """One field of what the devices know at the requests at hand (`env.kernel.layout.STATE`)."""
        return self._known[name][lanes]

    def state_arrays(self, site: Site, lanes: IntArray) -> StateArrays:
        """What the devices of some lanes of one site know at the requests at hand."""
        slots = site.candidates.costs.layout
        columns = []
        for name in _STATE_FIELDS:
            array = self._known[name][lanes]
            if array.ndim > 1 and name != "recent_errors":
                array = array[:, : len(slots.nodes) if array.shape[1] == NODES else len(slots.links)]
            columns.append(array)
        return StateArrays(*columns)
