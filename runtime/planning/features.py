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
    FloatArray,
    IntArray,
    Layout,
    StateArrays,
    blank_states,
    encode_states,
)
from runtime.planning.candidates import NUM_CANDIDATES, Candidates, candidates
from runtime.planning.cost import PARTS, complete, predict, predict_total, total_s
from runtime.planning.estimators import ReadingsArrays, last_value_arrays, tuned_arrays
from runtime.planning.problem import PlanningProblem
from runtime.planning.rows import CutTables
from runtime.types import DEVICE_NODE, SystemState

NUM_EDGES = 3
"""Edge nodes that the context shows, in the deployment's order."""

NUM_SHOWN = 3
"""Bandwidth samples that the context shows per link, newest first."""

_FLOOR = 1e-3
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
_HELD = PARTS[:4]  # device, edge, cloud, uplink: what one request holds and others wait for


@dataclass(frozen=True, slots=True)
class _Given:
    """What the rows of the table read. B: batch, K: candidates, N and L: node and link slots of the layout."""

    slots: "_Slots"
    state: StateArrays
    readings: ReadingsArrays
    parts: FloatArray  # (B, K, parts)
    total_s: FloatArray  # (B, K)
    penalty: FloatArray  # (B, K) 0 where the mask allows
    current: IntArray  # (B,) index of the candidate in force, -1: none
    warm: FloatArray  # (B, K)
    input_s: FloatArray  # (B, L) time of the input at the tuned rate
    rate_hz: FloatArray  # (B,) 0 where it is not known


@dataclass(frozen=True, slots=True, eq=False)
class _Slots:
    """Where the shown slots are in a problem's layout, and what times and bytes are measured in."""

    layout: Layout
    nodes: IntArray  # (shown nodes,) slot in the layout
    has_node: FloatArray  # (shown nodes,) 1 where there is one
    links: IntArray  # (shown links,)
    has_link: FloatArray
    samples: IntArray  # (shown links * NUM_SHOWN,) position in the flattened samples
    has_samples: FloatArray
    has_layers: FloatArray  # (K, 3)
    reference_s: float
    reference_bytes: float

    def of_nodes(self, values: FloatArray) -> FloatArray:
        """Pick the shown nodes; 0 where there is none."""
        return values.take(self.nodes, axis=1) * self.has_node

    def of_links(self, values: FloatArray) -> FloatArray:
        """Pick the shown links; 0 where there is none."""
        return values.take(self.links, axis=1) * self.has_link

    def of_samples(self, values: FloatArray) -> FloatArray:
        """Pick the shown samples of the shown links; 0 where there is no such link."""
        return values.reshape(len(values), -1).take(self.samples, axis=1) * self.has_samples


@dataclass(frozen=True, slots=True)
class Feature:
    """One row of the table: columns that share a meaning and bounds."""

    name: str
    columns: tuple[str, ...]
    low: float
    high: float
    text: str
    encode: Callable[[_Given], FloatArray]
    """Gives the columns: shape (B, K, columns) of candidates, (B, columns) of the context. Clipped to the bounds."""
    is_log: bool = True
    """Whether what is shown is log10(what `encode` gives + 0.001)."""


def _is_current(given: _Given) -> FloatArray:
    is_current: FloatArray = (given.current[:, None, None] == _PLACES) * 1.0
    return is_current


_PLACES = np.arange(NUM_CANDIDATES)[:, None]


def _over_best(given: _Given) -> FloatArray:
    over_best: FloatArray = given.total_s / (given.total_s + given.penalty).min(axis=1, keepdims=True)
    return over_best[..., None]


def _held(given: _Given) -> FloatArray:
    return given.parts[..., : len(_HELD)] * given.rate_hz[:, None, None]


CANDIDATE_FEATURES: tuple[Feature, ...] = (
    Feature("total", ("total",), -3, 3, "predicted latency", lambda g: (g.total_s / g.slots.reference_s)[..., None]),
    Feature("over_best", ("over_best",), 0, 3, "predicted / best of those the mask allows", _over_best),
    Feature("parts", PARTS, -3, 3, "predicted parts of the latency", lambda g: g.parts * (1 / g.slots.reference_s)),
    Feature("held", _HELD, 0, 2, "seconds held x request rate", _held, False),
    Feature("uses", ("device", "edge", "cloud"), 0, 1, "1 where it runs layers", lambda g: g.slots.has_layers, False),
    Feature("is_current", ("is_current",), 0, 1, "1 for the plan in force", _is_current, False),
    Feature("is_warm", ("is_warm",), 0, 1, "1 segments built, 0 not yet, 0.5 unknown", lambda g: g.warm[..., None], False),
)  # fmt: skip
"""The columns of `candidates`, in order: K rows of these."""


