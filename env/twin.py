"""The twin: many environments' dynamics in one process, calibrated by the same profiles that plan.

What is emulated, and where it differs from the runtime: queues are first in, first out; transfers integrate the world's
rates; codec and message times are delays that hold no server; a status tells the state at the instant it arrives; a
probe is a transfer of its bytes; a node that is lost is up again with its next status; decisions take no time. Tiles:
`env.kernel.tiles`.
"""

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from env.kernel import layout, run
from env.kernel.lanes import blank_lane
from env.kernel.layout import CLIENTS, NODES, ROWS, make_records
from env.records import Segments, number_segments, plans_of, put_rows, put_tiles
from env.site import Site
from env.traces import FloatArray
from env.world import World
from runtime.errors import ConfigError
from runtime.planning.arrays import StateArrays
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.features import CANDIDATE_COLUMNS, CONTEXT_COLUMNS
from runtime.planning.problem import check_plan
from runtime.planning.rows import compile_plan
from runtime.types import Plan

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

EXTRA_ROWS = ROWS - NUM_CANDIDATES
"""Plans besides the candidates that may be under way in one lane; as many as requests may be."""

OUTCOMES = ("under way", "remote", "device", "local", "failed")
"""What became of a request, by its code: `local` is completed by the device instead of as planned."""

_STATE_FIELDS = tuple(field.name for field in fields(StateArrays))
_NOT_LOOKED = np.empty((0, 1))


