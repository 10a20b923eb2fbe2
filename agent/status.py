"""`offcut status`: what the last session wrote, and what the nodes say now."""

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from agent.config import StatusConfig
from runtime.deployment import Deployment, load_deployment
from runtime.device.ask import NodeAnswer, ask_nodes
from runtime.device.session import default_log_folder
from runtime.device.telemetry import read_status

STALE_S = 3.0
"""A session writes once a second; older than this it has ended or hangs."""


def run_status(config: StatusConfig) -> None:
    """Print the session's status and the nodes' answers.

    Raises:
        ConfigError: when the deployment file is not valid.
    """
    console = Console()
    deployment = load_deployment(config.deployment)
    folder = default_log_folder(config.deployment)
    try:
        session = read_status(folder)
    except FileNotFoundError:
        console.print(f"no session has run with {config.deployment} yet")
        session = {}
    else:
        _print_session(console, session)
    answers = ask_nodes(deployment, config.timeout_s)
    console.print(_node_table(deployment, answers, session.get("breakers", {}) if session.get("is_running") else {}))


def _print_session(console: Console, session: dict[str, Any]) -> None:
    age_s = time.time() - session["written_at_unix_s"]
    if not session["is_running"]:
        state = f"ended {age_s:.0f} s ago"
    else:
        state = "running" if age_s < STALE_S else f"silent for {age_s:.0f} s: it hangs or was killed"
    console.print(f"session {session['pid']}: {state}; model {session['model']}, policy {session['policy']}")
    console.print(f"plan in force: {session['plan'] or 'none yet'}", markup=False)
    console.print(
        f"backlog: device {session['device_backlog_s'] * 1e3:.1f} ms, uplink {session['uplink_backlog_bytes']} bytes"
    )
    outcomes = ", ".join(f"{k} {n}" for k, n in session["outcomes"].items()) or "no request yet"
    console.print(f"requests: {outcomes}")
    for reason, count in session["fallback_reasons"].items():
        console.print(f"  finished on the device, {count}x: {reason}", markup=False)


def _node_table(deployment: Deployment, answers: dict[str, NodeAnswer], breakers: dict[str, str]) -> Table:
    table = Table(title="nodes, asked now")
    for column in ("node", "tier", "address", "state", "k", "queue", "waits", "busy", "rtt", "breaker"):
        table.add_column(column)
    for node in deployment.nodes:
        answer = answers[node.name]
        breaker = breakers.get(node.name, "-")
        if answer.status is None:
            table.add_row(node.name, node.tier.label, node.address, answer.problem, *("-",) * 5, breaker)
            continue
        state = answer.status.state
        table.add_row(
            node.name,
            node.tier.label,
            node.address,
            "up" if state.is_up else "shutting down",
            f"{state.load_factor:.2f}",
            str(state.queue_length),
            f"{state.queue_delay_s * 1e3:.1f} ms",
            f"{state.utilisation_frac:.0%}",
            f"{answer.rtt_s * 1e3:.1f} ms",
            breaker,
        )
    return table
