"""Tiles: layers on two edge nodes at once, over the same layers on one.

Two worker processes with one thread each, side by side on this machine: scatter and gather are real, over loopback.
What is timed is the head's share alone, from the moment it begins until its outputs are there; whole and tiled take
turns. Both processes need a core at the same moment, so of each the minimum counts: on a machine that is busy with
something else the median says more about that.

Whole layers run with the model's own kernels and tiles with others (`runtime.model.kernels`), so part of what tiles win is
the kernels'. How much, one process with one thread shows: it runs the layers both ways, without any wire.

Every tiled span is then run alone, device before it and cloud behind it, beside what the cost model expects of it: its map
is then scattered and gathered whole, where within a chain of spans only borders cross.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track

from agent.bench.report import Bar, Report
from runtime.deployment import ModelConfig
from runtime.device.session import InferenceResult, Session
from runtime.errors import OffcutError
from runtime.measure import run_all_values
from runtime.model.graph import trace
from runtime.model.inputs import admit
from runtime.model.segment import SegmentCache
from runtime.model.zoo import Model, load_model
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import PlanningProblem, make_stage
from runtime.planning.tile_search import TileChoice, choose_tiles
from runtime.planning.tiles import TileNode, cost_tiles, tile_node
from runtime.planning.tiling import find_spans
from runtime.presets import NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.tile_times import TileTimer, find_timed
from runtime.types import Plan, SystemState, Tier, TileSpan

BARS = {"torchvision:vgg16": "tiles_vgg16_two_nodes_speedup", "timm:darknet53": "tiles_darknet53_two_nodes_speedup"}
SPEEDUP = 1.7
ROUNDS = 15
QUICK_ROUNDS = 2
SPAN_ROUNDS = 5
"""Of every span alone."""

DEADLINE_S = 120.0
WARM_UP = 5
"""Requests after which the links' readings are those of tiles: a node tells them twice a second."""

READY_S = 60.0
"""Within which edge nodes must have found each other and measured their links."""

