"""Split: a request through device, edge and cloud, over the sum of its parts measured one by one.

The parts know nothing of the runtime: each tier's layers run alone in this process at the tier's emulated pace, and the
bytes that cross go over a bare TCP connection through a relay of the same shape. What the whole costs beyond their sum
is ours: messages, queues, threads, sockets. Whole and parts take turns, so that a busy machine slows both.
"""

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from agent.bench.bare_link import BareLink
from agent.bench.report import Bar, Report
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.node.emulation import Emulator
from runtime.node.hosted import HostedModel
from runtime.planning.cost import value_bytes
from runtime.planning.policies.registry import fixed_policy
from runtime.planning.problem import Route, find_route
from runtime.presets import LinkConfig, LinkEmulation, NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.testbed.rate import LinkShape
from runtime.types import DEVICE_NODE, GraphSpec, Plan, Tier
from runtime.wire.codec import AutoCodec

MODEL = "torchvision:resnet18"
SPEEDS = {DEVICE_NODE: 4.0, "edge0": 3.0, "cloud": 3.0}
LINKS = {(DEVICE_NODE, "edge0"): (40e6, 0.002), ("edge0", "cloud"): (100e6, 0.005)}
NAMES = {Tier.DEVICE: DEVICE_NODE, Tier.EDGE: "edge0", Tier.CLOUD: "cloud"}
ROUNDS = 20
QUICK_ROUNDS = 3
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Compare split requests with the sum of their parts."""

    json: Path | None = None
    """Where to write the report as JSON."""

    quick: bool = False
    """Few rounds: shows that everything works, not how well."""


def run_split(config: SplitConfig) -> Report:
    """Measure a two-tier and a three-tier split and their parts, interleaved."""
    speeds = ", ".join(f"{name} {factor:g}x" for name, factor in SPEEDS.items())
    report = Report("split", f"{MODEL}, codec raw; nodes emulated ({speeds} one thread of this machine), links shaped")
    emulate = {name: NodeEmulation(slow_down=factor, mode="compute") for name, factor in SPEEDS.items()}
    links = tuple(
        LinkConfig(between=ends, emulate=LinkEmulation(rate_bps=bps, delay_s=delay_s))
        for ends, (bps, delay_s) in LINKS.items()
    )
    model = ModelConfig(spec=MODEL, input_kind="tensor")
    with ExitStack() as stack:
        hosted = {name: _host(emulation) for name, emulation in emulate.items()}
        graph = hosted[DEVICE_NODE].graph.spec
        wires = {
            ends: stack.enter_context(BareLink(LinkShape(rates_bps=(bps,), delay_s=delay_s)))
            for ends, (bps, delay_s) in LINKS.items()
        }
        cluster = stack.enter_context(Cluster(model, edges=("edge0",), emulate=emulate, links=links))
        plans = _plans(graph)
        session = stack.enter_context(Session(cluster.deployment, fixed_policy(plans["two tiers"])))
        example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        whole: dict[str, list[float]] = {name: [] for name in plans}
        parts: dict[str, list[float]] = {name: [] for name in plans}
        rounds = QUICK_ROUNDS if config.quick else ROUNDS
        for turn in track(range(rounds + 1), description="rounds"):
            for name, plan in plans.items():
                result = session.infer(example, plan=plan, deadline_s=DEADLINE_S)
                assert result.latency is not None  # infer raises when there is no answer
                part_s = _run_parts(graph, plan, example, hosted, wires)
                if turn:  # the first one builds segments on every node
                    whole[name].append(result.latency.total_s)
                    parts[name].append(part_s)
    _add_rows(report, whole, parts)
    return report


def _host(emulation: NodeEmulation) -> HostedModel:
    torch.set_num_threads(1)
    return HostedModel.load(
        MODEL, weights=None, seed=0, batch_size=1, device="cpu", auto=AutoCodec(), emulator=Emulator(emulation)
    )


def _plans(graph: GraphSpec) -> dict[str, Plan]:
    n = graph.num_layers
    return {
        "two tiers": Plan.split(n, n // 3, n, edge_nodes=("edge0",), codec="raw"),
        "three tiers": Plan.split(n, n // 3, 2 * n // 3, edge_nodes=("edge0",), codec="raw"),
    }


def _run_parts(
    graph: GraphSpec,
    plan: Plan,
    example: torch.Tensor,
    hosted: dict[str, HostedModel],
    wires: dict[tuple[str, str], BareLink],
) -> float:
    """Sum of the seconds of every tier's layers and every link's bytes, each alone."""
    route = find_route(graph, plan, "tensor")
    values = {_input_name(graph): example}
    total_s = 0.0
    for tier in route.tiers:
        stage = route.stage(tier)
        made, seconds = hosted[NAMES[tier]].run(stage, {name: values[name] for name in stage.needs})
        values.update(made)
        total_s += seconds
    for hop in range(len(route.up)):
        near, far = route.tiers[hop], route.tiers[hop + 1]
        total_s += wires[NAMES[near], NAMES[far]].round_s(
            value_bytes(graph, route.up[hop], 0), _result_bytes(graph, route, hop)
        )
    return total_s


def _input_name(graph: GraphSpec) -> str:
    """The value that a tensor request brings."""
    entry = graph.entry("tensor")
    return next(v.name for v in graph.values if v.producer == entry - 1 and any(c >= entry for c in v.consumers))


def _result_bytes(graph: GraphSpec, route: Route, hop: int) -> int:
    made = {name for tier in route.tiers[hop + 1 :] for name in route.stage(tier).makes}
    return value_bytes(graph, tuple(name for name in graph.outputs if name in made), 0)


def _add_rows(report: Report, whole: dict[str, list[float]], parts: dict[str, list[float]]) -> None:
    ratios = []
    for name in whole:
        together_s, alone_s = statistics.median(whole[name]), statistics.median(parts[name])
        ratios.append(together_s / alone_s)
        report.add(name, "whole p50", together_s * 1e3, "ms")
        report.add(name, "parts p50", alone_s * 1e3, "ms")
        report.add(name, "whole / parts", ratios[-1], "")
    report.bars.append(Bar("split_over_parts", max(ratios), 1.03, "lower"))
