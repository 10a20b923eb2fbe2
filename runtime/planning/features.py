"""What a learnt policy sees: one table that is the source of the space, the encoder and the documentation.

Times are shown as log10(seconds / reference + 0.001), the reference being the problem's best latency on idle nodes at
nominal rates; rates are the time that the problem's input would take on the link. So the numbers mean the same for every
model. What there is none of is 0 before the logarithm, and a presence flag says so.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.planning.arrays import (
    NEVER_S,
    NUM_ERRORS,
    BoolArray,
    FloatArray,
    IntArray,
    Layout,
    StateArrays,
    blank_states,
    encode_states,
)
from runtime.planning.candidates import NUM_CANDIDATES, Candidates, candidates
from runtime.planning.cost import PARTS, complete, predict_complete, predict_total, total_s
from runtime.planning.estimators import ReadingsArrays, last_value_arrays, tuned_arrays
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import CutTables
from runtime.types import DEVICE_NODE, Plan, SystemState

NUM_EDGES = 3
"""Edge nodes that the context shows, in the deployment's order."""

NUM_SHOWN = 3
"""Bandwidth samples that the context shows per link, newest first."""

_FLOOR = np.float32(1e-3)
_NODE_SLOTS = ("device", *(f"edge{n}" for n in range(NUM_EDGES)), "cloud")
_LINK_SLOTS = tuple(
    f"{a}>{b}"
    for ends in (
        *(("device", f"edge{n}") for n in range(NUM_EDGES)),
        *((f"edge{n}", "cloud") for n in range(NUM_EDGES)),
        ("device", "cloud"),
    )
    for a, b in (ends, ends[::-1])
)
_NODES, _LINKS, _SAMPLES = "nodes", "links", "samples"
_HELD = PARTS[:4]  # device, edge, cloud, uplink: what one request holds and others wait for


@dataclass(frozen=True, slots=True)
class _Given:
    """What the rows of the table read. B: batch, K: candidates, N and L: node and link slots of the layout."""

    slots: "Slots"
    state: StateArrays
    readings: ReadingsArrays
    parts: FloatArray  # (B, K, parts)
    total_s: FloatArray  # (B, K)
    penalty: FloatArray  # (B, K) 0 where the mask allows
    current: IntArray  # (B,) index of the candidate in force, -1: none
    input_s: FloatArray  # (B, L) time of the input at the tuned rate
    rate_hz: FloatArray  # (B,) 0 where it is not known


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Where the shown slots are in a problem's layout, and what times and bytes are measured in."""

    nodes: IntArray  # (shown nodes,) slot in the layout, -1 where there is none
    links: IntArray  # (shown links,)
    has_layers: FloatArray  # (K, 3)
    reference_s: float
    reference_bytes: float
    request_scale: FloatArray  # (5,)

    def places(self, shows: str, num_nodes: int, num_links: int) -> tuple[IntArray, int]:
        """Which of the numbers that a row of the context encodes are shown, -1 for none, and how many there are."""
        if shows == _NODES:
            return self.nodes, num_nodes
        if shows == _LINKS:
            return self.links, num_links
        spread = self.links[:, None] * NUM_SHOWN + np.arange(NUM_SHOWN)
        return np.where(self.links[:, None] < 0, -1, spread).ravel(), num_links * NUM_SHOWN


@dataclass(frozen=True, slots=True)
class Feature:
    """One row of the table: columns that share a meaning and bounds."""

    name: str
    columns: tuple[str, ...]
    low: float
    high: float
    text: str
    encode: Callable[[_Given], FloatArray | BoolArray]
    """Gives the columns, shape (B, K, columns), of candidates. Of the context: shape (B, columns), or numbers of all
    nodes or links of the layout, of which the columns show some (`shows`). Clipped to the bounds."""
    is_log: bool = True
    """Whether what is shown is log10(what `encode` gives + 0.001)."""
    is_time: bool = False
    """Whether `encode` gives seconds, to be shown in units of the reference."""
    shows: str = ""
    """What `encode` gives numbers of: nodes, links, or the newest samples of links; 0 is shown where there is none."""


