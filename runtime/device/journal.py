"""The session's book: counts how requests end, writes an event for each, and the status once a second."""

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from runtime.device.contacts import Contacts
from runtime.device.request import Answer, Request
from runtime.device.shadow import ShadowCounts
from runtime.device.telemetry import Event, EventLog, Opinion, write_status
from runtime.errors import OffcutError
from runtime.types import Plan, SystemState

logger = logging.getLogger(__name__)


class Journal:
    """Counts in memory; events and status in a folder, if there is one.

    Written from the client's loop, refusals from the thread that asked.

    Args:
        folder: where `events.jsonl` and `status.json` go; None writes neither.
        model: spec of the model, for the status.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, model: str) -> None:
        self.model_id = ""
        """Fingerprint that events carry; known once the session is."""
        self._folder = folder
        self._model = model
        self._log = None if folder is None else EventLog(folder)
        self._began_at_s = time.perf_counter()
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.close()

    def ended(self, request: Request, answer: Answer | None, error: OffcutError | None) -> None:
        """Note how a request ended: with an answer, or an error."""
        outcome = "failed" if answer is None else answer.outcome
        self._counts[outcome] += 1
        if request.reason:
            self._reasons[request.reason.partition(":")[0]] += 1
        if self._log is None:
            return
        self._write(
            Event(
                request=request.number,
                arrived_after_s=request.arrived_at_s - self._began_at_s,
                model_id=self.model_id,
                policy=request.policy,
                plan=request.plan.describe(),
                tiers="".join(str(int(tier)) for tier in request.plan.tiers),
                edge_nodes=request.plan.edge_nodes,
                tiles=request.plan.tiles,
                codec=request.plan.codec,
                state=request.state,
                predicted=request.predicted,
                measured=None if answer is None else answer.latency,
                outcome=outcome,
                reason=request.reason if error is None else f"{type(error).__name__}: {error}",
                deadline_met=answer is not None and request.is_in_time(answer.latency),
                is_protected=request.is_protected,
            ),
            request.shadow,
        )

    def _write(self, event: Event, opinion: "Future[Opinion] | None") -> None:
        """Write an event, as soon as the shadow's opinion is there."""
        assert self._log is not None
        log = self._log
        if opinion is None:
            log.write(event)
        else:
            opinion.add_done_callback(lambda done: log.write(replace(event, shadow=done.result())))

    def refused(self, number: int, arrived_at_s: float, policy: str, plan: Plan | None, error: OffcutError) -> None:
        """Note a request that was refused before it was sent anywhere: it is a line of the log as any other."""
        self._counts["failed"] += 1
        self._reasons[type(error).__name__] += 1
        if self._log is None:
            return
        self._log.write(
            Event(
                request=number,
                arrived_after_s=arrived_at_s - self._began_at_s,
                model_id=self.model_id,
                policy=policy,
                plan="" if plan is None else plan.describe(),
                reason=f"{type(error).__name__}: {error}",
            )
        )

    def write_status(
        self,
        contacts: Contacts,
        state: SystemState,
        policy: str,
        *,
        guard: Mapping[str, int],
        shadow: ShadowCounts | None,
        is_running: bool,
    ) -> None:
        """Replace `status.json`; a folder that is gone or full must not cost an answer."""
        if self._folder is None:
            return
        plan = contacts.board.plan_in_force
        now_s = time.perf_counter()
        status = {
            "version": 1,
            "pid": os.getpid(),
            "is_running": is_running,
            "written_at_unix_s": time.time(),
            "model": self._model,
            "policy": policy,
            "plan": None if plan is None else plan.describe(),
            "outcomes": dict(self._counts),
            "fallback_reasons": dict(self._reasons),
            "guard_reasons": guard,
            "shadow": shadow,
            "device_backlog_s": state.device_backlog_s,
            "uplink_backlog_bytes": state.uplink_backlog_bytes,
            "nodes": state.nodes,
            "breakers": {c.name: c.breaker.state.value for c in contacts},
            "unusable": contacts.unusable(now_s),
            "predicted": [c.name for c in contacts if c.profile is not None and c.profile.is_predicted],
            "threads": {c.name: c.threads for c in contacts if c.is_described},
            "links": state.links,
        }
        try:
            write_status(self._folder, status)
        except OSError as error:
            logger.warning("cannot write the status to %s: %s", self._folder, error)
