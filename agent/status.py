"""`offcut status`: what the last session wrote, and what the nodes say now."""

import math
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agent.config import StatusConfig
from agent.tables import PREDICTED
from runtime.deployment import Deployment, load_deployment
from runtime.device.ask import NodeAnswer, ask_nodes
from runtime.device.telemetry import default_log_folder, read_status
from runtime.errors import PeerTimeout

STALE_S = 3.0
"""A session writes once a second; older than this it has ended or hangs."""

COLUMNS = ("k", "queue", "waits", "busy", "rtt")
"""See `StatusConfig`."""


def run_status(config: StatusConfig) -> None:
    """Print the session's status and the nodes' answers.

    Raises:
        ConfigError: when the deployment file is not valid, or names a key file that cannot be read.
        PeerTimeout: when no node answers.
    """
    console = Console(highlight=False)
    deployment = load_deployment(config.deployment)
    folder = default_log_folder(config.deployment)
    try:
        session = read_status(folder)
    except FileNotFoundError:
        console.print(f"no session has run with {config.deployment} yet", markup=False)
        session = {}
    else:
        _print_session(console, session)
    answers = ask_nodes(deployment, config.timeout_s)
    console.print(_node_table(deployment, answers, session.get("breakers", {}) if session.get("is_running") else {}))
    for name, answer in answers.items():
        if answer.status is not None and answer.status.state.mode != "real":
            state = answer.status.state
            console.print(f"{name}: {state.mode}; {state.overruns} segments took longer than what it emulates")
        if answer.problem:
            console.print(f"{name}: {answer.problem}", markup=False, soft_wrap=True)
    if all(answer.welcome is None for answer in answers.values()):
        raise PeerTimeout(
            f"none of the nodes of {config.deployment} answers; start them with `offcut worker`, "
            f"then try `offcut check {config.deployment}`"
        )


def _print_session(console: Console, session: dict[str, Any]) -> None:
    age_s = time.time() - session["written_at_unix_s"]
    if not session["is_running"]:
        state = f"ended {_ago(age_s)}"
    else:
        state = "running" if age_s < STALE_S else f"last heard of {_ago(age_s)}: it hangs or was killed"
    console.print(
        f"session {session['pid']}: {state}; model {session['model']}, policy {session['policy']}", markup=False
    )
    console.print(f"plan in force: {session['plan'] or 'none yet'}", markup=False)
    console.print(
        f"backlog: device {session['device_backlog_s'] * 1e3:.1f} ms, uplink {session['uplink_backlog_bytes']} bytes"
    )
    outcomes = ", ".join(f"{k} {n}" for k, n in session["outcomes"].items()) or "none yet"
    console.print(f"requests: {outcomes}")
    for name, why in session.get("unusable", {}).items():
        console.print(f"  {name}: {why}" if name not in why else f"  {why}", markup=False, soft_wrap=True)
    for name in session.get("predicted", ()):
        console.print(f"  {name}: {PREDICTED}", markup=False)
    for reason, count in session.get("guard_reasons", {}).items():
        console.print(f"  guard: the fallback rule decided, {count}x: {reason}", markup=False)
    if session.get("shadow"):
        shadow = session["shadow"]
        console.print(
            f"shadow {shadow['policy']}: the same plan in {shadow['agreed']} of {shadow['decisions']} decisions, no plan "
            f"in {sum(shadow['failures'].values())}",
            markup=False,
        )
    for reason, count in session["fallback_reasons"].items():
        console.print(f"  finished on the device, {count}x: {reason}", markup=False)


def _ago(age_s: float) -> str:
    for unit, seconds in (("days", 86400), ("hours", 3600), ("min", 60)):
        if age_s >= 2 * seconds:
            return f"{age_s / seconds:.0f} {unit} ago"
    return f"{age_s:.0f} s ago"


def _node_table(deployment: Deployment, answers: dict[str, NodeAnswer], breakers: dict[str, str]) -> Table:
    table = Table(title="nodes, asked now", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("node", "tier", "address", "state"):
        table.add_column(column, overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    if breakers:
        table.add_column("breaker", no_wrap=True)
    for node in deployment.nodes:
        answer = answers[node.name]
        cells = [node.name, node.tier.label, node.address.removeprefix("tcp://"), answer.state, *_load_cells(answer)]
        table.add_row(*cells, *([breakers.get(node.name, "-")] if breakers else []))
    return table


def _load_cells(answer: NodeAnswer) -> list[str]:
    """One cell per column of `COLUMNS`; `-` for what is not known."""
    if answer.status is None:
        return ["-"] * len(COLUMNS)
    state = answer.status.state
    return [
        _known(state.load_factor, "{:.2f}"),
        str(state.queue_length),
        _known(state.queue_delay_s * 1e3, "{:.1f} ms"),
        _known(state.utilisation_frac, "{:.0%}"),
        _known(answer.rtt_s * 1e3, "{:.1f} ms"),
    ]


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