def _is_current(given: _Given) -> BoolArray:
    is_current: BoolArray = given.current[:, None, None] == _PLACES
    return is_current


_PLACES = np.arange(NUM_CANDIDATES)[:, None]


def _over_best(given: _Given) -> FloatArray:
    over_best: FloatArray = given.total_s / (given.total_s + given.penalty).min(axis=1, keepdims=True)
    return over_best[..., None]


def _held(given: _Given) -> FloatArray:
    return given.parts[..., : len(_HELD)] * given.rate_hz[:, None, None]


_UNKNOWN: FloatArray = np.full((1, NUM_CANDIDATES, 1), 0.5)
"""Nodes do not tell which segments they hold; the column waits for when they do."""

CANDIDATE_FEATURES: tuple[Feature, ...] = (
    Feature("total", ("total",), -3, 3, "predicted latency", lambda g: g.total_s[..., None], is_time=True),
    Feature("over_best", ("over_best",), 0, 3, "predicted / best of those the mask allows", _over_best),
    Feature("parts", PARTS, -3, 3, "predicted parts of the latency", lambda g: g.parts, is_time=True),
    Feature("held", _HELD, 0, 2, "seconds held x request rate", _held, False),
    Feature("uses", ("device", "edge", "cloud"), 0, 1, "1 where it runs layers", lambda g: g.slots.has_layers, False),
    Feature("is_current", ("is_current",), 0, 1, "1 for the plan in force", _is_current, False),
    Feature("is_warm", ("is_warm",), 0, 1, "1 segments built, 0 not yet, 0.5 unknown", lambda g: _UNKNOWN, False),
)  # fmt: skip
"""The columns of `candidates`, in order: K rows of these."""


def _samples(given: _Given) -> FloatArray:
    """Time of the input at each sample's rate; at the tuned rate where there is none."""
    input_s = given.slots.reference_bytes * 8.0 / np.maximum(given.state.bandwidth_bps[..., :NUM_SHOWN], 1.0)
    np.copyto(input_s, given.input_s[..., None], where=np.isnan(input_s))
    return input_s.reshape(len(input_s), -1)


def _ages(given: _Given) -> FloatArray:
    return given.state.sample_age_s[..., :NUM_SHOWN].reshape(len(given.rate_hz), -1)


def _backlog(given: _Given) -> FloatArray:
    """Time to drain the queue in front of each link."""
    return given.state.backlog_bytes * given.input_s * (1.0 / given.slots.reference_bytes)


def _errors(given: _Given) -> FloatArray:
    ratio = given.state.recent_errors + 1.0
    np.copyto(ratio, 1.0, where=np.isnan(ratio))
    return np.maximum(ratio, 0.0, out=ratio)


def _request(given: _Given) -> FloatArray:
    state = given.state
    columns = np.empty((len(given.rate_hz), len(_REQUEST_COLUMNS)))
    columns[:, 0] = state.device_backlog_s
    columns[:, 1] = state.uplink_backlog_bytes
    columns[:, 2] = given.rate_hz
    columns[:, 3] = state.deadline_s
    columns[:, 4] = state.input_bytes
    columns *= given.slots.request_scale
    np.fmin(columns, 1e9, out=columns)  # no deadline is known: as long as can be
    return columns


