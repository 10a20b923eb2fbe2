"""A node as a pure state machine: events in, instructions out, no sockets, no tensors, no clock of its own.

    arrive -> [queued] -> [running] -> [waiting for the next node] -> answered
                 |         |  ^ |                   |
                 |         v  | |                   |
                 |   [gathering, ready]             |
                 |            | |                   |
                 +------------+-+-------------------+--> refused (busy, late, error, lost) or forgotten (cancelled)

A request that brings no layers for this node skips the queue. One that needs tiles of other nodes leaves the processor
to others while it gathers them, and goes on ahead of the queue; it counts against the capacity all the while. Late work
is dropped and counted at every arrow. The worker executes the instructions (`runtime.node.worker`).
"""

import enum
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from runtime.node.load import NodeLoad

Key = tuple[Hashable, int]
"""(client, its request number): what a request is called on a node."""


class Phase(enum.Enum):
    """Where a request stands on this node."""

    QUEUED = "queued"
    RUNNING = "running"
    GATHERING = "gathering"
    READY = "ready"  # to go on computing
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Run:
    """Start computing this request's share now."""

    key: Key
    queue_s: float


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on computing this request's share: no tile of it is out any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class Forward:
    """Send what crosses on to the next node."""

    key: Key
    remaining_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """Send the result back."""

    key: Key


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the client that there will be no result, then forget the request."""

    key: Key
    kind: str  # busy, late, error, lost
    text: str
    is_plan_fault: bool = False
    was_forwarded: bool = False  # the next node must be told


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop everything held for this request; `was_forwarded`: the next node must be told."""

    key: Key
    was_forwarded: bool


Instruction = Run | Resume | Forward | Reply | Refuse | Forget


@dataclass(slots=True)
class _Request:
    phase: Phase
    arrived_at_s: float
    deadline_at_s: float
    has_next: bool
    is_cancelled: bool = False


