"""The demo: a photograph through one network on a device, two edge nodes and a cloud, under several plans.

Everything runs on this machine, each node in a process of its own, over ZeroMQ on loopback. Nothing is emulated: the
nodes are equally fast and the links are not shaped, so the table shows that every plan gives the same output, and what
splitting costs by itself, not which plan is best in the field.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from agent.infer import output_error
from agent.tables import latency_cells, make_latency_table
from runtime.device.session import InferenceResult, Session
from runtime.errors import ConfigError
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import admit, run_input_stage
from runtime.model.zoo import Model, load_model
from runtime.planning.policies.registry import load_policy
from runtime.testbed.cluster import Cluster
from runtime.types import Plan

DEADLINE_S = 60.0
"""Far away: the demo shows the plans, not local completion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Send a photograph through a network that is split over four processes on this machine."""

    model: str = "torchvision:resnet50"
    """Model to run."""

    photo: Path | None = None
    """A JPEG or PNG; none takes a photograph that scikit-learn ships."""

    repeat: int = 5
    """Timed requests per plan, after one that warms it up; the row shows the one in the middle."""

    quick: bool = False
    """A small model and one request per plan: shows that everything works, in half a minute."""

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


def run_demo(config: DemoConfig) -> bool:
    """Run the demo and print its table.

    Returns:
        Whether every output equals the whole model's.
    """
    torch.set_num_threads(1)
    console = Console()
    photo = config.photo or sample_photo()
    console.print(f"[bold]Offcut demo[/bold]: {photo.name} ({photo.stat().st_size:,} bytes) through {config.model}")
    with _spinner(console) as progress:
        progress.add_task("starting a cloud, two edge nodes and the device: each loads and traces the model")
        cluster = Cluster.local(config.model, edges=2)
        with cluster, cluster.session(policy=load_policy("device-only")) as session:
            model = load_model(config.model)
            graph = trace(model)
            whole = _run_whole(model, graph, photo)
            task = progress.add_task("running the plans", total=len(_plans(graph)))
            rows = []
            for name, plan in _plans(graph):
                rows.append((name, _run_plan(session, photo, plan, config.repeat)))
                progress.advance(task)
    return _report(console, rows, whole, config)


def sample_photo() -> Path:
    """A photograph that scikit-learn ships.

    Raises:
        ModuleNotFoundError: without scikit-learn, with what to install.
    """
    try:
        folder = resources.files("sklearn.datasets.images")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo's photograph comes with scikit-learn: pip install offcut[demo]") from error
    return Path(str(folder / "china.jpg"))


def _spinner(console: Console) -> Progress:
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)


def _run_whole(model: Model, graph: LayerGraph, photo: Path) -> Any:
    """The reference: input stage, then the untouched module, in this process."""
    with torch.no_grad():
        return model.module(run_input_stage(graph.spec, admit(graph.spec, photo)))


def _plans(graph: LayerGraph) -> list[tuple[str, Plan]]:
    """The plans to show: single tiers, and splits at a third and two thirds of the layers."""
    n = graph.num_layers
    i, j = n // 3, 2 * n // 3
    return [
        ("all on the device", Plan.split(n, n, n)),
        ("JPEG to edge0", Plan.split(n, 0, n, edge_nodes=("edge0",))),
        ("JPEG to cloud", Plan.split(n, 0, 0)),
        ("JPEG to cloud via edge1", Plan.split(n, 0, 0, edge_nodes=("edge1",))),
        ("device, then edge0", Plan.split(n, i, n, edge_nodes=("edge0",))),
        ("device, then cloud", Plan.split(n, i, i)),
        ("device, edge0, cloud", Plan.split(n, i, j, edge_nodes=("edge0",))),
        ("the same, compressed", Plan.split(n, i, j, edge_nodes=("edge0",), codec="lossless")),
    ]


def _run_plan(session: Session, photo: Path, plan: Plan, repeat: int) -> list[InferenceResult]:
    session.infer(photo, plan=plan, deadline_s=DEADLINE_S)  # builds segments on every node
    results = [session.infer(photo, plan=plan, deadline_s=DEADLINE_S) for _ in range(repeat)]
    return sorted(results, key=lambda r: r.latency.total_s if r.latency is not None else float("inf"))


def _report(console: Console, rows: list[tuple[str, list[InferenceResult]]], whole: Any, config: DemoConfig) -> bool:
    table = make_latency_table(f"median of {config.repeat} requests per plan", "plan", "same")
    all_equal = True
    for name, results in rows:
        is_equal = all(output_error(r.output, whole)[1] and r.outcome != "local" for r in results)
        all_equal &= is_equal
        latency = results[len(results) // 2].latency
        assert latency is not None  # infer raises when there is no answer
        table.add_row(name, "yes" if is_equal else "[red]NO[/red]", *latency_cells(latency))
    console.print(table)
    console.print("All nodes are processes on this machine, equally fast; links are loopback, not shaped.")
    total = sum(len(results) for _, results in rows)
    if all_equal:
        console.print(f"[green]All {total} outputs equal the whole model's, bit for bit.[/green]")
    else:
        console.print("[red]An output differs from the whole model's: that is a bug.[/red]")
    return all_equal
