"""`offcut plan`: what the planner would do at this moment, and why not something else."""

import time

from rich import box
from rich.console import Console
from rich.table import Table

from agent.config import PlanConfig
from agent.tables import PREDICTED, latency_cells, loading, make_latency_table
from runtime.deployment import load_deployment
from runtime.device.session import Session
from runtime.errors import OffcutError
from runtime.planning.explain import Explanation, explain
from runtime.planning.policies.registry import load_policy
from runtime.types import SystemState

FIRST_BYTES = 150_000
"""Bytes of an encoded picture when none is given. Guess: a camera's 640 x 480 JPEG at good quality."""

LOSES_BY = {
    "device": "the device computes",
    "edge": "the edge computes",
    "cloud": "the cloud computes",
    "uplink": "the uplink sends",
    "backbone_up": "the edge sends on to the cloud",
    "backbone_down": "the cloud answers the edge",
    "downlink": "the answer comes back",
    "round_trips": "round trips",
    "codec": "packing",
    "wait_device": "the device is busy",
    "wait_uplink": "the uplink is busy",
    "wait_backbone": "the edge's uplink is busy",
    "wait_nodes": "nodes have queues",
    "messages": "messages",
}


def run_plan(config: PlanConfig) -> None:
    """Print the best plans of this moment with their predicted breakdown.

    Raises:
        ConfigError: the deployment is not valid.
        OffcutError: no session could be opened, or no plan is legal.
    """
    deployment = load_deployment(config.deployment)
    console = Console(highlight=False)
    kind = deployment.model.input_kind
    with loading("loading the model, asking the nodes, measuring the links"):
        session = Session(deployment, load_policy("planner"))
    with session:
        time.sleep(config.listen_s)  # statuses and probes come by themselves
        limit_s = deployment.constraints.deadline_s or float("inf")
        state = session.state(kind, config.input_bytes or _typical_bytes(session, kind), limit_s)
        found = explain(session.problem(kind), state, config.top)
    if not found:
        raise OffcutError("every plan needs a node that is down; see `offcut status`")
    _print_readings(console, state)
    for name, profile in session.problem(kind).profile.nodes.items():
        if profile.is_predicted:
            console.print(f"{name}: {PREDICTED}", markup=False)
    table = make_latency_table("predicted for a request now", "plan")
    for one in found:
        table.add_row(one.plan.describe(), *latency_cells(one.predicted, _cloud_name(state)))
    console.print(table)
    console.print(_why(found))


def _typical_bytes(session: Session, kind: str) -> int:
    graph = session.graph
    entry = graph.entry(kind)
    sized = sum(v.tensor.nbytes for v in graph.values if v.producer == entry - 1 and v.is_sized)
    return sized or FIRST_BYTES


def _cloud_name(state: SystemState) -> str:
    return next((node.name for node in state.nodes if node.tier.label == "cloud"), "cloud")


def _print_readings(console: Console, state: SystemState) -> None:
    for link in state.links:
        rate = f"{link.samples[0].bandwidth_bps / 1e6:.1f} Mbps" if link.samples else "not measured yet"
        console.print(f"{link.source} > {link.target}: {rate}, round trip {link.rtt_s * 1e3:.1f} ms")
    for node in state.nodes:
        up = f"k {node.load_factor:.2f}, waits {node.queue_delay_s * 1e3:.1f} ms" if node.is_up else "down"
        console.print(f"{node.name}: {up}")


def _why(found: tuple[Explanation, ...]) -> Table:
    table = Table(title="why the others lose", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("plan", "behind, ms", "mostly because"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for one in found[1:]:
        reason = f"{LOSES_BY[one.loses_by]} {one.loses_by_s * 1e3:+.1f} ms"
        table.add_row(one.plan.describe(), f"{one.behind_s * 1e3:.1f}", reason)
    return table