@dataclass(slots=True)
class NodeMachine:
    """The invariants of one node: one request runs at a time, the queue is bounded and first in, first out.

    Args:
        capacity: requests that may wait; one more is answered *busy* at once.
    """

    capacity: int
    load: NodeLoad = field(default_factory=NodeLoad)
    is_draining: bool = False
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("done", "busy", "late", "error", "lost", "cancelled"), 0)
    )
    _requests: dict[Key, _Request] = field(default_factory=dict)
    _queue: deque[Key] = field(default_factory=deque)
    _ready: deque[Key] = field(default_factory=deque)
    _gathering: set[Key] = field(default_factory=set)
    _running: Key | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait for the processor or have it."""
        return len(self._queue) + len(self._ready) + (self._running is not None)

    @property
    def is_idle(self) -> bool:
        """True when no request is anywhere on this node."""
        return not self._requests

    def arrive(
        self,
        key: Key,
        *,
        remaining_s: float,
        has_compute: bool,
        has_next: bool,
        now_s: float,
        num_chains: int = 0,
        goes_on: bool = False,
    ) -> list[Instruction]:
        """Take a request.

        Args:
            key: the request; one that is known already is ignored.
            remaining_s: time it has left; inf without deadline.
            has_compute: it brings layers for this node.
            has_next: something must go on to the next node.
            now_s: this instant.
            num_chains: chains of tiles that are begun here, with this one if it begins one: no more than may wait.
            goes_on: it is a span of one of them, and has its place since that began.
        """
        if key in self._requests:
            return []
        if remaining_s <= 0:
            return [self._refuse_unseen(key, "late", "its time had run out on arrival")]
        if self.is_draining:
            return [self._refuse_unseen(key, "busy", "the node is shutting down")]
        num_waiting = len(self._queue) + len(self._gathering) + len(self._ready)
        if has_compute and not goes_on and max(num_waiting, num_chains - 1) >= self.capacity:
            return [self._refuse_unseen(key, "busy", f"{num_waiting} requests wait and the queue holds no more")]
        request = _Request(Phase.QUEUED, now_s, now_s + remaining_s, has_next)
        self._requests[key] = request
        if not has_compute:
            return self._pass_on(key, request, now_s)
        self._queue.append(key)
        return self._start_next(now_s)

    def computed(self, key: Key, *, measured_s: float, predicted_s: float, now_s: float) -> list[Instruction]:
        """The running request's share is done.

        Args:
            key: the request.
            measured_s: its compute seconds on this node.
            predicted_s: idle seconds predicted for the same work.
            now_s: this instant.
        """
        request = self._end_running(key, now_s)
        out: list[Instruction] = []
        if request.is_cancelled:
            out.append(self._forget(key, was_forwarded=False))
        else:
            self.load.add_segment(measured_s, predicted_s, now_s)
            out += self._pass_on(key, request, now_s)
        return out + self._start_next(now_s)

    def scattered(self, key: Key, *, is_gathered: bool, now_s: float) -> list[Instruction]:
        """The running request's share is as far as it comes without tiles that are out.

        Args:
            key: the request.
            is_gathered: whether they are all back already, or given up.
            now_s: this instant.
        """
        request = self._end_running(key, now_s)
        if request.is_cancelled:
            return [self._forget(key, was_forwarded=False), *self._start_next(now_s)]
        request.phase = Phase.GATHERING
        self._gathering.add(key)
        return self.gathered(key, now_s=now_s) if is_gathered else self._start_next(now_s)

    def gathered(self, key: Key, *, now_s: float) -> list[Instruction]:
        """No tile of a request is out any more: each is back, or given up."""
        request = self._requests.get(key)
        if request is None or request.phase is not Phase.GATHERING:
            return []
        request.phase = Phase.READY
        self._gathering.remove(key)
        self._ready.append(key)
        return self._start_next(now_s)

    def crashed(self, key: Key, *, text: str, is_plan_fault: bool, now_s: float) -> list[Instruction]:
        """The running request's share raised."""
        request = self._end_running(key, now_s)
        if request.is_cancelled:
            first: Instruction = self._forget(key, was_forwarded=False)
        else:
            first = self._refuse(key, "error", text, is_plan_fault=is_plan_fault)
        return [first, *self._start_next(now_s)]

    def answered(self, key: Key, *, now_s: float) -> list[Instruction]:
        """The next node's result is here."""
        request = self._requests.get(key)
        if request is None or request.phase is not Phase.WAITING:
            return []
        if now_s > request.deadline_at_s:
            return [self._refuse(key, "late", "the next node answered after the deadline")]
        return [self._finish(key)]

    def next_failed(self, key: Key, *, kind: str, text: str, is_plan_fault: bool = False) -> list[Instruction]:
        """The next node will not answer."""
        request = self._requests.get(key)
        if request is None or request.phase is not Phase.WAITING:
            return []
        return [self._refuse(key, kind, text, is_plan_fault=is_plan_fault)]

    def cancel(self, key: Key) -> list[Instruction]:
        """The client no longer wants this request."""
        request = self._requests.get(key)
        if request is None or request.is_cancelled:
            return []
        self.counts["cancelled"] += 1
        if request.phase is Phase.RUNNING:
            request.is_cancelled = True  # a running segment is told to stop by the worker; its end forgets it
            return []
        return [self._forget(key, was_forwarded=request.phase is Phase.WAITING)]

    def client_left(self, client: Hashable) -> list[Instruction]:
        """A client is gone: nothing of its requests is wanted any more."""
        keys = [key for key in self._requests if key[0] == client]
        return [instruction for key in keys for instruction in self.cancel(key)]

    def is_cancelled(self, key: Key) -> bool:
        """Tell whether the running share of this request may stop."""
        request = self._requests.get(key)
        return request is None or request.is_cancelled

    def tick(self, now_s: float) -> list[Instruction]:
        """Drop what has run out of time while queued or waiting, and let the watcher look at an idle node."""
        late = [
            key
            for key, request in self._requests.items()
            if now_s > request.deadline_at_s and request.phase is not Phase.RUNNING
        ]
        self.load.watch(now_s, is_idle=self.is_idle)
        return [self._refuse(key, "late", "its time ran out while it waited") for key in late]

    def drain(self) -> None:
        """Accept nothing new from here on."""
        self.is_draining = True

    def _start_next(self, now_s: float) -> list[Instruction]:
        if self._running is not None:
            return []
        out: list[Instruction] = []
        while self._ready or self._queue:
            is_ready = bool(self._ready)
            key = (self._ready or self._queue).popleft()
            request = self._requests[key]
            if now_s > request.deadline_at_s:
                out.append(self._refuse(key, "late", "its time ran out in the queue"))
                continue
            request.phase = Phase.RUNNING
            self._running = key
            if is_ready:
                self.load.resume(now_s)
                out.append(Resume(key))
                break
            queue_s = now_s - request.arrived_at_s
            self.load.start(queue_s, now_s)
            out.append(Run(key, queue_s))
            break
        return out

    def _end_running(self, key: Key, now_s: float) -> _Request:
        if key != self._running:
            raise AssertionError(f"{key} ended but {self._running} runs")
        self._running = None
        self.load.stop(now_s)
        return self._requests[key]

    def _pass_on(self, key: Key, request: _Request, now_s: float) -> list[Instruction]:
        """After this node's share, or without one: on to the next node, or back."""
        remaining_s = request.deadline_at_s - now_s
        if remaining_s < 0 and math.isfinite(remaining_s):
            return [self._refuse(key, "late", "its time ran out while it was computed")]
        if request.has_next:
            request.phase = Phase.WAITING
            return [Forward(key, remaining_s)]
        return [self._finish(key)]

    def _finish(self, key: Key) -> Instruction:
        del self._requests[key]
        self.counts["done"] += 1
        return Reply(key)

    def _refuse(self, key: Key, kind: str, text: str, *, is_plan_fault: bool = False) -> Instruction:
        was_forwarded = self._requests[key].phase is Phase.WAITING
        self._drop(key)
        self.counts[kind] += 1
        return Refuse(key, kind, text, is_plan_fault, was_forwarded)

    def _refuse_unseen(self, key: Key, kind: str, text: str) -> Instruction:
        self.counts[kind] += 1
        return Refuse(key, kind, text)

    def _forget(self, key: Key, *, was_forwarded: bool) -> Instruction:
        self._drop(key)
        return Forget(key, was_forwarded)

    def _drop(self, key: Key) -> None:
        del self._requests[key]
        self._gathering.discard(key)
        for waiting in (self._queue, self._ready):
            if key in waiting:
                waiting.remove(key)
