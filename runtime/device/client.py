"""The device's loop: sends what crosses, hears results and failures, and finishes a request itself in time.

One thread owns the hub and every `Request`; one executor thread computes. Other threads only `submit`. First answer
wins: the segment that runs is told to stop, the upload that runs is withdrawn.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.deployment import Deployment
from runtime.device.breaker import BreakerState
from runtime.device.contacts import Contact, Contacts
from runtime.device.request import Answer, Request, local_breakdown, remote_breakdown
from runtime.errors import DeadlineExceeded, NodeBusy, NodeError, OffcutError, PeerClosed
from runtime.node.executor import Done, Executor
from runtime.node.hosted import HostedModel
from runtime.planning.cost import sum_layers
from runtime.planning.problem import find_route, make_stage
from runtime.types import DEVICE_NODE, LatencyBreakdown, Plan, Tier
from runtime.wire.channel import Hub
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Connected, Delivered, Event, Limits, Lost, Received, ReceivedData, Rejected
from runtime.wire.keys import load_keys
from runtime.wire.messages import Cancel, Described, Failure, Result, Status, Submit
from runtime.wire.pack import Packed, pack, unpack

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.25
CLOSE_S = 5.0


class Client:
    """Runs requests: the device's share here, the rest on the nodes, all of it here when that is what is left.

    Args:
        deployment: the nodes and keys.
        local: the model, or None on a device without it.
        auto: the codec's memory.
        threads: torch threads of this process, to compare with the nodes'.
        on_end: called in the loop's thread when a request has ended, with its answer or error.
        on_second: called in the loop's thread about once a second, and at its end.
    """

    def __init__(
        self,
        deployment: Deployment,
        local: HostedModel | None,
        auto: AutoCodec,
        *,
        threads: int,
        on_end: Callable[[Request, Answer | None, OffcutError | None], None],
        on_second: Callable[[], None],
    ) -> None:
        self._deployment = deployment
        self._local = local
        self._auto = auto
        self._on_end = on_end
        self._on_second = on_second
        self._limits = Limits()
        security = deployment.security
        keys = None if security.secret_key is None else load_keys(Path(security.secret_key))
        self._hub = Hub(DEVICE_NODE, keys=keys, insecure=security.insecure, limits=self._limits)
        model_id = "" if local is None else local.graph.model_id
        self.contacts = Contacts(deployment, self._hub, model_id, threads=threads)
        self.uplink_backlog_bytes = 0
        """Bytes that wait for the device's uplinks, as of the loop's last turn."""
        self._executor = Executor("offcut-device-compute", self._hub.wake)
        self._requests: dict[int, Request] = {}
        self._new: deque[Request] = deque()  # submitted, not yet seen by the loop
        self._pending_s: dict[tuple[str, int], float] = {}  # executor work not yet done -> predicted seconds
        self._stop = threading.Event()
        self._gate = threading.Lock()
        self._ended_by: OffcutError | None = None
        self._next_second_s = 0.0
        self._thread = threading.Thread(target=self._run, name="offcut-device-loop", daemon=True)

    # --- called from other threads ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect to every node and start the loop."""
        self.contacts.connect()
        self._thread.start()

    def close(self) -> None:
        """End the loop; requests that have not ended fail with `PeerClosed`."""
        self._stop.set()
        if self._thread.is_alive():
            self._hub.wake()
            self._thread.join()

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._stop.is_set()

    def submit(self, request: Request) -> None:
        """Start a request; its future ends with an `Answer` or an `OffcutError`.

        Raises:
            PeerClosed: when the client is closed.
            OffcutError: when the loop has ended by an error of its own.
        """
        with self._gate:
            if self._ended_by is not None:
                raise self._ended_by
            self._new.append(request)
            self._hub.wake()

    def backlog_s(self) -> float:
        """Predicted seconds of the work that waits or runs on the device."""
        running = self._executor.running
        total = 0.0
        for tag, seconds in list(self._pending_s.items()):
            spent = time.perf_counter() - running[1] if running is not None and running[0] == tag else 0.0
            total += max(seconds - spent, 0.0)
        return total

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        ended_by: OffcutError = PeerClosed("the session is closed; open another one")
        try:
            while not self._stop.is_set():
                self._step()
        except Exception as error:
            logger.exception("the device's loop has ended")
            ended_by = OffcutError(
                f"the device's loop has ended by {type(error).__name__}: {error}; open a new session"
            )
            ended_by.__cause__ = error
        finally:
            self._shut(ended_by)

    def _shut(self, ended_by: OffcutError) -> None:
        """Fail what has not ended and refuse what comes; whatever else goes wrong, thread and sockets are closed."""
        with self._gate:
            self._ended_by = ended_by
        try:
            for request in (*self._requests.values(), *self._new):
                try:
                    self._on_end(request, None, ended_by)
                finally:
                    request.future.set_exception(ended_by)
            self._stop.set()
            self._on_second()
        finally:
            self._executor.close()
            self._hub.close()

    def _step(self) -> None:
        for event in self._hub.poll(self._wait_s()):
            self._handle(event)
        while self._new:
            self._admit(self._new.popleft())
        for done in self._executor.finished():
            self._finish(done)
        self.uplink_backlog_bytes = self.contacts.uplink_backlog_bytes()
        now_s = time.perf_counter()
        for request in list(self._requests.values()):
            self._guard_deadline(request, now_s)
        if now_s >= self._next_second_s:
            self._next_second_s = now_s + 1.0
            self._on_second()

    def _wait_s(self) -> float:
        """Until the next request must be looked at."""
        now_s = time.perf_counter()
        waits = [IDLE_POLL_S]
        for request in self._requests.values():
            at_s = self._protect_at_s(request)
            if at_s is not None:
                waits.append(max(at_s - now_s, 0.0))
        return min(waits)

    def _protect_at_s(self, request: Request) -> float | None:
        """When this request must be acted on for its deadline's sake; None when nothing is left to do for it."""
        if self._local is None:
            return request.deadline_at_s
        if request.is_local or len(request.route.tiers) == 1:
            return None
        remainder_s = sum_layers(self._local.profile.layer_s, request.remaining_layers)
        return request.protect_at_s(remainder_s, self._completion_backlog_s())

    def _completion_backlog_s(self) -> float:
        """Predicted seconds until the device is free for one more completion: what runs, and completions queued."""
        running = self._executor.running
        total = 0.0
        for tag, seconds in self._pending_s.items():
            if running is not None and running[0] == tag:
                total += max(seconds - (time.perf_counter() - running[1]), 0.0)
            elif tag[0] == "local":
                total += seconds
        return total

    def _guard_deadline(self, request: Request, now_s: float) -> None:
        at_s = self._protect_at_s(request)
        if at_s is None or now_s < at_s:
            return
        if self._local is not None:
            self._finish_here(request, "deadline")
        else:
            self._unanswered(request, now_s)
            waited_s = now_s - request.arrived_at_s
            self._fail(
                request, DeadlineExceeded(f"no node answered within {waited_s:.3f} s: {request.reason or 'late'}")
            )

    # --- requests ---------------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        self._requests[request.number] = request
        if request.route.device.layers and self._local is not None:
            self._submit_stage(request, self._local)
        else:
            self._stage_done(request)

    def _submit_stage(self, request: Request, local: HostedModel) -> None:
        stage = request.route.device
        bandwidth_bps = self.contacts.bandwidth_bps(self._next_name(request))
        queued_at_s = time.perf_counter()

        def work() -> Packed | None:
            if request.is_local or request.future.done():
                return None  # finished another way while it was queued
            request.device_queue_s = time.perf_counter() - queued_at_s
            made, request.device_compute_s = local.run(stage, request.values)
            request.values.update(made)
            crossing = request.route.up[0] if request.route.up else ()
            return pack(request.values, crossing, request.plan.codec, self._auto, bandwidth_bps)

        self._queue_work(("stage", request.number), work, sum_layers(local.profile.layer_s, stage.layers), priority=1)

    def _queue_work(
        self, tag: tuple[str, int], work: Callable[[], object], predicted_s: float, *, priority: int
    ) -> None:
        self._pending_s[tag] = predicted_s
        self._executor.submit(tag, work, priority=priority)

    def _finish(self, done: Done) -> None:
        """A piece of device work has ended."""
        kind, number = done.tag
        self._pending_s.pop((kind, number), None)
        request = self._requests.get(number)
        if request is None:
            return  # answered meanwhile
        if done.error is not None and request.is_remote:
            request.local_error = _as_offcut_error(done.error)  # the node may still answer
        elif done.error is not None:
            self._fail(request, _as_offcut_error(done.error))
        elif kind == "local":
            self._end(
                request, Answer(done.value, local_breakdown(request, time.perf_counter()), "local", request.reason)
            )
        elif done.value is not None:
            request.codec_s += done.value.codec_s
            self._stage_done(request, done.value)

    def _stage_done(self, request: Request, packed: Packed | None = None) -> None:
        """The device's share is done: on to the next node, or that was all."""
        request.is_stage_done = True
        if len(request.route.tiers) == 1:
            self._end(request, Answer(request.values, local_breakdown(request, time.perf_counter()), "device", ""))
        elif request.is_local:
            self._submit_completion(request)  # its time came while the share ran
        else:
            self._send(request, self._next_name(request), packed)

    def _next_name(self, request: Request) -> str:
        """Node that the device sends this request to, empty for none."""
        if len(request.route.tiers) == 1:
            return ""
        if request.plan.head is not None:
            return request.plan.head
        cloud = self._deployment.cloud
        return "" if cloud is None else cloud.name

    def _send(self, request: Request, name: str, packed: Packed | None = None) -> None:
        now_s = time.perf_counter()
        contact = self.contacts[name]
        request.target = name
        request.tried.add(name)
        why_not = contact.why_not(now_s)
        if why_not or not contact.breaker.admits(now_s):
            self._remote_failed(request, why_not or f"{name} is paused: another request tries whether it answers again")
            return
        if packed is None:
            crossing = request.route.up[0]
            packed = pack(request.values, crossing, request.plan.codec, self._auto, self.contacts.bandwidth_bps(name))
            request.codec_s += packed.codec_s
        submit = Submit(
            request.number,
            contact.model_id,
            request.plan,
            request.input_kind,
            request.deadline_at_s - now_s,
            packed.headers,
        )
        request.is_remote = True
        request.sent_at_s = now_s
        self._hub.send_data(contact.peer, submit, packed.frames, request.number)

    def _remote_failed(self, request: Request, reason: str, error: OffcutError | None = None) -> None:
        """No answer will come from where the request was sent: finish it here, or elsewhere."""
        request.is_remote = False
        if request.local_error is not None:
            self._fail(request, request.local_error)
            return
        if self._local is not None:
            self._finish_here(request, reason)
            return
        request.reason = reason
        for contact in self.contacts:
            is_well = contact.is_described and contact.breaker.state is not BreakerState.OPEN
            if is_well and contact.name not in request.tried:
                self._send_elsewhere(request, contact)
                return
        self._fail(request, error or PeerClosed(f"{reason}, and no other node is left to try"))

    def _send_elsewhere(self, request: Request, contact: Contact) -> None:
        """Everything on one other node: the way of a device that does not hold the model."""
        assert contact.graph is not None  # it has described itself
        edge_nodes = (contact.name,) if contact.tier is Tier.EDGE else ()
        request.plan = Plan((contact.tier,) * len(request.plan.tiers), edge_nodes, codec=request.plan.codec)
        request.route = find_route(contact.graph, request.plan, request.input_kind)
        self._send(request, contact.name)

    def _finish_here(self, request: Request, reason: str) -> None:
        """Start to finish a request on the device, ahead of new work."""
        if request.is_local or self._local is None:
            return
        request.is_local = True
        request.reason = reason
        running = self._executor.running
        is_stage_running = running is not None and running[0] == ("stage", request.number)
        if request.is_stage_done or not is_stage_running:
            self._submit_completion(request)

    def _submit_completion(self, request: Request) -> None:
        local = self._local
        assert local is not None  # is_local is set only where there is a model
        layers = request.remaining_layers
        stage = make_stage(local.graph.spec, Tier.DEVICE, layers)

        def work() -> dict[str, torch.Tensor]:
            if request.future.done():
                return {}
            made, seconds = local.run(stage, request.values, should_stop=request.future.done)
            request.device_compute_s += seconds
            return {**request.values, **made}

        self._queue_work(("local", request.number), work, sum_layers(local.profile.layer_s, layers), priority=0)

    # --- events -----------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        match event:
            case Connected():
                self.contacts.connected(event)
            case Lost(peer=peer, reason=reason):
                self._lost(peer.name, reason)
            case Rejected(peer=peer, error=error):
                self.contacts.rejected(peer.name, error)
            case Delivered(peer=peer, tag=int() as number, transfer_s=transfer_s, waited_s=waited_s):
                self._delivered(peer.name, self._requests.get(number), transfer_s, waited_s)
            case ReceivedData(peer=peer, body=Result() as result, frames=frames):
                self._take_result(self.contacts[peer.name], result, Packed(result.tensors, frames))
            case Received(peer=peer, message=Described() as described):
                self.contacts.described(peer.name, described)
            case Received(peer=peer, message=Status() as status):
                self.contacts.heard(peer.name, status)
            case Received(peer=peer, message=Failure() as failure):
                self._failed(self.contacts[peer.name], self._requests.get(failure.request), failure)
            case _:
                logger.debug("%s", event)

    def _delivered(self, name: str, request: Request | None, transfer_s: float, waited_s: float) -> None:
        self.contacts.note_link(name)
        if request is not None and request.target == name:
            request.upload_s, request.upload_wait_s = transfer_s, waited_s

    def _failed(self, contact: Contact, request: Request | None, failure: Failure) -> None:
        contact.breaker.answered()
        if request is None or request.target != contact.name or not request.is_remote:
            return
        text = f"{failure.node}: {failure.text}"
        error: OffcutError
        if failure.kind == "busy":
            error = NodeBusy(text)
        elif failure.kind == "late":
            error = DeadlineExceeded(text)
        else:
            error = NodeError(text, is_plan_fault=failure.is_plan_fault)
        self._remote_failed(request, f"{failure.kind}: {text}", error)

    def _lost(self, name: str, reason: str) -> None:
        self.contacts.lost(name)
        for request in list(self._requests.values()):
            if request.is_remote and request.target == name:
                self._remote_failed(request, f"{name} was lost: {reason}")

    def _take_result(self, contact: Contact, result: Result, packed: Packed) -> None:
        received_at_s = time.perf_counter()
        request = self._requests.get(result.request)
        if request is None or request.target != contact.name or not request.is_remote:
            return  # answered another way meanwhile
        contact.breaker.answered()
        beyond = {name for tier in request.route.tiers[1:] for name in request.route.stage(tier).makes}
        graph = contact.graph
        expected = [n for n in dict.fromkeys(graph.outputs) if n in beyond] if graph is not None else []
        try:
            outputs = unpack(packed, expected, self._limits)
        except OffcutError as error:
            self._remote_failed(request, f"{contact.name} sent a broken result: {error}", error)
            return
        names = (contact.name, *(hop.node for hop in result.hops[1:]))
        for name, hop in zip(names, result.hops, strict=True):
            self.contacts.board.hear_reply(name, hop.state, received_at_s)
        latency: LatencyBreakdown = remote_breakdown(request, result.hops, names, received_at_s, time.perf_counter())
        request.is_remote = False
        request.reason = "; ".join(filter(None, (request.reason, *(hop.reason for hop in result.hops))))
        self._end(request, Answer({**request.values, **outputs}, latency, "remote", request.reason))

    # --- endings ----------------------------------------------------------------------------------------------------

    def _end(self, request: Request, answer: Answer) -> None:
        del self._requests[request.number]
        try:
            self._give_up_remote(request)
            predicted_s = request.predicted.total_s
            error = answer.latency.total_s / predicted_s - 1.0 if predicted_s else math.nan
            self.contacts.board.ended(request.plan, error)
            self._on_end(request, answer, None)
        finally:
            request.future.set_result(answer)  # last, so that who waits for it finds the books written; but always

    def _fail(self, request: Request, error: OffcutError) -> None:
        del self._requests[request.number]
        try:
            self._give_up_remote(request)
            self._on_end(request, None, error)
        finally:
            request.future.set_exception(error)

    def _give_up_remote(self, request: Request) -> None:
        """Tell the node that nobody waits any more; that it had its time and did not answer counts against it."""
        if not request.is_remote:
            return
        self._unanswered(request, time.perf_counter())
        peer = self.contacts[request.target].peer
        self._hub.withdraw(peer, request.number)
        self._hub.send(peer, Cancel(request.number))
        request.is_remote = False

    def _unanswered(self, request: Request, now_s: float) -> None:
        if request.is_remote:
            self.contacts[request.target].breaker.unanswered(now_s)


def _as_offcut_error(error: Exception) -> OffcutError:
    if isinstance(error, OffcutError):
        return error
    wrapped = NodeError(f"the device failed while computing: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
