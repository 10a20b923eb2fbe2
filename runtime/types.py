"""The records everything else speaks in: plans, graphs, profiles, states, latencies.

Frozen, standard library and our errors only, SI units in the names. Ranges are half-open and zero-based. A link is a directed pair of
node names; the device's own name is `DEVICE_NODE`.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.errors import PlanError

DEVICE_NODE = "device"
"""Name of the device in links and node tables; no deployment may give it to another node."""

INPUT_KINDS = ("encoded", "image", "tensor")
"""What a request may bring, in the order of the input stage: JPEG/PNG bytes, uint8 image, model input tensor."""

CODECS = ("auto", "raw", "lossless", "fp16", "int8")
"""What a plan may ask of the wire. `auto` picks raw or lossless per tensor; the last two lose precision."""

LOSSY_CODECS = ("fp16", "int8")


def result_codec(codec: str) -> str:
    """Codec of results under a plan: outputs never lose precision on the way back."""
    return "auto" if codec in LOSSY_CODECS else codec


class Tier(enum.IntEnum):
    """Where a layer runs. The order is the order data may flow in."""

    DEVICE = 0
    EDGE = 1
    CLOUD = 2

    @property
    def label(self) -> str:
        """Lower-case name, as configuration files and tables write it."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class TileSpan:
    """Layers `[start, stop)` cut into a grid of tiles; tile t (row-major) runs on `Plan.edge_nodes[t]`."""

    start: int
    stop: int
    row_lines: tuple[int, ...]  # ascending inner cut positions in the rows of the span's output
    col_lines: tuple[int, ...]  # ascending inner cut positions in its columns

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid."""
        return (len(self.row_lines) + 1) * (len(self.col_lines) + 1)

    def describe(self) -> str:
        """Give a short text, such as `[2:9) 2x1`: layers, then rows by columns of tiles."""
        return f"[{self.start}:{self.stop}) {len(self.row_lines) + 1}x{len(self.col_lines) + 1}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision: a tier for every layer, the edge nodes in use, tiles, and the codec.

    Hashable. Whether it is legal for a model and a deployment is checked in `runtime.planning.problem.check_plan`.
    """

    tiers: tuple[Tier, ...]  # (num_layers,), monotone along the data flow
    edge_nodes: tuple[str, ...] = ()
    """(head, *tile peers). Empty: no edge, the device - cloud link is used. With a head everything goes through it."""
    tiles: tuple[TileSpan, ...] = ()
    codec: str = "auto"

    def __post_init__(self) -> None:
        """Take any sequences of tiers and names, and keep them as tuples.

        Raises:
            PlanError: when one is not a sequence of tiers, or of names.
        """
        if type(self.tiers) is not tuple or not set(map(type, self.tiers)) <= {Tier}:
            object.__setattr__(self, "tiers", _as_tiers(self.tiers))
        if type(self.edge_nodes) is not tuple:
            if isinstance(self.edge_nodes, str) or not isinstance(self.edge_nodes, Sequence):
                raise PlanError(f"expected edge_nodes as a tuple of names, got {self.edge_nodes!r}; write (NAME,)")
            object.__setattr__(self, "edge_nodes", tuple(self.edge_nodes))

    @classmethod
    def split(cls, num_layers: int, i: int, j: int, *, edge_nodes: tuple[str, ...] = (), codec: str = "auto") -> "Plan":
        """Make the common plan: layers `[0, i)` on the device, `[i, j)` on the edge, `[j, num_layers)` in the cloud.

        Raises:
            PlanError: unless `0 <= i <= j <= num_layers`.
        """
        if not 0 <= i <= j <= num_layers:
            raise PlanError(f"expected 0 <= i <= j <= {num_layers}, got i={i}, j={j}")
        tiers = (Tier.DEVICE,) * i + (Tier.EDGE,) * (j - i) + (Tier.CLOUD,) * (num_layers - j)
        return cls(tiers=tiers, edge_nodes=edge_nodes, codec=codec)

    @property
    def head(self) -> str | None:
        """The edge node that everything goes through, if there is one."""
        return self.edge_nodes[0] if self.edge_nodes else None

    def uses(self, tier: Tier) -> bool:
        """Tell whether any layer runs on `tier`."""
        return tier in self.tiers

    def describe(self) -> str:
        """Give a short text for tables, such as `device[0:10) edge0[10:20) cloud[20:22)`; tiles stand behind."""
        parts = []
        start = 0
        for stop in range(1, len(self.tiers) + 1):
            if stop == len(self.tiers) or self.tiers[stop] != self.tiers[start]:
                tier = self.tiers[start]
                name = self.head if tier is Tier.EDGE and self.head else tier.label
                parts.append(f"{name}[{start}:{stop})")
                start = stop
        through = f" via {self.head}" if self.head and not self.uses(Tier.EDGE) else ""
        text = " ".join(parts) + through
        if self.tiles:
            text += f", tiles {' '.join(span.describe() for span in self.tiles)} on {'+'.join(self.edge_nodes)}"
        return text


