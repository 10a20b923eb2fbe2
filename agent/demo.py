"""The demo: one network on a weak device, two edge nodes and a cloud, while everything changes.

Five phases: all is well, the uplinks collapse, an edge node is loaded, it is killed in the middle of a request, it is
back. In each the same photograph goes through the network under every rule in turn, so that all meet the same
conditions. Every node is a real process, every request is really computed, coded and sent; speeds and links are
emulated, as the table says.
"""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from agent import load_policy
from agent.infer import output_error
from agent.photos import sample_photo
from agent.report import Sample, load_drawing, plot_timeline, write_tensorboard
from agent.tables import latency_cells, make_latency_table
from runtime.deployment import ModelConfig
from runtime.device.session import InferenceResult, Session
from runtime.errors import ConfigError
from runtime.model.inputs import admit, run_input_stage
from runtime.model.zoo import load_model
from runtime.node.emulation import Emulator
from runtime.node.hosted import HostedModel
from runtime.planning.policies.registry import PolicySpec
from runtime.presets import LinkConfig, LinkEmulation, NodeEmulation
from runtime.testbed.arrivals import LoadShape
from runtime.testbed.cluster import Cluster
from runtime.testbed.rate import LinkShape
from runtime.types import DEVICE_NODE, GraphSpec
from runtime.wire.codec import AutoCodec

SPEEDS = {DEVICE_NODE: 3.0, "edge0": 1.5, "edge1": 2.0, "cloud": 1.2}
"""Times slower than one idle thread of this machine. The ratios are an example's, not a product's."""

LINKS = {
    (DEVICE_NODE, "edge0"): (40e6, 0.002),
    (DEVICE_NODE, "edge1"): (40e6, 0.002),
    (DEVICE_NODE, "cloud"): (12e6, 0.020),
    ("edge0", "cloud"): (100e6, 0.010),
    ("edge1", "cloud"): (100e6, 0.010),
}
"""Rate in bit/s and one-way delay of every link: a good Wi-Fi, a home's uplink, an office's."""

COLLAPSED_BPS = 1e6
CONTENTION = 3.0
LOAD_HZ = 1.0
KILL_AFTER_S = 0.1
"""Into the first request of its phase."""

TILE_ERROR_FRAC = 1e-3
"""Largest error behind tiles, relative to the largest output: kernels sum in another order."""

DEADLINE_S = 1.5
BACK_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Watch a split network while links and nodes come and go, all on this machine."""

    model: str = "torchvision:resnet50"
    """Model to run."""

    photo: Path | None = None
    """A JPEG or PNG; none takes a photograph that scikit-learn ships."""

    repeat: int = 2
    """Requests per rule and phase."""

    out: Path = Path("runs/demo")
    """Folder for the timeline (PNG) and the TensorBoard logs; what an earlier demo left there is replaced."""

    quick: bool = False
    """A small model and one request per rule and phase: shows that everything works, in half a minute."""

    def __post_init__(self) -> None:
        """Apply `quick`.

        Raises:
            ConfigError: when `repeat` is below 1.
        """
        if self.repeat < 1:
            raise ConfigError(f"expected --repeat >= 1, got {self.repeat}")
        if self.quick:
            object.__setattr__(self, "model", "torchvision:squeezenet1_1")
            object.__setattr__(self, "repeat", 1)


@dataclass(frozen=True, slots=True)
class Phase:
    """What changes when it begins, and what of the next one is got ready meanwhile."""

    name: str
    begin: Callable[[Cluster, Session], None]
    get_ready: Callable[[Cluster], None] = lambda cluster: None


def run_demo(config: DemoConfig) -> bool:
    """Run the demo and print its tables.

    Returns:
        Whether every output equals the whole model's: to the bit, or within rounding where tiles ran.
    """
    torch.set_num_threads(1)
    console = Console()
    photo = config.photo or sample_photo()
    console.print(f"[bold]Offcut demo[/bold]: {photo.name} ({photo.stat().st_size:,} bytes) through {config.model}")
    samples: list[Sample] = []
    steady: dict[str, InferenceResult] = {}
    with contextlib.ExitStack() as running:
        with console.status("starting a cloud, two edge nodes and the device: each loads and traces the model"):
            device = running.enter_context(ThreadPoolExecutor(1)).submit(_load_device, config.model, photo)
            cluster = running.enter_context(_start(config.model))
            local, whole = device.result()
        session = running.enter_context(Session(cluster.deployment, load_policy("device-only"), local=local))
        rules = _rules(session.graph)
        with console.status("first use of every plan: each node builds its segments"):
            for spec in rules.values():
                session.use(spec)
                session.infer(photo, deadline_s=BACK_S)
        at_s = 0.0  # the clock stands still while a phase is prepared
        with Live(console=console, refresh_per_second=4) as live:
            for phase in _phases():
                phase.begin(cluster, session)
                for turn in range(config.repeat * len(rules)):
                    name = list(rules)[turn % len(rules)]
                    if turn == (config.repeat - 2) * len(rules) + 1:
                        phase.get_ready(cluster)
                    session.use(rules[name])
                    began_s = time.perf_counter()
                    result = session.infer(photo, deadline_s=DEADLINE_S)
                    samples.append(_sample(phase.name, name, at_s, result, whole))
                    at_s += time.perf_counter() - began_s
                    steady.setdefault(name, result)
                    live.update(_table(samples, list(rules)))
        nodes = session.state("encoded", 0, DEADLINE_S).nodes
    overruns = {node.name: node.overruns for node in nodes if node.overruns}
    return _report(console, config, samples, steady, overruns)


def _load_device(spec: str, photo: Path) -> tuple[HostedModel, Any]:
    """The device's model, and the reference: input stage, then the untouched module, in this process."""
    config, emulator = ModelConfig(spec=spec), Emulator(_speed(DEVICE_NODE))
    local = HostedModel.load(
        spec,
        weights=config.weights,
        seed=config.seed,
        batch_size=config.batch_size,
        device="cpu",
        auto=AutoCodec(),
        emulator=emulator,
    )
    graph = local.graph.spec
    with torch.no_grad():
        return local, load_model(spec).module(run_input_stage(graph, admit(graph, photo)))