def _samples(given: _Given) -> FloatArray:
    """Time of the input at each sample's rate; at the tuned rate where there is none."""
    input_s = given.slots.reference_bytes * 8.0 / np.maximum(given.state.bandwidth_bps[..., :NUM_SHOWN], 1.0)
    input_s = np.where(np.isnan(input_s), given.input_s[..., None], input_s)
    return given.slots.of_samples(input_s * (1.0 / given.slots.reference_s))


def _backlog(given: _Given) -> FloatArray:
    """Time to drain the queue in front of each link."""
    drain = given.state.backlog_bytes * given.input_s
    return given.slots.of_links(drain * (1.0 / (given.slots.reference_bytes * given.slots.reference_s)))


def _errors(given: _Given) -> FloatArray:
    return np.fmax(np.where(np.isnan(given.state.recent_errors), 0.0, given.state.recent_errors) + 1.0, 0.0)


def _is_up(given: _Given) -> FloatArray:
    is_up: FloatArray = given.state.is_up.take(given.slots.nodes, axis=1) * given.slots.has_node
    return is_up


def _request(given: _Given) -> FloatArray:
    slots, state = given.slots, given.state
    columns = np.empty((len(given.rate_hz), 5))
    columns[:, 0] = state.device_backlog_s / slots.reference_s
    columns[:, 1] = state.uplink_backlog_bytes / slots.reference_bytes
    columns[:, 2] = given.rate_hz * slots.reference_s
    columns[:, 3] = np.fmin(state.deadline_s / slots.reference_s, 1e9)  # none known: as long as can be
    columns[:, 4] = state.input_bytes / slots.reference_bytes
    return columns