def _bytes_of(records: Any) -> npt.NDArray[np.uint8]:
    """Records as rows of bytes: those are copied in one go, and records field by field."""
    rows: npt.NDArray[np.uint8] = records.view(np.uint8).reshape(len(records), -1)
    return rows


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
        num_all = num_lanes + num_forks
        self._homes = np.arange(num_all)
        self._worlds = layout.Worlds(
            courses=make_records(layout.COURSE, num_lanes),
            requests=np.zeros((num_lanes, CLIENTS, num_requests, layout.REQUEST_COLUMNS)),
            meters=make_records(layout.METERS, num_all + 1),
            tiles=np.zeros((num_lanes, 0, layout.TILE_COLUMNS)),
            fates=np.zeros((num_all + 1, num_requests, layout.FATE_COLUMNS)),
        )
        self._worlds.courses["grid"] = 1.0
        self._plans = make_records(layout.PLANS, num_lanes)
        self._plan_bytes = _bytes_of(self._plans)
        self._lanes = make_records(layout.LANE, num_all + 2)
        self._lanes[-1] = blank_lane()[0]
        self._states, self._views = make_records(layout.STATE, num_all), make_records(layout.VIEW, 1)
        self.give_seen()
        self._ended = np.zeros((2, num_all * num_requests), dtype=np.int64)
        self._sites: list[Site | None] = [None] * num_lanes
        self._segments: list[Segments] = [{} for _ in range(num_lanes)]
        self._extra: list[dict[Plan, int]] = [{} for _ in range(num_lanes)]  # rows of other plans, the last used last
        self._num_tiles = [0] * num_lanes

    def give_seen(self) -> None:
        """Leave the arrays of what is seen to whoever has them; what is seen next is written into new ones.

        What the new ones hold of a lane means nothing until it is started or stepped.
        """
        num_all = len(self._homes)
        self.seen = layout.Seen(
            candidates=np.empty((num_all, NUM_CANDIDATES * len(CANDIDATE_COLUMNS)), dtype=np.float32),
            context=np.empty((num_all, len(CONTEXT_COLUMNS)), dtype=np.float32),
            mask=np.empty((num_all, NUM_CANDIDATES), dtype=np.int8),
        )
        rows = self.seen.candidates.reshape(num_all, NUM_CANDIDATES, -1)
        self._shown = self.seen._replace(candidates=rows)  # the same, as compiled functions take it

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
        plans = self._plans
        rows = plans["rows"][lane]
        rows["padding"][NUM_CANDIDATES:] = 1
        rows["num_peers"][NUM_CANDIDATES:] = 0
        plans["num_rows"][lane], plans["num_tiled"][lane] = NUM_CANDIDATES, np.count_nonzero(rows["num_peers"])
        self._num_tiles[lane] = len(plans_of(site).tiles)
        self._load_world(lane, world)
        is_warm = self._worlds.courses["is_warm"][lane]
        is_warm[:] = 0
        is_warm[rows["segment"][: len(world.is_warm)][world.is_warm]] = 1

    def _load_site(self, lane: int, site: Site) -> None:
        plans, tiles, segments = plans_of(site)
        self._plan_bytes[lane] = _bytes_of(plans)[0]
        self._put_tiles(lane, 0, tiles)
        self._sites[lane], self._segments[lane] = site, segments.copy()

    def _load_world(self, lane: int, world: World) -> None:
        plans, courses = self._plans, self._worlds.courses
        grid, background = courses["grid"][lane], courses["background"][lane]  # a record's attributes take far longer
        num_nodes, (clients, requests) = len(world.background), world.arrivals_s.shape
        grid[: layout.PATHS] = world.rate_bps
        grid[layout.RTT : layout.RTT + layout.PATHS] = world.rtt_s
        grid[layout.CONTENTION : layout.CONTENTION + num_nodes] = world.contention
        grid[layout.DOWN : layout.DOWN + num_nodes] = world.is_down
        counts = plans["bg_count"][lane]
        for node, of_node in enumerate(world.background):
            count = len(of_node.arrivals_s)
            if count:
                background[node, :count] = of_node.arrivals_s
                background[NODES + node, :count] = of_node.service_s
                if world.background_until_s < np.inf:  # one that never comes: the others do not come again
                    background[node, count] = np.inf
                    count += 1
            counts[node] = count
        plans["path"][lane, : len(world.path)], plans["scale"][lane, : len(world.path)] = world.path, world.scale
        plans["num_clients"][lane], plans["num_requests"][lane] = clients, requests
        plans["shift"][lane, :clients] = world.shift
        table = self._worlds.requests[lane, :clients, :requests]
        table[..., layout.ARRIVES], table[..., layout.INPUT] = world.arrivals_s, world.input_bytes
        table[..., layout.DEADLINE], table[..., layout.NOISE :] = world.deadline_s, world.noise

    def _put_tiles(self, lane: int, first: int, tiles: FloatArray) -> None:
        """Write tiles of a lane's plans; there is room for as many as some lane has had."""
        known = self._worlds.tiles
        if first + len(tiles) > known.shape[1]:
            more = np.zeros((len(known), max(first + len(tiles), 2 * known.shape[1]), layout.TILE_COLUMNS))
            more[:, : known.shape[1]] = known
            self._worlds = self._worlds._replace(tiles=more)
        self._worlds.tiles[lane, first : first + len(tiles)] = tiles
        self._num_tiles[lane] = first + len(tiles)

    def add_plan(self, lane: int, plan: Plan) -> int:
        """Give any legal plan a row, so that it can be chosen as the candidates are; a lane that stands at a request.

        Returns:
            The row, good until `EXTRA_ROWS` other plans were added or used.

        Raises:
            PlanError: when the plan is not legal at the lane's site.
        """
        site, extra = self._sites[lane], self._extra[lane]
        assert site is not None  # load comes first
        row = site.candidates.index.get(plan)
        if row is None:
            row = extra.get(plan)
            if row is not None:
                extra[plan] = extra.pop(plan)  # used last
        if row is not None:
            return row
        costs = compile_plan(site.problem, check_plan(site.problem, plan))
        row = NUM_CANDIDATES + len(extra)
        if len(extra) == EXTRA_ROWS:
            row = extra.pop(next(iter(extra)))
        extra[plan] = row
        put_rows(self._plans[lane], slice(row, row + 1), costs)
        self._plans["rows"]["segment"][lane, row] = number_segments(self._segments[lane], site, plan)
        self._plans["rows"]["padding"][lane, row] = 2
        self._plans["num_rows"][lane] = max(self._plans["num_rows"][lane], row + 1)
        first = self._num_tiles[lane]
        self._put_tiles(lane, first, put_tiles(self._plans[lane], row, first, site, plan))
        self._plans["num_tiled"][lane] = np.count_nonzero(self._plans["rows"]["num_peers"][lane])
        # The request at hand was weighed before there was this row.
        state = self.state_arrays(site, np.array([lane]))
        self._lanes["predicted_total_s"][lane, row] = predict_total(costs, tuned_arrays(state), state)[0, 0]
        return row

    def plan_of(self, lane: int, row: int) -> Plan:
        """The plan that has a row."""
        site = self._sites[lane]
        assert site is not None  # load comes first
        if row < NUM_CANDIDATES:
            return site.candidates.plans[row]
        return next(plan for plan, known in self._extra[lane].items() if known == row)

    def begin(self, lanes: IntArray, *, is_asking: bool = False) -> None:
        """Start lanes over: each stands at its first request.

        With `is_asking` a lane stands at the requests of all its clients, not only at those of client 0, and `step` starts
        that of the client whose turn it is (`turn`). Else the planner decides for the others. `look` and `finish` are for
        lanes that do not ask.
        """
        self._run(lanes, np.full((len(lanes), 1), int(is_asking)), run.BEGIN)

    def step(self, lanes: IntArray, rows: IntArray) -> tuple[BoolArray, IntArray]:
        """Start the request at hand in some lanes, each under the plan of its row, and go on to the next.

        Returns:
            Where the next one is the world's last: it is not started any more, and every other of the agent's requests
            has ended. And the requests that ended, shape (2, number): place in `lanes`, number in the episode.
        """
        return self._run(lanes, rows[:, None], run.STEP)

    def start(self, lanes: IntArray) -> FloatArray:
        """Run the planner through whole episodes, then start over: latency of every request by it, shape (lanes, R)."""
        latency_s = np.empty((len(lanes), self.num_requests))
        self._run(lanes, lanes[:, None], run.START, latency_s)
        return latency_s

    def look(self, lanes: IntArray, rows: IntArray) -> FloatArray:
        """See what would become of the requests at hand and of some that follow; nothing changes.

        The world goes on as it will; after the last of these requests none comes any more.

        Args:
            lanes: any, also one several times.
            rows: plan of the request at hand, then of each that follows, shape (lanes, requests).

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
        self._run(lanes, forks[:, None], run.FORK)
        self._homes[forks] = lanes
        return forks

    def finish(self, lanes: IntArray) -> None:
        """Go on until all earlier requests have ended; the one at hand and later ones never come."""
        self._run(lanes, np.empty((len(lanes), 0), dtype=np.int64), run.FINISH)

    def _read(self, lanes: IntArray) -> None:
        """Write what is known into the states: steps need no more of it than they show."""
        self._run(lanes, lanes[:, None], run.READ)

    def _run(
        self, lanes: IntArray, rows: IntArray, mode: int, looked_s: FloatArray = _NOT_LOOKED
    ) -> tuple[BoolArray, IntArray]:
        is_over = np.zeros(len(lanes), dtype=np.bool_)
        lanes, rows = np.ascontiguousarray(lanes), np.ascontiguousarray(rows)  # others would be compiled for once more
        count = run.run_lanes(
            self._worlds,
            self._plans,
            self._lanes,
            self._states,
            self._views,
            self._shown,
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
        fates = self._worlds.fates.reshape(-1, layout.FATE_COLUMNS).take(lanes * self.num_requests + numbers, axis=0)
        return fates[:, layout.LATENCY], self.deadline_s(lanes, numbers), fates[:, layout.OUTCOME].astype(np.int64)

    def deadline_s(self, lanes: IntArray, numbers: IntArray) -> FloatArray:
        """Deadline of some requests."""
        deadline_s: FloatArray = self._worlds.requests[self._homes[lanes], 0, numbers, layout.DEADLINE]
        return deadline_s

    def now_s(self, lane: int) -> float:
        """Instant at which a lane stands."""
        return float(self._lanes["now_s"][lane])

    def turn(self, lane: int) -> int:
        """Client whose request is at hand."""
        return int(self._lanes["turn"][lane])

    def known(self, name: str, lanes: IntArray) -> Any:
        """One field of what the devices know at the requests at hand (`env.kernel.layout.STATE`)."""
        self._read(lanes)
        return self._states[name][lanes]

    def state_arrays(self, site: Site, lanes: IntArray) -> StateArrays:
        """What the devices of some lanes of one site know at the requests at hand."""
        slots = site.candidates.costs.layout
        self._read(lanes)
        columns = []
        for name in _STATE_FIELDS:
            array = self._states[name][lanes]
            if array.ndim > 1 and name != "recent_errors":
                array = array[:, : len(slots.nodes) if array.shape[1] == NODES else len(slots.links)]
            columns.append(array)
        return StateArrays(*columns)