def _speed(name: str) -> NodeEmulation:
    return NodeEmulation(slow_down=SPEEDS[name], mode="compute")


def _start(model: str) -> Cluster:
    links = tuple(
        LinkConfig(between=ends, emulate=LinkEmulation(rate_bps=bps, delay_s=delay_s))
        for ends, (bps, delay_s) in LINKS.items()
    )
    speeds = {name: _speed(name) for name in SPEEDS}
    return Cluster(ModelConfig(spec=model), edges=("edge0", "edge1"), emulate=speeds, links=links)


def _rules(graph: GraphSpec) -> dict[str, PolicySpec]:
    cut = _inner_cut(graph)
    return {
        "edge only": load_policy("edge-only"),
        "device only": load_policy("device-only"),
        "JPEG to cloud": load_policy("cloud-only"),
        f"split at {cut}": load_policy(f"fixed:{cut},{graph.num_layers}@edge0"),
        "LoADPart": load_policy("loadpart"),
        "D3": load_policy("d3"),
        "planner": load_policy("planner"),
        "trained": load_policy("checkpoints/default"),
    }


def _inner_cut(graph: GraphSpec) -> int:
    """The inner cut in the first half of the layers that sends the fewest bytes."""
    crossing = {
        cut: sum(v.tensor.nbytes for v in graph.values if v.producer < cut and any(c >= cut for c in v.consumers))
        for cut in range(graph.num_stage_layers + 1, graph.num_layers // 2)
    }
    return min(crossing, key=lambda cut: crossing[cut])


# --- phases -------------------------------------------------------------------------------------------------------------


def _phases() -> list[Phase]:
    return [
        Phase("steady", lambda cluster, session: None),
        Phase("uplinks collapse", _collapse),
        Phase("edge0 loaded", _load),
        Phase("edge0 killed", _kill, _restart),
        Phase("edge0 back", _come_back),
    ]


def _collapse(cluster: Cluster, session: Session) -> None:
    for (near, far), (_, delay_s) in LINKS.items():
        if near == DEVICE_NODE:
            cluster.link(near, far).shape(up=LinkShape(rates_bps=(COLLAPSED_BPS,), delay_s=delay_s))


def _load(cluster: Cluster, session: Session) -> None:
    for (near, far), (bps, delay_s) in LINKS.items():
        cluster.link(near, far).shape(up=LinkShape(rates_bps=(bps,), delay_s=delay_s))
    cluster.set_contention("edge0", CONTENTION)
    cluster.set_load("edge0", LoadShape(rates_hz=(LOAD_HZ,), arrivals="periodic"))


def _kill(cluster: Cluster, session: Session) -> None:
    cluster.set_load("edge0", LoadShape())
    cluster.set_contention("edge0", 1.0)
    threading.Timer(KILL_AFTER_S, cluster.kill, ("edge0",)).start()


def _restart(cluster: Cluster) -> None:
    """Start it again: to load its model takes about as long as two turns of all rules."""
    threading.Thread(target=cluster.heal).start()


def _come_back(cluster: Cluster, session: Session) -> None:
    cluster.heal()  # where it was not started before
    load_drawing()  # for the report: there is nothing else to do until the node is back
    until_s = time.perf_counter() + BACK_S
    while session.unusable.get("edge0") and time.perf_counter() < until_s:
        time.sleep(0.05)


# --- what came of it ----------------------------------------------------------------------------------------------------


def _sample(phase: str, rule: str, at_s: float, result: InferenceResult, whole: Any) -> Sample:
    assert result.latency is not None  # infer raises when there is no answer
    error, is_equal = output_error(result.output, whole)
    return Sample(
        phase=phase,
        rule=rule,
        at_s=at_s,
        latency=result.latency,
        outcome=result.outcome,
        is_equal=is_equal,
        is_right=is_equal or (bool(result.plan.tiles) and error <= TILE_ERROR_FRAC * float(whole.abs().max())),
        is_in_time=result.deadline_met,
        plan=result.plan.describe(),
    )


def _table(samples: list[Sample], rules: list[str]) -> Table:
    """Median milliseconds by rule and phase; a star where the device had to finish a request itself."""
    phases = [phase.name for phase in _phases()]
    table = Table(title="median latency, milliseconds; * the device finished a request itself")
    table.add_column("rule", no_wrap=True)
    for phase in phases:
        table.add_column(phase, justify="right")
    for rule in rules:
        cells = []
        for phase in phases:
            here = [sample for sample in samples if (sample.rule, sample.phase) == (rule, phase)]
            star = "*" if any(sample.outcome == "local" for sample in here) else ""
            median_s = statistics.median(sample.latency.total_s for sample in here) if here else 0.0
            cells.append(f"{median_s * 1e3:.0f}{star}" if here else "")
        table.add_row(rule, *cells)
    return table


def _report(
    console: Console,
    config: DemoConfig,
    samples: list[Sample],
    steady: dict[str, InferenceResult],
    overruns: dict[str, int],
) -> bool:
    table = make_latency_table("where the time went, first steady request", "rule")
    for rule, result in steady.items():
        assert result.latency is not None
        table.add_row(rule, *latency_cells(result.latency))
    console.print(table)
    speeds = ", ".join(f"{name} {factor:g}x" for name, factor in SPEEDS.items())
    links = ", ".join(f"{a}-{b} {bps / 1e6:g} Mbps {2e3 * s:g} ms" for (a, b), (bps, s) in LINKS.items())
    console.print(f"Emulated on this machine: {speeds} slower than one thread of it; {links} round trip.")
    console.print(f"Collapse: uplinks at {COLLAPSED_BPS / 1e6:g} Mbps. Load: edge0 {CONTENTION:g}x and {LOAD_HZ:g}/s.")
    if overruns:
        told = ", ".join(f"{name} {count}" for name, count in overruns.items())
        console.print(f"This machine was busy: segments slower than what they emulate: {told}.")
    timeline = plot_timeline(samples, config.out, DEADLINE_S)
    logs = write_tensorboard(samples, config.out)
    console.print(f"timeline: {timeline}\nTensorBoard: tensorboard --logdir {logs}", highlight=False)
    late = sum(not sample.is_in_time for sample in samples)
    if late:
        console.print(f"[yellow]{late} of {len(samples)} answers came after the deadline of {DEADLINE_S:g} s.[/yellow]")
    wrong = sum(not sample.is_right for sample in samples)
    equal = sum(sample.is_equal for sample in samples)
    if wrong:
        console.print(f"[red]{wrong} outputs differ from the whole model's: that is a bug.[/red]")
    else:
        tiled = f": {equal} bit for bit, those in tiles within rounding" if equal < len(samples) else ", bit for bit"
        console.print(f"[green]All {len(samples)} outputs equal the whole model's{tiled}.[/green]")
    return not wrong