def _shown(slots: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{slot}.{n}" for slot in slots for n in range(NUM_SHOWN))


_REQUEST_COLUMNS = ("device_backlog", "uplink_backlog", "request_rate", "deadline", "input_bytes")

CONTEXT_FEATURES: tuple[Feature, ...] = (
    Feature("load_factor", _NODE_SLOTS, -3, 2, "k", lambda g: np.fmax(g.state.load_factor, 1.0), shows=_NODES),
    Feature("queue_delay", _NODE_SLOTS, -3, 3, "q", lambda g: np.fmax(g.state.queue_delay_s, 0.0), shows=_NODES, is_time=True),
    Feature("queue_length", _NODE_SLOTS, -3, 3, "1 + requests that wait", lambda g: 1.0 + g.state.queue_length, shows=_NODES),
    Feature("node_age", _NODE_SLOTS, -3, 3, "seconds since it was heard of", lambda g: np.minimum(g.state.node_age_s, NEVER_S), shows=_NODES),
    Feature("sample", _shown(_LINK_SLOTS), -3, 3, "time of the input at a measured rate; the tuned rate where there is none", _samples, shows=_SAMPLES, is_time=True),
    Feature("sample_age", _shown(_LINK_SLOTS), -3, 3, "age of the sample in seconds", _ages, shows=_SAMPLES),
    Feature("rate", _LINK_SLOTS, -3, 3, "time of the input at the tuned rate", lambda g: g.input_s, shows=_LINKS, is_time=True),
    Feature("round_trip", _LINK_SLOTS, -3, 3, "round trip", lambda g: g.readings.rtt_s, shows=_LINKS, is_time=True),
    Feature("backlog", _LINK_SLOTS, -3, 3, "time to drain the queue in front of the link", _backlog, shows=_LINKS, is_time=True),
    Feature("errors", tuple(f"{n}" for n in range(NUM_ERRORS)), -2, 2, "measured / predicted, newest first; 1 unknown", _errors),
    Feature("request", _REQUEST_COLUMNS, -3, 3, "work and bytes that wait, requests per reference time, deadline, input", _request),
    Feature("node_present", _NODE_SLOTS, 0, 1, "1 if there is such a node", lambda g: np.ones_like(g.state.node_age_s), False, shows=_NODES),
    Feature("node_up", _NODE_SLOTS, 0, 1, "1 if it is up", lambda g: g.state.is_up, False, shows=_NODES),
    Feature("utilisation", _NODE_SLOTS, 0, 1, "share of time busy; 0 unknown", lambda g: np.fmax(g.state.utilisation_frac, 0.0), False, shows=_NODES),
    Feature("link_present", _LINK_SLOTS, 0, 1, "1 if there is such a link", lambda g: np.ones_like(g.input_s), False, shows=_LINKS),
)  # fmt: skip
"""The columns of `context`, in order."""


def _columns(table: tuple[Feature, ...]) -> tuple[str, ...]:
    return tuple(f"{row.name}:{column}" for row in table for column in row.columns)


CANDIDATE_COLUMNS = _columns(CANDIDATE_FEATURES)
CONTEXT_COLUMNS = _columns(CONTEXT_FEATURES)


def _bounds(table: tuple[Feature, ...]) -> tuple[FloatArray, FloatArray]:
    low = [row.low for row in table for _ in row.columns]
    high = [row.high for row in table for _ in row.columns]
    return np.array(low, dtype=np.float64), np.array(high, dtype=np.float64)


CANDIDATE_LOW, CANDIDATE_HIGH = _bounds(CANDIDATE_FEATURES)
CONTEXT_LOW, CONTEXT_HIGH = _bounds(CONTEXT_FEATURES)


def _digest() -> str:
    rows = [
        (row.name, row.columns, row.low, row.high, row.text, row.is_log)
        for row in CANDIDATE_FEATURES + CONTEXT_FEATURES
    ]
    return hashlib.sha256(repr((NUM_CANDIDATES, rows)).encode()).hexdigest()[:12]


FEATURES_VERSION = _digest()
"""Changes with any row of the table: a checkpoint made for another one must not be loaded."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a learnt policy sees of a batch: finite, within the table's bounds."""

    candidates: npt.NDArray[np.float32]  # (B, K, F)
    context: npt.NDArray[np.float32]  # (B, G)
    mask: npt.NDArray[np.bool_]  # (B, K)


class FeatureEncoder:
    """Encodes the states of one problem. Slots and references are worked out once.

    Raises:
        PlanError: when no split of the problem is legal.
    """

    def __init__(self, problem: PlanningProblem) -> None:
        self.candidates: Candidates = candidates(problem)
        self.layout: Layout = self.candidates.costs.layout
        self.slots = find_slots(problem, self.candidates)
        self._by_id = {id(plan): index for plan, index in self.candidates.index.items()}
        self._scales = (
            _scale(CANDIDATE_FEATURES, self.reference_s, NUM_CANDIDATES),
            _scale(CONTEXT_FEATURES, self.reference_s, 1),
        )
        self._context = _Gather.of(self.slots, self.layout)

    @property
    def reference_s(self) -> float:
        """What times are shown in units of: the best latency on idle nodes at nominal rates."""
        return self.slots.reference_s

    @property
    def reference_bytes(self) -> float:
        """What bytes are shown in units of: those of a typical input."""
        return self.slots.reference_bytes

    def encode(
        self,
        state: StateArrays,
        *,
        readings: ReadingsArrays | None = None,
        current: IntArray | None = None,
    ) -> Features:
        """Encode a batch.

        Args:
            state: the states.
            readings: what is believed of them; None takes the tuned estimators.
            current: index of the candidate in force, shape (B,), -1 where it is none of them.
        """
        batch = len(state.input_bytes)
        readings = complete(tuned_arrays(state) if readings is None else readings, self.layout)
        parts = predict_complete(self.candidates.costs, readings, state)
        penalty = self.candidates.penalty(state)
        given = _Given(
            slots=self.slots,
            state=state,
            readings=readings,
            parts=parts,
            total_s=total_s(parts),
            penalty=penalty,
            current=np.full(batch, -1) if current is None else current,
            input_s=self.slots.reference_bytes * 8.0 / readings.bandwidth_bps,
            rate_hz=np.fmax(state.request_rate_hz, 0.0),
        )
        rows = np.empty((batch, NUM_CANDIDATES, len(CANDIDATE_COLUMNS)), dtype=np.float32)
        for start, stop, encode in _CANDIDATE_ROWS:
            rows[..., start:stop] = encode(given)
        return Features(
            candidates=_CANDIDATE_TABLE.show(rows, self._scales[0]),
            context=_CONTEXT_TABLE.show(self._context.take(given), self._scales[1]),
            mask=penalty <= penalty.min(axis=1, keepdims=True),
        )

    def encode_state(self, state: SystemState) -> Features:
        """Encode one state: `encode` with batch 1; the plan in force is looked up among the candidates."""
        return self.encode(encode_states(self.layout, (state,)), current=np.array([self._find(state.plan_in_force)]))

    def _find(self, plan: Plan | None) -> int:
        """Index of a plan among the candidates, -1 for none of them."""
        if plan is None:
            return -1
        # Most often it is one of these very objects: to hash a plan of hundreds of layers takes longer than to look.
        index = self._by_id.get(id(plan))
        return self.candidates.index.get(plan, -1) if index is None else index


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """What turns the numbers of one part into what is shown, over whole blocks of memory.

    One call takes the logarithms of all columns and another puts the plain ones back: faster than to leave them out.
    """

    num_logs: int  # these columns come first
    low: npt.NDArray[np.float32]  # of `repeat` times the columns
    high: npt.NDArray[np.float32]

    @classmethod
    def of(cls, features: tuple[Feature, ...], repeat: int) -> "_Table":
        """Lay the bounds out."""
        low, high = (np.tile(bound, repeat).astype(np.float32) for bound in _bounds(features))
        return cls(sum(len(row.columns) for row in features if row.is_log), low, high)

    def show(self, numbers: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Scale, take the logarithms and clip, in place; shape (..., columns), contiguous."""
        flat = numbers.reshape(-1, len(self.low))
        flat *= scale
        plain = numbers[..., self.num_logs :].copy()
        numbers[..., self.num_logs :] = 1.0
        numbers += _FLOOR
        np.log(numbers, out=numbers)
        numbers *= _PER_DECADE
        numbers[..., self.num_logs :] = plain
        np.maximum(flat, self.low, out=flat)
        np.minimum(flat, self.high, out=flat)
        return numbers


def _scale(features: tuple[Feature, ...], reference_s: float, repeat: int) -> npt.NDArray[np.float32]:
    """What every column is multiplied with to be in units of the reference."""
    scale = [1.0 / reference_s if row.is_time else 1.0 for row in features for _ in row.columns]
    return np.tile(np.array(scale, dtype=np.float32), repeat)


_PER_DECADE = np.float32(1.0 / np.log(10.0))
_CANDIDATE_TABLE, _CONTEXT_TABLE = _Table.of(CANDIDATE_FEATURES, NUM_CANDIDATES), _Table.of(CONTEXT_FEATURES, 1)
_CANDIDATE_STOPS = np.cumsum([len(row.columns) for row in CANDIDATE_FEATURES]).tolist()
_CANDIDATE_ROWS = tuple(
    (stop - len(row.columns), stop, row.encode) for row, stop in zip(CANDIDATE_FEATURES, _CANDIDATE_STOPS, strict=True)
)


@dataclass(frozen=True, slots=True, eq=False)
class _Gather:
    """Takes all columns of the context at once from what its rows encode, laid side by side behind a column of zeros."""

    columns: IntArray  # (G,) 0 where the deployment has no such node or link

    @classmethod
    def of(cls, slots: Slots, layout: Layout) -> "_Gather":
        """Find the places of one problem's nodes and links."""
        columns, start = [], 1
        for row in CONTEXT_FEATURES:
            places, width = np.arange(len(row.columns)), len(row.columns)
            if row.shows:
                places, width = slots.places(row.shows, len(layout.nodes), len(layout.links))
            columns.append(np.where(places < 0, 0, places + start))
            start += width
        return cls(np.concatenate(columns))

    def take(self, given: _Given) -> npt.NDArray[np.float32]:
        """Encode the rows and pick, shape (B, G)."""
        numbers = [np.zeros((len(given.rate_hz), 1)), *(row.encode(given) for row in CONTEXT_FEATURES)]
        together: npt.NDArray[np.float32] = np.concatenate(numbers, axis=1, dtype=np.float32, casting="same_kind")
        return together.take(self.columns, axis=1)


def find_slots(problem: PlanningProblem, choices: Candidates) -> Slots:
    """Find where a problem's nodes and links are shown, and what its times and bytes are measured in."""
    layout, names = choices.costs.layout, _slot_names(problem)
    ends = [(names[a], names[b]) for a, b in (link.split(">") for link in _LINK_SLOTS)]
    nodes = np.array([layout.node_slot.get(name, -1) for name in names.values()])
    links = np.array([layout.link_slot.get(link, -1) for link in ends])
    up = CutTables.of(problem, "raw").up[:, problem.entry]
    typical = sum(v.tensor.nbytes for v in problem.graph.values if not v.is_sized)
    reference_s, reference_bytes = _reference_s(choices, typical), max(float(up[0] + up[4] * typical), 1.0)
    per_s, per_byte = 1.0 / reference_s, 1.0 / reference_bytes
    return Slots(
        nodes=nodes,
        links=links,
        has_layers=choices.costs.has_layers,
        reference_s=reference_s,
        reference_bytes=reference_bytes,
        request_scale=np.array([per_s, per_byte, reference_s, per_s, per_byte]),
    )


def _slot_names(problem: PlanningProblem) -> dict[str, str]:
    """Name of the node in each shown slot; "" where there is none."""
    edges = [node.name for node in problem.deployment.edges][:NUM_EDGES]
    edges += [""] * (NUM_EDGES - len(edges))
    cloud = problem.deployment.cloud
    return dict(zip(_NODE_SLOTS, (DEVICE_NODE, *edges, "" if cloud is None else cloud.name), strict=True))


def _reference_s(choices: Candidates, input_bytes: float) -> float:
    """Best latency of a problem on idle nodes at nominal rates."""
    state = blank_states(choices.costs.layout, 1)
    state.input_bytes[:] = input_bytes
    totals = predict_total(choices.costs, last_value_arrays(state), state)
    return float(max(totals.min(), 1e-6))


def table_markdown() -> str:
    """The table as documentation."""
    lines = ["| part | feature | columns | shown as | bounds | meaning |", "|---|---|---|---|---|---|"]
    for part, table in (("candidates", CANDIDATE_FEATURES), ("context", CONTEXT_FEATURES)):
        lines += [
            f"| {part} | {row.name} | {len(row.columns)} | {'log10' if row.is_log else 'plain'} | [{row.low:g}, {row.high:g}] | {row.text} |"
            for row in table
        ]
    return "\n".join(lines) + "\n"