def _as_tiers(tiers: object) -> tuple[Tier, ...]:
    try:
        return tuple(Tier[t.upper()] if isinstance(t, str) else Tier(t) for t in tiers)  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(tier.label for tier in Tier)
        raise PlanError(f"expected tiers as a sequence of {names}, one per layer, got {tiers!r}") from error


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and memory order of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as torch prints it, without the prefix: float32, uint8, int64, bool, bfloat16 ...
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """One tensor that may cross between layers.

    An encoded input has no fixed size: its spec holds the typical bytes, and `is_sized` is False.
    """

    name: str
    producer: int  # index of the layer that makes it; -1 for the request's input
    consumers: tuple[int, ...]  # ascending indices of the layers that read it
    tensor: TensorSpec
    is_output: bool = False
    is_sized: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    """Which positions of its input one position of an operation's result reads, along rows or columns.

    Position i reads `i * stride - padding + dilation * (0 .. kernel - 1)`. The default reads position i alone.
    """

    kernel: int = 1
    stride: int = 1
    padding: int = 0  # before the first position; what is read after the last one follows from the sizes
    dilation: int = 1

    @property
    def extent(self) -> int:
        """Positions from the first to the last one read, both included."""
        return self.dilation * (self.kernel - 1) + 1


@dataclass(frozen=True, slots=True)
class SpatialOp:
    """One operation on maps (batch, channels, rows, columns) whose result can be made region by region."""

    name: str  # of its result
    reads: tuple[str, ...]  # maps it reads; one with a single row or column is read whole, as broadcasting does
    size: tuple[int, int]  # rows and columns of the result
    windows: tuple[Window, Window] = (Window(), Window())  # along rows, along columns
    flops: float = 0.0
    weight_bytes: int = 0  # of a convolution: read whole, however small the region


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: the smallest unit the graph is cut into."""

    name: str
    kind: str  # conv, linear, pool, norm, attention, ... : what the regressions group by
    inputs: tuple[str, ...]  # names of the values it reads
    outputs: tuple[str, ...]
    flops: float = 0.0
    weight_bytes: int = 0  # of the constants it reads
    window: tuple[int, ...] = ()  # kernel of a convolution or pooling, one size per dimension
    groups: int = 1  # of a convolution
    num_ops: int = 1  # operations that run together: norm, activation and addition beside the one that names the kind
    spatial: tuple[SpatialOp, ...] = ()
    """All its operations, in order, where each can be made region by region; else empty: it cannot be tiled."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the model's input: resize the shorter side, crop the centre, scale, normalise."""

    height: int
    width: int
    resize: int  # shorter side before the crop
    interpolation: str  # nearest, bilinear, bicubic, lanczos
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """A model's layers and the tensors between them, without any torch: what planning and the wire know of it.

    The first `num_stage_layers` layers are the input stage (decode, normalise), absent for models without
    preprocessing. Layers are in topological order.
    """

    graph_id: str
    layers: tuple[LayerSpec, ...]
    values: tuple[ValueSpec, ...]
    outputs: tuple[str, ...]  # names of the flattened outputs, in order; a name may repeat
    output_tree: str  # JSON of the pytree that the flattened outputs unflatten into
    batch_size: int
    num_stage_layers: int
    preprocessing: Preprocessing | None

    @property
    def num_layers(self) -> int:
        """Number of layers, the input stage included."""
        return len(self.layers)

    def entry(self, input_kind: str) -> int:
        """Index of the first layer a request of this kind runs: those before it cost and move nothing.

        Raises:
            ValueError: when there is no such kind.
        """
        if input_kind not in INPUT_KINDS:
            raise ValueError(f"expected an input kind among {INPUT_KINDS}, got {input_kind!r}")
        return min(INPUT_KINDS.index(input_kind), self.num_stage_layers)


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan must respect."""

    private_input: bool = False
    """The raw input stays on the device: the input stage and the first layer of the model run there."""
    allowed_tiers: tuple[Tier, ...] = (Tier.DEVICE, Tier.EDGE, Tier.CLOUD)
    lossless_only: bool = True
    deadline_s: float | None = None
    """Time each request has; None: three times the predicted device-only latency."""
    device_has_model: bool = True
    """False: the device runs no layer, and must be given a deadline."""
    tiles: bool = True
    """False: no layer is cut into tiles for several edge nodes, and every answer is bit-equal to the whole model's."""


