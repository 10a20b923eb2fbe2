"""Recovery: what a node that dies, or a link that swallows everything, costs a device that streams.

A tiny model, so that the time seen is the runtime's own; two edge nodes and a cloud, all loaded: edge1 is the warm spare
of edge0. Faults hit edge0 while three threads keep asking; every answer is compared with the whole model's.
"""

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from agent.bench.report import Bar, Report
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.errors import OffcutError
from runtime.model.zoo import load_model
from runtime.planning.policies.registry import load_policy
from runtime.testbed.cluster import Cluster

VICTIM = "edge0"
DEADLINE_S = 0.5
ASKERS = 3
PAUSE_S = 0.03
"""Between two requests of one asker: the cores are shared with the nodes that start again."""

HOLE_S = 1.0
"""How long a link stays a black hole after the next answer has come."""

BACK_S = 120.0
"""How long a node may take to be used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryConfig:
    """Kill a node, or make its link swallow everything, again and again; time the next right answer."""

    json: Path | None = None
    """Where to write the report as JSON."""

    faults: int = 200
    """How many; every other one is a kill, every other one a black hole."""

    quick: bool = False
    """Four faults: shows that everything works, not how well."""

    def __post_init__(self) -> None:
        """Apply `quick`."""
        if self.quick:
            object.__setattr__(self, "faults", 4)


def tiny() -> tuple[nn.Module, torch.Tensor]:
    """The benchmark's model: four small convolutions and a classifier."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(*layers).eval(), torch.randn(1, 3, 32, 32)


@dataclass(slots=True)
class Askers:
    """Threads that keep asking, and what became of every request."""

    session: Session
    frame: torch.Tensor
    whole: torch.Tensor
    ended: list[tuple[float, float, bool, bool]] = field(default_factory=list)  # asked, answered, right, in time
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Askers":
        """Start asking."""
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(ASKERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop asking."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._stop.wait(PAUSE_S):
            asked_s = time.perf_counter()
            try:
                result = self.session.infer(self.frame, deadline_s=DEADLINE_S)
                is_right, is_in_time = torch.equal(result.output, self.whole), result.deadline_met
            except OffcutError:
                is_right = is_in_time = False
            self.ended.append((asked_s, time.perf_counter(), is_right, is_in_time))

    def next_right_answer_s(self, fault_s: float) -> float:
        """Wait for the first right answer to a request that was asked after the fault; seconds since the fault."""
        wait_until(lambda: any(asked_s > fault_s and right for asked_s, _, right, _ in list(self.ended)))
        return min(end_s for asked_s, end_s, right, _ in list(self.ended) if asked_s > fault_s and right) - fault_s


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that must come to be.

    Raises:
        OffcutError: when it does not.
    """
    until_s = time.perf_counter() + BACK_S
    while not holds():
        if time.perf_counter() > until_s:
            raise OffcutError(f"nothing recovered within {BACK_S:.0f} s; run again with fewer programs beside")
        time.sleep(0.002)


def run_recovery(config: RecoveryConfig) -> Report:
    """Measure kills and black holes in turn."""
    report = Report("recovery", "tiny model on loopback, edge1 a warm spare; nothing emulated but the black hole")
    spec = "agent.bench.recovery:tiny"
    model = load_model(spec)
    with torch.inference_mode():
        whole = model.module(model.example)
    config_ = ModelConfig(spec=spec, input_kind="tensor")
    seconds: dict[str, list[float]] = {"kill": [], "black hole": []}
    with (
        Cluster(config_, edges=("edge0", "edge1"), relays=(VICTIM,)) as cluster,
        Session(cluster.deployment, load_policy("edge-only")) as session,
        Askers(session, model.example, whole) as askers,
    ):
        faults = {"kill": _kill, "black hole": _swallow}
        for turn in track(range(config.faults), description="faults"):
            wait_until(lambda: _is_used(session))
            kind = list(faults)[turn % 2]
            seconds[kind].append(faults[kind](cluster, askers))
    _add_rows(report, seconds, askers)
    return report


def _kill(cluster: Cluster, askers: Askers) -> float:
    fault_s = time.perf_counter()
    cluster.kill(VICTIM)
    seconds = askers.next_right_answer_s(fault_s)
    cluster.restart(VICTIM)
    return seconds


def _swallow(cluster: Cluster, askers: Askers) -> float:
    fault_s = time.perf_counter()
    cluster.relays[VICTIM].set_black_hole(True)
    seconds = askers.next_right_answer_s(fault_s)
    time.sleep(HOLE_S)
    cluster.relays[VICTIM].set_black_hole(False)
    return seconds


def _is_used(session: Session) -> bool:
    """Whether requests go to the victim again."""
    node = session.state("tensor", 0, DEADLINE_S).node(VICTIM)
    return node is not None and node.is_up and not session.unusable.get(VICTIM)


def _add_rows(report: Report, seconds: dict[str, list[float]], askers: Askers) -> None:
    for kind, samples in seconds.items():
        report.add(kind, "faults", len(samples), "")
        report.add(kind, "next answer p50", statistics.median(samples), "s")
        report.add(kind, "next answer p95", _p95(samples), "s")
        report.add(kind, "next answer max", max(samples), "s")
    count = len(askers.ended)
    right = sum(is_right for _, _, is_right, _ in askers.ended)
    report.add("all requests", "requests", count, "")
    report.add("all requests", "in time", sum(in_time for *_, in_time in askers.ended) / count, "of 1")
    report.bars.append(Bar("recovery_right_answers_frac", right / count, 1.0, "higher"))
    report.bars.append(Bar("recovery_next_answer_s", _p95([s for x in seconds.values() for s in x]), 1.0, "lower"))


def _p95(samples: list[float]) -> float:
    return sorted(samples)[min(int(0.95 * len(samples)), len(samples) - 1)]