TOLERANCE = 3e-3
"""Largest error behind tiles in float32, relative to the largest output: Inception-v4, the deepest of the tests'
models, comes to 1.8e-3 at its output behind forty spans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesConfig:
    """Compare tiled layers on several edge nodes with the same layers on one."""

    json: Path | None = None
    """Where to write the report as JSON."""

    models: tuple[str, ...] = tuple(BARS)
    """Which models; only VGG-16 and Darknet-53 have bars."""

    quick: bool = False
    """Few rounds on two nodes: shows that everything works, not how well."""


def run_tiles(config: TilesConfig) -> Report:
    """Measure two real nodes, and four that replay, for every model."""
    report = Report("tiles", "codec raw; one thread a process; four nodes are replayed: their computing is a profile")
    rounds = QUICK_ROUNDS if config.quick else ROUNDS
    for spec in config.models:
        name = spec.partition(":")[2]
        model = load_model(spec)
        alone_s = _measure_threads(report, model, name, rounds)
        speedup = _measure(report, model, f"{name}, 2 nodes", 2, rounds, alone_s, replays=False)
        if spec in BARS:
            report.bars.append(Bar(BARS[spec], speedup, SPEEDUP, "higher"))
        if not config.quick:
            _measure(report, model, f"{name}, 4 nodes replayed", 4, rounds, alone_s, replays=True)
    return report


@dataclass(slots=True)
class _Times:
    """Seconds of one way to run the layers, round by round."""

    head_s: list[float] = field(default_factory=list)  # from the span's inputs to its outputs, at the head
    total_s: list[float] = field(default_factory=list)  # of the request, from input to output


def _measure(
    report: Report, model: Model, case: str, num_nodes: int, rounds: int, alone_s: float, *, replays: bool
) -> float:
    """Time the tileable layers on one node and on several, in turns; return the speedup of the minima.

    Args:
        report: takes the numbers.
        model: what to run.
        case: names the rows.
        num_nodes: edge nodes.
        rounds: requests of either kind.
        alone_s: seconds of the layers in one process, with the kernels of tiles.
        replays: nodes replay instead of computing.
    """
    names = tuple(f"edge{i}" for i in range(num_nodes))
    emulate = dict.fromkeys(names, NodeEmulation(slow_down=1.0, mode="replay")) if replays else None
    config = ModelConfig(spec=model.spec, input_kind="tensor")
    with (
        Cluster(config, edges=names, emulate=emulate) as cluster,
        Session(cluster.deployment, load_policy("edge-only")) as session,
    ):
        choice, nodes, plans = _choose(session, names, model)
        expected = session.infer(model.example, plan=plans["whole"], deadline_s=DEADLINE_S).output
        times = {name: _Times() for name in plans}
        for turn in track(range(rounds + 1), description=case):
            for name, plan in plans.items():
                result = session.infer(model.example, plan=plan, deadline_s=DEADLINE_S)
                _check(result, expected)
                if turn and result.latency is not None:  # the first one builds segments on every node
                    times[name].head_s.append(result.latency.compute_s["edge0"])
                    times[name].total_s.append(result.latency.total_s)
        if not replays:
            _measure_spans(report, session, model, case, choice.spans, nodes, rounds, expected)
    for name, measured in times.items():
        report.add(f"{case}, {name}", "layers min", min(measured.head_s) * 1e3, "ms")
        report.add(f"{case}, {name}", "layers p50", statistics.median(measured.head_s) * 1e3, "ms")
        report.add(f"{case}, {name}", "end to end p50", statistics.median(measured.total_s) * 1e3, "ms")
    speedup = min(times["whole"].head_s) / min(times["tiled"].head_s)
    report.add(f"{case}, tiled", "speedup min", speedup, "")
    report.add(f"{case}, tiled", "speedup p50", _ratio(times["whole"].head_s, times["tiled"].head_s), "")
    report.add(f"{case}, tiled", "end to end speedup", _ratio(times["whole"].total_s, times["tiled"].total_s), "")
    report.add(f"{case}, tiled", "predicted", choice.total_s * 1e3, "ms")
    report.add(f"{case}, tiled", "predicted speedup", choice.untiled_s / choice.total_s, "")
    if not replays:
        report.add(f"{case}, tiled", "speedup over tiles' kernels", alone_s / min(times["tiled"].head_s), "")
    return speedup


def _measure_spans(
    report: Report,
    session: Session,
    model: Model,
    case: str,
    spans: tuple[TileSpan, ...],
    nodes: Mapping[str, TileNode],
    rounds: int,
    expected: torch.Tensor,
) -> None:
    """Time every tiled span alone, scattered and gathered, beside what was predicted of it."""
    errors, names = [], tuple(nodes)
    for span in spans:
        (cost,) = cost_tiles(session.graph, [span], tuple(nodes.values()))
        tiers = _tiers(session.graph.num_layers, span.start, span.stop)
        plan = Plan(tiers, names[: span.num_tiles], (span,), "raw")
        seconds = []
        for turn in range(min(rounds, SPAN_ROUNDS) + 1):
            result = session.infer(model.example, plan=plan, deadline_s=DEADLINE_S)
            _check(result, expected)
            if turn and result.latency is not None:  # the first one builds segments
                seconds.append(result.latency.compute_s[names[0]])
        errors.append(abs(cost.total_s / min(seconds) - 1.0))
        report.add(f"{case}, span {span.describe()}", "predicted", cost.total_s * 1e3, "ms")
        report.add(f"{case}, span {span.describe()}", "min", min(seconds) * 1e3, "ms")
    report.add(f"{case}, spans", "median error of the prediction", statistics.median(errors), "")


def _tiers(num_layers: int, start: int, stop: int) -> tuple[Tier, ...]:
    return (Tier.DEVICE,) * start + (Tier.EDGE,) * (stop - start) + (Tier.CLOUD,) * (num_layers - stop)


def _ratio(whole_s: list[float], tiled_s: list[float]) -> float:
    return statistics.median(whole_s) / statistics.median(tiled_s)


def _choose(
    session: Session, names: tuple[str, ...], model: Model
) -> tuple[TileChoice, dict[str, TileNode], dict[str, Plan]]:
    """The tiles that fit the links as they are, the nodes as they were seen, and the plans.

    Tileable layers are on the edge, the rest in the cloud.
    """
    _wait_for_links(session, names)
    problem = session.problem("tensor")
    graph = problem.graph
    start, stop = find_spans(graph)[0].start, find_spans(graph)[-1].stop
    tiers = _tiers(graph.num_layers, start, stop)
    for is_second in (False, True):  # the second choice knows the links by what the first one sent over them
        state = session.state("tensor", 0, DEADLINE_S)
        nodes = {name: _tile_node(problem, state, name) for name in names}
        choice = choose_tiles(graph, tuple(nodes.values()), start, stop)
        if not choice.spans:
            raise OffcutError(f"expected tiles to pay for {model.spec} on {len(names)} nodes, got none; see the links")
        # With gaps between them spans send whole maps: borders are too small to measure a fast link by.
        sent = choice.spans if is_second else choice.spans[::2]
        _warm_up(session, Plan(tiers, names, sent, "raw"), model)
    tiled = Plan(tiers, names, choice.spans, "raw")
    return choice, nodes, {"whole": Plan(tiers, names[:1], codec="raw"), "tiled": tiled}


def _tile_node(problem: PlanningProblem, state: SystemState, name: str) -> TileNode:
    profile = problem.profile.nodes[name]
    there, back = state.link("edge0", name), state.link(name, "edge0")
    if there is None or back is None:
        return tile_node(profile)  # the head
    # The fastest reading: what every message costs, whatever its size, slows each of them and is added by itself.
    to_bps, from_bps = (max(x.bandwidth_bps for x in link.samples) for link in (there, back))
    return tile_node(profile, to_bps, from_bps, there.rtt_s)


def _warm_up(session: Session, plan: Plan, model: Model) -> None:
    """Run a tiled plan until nothing is missing, and then some."""
    _wait_for(lambda: not session.infer(model.example, plan=plan, deadline_s=DEADLINE_S).reason)
    for _ in range(WARM_UP):
        session.infer(model.example, plan=plan, deadline_s=DEADLINE_S)


def _wait_for_links(session: Session, names: tuple[str, ...]) -> None:
    """Wait until every edge node has measured its links."""

    def is_known() -> bool:
        state = session.state("tensor", 0, DEADLINE_S)
        links = [state.link(*ends) for peer in names[1:] for ends in ((names[0], peer), (peer, names[0]))]
        return all(link is not None and link.samples and link.rtt_s > 0 for link in links)

    _wait_for(is_known)


def _wait_for(holds: Callable[[], bool]) -> None:
    until_s = time.perf_counter() + READY_S
    while not holds():
        if time.perf_counter() > until_s:
            raise OffcutError(
                f"the edge nodes did not find each other within {READY_S:.0f} s; run again on a quiet machine"
            )
        time.sleep(0.05)


def _check(result: InferenceResult, expected: torch.Tensor) -> None:
    """Refuse to time answers that are wrong or came another way."""
    error = float((result.output - expected).abs().max() / expected.abs().max())
    if result.outcome != "remote" or result.reason or not error <= TOLERANCE:
        raise OffcutError(
            f"expected an answer from the nodes within {TOLERANCE}, got {result.outcome} ({result.reason}) with an "
            f"error of {error:.2g}; run again on a quiet machine"
        )


def _measure_threads(report: Report, model: Model, case: str, rounds: int) -> float:
    """Time the same layers in this process with one thread and with two, and with the kernels of tiles.

    Returns:
        Seconds with these, one thread.
    """
    graph = trace(model)
    spans = find_spans(graph.spec)
    stage = make_stage(graph.spec, Tier.EDGE, range(spans[0].start, spans[-1].stop))
    before = make_stage(graph.spec, Tier.DEVICE, range(graph.spec.num_stage_layers, spans[0].start))
    segments = SegmentCache(graph)
    given = dict(admit(graph.spec, model.example).values)
    timers = [TileTimer(graph, span, run_all_values(graph, given)) for span in find_timed(graph)]
    values = dict(given)
    values |= segments.get(before).run(values)
    given = {name: values[name] for name in stage.needs}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(rounds + 1):
            for threads, samples in seconds.items():
                torch.set_num_threads(threads)
                samples.append(segments.get(stage).run_timed(given)[1])
            torch.set_num_threads(1)
            for timer in timers:
                timer.run(time.perf_counter)
    finally:
        torch.set_num_threads(1)
    for threads, samples in seconds.items():
        case_ = f"{case}, {threads} thread{'s' if threads > 1 else ''}, no wire"
        report.add(case_, "layers min", min(samples[1:]) * 1e3, "ms")
        report.add(case_, "layers p50", statistics.median(samples[1:]) * 1e3, "ms")
        report.add(case_, "speedup min", min(seconds[1][1:]) / min(samples[1:]), "")
    tiles_s = sum(timer.least_s for timer in timers) if timers else min(seconds[1][1:])
    report.add(f"{case}, 1 thread, tiles' kernels, no wire", "layers min", tiles_s * 1e3, "ms")
    report.add(f"{case}, 1 thread, tiles' kernels, no wire", "speedup min", min(seconds[1][1:]) / tiles_s, "")
    return tiles_s
