"""A session's log as the twin's world would have filled it, with a machine that is slower than it says."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np

from env.backend import TwinBackend
from env.scenario import SyntheticScenario
from env.site import Site, make_site
from runtime.device.telemetry import EVENTS_FILE, Event, EventLog
from runtime.planning.cost import estimate
from runtime.profiles.shipped import load_shipped_profile
from runtime.types import LatencyBreakdown

MODEL = load_shipped_profile("torchvision:alexnet")
COUNT = 40
EDGE_FACTOR, MESSAGE_S = 1.25, 0.003


def logged_site() -> Site:
    """The site that the log is of."""
    return make_site(MODEL.spec, MODEL.graph, MODEL.profile, np.random.default_rng(3), input_kind="image")


def _slower(latency: LatencyBreakdown, site: Site) -> LatencyBreakdown:
    """The same request where edge nodes are slower than they say, and messages cost more."""
    edges = {node.name for node in site.problem.deployment.edges}
    compute = {name: s * (EDGE_FACTOR if name in edges else 1.0) for name, s in latency.compute_s.items()}
    more_s = MESSAGE_S * len(latency.transfer_s)
    total_s = latency.total_s + sum(compute.values()) - sum(latency.compute_s.values()) + more_s
    return replace(latency, compute_s=compute, other_s=latency.other_s + more_s, total_s=total_s, source="measured")


def write_log(folder: Path, site: Site) -> None:
    """Write the events of one session."""
    backend, log = TwinBackend([site], num_requests=COUNT), EventLog(folder)
    backend.start(0, SyntheticScenario("both"), 2)
    for number in range(COUNT):
        state, plan = backend.state(), site.candidates.plans[number % site.candidates.num_plans]
        predicted = estimate(site.problem, plan, state)
        log.write(
            Event(
                request=number,
                arrived_after_s=backend.time_s,
                model_id="one",
                policy="planner",
                plan=plan.describe(),
                tiers="".join(str(int(tier)) for tier in plan.tiers),
                edge_nodes=plan.edge_nodes,
                tiles=(),
                codec=plan.codec,
                state=state,
                predicted=predicted,
                measured=_slower(predicted, site),
                outcome="remote",
                reason="",
                deadline_met=True,
                is_protected=True,
            )
        )
        backend.step(plan)
    log.close()
    path, now = folder / EVENTS_FILE, datetime(2026, 1, 1, tzinfo=UTC)
    events = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    for event in events:  # as if it had been written when the request ended
        ended_s = event["arrived_after_s"] + event["measured"]["total_s"]
        event["at"] = (now + timedelta(seconds=ended_s)).isoformat(timespec="milliseconds")
    path.write_bytes(b"\n".join(map(msgspec.json.encode, events)) + b"\n")
