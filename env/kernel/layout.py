"""The memory of the dynamics: one record per lane, of one fixed form, so that it is compiled once.

Names of fields and their shapes are the tables below; a record is what a compiled function gets, as a pointer. What a world
brings (`COURSE`) and what is measured of it (`METERS`) are records too; what differs in length (requests, tiles, fates) is in
plain arrays beside them.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

EDGES = 3
NODES = EDGES + 2
LINKS = NODES * (NODES - 1)
"""Directed pairs of nodes."""

CLIENTS = 6
ROWS = 128
"""Candidates, then room for other plans; of all only the first `PLANS.num_rows` are looked at."""

SLOTS = 96
"""Requests under way in one lane, and tiles that are out; one more request is refused and counts as failed, one more tile is
left to its head."""

ENDED = SLOTS + 1
"""Most requests of client 0 that end between two of its arrivals: all under way, or one that is refused."""

BACKGROUND = 4096
"""Background requests of a node in a period; where there would be more, they are fewer and larger."""

EVENTS = 4 * SLOTS
RING = 32
"""Jobs of a node that its readings look at: more than its queue holds."""

SAMPLES = 8
METER = 2 * SAMPLES
"""Samples kept per link: what was reported may be older than the newest 8."""

TICKS = 10
"""Busy times kept per node, half a second apart: a window of 5 s."""

SERVERS = CLIENTS * LINKS
"""Servers of links: `client * LINKS + link` for a link of a device, `link` for one that clients share."""

SHOWN_NODES, SHOWN_LINKS = EDGES + 2, 4 * EDGES + 2
"""What policies see: of links, those to and from the device and the cloud."""

STEPS = 512
"""Of the grid; a power of two, so that to start over takes no division."""

PATHS = 6
RTT, CONTENTION, DOWN = PATHS, 2 * PATHS, 2 * PATHS + NODES
GRID_ROWS = DOWN + NODES
"""Rows of the grid: rates from 0 on, then round trips, contention, and 1 where a node answers nobody."""

ARRIVES, INPUT, DEADLINE, NOISE = range(4)
REQUEST_COLUMNS = NOISE + 3
"""Columns of the requests; the last three: noise of each tier."""

NODE_AT, THERE, BACK, IDLE_S, THERE_BYTES, BACK_BYTES, FIXED_S, ALONE_S, REPLAY_S, GOES_ON = range(10)
TILE_COLUMNS = GOES_ON + 1
"""Columns of the tiles: node, links from the head and back (-1: the head's own tile, with which each span begins), idle
seconds there, bytes, fixed seconds of both messages, and what the head needs if it is left to do it: the tile, or at its
own tile the whole span in one piece; the tile from the start of its chain on; 1 where the span goes on with a chain."""

LATENCY, OUTCOME = range(2)
FATE_COLUMNS = 2
"""Columns of what becomes of client 0's requests."""

MEASURED, BPS, LOG_BPS, LOG_MEAN, DECAY, WEIGHT, LOG_SUM = range(7)
METER_COLUMNS = 8
"""Columns of the samples of a link: instant, rate, its logarithm, mean logarithm of all so far, weight of the sample before
it over its own, and weights and weighted logarithms summed over this one and the seven before."""

Lane: TypeAlias = Any
"""A record of `LANE`."""

Plans: TypeAlias = Any
"""A record of `PLANS`."""

State: TypeAlias = Any
"""A record of `STATE`."""

Requests: TypeAlias = Any
"""The requests of a lane's clients, shape (CLIENTS, R, REQUEST_COLUMNS)."""

View: TypeAlias = Any
"""A record of `VIEW`."""


class World(NamedTuple):
    """What happens in one lane whatever is decided, and what is measured of it.

    Records where it can be: they are passed as pointers, and arrays with all their lengths and strides at every call.
    """

    course: Any  # of `COURSE`
    meters: Any  # of `METERS`
    tiles: Any  # (T, TILE_COLUMNS) of the lane's plans, in the order of rows, of the spans in them and of the nodes in those


class Worlds(NamedTuple):
    """Worlds of all lanes, and what becomes of them. R requests.

    Forks have samples and fates of their own, the rest is that of their homes; behind them comes one more of both, to
    look ahead in.
    """

    courses: Any  # (lanes,) of `COURSE`
    requests: Any  # (lanes, CLIENTS, R, REQUEST_COLUMNS)
    tiles: Any  # (lanes, T, TILE_COLUMNS)
    meters: Any  # (lanes + forks + 1,) of `METERS`
    fates: Any  # (lanes + forks + 1, R, FATE_COLUMNS)


class Seen(NamedTuple):
    """Observations, of all lanes (`runtime.planning.features`). K candidates."""

    candidates: Any  # (lanes, K * columns) float32; to compiled functions (lanes, K, columns)
    context: Any  # (lanes, columns) float32
    mask: Any  # (lanes, K) int8


_I, _F, _B = np.int64, np.float64, np.uint8  # numba takes no array of bool inside a record
# What every step reads of a plan is kept small: lanes do not fit into a core's own cache.
_S, _H, _L = np.int8, np.int16, np.int32

_Table: TypeAlias = list[tuple[Any, ...]]


def _fields(kind: Any, names: str, *shape: int) -> _Table:
    return [(name, kind, shape) if shape else (name, kind) for name in names.split()]


ROW = np.dtype(
    _fields(_S, "padding")  # 0 a candidate, 1 no plan, 2 a plan that is no candidate
    + _fields(_B, "needs is_relayed")  # the first: a bit per node
    + _fields(_S, "num_peers")  # nodes that run tiles for the head
    + _fields(_S, "node", 3)
    + _fields(_S, "link", 4)
    + _fields(_B, "has_layers", 3)
    + _fields(_B, "has_hop has_input", 4)
    + _fields(_H, "segment", 3)
    + _fields(_F, "idle_s", 3)
    + _fields(_F, "plain_bytes saved_bytes coding_s", 4)
    + _fields(_F, "plain_codec_s message_s")
    + _fields(_L, "first_tile num_tiles"),
    align=True,
)
"""A plan (`runtime.planning.rows.PlanCosts`)."""

PLANS = np.dtype(
    _fields(ROW, "rows", ROWS)
    + _fields(_S, "link_source link_target reverse path", LINKS)
    + _fields(_S, "back_link", NODES)  # from a node to the device
    + _fields(_F, "scale", LINKS)
    + _fields(_I, "num_links num_nodes num_clients num_requests")
    + _fields(_I, "num_rows num_tiled")  # rows that are looked at, and how many of them have tiles
    + _fields(_I, "shift", CLIENTS)
    + _fields(_I, "bg_count", NODES)
    + _fields(_F, "local_s")  # whole model on the device; inf where it has none
    # What is shown to a policy (`runtime.planning.features.Slots`).
    + _fields(_S, "shown_node", SHOWN_NODES)
    + _fields(_S, "shown_link", SHOWN_LINKS)
    + _fields(_F, "reference_s reference_bytes"),
    align=True,
)
"""Plans of a lane, and what else stands still during an episode."""

EVENT = np.dtype(_fields(_F, "at_s") + _fields(_I, "kind what version"), align=True)
"""What comes: when, what, of what, and of which version of it."""

SLOT = np.dtype(
    _fields(_B, "is_active is_coded is_stage_done is_remote is_span_open")
    # Who asked, where the remote part is, how far a local completion is.
    + _fields(_I, "client place server queued local row hop todo version target number local_queued")
    + _fields(_F, "guard_s deadline_at_s arrived_s predicted_s queued_s input_bytes")
    + _fields(_F, "noise", 3)  # factor on the service time of each tier
    # In tiles: the next of the plan's, those that are out, what is left to the head, which of a chain it has taken over (a
    # bit each). Tiles that are out have a slot each: of which request, and which tile.
    + _fields(_L, "parent tile num_out taken")
    + _fields(_F, "left_s scattered_s crossing_s"),
    align=True,
)
"""A request under way, or a tile that is out."""

ENDING = np.dtype(_fields(_I, "number outcome") + _fields(_F, "latency_s"), align=True)
"""A request that has ended."""

CLIENT = np.dtype(
    _fields(_I, "next_request slot version in_force error_count")
    + _fields(_B, "is_local")
    + _fields(_F, "predicted_end_s")
    + _fields(_F, "errors", SAMPLES),
    align=True,
)
"""A client and its device."""

SERVER = np.dtype(
    _fields(_I, "slot version meter_count")  # in flight: -1 nothing, -2 a probe
    + _fields(_F, "start_s sent_bytes measured_s"),  # the last: of the newest sample
    align=True,
)
"""A link, with what its sender measured."""

NODE = np.dtype(
    # The request that runs and the version of its event; background requests taken in and jobs started; when all that has
    # started is done, and the service of all that. Saved: as of the last `nodes._save`.
    _fields(_I, "slot version bg jobs saved_bg saved_jobs") + _fields(_F, "free_s busy_s saved_free_s saved_busy_s"),
    align=True,
)

JOB = np.dtype(_fields(_F, "start_s wait_s end_s ratio"), align=True)
"""A request that a node has started, background included; `ratio` is what it took over its idle time."""

KNOWN = np.dtype(
    _fields(_B, "is_up")
    + _fields(_F, "heard_s k q_s length busy_frac cool_down_s retry_s")
    + _fields(_I, "breaker failures"),  # 0 closed, 1 open, 2 half open
    align=True,
)
"""What a device knows of a node, and its breaker."""

LANE = np.dtype(
    _fields(_F, "now_s")
    + _fields(_I, "sequence event_count tick_count ended_count top turn")  # no slot from top on is active
    + _fields(_B, "is_over is_asking")  # the second: others than client 0 are not decided for by the planner
    + _fields(CLIENT, "clients", CLIENTS)
    + _fields(KNOWN, "known", CLIENTS, NODES)
    + _fields(NODE, "nodes", NODES)
    + _fields(EVENT, "events", EVENTS)
    + _fields(SLOT, "slots", SLOTS)
    + _fields(SERVER, "servers", SERVERS)
    + _fields(ENDING, "ended", ENDED)  # of client 0, since its last arrival
    + _fields(JOB, "jobs", NODES, RING)  # the last ones
    + _fields(_F, "tick_busy_s", NODES, TICKS)
    + _fields(_B, "is_warm", 3 * ROWS)
    + _fields(_F, "predicted_total_s", ROWS),  # by the planner, of the request at hand
    align=True,
)
"""Everything that changes during an episode; `turn` is the client whose request is at hand."""

COURSE = np.dtype(
    _fields(_F, "grid", GRID_ROWS, STEPS)
    + _fields(_F, "background", 2 * NODES, BACKGROUND + 1)  # arrivals, then service times
    + _fields(_B, "is_warm", 3 * ROWS),  # segments that are built when an episode begins
    align=True,
)
"""What happens in a lane whatever is decided, but for its requests: those of an episode differ in number."""

METERS = np.dtype(_fields(_F, "sample", SERVERS, METER, METER_COLUMNS), align=True)
"""Samples of all links of a lane."""

STATE = np.dtype(
    _fields(_F, "bandwidth_bps sample_age_s", LINKS, SAMPLES)
    + _fields(_F, "mean_bandwidth_bps rtt_s backlog_bytes rate_cap_bps", LINKS)
    + _fields(_B, "is_up", NODES)
    + _fields(_F, "load_factor queue_delay_s queue_length utilisation_frac node_age_s", NODES)
    + _fields(_F, "device_backlog_s uplink_backlog_bytes request_rate_hz input_bytes deadline_s")
    + _fields(_F, "recent_errors", SAMPLES)
    + _fields(_I, "current")  # row in force, -1 for none
    + _fields(_F, "total_s", ROWS),  # predicted by the planner
    align=True,
)
"""What a device has measured when a request comes, as `runtime.planning.arrays.StateArrays` has it, and more."""

VIEW = np.dtype(
    _fields(_F, "s_per_byte half_rtt_s backlog_bytes", LINKS)
    + _fields(_F, "k q_s", NODES)
    + _fields(_F, "device_backlog_s uplink_backlog_bytes input_bytes")
    + _fields(_I, "down")  # a bit per node
    + _fields(_F, "tiled_s", ROWS),  # of the spans in tiles; nothing where a plan has none
    align=True,
)
"""What the planner makes of that under the tuned estimators: all that a prediction needs."""

BOUNDED = (
    "uplink_frac access_scale edge_rtt_s cloud_rtt_s backbone_bps backbone_rtt_s peer_bps peer_rtt_s utilisation "
    "background_size co_tenant co_tenant_on_s gap gap_streaming deadline_factor outage_gap_s outage_s "
    "handover_every_s handover_outage_s handover_weak warm_frac"
)
SINGLE = "utilisation_max service_noise utilisation_cap input_sigma handover_rtt_s"
"""What worlds are drawn from, of `env.ranges.Ranges`."""

PLACE = np.dtype(
    _fields(_F, BOUNDED, 2)
    + _fields(_F, SINGLE)
    + _fields(_I, "clients", 2)
    + _fields(_I, "num_edges num_plans num_families")
    + _fields(_I, "families", 16)  # rows of the table of families
    + _fields(_F, "typical_bytes local_s")
    + _fields(_F, "deadline_s")  # NaN: drawn
    + _fields(_F, "model_s", NODES),
    align=True,
)
"""What worlds at a site are drawn from."""

Place: TypeAlias = Any
"""A record of `PLACE`."""

PER_SIGMA, MAX_SIGMA = 64, 5
LENGTHS = 32

FAMILY = np.dtype(
    _fields(_F, "level_sigma fast_keep fast_sigma fast_step slow_keep slow_sigma slow_step out_value step_s")
    + _fields(_F, "value", 2 * MAX_SIGMA * PER_SIGMA + 1)  # by the normal number it is the quantile of
    + _fields(_B, "has_outages")
    + _fields(_F, "turn_s running_s", 2 * LENGTHS),  # outages, then what lies between; and their running sum
    align=True,
)
"""A fitted family (`env.families`) at some step of time."""

Family: TypeAlias = Any
"""A record of `FAMILY`."""


def make_records(form: "np.dtype[Any]", count: int) -> Any:
    """Allocate records whose fields are attributes; of an array of them they are items."""
    return np.zeros(count, dtype=np.dtype((np.record, form)))
