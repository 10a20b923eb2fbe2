"""Test bed: how exactly it is what it pretends to be. Links, service times, the load factor k, the queue delay q.

Each is compared with its definition: a transfer with arithmetic on its rates, a service time with slow_down x profiled
idle time, k with the co-tenant's contention, q with Lindley's recursion on the very arrivals and with M/D/1.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from agent.bench.bare_link import BareLink
from agent.bench.report import Bar, Report
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.node.emulation import Emulator
from runtime.node.hosted import HostedModel
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import make_stage
from runtime.presets import NodeEmulation
from runtime.testbed.arrivals import Arrivals, LoadShape
from runtime.testbed.cluster import Cluster
from runtime.testbed.rate import LinkShape
from runtime.types import NodeState, Tier
from runtime.wire.codec import AutoCodec

MODEL = "torchvision:resnet18"
TINY = "agent.bench.recovery:tiny"
SLOW_DOWNS = (3.0, 5.0, 10.0)
CONTENTIONS = (1.0, 1.5, 2.0, 4.0)
UTILISATIONS = (0.3, 0.6)
PAYLOAD_BYTES = 1_000_000
SERVICE_S = 0.06
"""Of the node whose k and q are read: long beside what a node does between two requests."""

SETTLE_S = 7.0
"""The window of k, and the way of a status."""

LINKS = {
    "8 Mbps, 20 ms": LinkShape(rates_bps=(8e6,), delay_s=0.02),
    "new rate each 0.2 s": LinkShape(rates_bps=(12e6, 4e6), starts_s=(0.0, 0.2), period_s=0.4, delay_s=0.02),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TestbedConfig:
    """Compare the test bed with its definitions."""

    json: Path | None = None
    """Where to write the report as JSON."""

    quick: bool = False
    """Few rounds: shows that everything works, not how well."""


def run_testbed(config: TestbedConfig) -> Report:
    """Measure links, service times, k and q."""
    torch.set_num_threads(1)
    report = Report("testbed", "what is emulated over its definition; 1 is exact")
    link_error = _measure_links(report, 2 if config.quick else 10)
    service_error = _measure_service(report, 2 if config.quick else 11)
    k_error = _measure_node(
        report, contentions=CONTENTIONS[-1:] if config.quick else CONTENTIONS, is_quick=config.quick
    )
    report.bars.append(Bar("testbed_link_error_frac", link_error, 0.03, "lower"))
    report.bars.append(Bar("testbed_service_error_frac", service_error, 0.02, "lower"))
    report.bars.append(Bar("testbed_k_error_frac", k_error, 0.05, "lower"))
    return report


def _measure_links(report: Report, rounds: int) -> float:
    errors = []
    for name, shape in LINKS.items():
        schedule = shape.schedule()
        assert schedule is not None  # these links have rates
        expected_s = schedule.finish_s(0.0, 8.0 * PAYLOAD_BYTES) + shape.delay_s
        ratios = []
        with BareLink(shape) as link:
            for _ in range(rounds):
                link.restart()
                ratios.append(link.one_way_s(PAYLOAD_BYTES) / expected_s)
        _add(report, f"1 MB over {name}", ratios)
        errors.append(abs(statistics.median(ratios) - 1.0))
    return max(errors)


def _measure_service(report: Report, rounds: int) -> float:
    errors = []
    for slow_down in SLOW_DOWNS:
        emulator = Emulator(NodeEmulation(slow_down=slow_down, mode="compute"))
        hosted = HostedModel.load(
            MODEL, weights=None, seed=0, batch_size=1, device="cpu", auto=AutoCodec(), emulator=emulator
        )
        spec = hosted.graph.spec
        third = range(spec.num_layers // 3, 2 * spec.num_layers // 3)
        stage = make_stage(spec, Tier.EDGE, third)
        values = {v.name: torch.rand(v.tensor.shape) for v in spec.values if v.name in stage.needs}
        expected_s = sum(hosted.profile.layer_s[i] for i in third)
        hosted.run(stage, values)  # builds the segment
        ratios = [hosted.run(stage, values)[1] / expected_s for _ in range(rounds)]
        _add(report, f"service time, slow_down {slow_down:g}", ratios)
        report.add(f"service time, slow_down {slow_down:g}", "overruns", emulator.overruns, "")
        errors.append(abs(statistics.median(ratios) - 1.0))
    return max(errors)


def _measure_node(report: Report, *, contentions: tuple[float, ...], is_quick: bool) -> float:
    config = ModelConfig(spec=TINY, input_kind="tensor")
    idle_s = _idle_s()
    emulate = {"edge0": NodeEmulation(slow_down=SERVICE_S / idle_s, mode="compute")}
    with (
        Cluster(config, edges=("edge0",), has_cloud=False, emulate=emulate) as cluster,
        Session(cluster.deployment, load_policy("edge-only")) as session,
    ):
        service_s = sum(session.problem("tensor").profile.nodes["edge0"].layer_s)
        error = max(_read_k(report, cluster, session, contention, service_s) for contention in contentions)
        for utilisation in UTILISATIONS:
            _read_q(report, cluster, session, utilisation, service_s, 5.0 if is_quick else 60.0)
    return error


def _idle_s() -> float:
    hosted = HostedModel.load(TINY, weights=None, seed=0, batch_size=1, device="cpu", auto=AutoCodec())
    return sum(hosted.profile.layer_s)


def _read_k(report: Report, cluster: Cluster, session: Session, contention: float, service_s: float) -> float:
    cluster.set_contention("edge0", contention)
    cluster.set_load("edge0", LoadShape(rates_hz=(0.4 / (contention * service_s),), arrivals="periodic"))
    time.sleep(SETTLE_S)
    readings = []
    for _ in range(10):
        time.sleep(0.5)
        readings.append(_node(session).load_factor / contention)
    cluster.set_load("edge0", LoadShape())
    cluster.set_contention("edge0", 1.0)
    _add(report, f"k under a co-tenant of {contention:g}", readings)
    return abs(statistics.median(readings) - 1.0)


def _read_q(
    report: Report, cluster: Cluster, session: Session, utilisation: float, service_s: float, length_s: float
) -> None:
    shape = LoadShape(rates_hz=(utilisation / service_s,), seed=1)
    _wait(lambda: _node(session).queue_length == 0)
    cluster.load_report("edge0")
    cluster.set_load("edge0", shape)
    time.sleep(length_s)
    k = _node(session).load_factor
    cluster.set_load("edge0", LoadShape())
    _wait(lambda: _node(session).queue_length == 0)
    told = cluster.load_report("edge0")
    case = f"q at utilisation {utilisation:g}"
    held_frac = told.mean_held_s / service_s * utilisation
    in_theory_s = held_frac * told.mean_held_s / (2.0 * (1.0 - held_frac))
    report.add(case, "k", k, "")
    report.add(case, "wait", told.mean_queue_s * 1e3, "ms")
    report.add(case, "recursion", mean_wait_s(shape, told.mean_held_s, length_s) * 1e3, "ms")
    report.add(case, "M/D/1", in_theory_s * 1e3, "ms")


def mean_wait_s(shape: LoadShape, service_s: float, length_s: float) -> float:
    """Mean wait of a load's requests at a server that takes the same time for each: Lindley's recursion."""
    arrivals = Arrivals(shape)
    times = list(itertools.takewhile(lambda at_s: at_s < length_s, iter(arrivals.next_s, None)))
    waits = [0.0]
    for before, after in itertools.pairwise(times):
        waits.append(max(0.0, waits[-1] + service_s - (after - before)))
    return statistics.fmean(waits)


def _node(session: Session) -> NodeState:
    node = session.state("tensor", 0, 1.0).node("edge0")
    assert node is not None  # it is the deployment's
    return node


def _wait(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    until_s = time.perf_counter() + seconds
    while not holds() and time.perf_counter() < until_s:
        time.sleep(0.02)


def _add(report: Report, case: str, ratios: list[float]) -> None:
    report.add(case, "p50", statistics.median(ratios), "")
    report.add(case, "min", min(ratios), "")
    report.add(case, "max", max(ratios), "")