@dataclass(frozen=True, slots=True)
class NodeProfile:
    """What one idle node needs for each layer of one graph."""

    layer_s: tuple[float, ...]  # (num_layers,)
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    fixed_s: float = 0.0
    """Fixed seconds per message."""
    is_predicted: bool = False
    """Whether the layer times are predicted from other models on the machine, because this one was not measured yet."""
    tile_layer_s: tuple[float, ...] = ()
    """(num_layers,) the same with the kernels that tiles take, on whole maps; empty: not measured, taken as `layer_s`."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Layer times per node beside the graph: all that a heuristic may know of a model. Keyed by `graph.graph_id`."""

    graph: GraphSpec
    nodes: Mapping[str, NodeProfile]  # by node name, the device included
    lossless_ratio: Mapping[str, float] = field(default_factory=dict)
    """Expected raw bytes / coded bytes by value name; a value that is missing counts as 1."""


@dataclass(frozen=True, slots=True)
class LinkSample:
    """One measured transfer."""

    age_s: float
    bandwidth_bps: float


@dataclass(frozen=True, slots=True)
class LinkState:
    """What its sender measured of a directed link. Unknown readings are NaN with age inf."""

    source: str
    target: str
    samples: tuple[LinkSample, ...] = ()  # newest first, at most 8
    mean_bandwidth_bps: float = math.nan
    rtt_s: float = math.nan
    backlog_bytes: int = 0
    in_flight_bytes: int = 0
    in_flight_s: float = 0.0
    """The transfer under way: its bytes, and how long it has taken beyond a round trip; 0 when none is known of."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """What was last heard of a node."""

    name: str
    tier: Tier
    is_up: bool
    load_factor: float = math.nan  # k: measured / predicted idle segment seconds
    queue_delay_s: float = math.nan  # q
    queue_length: int = 0
    utilisation_frac: float = math.nan
    age_s: float = math.inf
    mode: str = "real"  # or what it pretends to be: emulated, replayed
    overruns: int = 0  # segments that took longer than the emulated node would need, since it started


@dataclass(frozen=True, slots=True)
class SystemState:
    """What was measured, the same for every policy; never a simulator's truth."""

    nodes: tuple[NodeState, ...]  # the device excluded
    links: tuple[LinkState, ...]
    device_backlog_s: float
    uplink_backlog_bytes: int
    request_rate_hz: float  # NaN before the second request
    recent_errors: tuple[float, ...]  # measured / predicted - 1 of the last requests, newest first
    plan_in_force: Plan | None
    input_kind: str
    input_bytes: int
    deadline_s: float

    def node(self, name: str) -> NodeState | None:
        """Find a node by name."""
        return next((n for n in self.nodes if n.name == name), None)

    def link(self, source: str, target: str) -> LinkState | None:
        """Find a directed link by its ends."""
        return next((x for x in self.links if (x.source, x.target) == (source, target)), None)


@dataclass(frozen=True, slots=True)
class LatencyBreakdown:
    """Where a request's time went, or is expected to go. The parts add up to the total.

    `transfer_s` is keyed by directed link, `"device>edge0"`.
    """

    compute_s: Mapping[str, float]  # by node name
    codec_s: float
    transfer_s: Mapping[str, float]
    queueing_s: float
    decision_s: float
    other_s: float  # messages, scheduling, whatever no part above claims
    total_s: float
    source: str = "measured"  # or "estimated"