def _shown(slots: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{slot}.{n}" for slot in slots for n in range(NUM_SHOWN))


_REQUEST_COLUMNS = ("device_backlog", "uplink_backlog", "request_rate", "deadline", "input_bytes")

CONTEXT_FEATURES: tuple[Feature, ...] = (
    Feature("load_factor", _NODE_SLOTS, -3, 2, "k", lambda g: g.slots.of_nodes(np.fmax(g.state.load_factor, 1.0))),
    Feature("queue_delay", _NODE_SLOTS, -3, 3, "q", lambda g: g.slots.of_nodes(np.fmax(g.state.queue_delay_s, 0.0) * (1.0 / g.slots.reference_s))),
    Feature("queue_length", _NODE_SLOTS, -3, 3, "1 + requests that wait", lambda g: g.slots.of_nodes(1.0 + g.state.queue_length)),
    Feature("node_age", _NODE_SLOTS, -3, 3, "seconds since it was heard of", lambda g: g.slots.of_nodes(np.minimum(g.state.node_age_s, NEVER_S))),
    Feature("sample", _shown(_LINK_SLOTS), -3, 3, "time of the input at a measured rate; the tuned rate where there is none", _samples),
    Feature("sample_age", _shown(_LINK_SLOTS), -3, 3, "age of the sample in seconds", lambda g: g.slots.of_samples(g.state.sample_age_s[..., :NUM_SHOWN])),
    Feature("rate", _LINK_SLOTS, -3, 3, "time of the input at the tuned rate", lambda g: g.slots.of_links(g.input_s * (1.0 / g.slots.reference_s))),
    Feature("round_trip", _LINK_SLOTS, -3, 3, "round trip", lambda g: g.slots.of_links(g.readings.rtt_s * (1.0 / g.slots.reference_s))),
    Feature("backlog", _LINK_SLOTS, -3, 3, "time to drain the queue in front of the link", _backlog),
    Feature("errors", tuple(f"{n}" for n in range(NUM_ERRORS)), -2, 2, "measured / predicted, newest first; 1 unknown", _errors),
    Feature("request", _REQUEST_COLUMNS, -3, 3, "work and bytes that wait, requests per reference time, deadline, input", _request),
    Feature("node_present", _NODE_SLOTS, 0, 1, "1 if there is such a node", lambda g: g.slots.has_node, False),
    Feature("node_up", _NODE_SLOTS, 0, 1, "1 if it is up", _is_up, False),
    Feature("utilisation", _NODE_SLOTS, 0, 1, "share of time busy; 0 unknown", lambda g: g.slots.of_nodes(np.fmax(g.state.utilisation_frac, 0.0)), False),
    Feature("link_present", _LINK_SLOTS, 0, 1, "1 if there is such a link", lambda g: g.slots.has_link, False),
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
        self._slots = _find_slots(problem, self.candidates)

    @property
    def reference_s(self) -> float:
        """What times are shown in units of: the best latency on idle nodes at nominal rates."""
        return self._slots.reference_s

    @property
    def reference_bytes(self) -> float:
        """What bytes are shown in units of: those of a typical input."""
        return self._slots.reference_bytes

    def encode(
        self,
        state: StateArrays,
        *,
        readings: ReadingsArrays | None = None,
        current: IntArray | None = None,
        warm: FloatArray | None = None,
    ) -> Features:
        """Encode a batch.

        Args:
            state: the states.
            readings: what is believed of them; None takes the tuned estimators.
            current: index of the candidate in force, shape (B,), -1 where it is none of them.
            warm: shape (B, K), 1 where a plan's segments are built, 0 where not; None: unknown.
        """
        batch = len(state.input_bytes)
        readings = complete(tuned_arrays(state) if readings is None else readings, self.layout)
        parts = predict(self.candidates.costs, readings, state)
        penalty = self.candidates.penalty(state)
        given = _Given(
            slots=self._slots,
            state=state,
            readings=readings,
            parts=parts,
            total_s=total_s(parts),
            penalty=penalty,
            current=np.full(batch, -1) if current is None else current,
            warm=np.full((batch, NUM_CANDIDATES), 0.5) if warm is None else warm,
            input_s=self._slots.reference_bytes * 8.0 / readings.bandwidth_bps,
            rate_hz=np.fmax(state.request_rate_hz, 0.0),
        )
        rows = np.empty((batch, NUM_CANDIDATES, len(CANDIDATE_COLUMNS)), dtype=np.float32)
        context = np.empty((batch, len(CONTEXT_COLUMNS)), dtype=np.float32)
        return Features(
            candidates=_fill(rows, _CANDIDATE_TABLE, given),
            context=_fill(context, _CONTEXT_TABLE, given),
            mask=penalty <= penalty.min(axis=1, keepdims=True),
        )

    def encode_state(self, state: SystemState) -> Features:
        """Encode one state: `encode` with batch 1; the plan in force is looked up among the candidates."""
        plan = state.plan_in_force
        current = -1 if plan is None else self.candidates.index.get(plan, -1)
        return self.encode(encode_states(self.layout, (state,)), current=np.array([current]))


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Rows ready for the encoder: the logarithmic ones are the first columns, so that one call takes all logs."""

    rows: tuple[tuple[int, int, Callable[[_Given], FloatArray]], ...]
    num_logs: int
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]

    @classmethod
    def of(cls, features: tuple[Feature, ...]) -> "_Table":
        """Lay the rows out from left to right."""
        stops = np.cumsum([len(row.columns) for row in features]).tolist()
        rows = tuple((stop - len(row.columns), stop, row.encode) for row, stop in zip(features, stops, strict=True))
        num_logs = sum(len(row.columns) for row in features if row.is_log)
        low, high = _bounds(features)
        return cls(rows, num_logs, low.astype(np.float32), high.astype(np.float32))


_CANDIDATE_TABLE, _CONTEXT_TABLE = _Table.of(CANDIDATE_FEATURES), _Table.of(CONTEXT_FEATURES)


def _fill(out: npt.NDArray[np.float32], table: _Table, given: _Given) -> npt.NDArray[np.float32]:
    for start, stop, encode in table.rows:
        out[..., start:stop] = encode(given)
    logs = out[..., : table.num_logs]
    logs += np.float32(_FLOOR)
    np.log(logs, out=logs)
    logs *= np.float32(1.0 / np.log(10.0))
    np.maximum(out, table.low, out=out)
    np.minimum(out, table.high, out=out)
    return out


def _find_slots(problem: PlanningProblem, choices: Candidates) -> _Slots:
    layout, names = choices.costs.layout, _slot_names(problem)
    ends = [(names[a], names[b]) for a, b in (link.split(">") for link in _LINK_SLOTS)]
    links = np.array([layout.link_slot.get(link, 0) for link in ends])
    has_link = np.array([link in layout.link_slot for link in ends], dtype=np.float64)
    up = CutTables.of(problem, "raw").up[:, problem.entry]
    typical = sum(v.tensor.nbytes for v in problem.graph.values if not v.is_sized)
    return _Slots(
        layout=layout,
        nodes=np.array([layout.node_slot.get(name, 0) for name in names.values()]),
        has_node=np.array([name in layout.node_slot for name in names.values()], dtype=np.float64),
        links=links,
        has_link=has_link,
        samples=(links[:, None] * NUM_SHOWN + np.arange(NUM_SHOWN)).ravel(),
        has_samples=np.repeat(has_link, NUM_SHOWN),
        has_layers=choices.costs.has_layers,
        reference_s=_reference_s(choices, typical),
        reference_bytes=max(float(up[0] + up[4] * typical), 1.0),
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
