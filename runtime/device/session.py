"""What a user holds: state -> plan -> infer, for one input or a stream of them."""

import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from runtime.deployment import Deployment
from runtime.device.board import RequestFacts
from runtime.device.client import Client
from runtime.device.journal import Journal
from runtime.device.request import PROTECTION_FACTOR, Answer, Request
from runtime.device.shadow import Shadow, ShadowCounts
from runtime.errors import ConfigError, InputError, OffcutError, PeerTimeout
from runtime.model.graph import unflatten_outputs
from runtime.model.inputs import Admitted, admit
from runtime.node.emulation import Emulator
from runtime.node.hosted import HostedModel
from runtime.planning.cost import estimate, sum_layers
from runtime.planning.policies.guard import GuardedPolicy
from runtime.planning.policies.registry import PolicySpec
from runtime.planning.problem import PlanningProblem, Policy, check_plan, find_route
from runtime.profiles.shipped import shipped_ratios
from runtime.types import (
    DEVICE_NODE,
    INPUT_KINDS,
    GraphSpec,
    LatencyBreakdown,
    ModelProfile,
    Plan,
    SystemState,
)
from runtime.wire.codec import AutoCodec

logger = logging.getLogger(__name__)

DEADLINE_FACTOR = 3.0
"""Default deadline in predicted device-only latencies."""

DEADLINE_FLOOR_S = 0.05
"""Default deadlines are no shorter than this and two round trips: a model of a few milliseconds would never get an
answer from a node. Guess: two frames of a camera."""

CONNECT_TIMEOUT_S = 3.0
"""How long a new session waits for nodes that do not answer before it starts without them."""


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """One answer: `output`, the `plan` it was asked with, and where its time went.

    In a stream a request that failed is a result too; reading its `output` raises its error.
    """

    plan: Plan
    latency: LatencyBreakdown | None
    predicted: LatencyBreakdown
    outcome: str  # remote, device, local, failed
    reason: str
    protected: bool
    """Whether local completion alone could hold the deadline when the request came."""
    deadline_met: bool
    error: OffcutError | None
    _output: Any

    @property
    def output(self) -> Any:
        """What the whole model would have returned.

        Raises:
            OffcutError: what the request failed with.
        """
        if self.error is not None:
            raise self.error
        return self._output


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A request that has come and is not decided yet: what is known at this instant, for who decides outside."""

    state: SystemState
    admitted: Admitted


class Session:
    """The device side of a deployment. Use as a context manager, or `close` it.

    Several threads may call `infer` at once. Answers arrive in the thread that asked. Making a session sets torch's thread count for the process to `threads`:
    outputs are bit-equal only between processes with the same number, and two threads under contention are slower
    than one.

    Args:
        deployment: model, nodes, constraints.
        policy: the rule that picks a plan for each request.
        shadow: another that is asked beside it and never obeyed; what it would have done goes into the events, which
            may then be written a moment after the answer, and into `shadow`.
        log_folder: where `events.jsonl` and `status.json` go; None writes neither.
        threads: torch threads of this process.
        connect_timeout_s: how long to wait for nodes that do not answer.
        local: the device's model, where it is loaded already (`load_local`).

    Raises:
        ModelError: the model cannot be loaded or traced.
        HandshakeError: a node runs another model, weights or version, or does not know our key.
        PeerTimeout: the device holds no model and no node answered.
        PlanError: no plan of this rule is legal here.
    """

    def __init__(
        self,
        deployment: Deployment,
        policy: PolicySpec,
        *,
        shadow: PolicySpec | None = None,
        log_folder: Path | None = None,
        threads: int = 1,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        local: HostedModel | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self.deployment = deployment
        self.policy_spec = policy
        self._auto = AutoCodec()
        if not deployment.constraints.device_has_model:
            self._local = None
        else:
            self._local = load_local(deployment, self._auto) if local is None else local
        self._journal = Journal(log_folder, deployment.model.spec)
        self._shadow = None if shadow is None else Shadow(shadow)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._policies: dict[str, tuple[PlanningProblem, Policy]] = {}
        self._ratios: Mapping[str, float] = {}
        self._client = Client(
            deployment,
            self._local,
            self._auto,
            threads=threads,
            on_end=self._journal.ended,
            on_second=self._write_status,
        )
        self._client.start()
        try:
            self._client.contacts.wait_described(connect_timeout_s)
            self._check_contacts(connect_timeout_s)
            self._journal.model_id = self.model_id
            self._ratios = shipped_ratios(deployment.model.spec, self.graph.graph_id)
            self._policy(deployment.model.input_kind)  # refuses at once what can never be legal
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session; requests that have not ended fail."""
        if self._shadow is not None:
            self._shadow.close()  # first, so that the last status has all that it said
        self._client.close()
        self._journal.close()

    # --- using it ---------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> GraphSpec:
        """The model's layers, as the device or the first node that answered knows them."""
        if self._local is not None:
            return self._local.graph.spec
        return next(c.graph for c in self._client.contacts if c.graph is not None)

    @property
    def model_id(self) -> str:
        """Fingerprint of graph, weights and torch version."""
        if self._local is not None:
            return self._local.graph.model_id
        return next(c.model_id for c in self._client.contacts if c.model_id)

    def infer(self, x: Any, *, deadline_s: float | None = None, plan: Plan | None = None) -> InferenceResult:
        """Run one request and wait for its answer.

        Args:
            x: path or bytes of a JPEG or PNG, a uint8 image, or the model's input tensor; a list of files or bytes for
                batch sizes above 1.
            deadline_s: for this request; None takes the deployment's, or three times the predicted device-only time
                (at least `DEADLINE_FLOOR_S` and two round trips).
            plan: use this plan instead of asking the policy.

        Raises:
            InputError: the input is not one that the model takes.
            PlanError: the plan is not legal here.
            OffcutError: no answer was possible, such as `DeadlineExceeded` on a device without the model.
        """
        request = self._start(x, deadline_s, plan)
        result = self._result(request)
        if result.error is not None:
            raise result.error
        return result

    def stream(
        self, frames: Iterable[Any], *, in_flight: int = 3, deadline_s: float | None = None, plan: Plan | None = None
    ) -> Iterator[InferenceResult]:
        """Run requests that overlap, and yield their results in the order of the frames.

        A frame that fails yields a result whose `output` raises; the stream goes on.

        Args:
            frames: inputs, as `infer` takes them.
            in_flight: how many may be under way at once.
            deadline_s: for each request.
            plan: for each request, instead of asking the policy.

        Raises:
            InputError: `frames` is one frame and no collection of frames.
            ConfigError: `in_flight` is not positive.
        """
        if isinstance(frames, (str, bytes, bytearray, Path, torch.Tensor)):
            raise InputError(
                f"expected frames to be a list or iterator of inputs, got one {type(frames).__name__}; use infer"
            )
        if in_flight < 1:
            raise ConfigError(f"expected in_flight >= 1, got {in_flight}")
        return self._stream(frames, in_flight, deadline_s, plan)

    def _stream(
        self, frames: Iterable[Any], in_flight: int, deadline_s: float | None, plan: Plan | None
    ) -> Iterator[InferenceResult]:
        waiting: deque[Request | InferenceResult] = deque()
        for frame in frames:
            waiting.append(self._try_start(frame, deadline_s, plan))
            while len(waiting) >= in_flight:
                yield self._result(waiting.popleft())
        while waiting:
            yield self._result(waiting.popleft())

    def arrive(self, x: Any, *, deadline_s: float | None = None) -> Arrival:
        """Note a request and what is known as it comes; `submit` starts it, once somebody else has decided.

        Raises:
            InputError: the input is not one that the model takes.
        """
        admitted = admit(self.graph, x)
        limit_s = self._deadline_s(admitted.kind, deadline_s)
        self._client.contacts.board.arrived(time.perf_counter())
        return Arrival(self.state(admitted.kind, admitted.nbytes, limit_s), admitted)

    def submit(self, arrival: Arrival, plan: Plan) -> "Future[InferenceResult]":
        """Start a request under a plan and do not wait: its time begins now. One that fails is a result too.

        Raises:
            PlanError: the plan is not legal here.
            OffcutError: the session is closed, or its loop has ended by an error.
        """
        began_s = time.perf_counter()
        with self._lock:
            problem, _ = self._policy(arrival.admitted.kind)
        chosen = check_plan(problem, plan)
        request = self._make_request(arrival.admitted, chosen, problem, arrival.state, began_s, 0.0)
        result: Future[InferenceResult] = Future()
        request.future.add_done_callback(lambda _: result.set_result(self._result(request)))
        self._client.submit(request)
        return result

    def state(self, input_kind: str, input_bytes: int, deadline_s: float) -> SystemState:
        """What is known of nodes and links at this instant: what the policy would see.

        Raises:
            ConfigError: when there is no such kind of input.
        """
        if input_kind not in INPUT_KINDS:
            raise ConfigError(f"expected an input kind among {', '.join(INPUT_KINDS)}, got {input_kind!r}")
        client = self._client
        facts = RequestFacts(input_kind, input_bytes, deadline_s, client.backlog_s(), client.uplink_backlog_bytes)
        return client.contacts.board.state(facts, time.perf_counter())

    def use(self, policy: PolicySpec) -> None:
        """Decide with another rule from the next request on.

        Raises:
            PlanError: no plan of this rule is legal here; the one in use stays.
        """
        with self._lock:
            before = (self.policy_spec, self._policies)
            self.policy_spec, self._policies = policy, {}
            try:
                self._policy(self.deployment.model.input_kind)
            except BaseException:
                self.policy_spec, self._policies = before
                raise

    @property
    def uplink_backlog_bytes(self) -> int:
        """Bytes that wait for the device's uplinks or are on their way."""
        return self._client.uplink_backlog_bytes

    @property
    def unusable(self) -> dict[str, str]:
        """Nodes that no request can go to at this moment, and why."""
        return self._client.contacts.unusable(time.perf_counter())

    def problem(self, input_kind: str) -> PlanningProblem:
        """What the policy was built for, with the profiles of all nodes that have described themselves."""
        return self._policy(input_kind)[0]

    @property
    def shadow(self) -> ShadowCounts | None:
        """What the shadow would have done so far; None without one."""
        return None if self._shadow is None else self._shadow.counts

    def _write_status(self) -> None:
        state = self.state(self.deployment.model.input_kind, 0, 0.0)
        is_running = not self._client.is_closing
        known = self._policies.get(self.deployment.model.input_kind)
        guard = dict(known[1].reasons) if known is not None and isinstance(known[1], GuardedPolicy) else {}
        self._journal.write_status(
            self._client.contacts,
            state,
            self.policy_spec.name,
            guard=guard,
            shadow=self.shadow,
            is_running=is_running,
        )

    # --- one request ------------------------------------------------------------------------------------------------

    def _try_start(self, x: Any, deadline_s: float | None, plan: Plan | None) -> Request | InferenceResult:
        try:
            return self._start(x, deadline_s, plan)
        except OffcutError as error:
            return _failed_result(plan or Plan(()), error)

    def _start(self, x: Any, deadline_s: float | None, plan: Plan | None) -> Request:
        arrived_at_s = time.perf_counter()
        try:
            return self._admit(x, deadline_s, plan, arrived_at_s)
        except OffcutError as error:
            self._journal.refused(next(self._numbers), arrived_at_s, self.policy_spec.name, plan, error)
            raise

    def _admit(self, x: Any, deadline_s: float | None, plan: Plan | None, arrived_at_s: float) -> Request:
        admitted = admit(self.graph, x)
        limit_s = self._deadline_s(admitted.kind, deadline_s)
        with self._lock:  # policies are not asked to be thread safe
            self._client.contacts.board.arrived(arrived_at_s)
            problem, policy = self._policy(admitted.kind)
            state = self.state(admitted.kind, admitted.nbytes, limit_s)
            asked_at_s = time.perf_counter()
            chosen = check_plan(problem, policy.plan(state) if plan is None else plan)
            decision_s = time.perf_counter() - asked_at_s
        request = self._make_request(admitted, chosen, problem, state, arrived_at_s, decision_s)
        if self._shadow is not None and plan is None:
            request.shadow = self._shadow.ask(problem, state, chosen, request.predicted.total_s)
        self._client.submit(request)
        return request

    def _make_request(
        self,
        admitted: Admitted,
        plan: Plan,
        problem: PlanningProblem,
        state: SystemState,
        arrived_at_s: float,
        decision_s: float,
    ) -> Request:
        local_s = self._local_s(admitted.kind)
        return Request(
            number=next(self._numbers),
            input_kind=admitted.kind,
            values=dict(admitted.values),
            plan=plan,
            route=find_route(problem.graph, plan, admitted.kind),
            state=state,
            predicted=estimate(problem, plan, state),
            policy=self.policy_spec.name,
            arrived_at_s=arrived_at_s,
            deadline_at_s=arrived_at_s + state.deadline_s,
            is_protected=PROTECTION_FACTOR * local_s + state.device_backlog_s <= state.deadline_s,
            decision_s=decision_s,
        )

    def _local_s(self, kind: str) -> float:
        """Predicted device-only seconds; inf on a device without the model."""
        if self._local is None:
            return float("inf")
        graph = self._local.graph.spec
        return sum_layers(self._local.profile.layer_s, tuple(range(graph.entry(kind), graph.num_layers)))

    def _deadline_s(self, kind: str, asked_s: float | None) -> float:
        limit_s = asked_s if asked_s is not None else self.deployment.constraints.deadline_s
        if limit_s is None:
            floor_s = DEADLINE_FLOOR_S + 2.0 * self._client.contacts.board.rtt_s()
            limit_s = max(DEADLINE_FACTOR * self._local_s(kind), floor_s)
        if not limit_s > 0:
            raise ConfigError(f"expected deadline_s > 0, got {limit_s}")
        return limit_s

    def _result(self, request: Request | InferenceResult) -> InferenceResult:
        if isinstance(request, InferenceResult):
            return request
        future: Future[Answer] = request.future
        try:
            answer = future.result()
        except OffcutError as error:
            return dataclasses.replace(_failed_result(request.plan, error), predicted=request.predicted)
        return InferenceResult(
            plan=request.plan,
            latency=answer.latency,
            predicted=request.predicted,
            outcome=answer.outcome,
            reason=answer.reason,
            protected=request.is_protected,
            deadline_met=request.is_in_time(answer.latency),
            error=None,
            _output=unflatten_outputs(self.graph, answer.values),
        )

    # --- policy -----------------------------------------------------------------------------------------------------

    def _policy(self, kind: str) -> tuple[PlanningProblem, Policy]:
        """The policy for one input kind, built anew when a node has described itself since."""
        nodes = {c.name: c.profile for c in self._client.contacts if c.profile is not None}
        if self._local is not None:
            nodes[DEVICE_NODE] = self._local.profile
        known = self._policies.get(kind)
        if known is None or known[0].profile.nodes != nodes:
            profile = ModelProfile(self.graph, nodes, self._ratios)
            problem = PlanningProblem(profile, self.deployment, self.deployment.constraints, kind)
            known = (problem, self.policy_spec.build(problem))
            self._policies[kind] = known
        return known

    def _check_contacts(self, waited_s: float) -> None:
        for contact in self._client.contacts:
            if contact.refused is not None:
                raise contact.refused
        if self._local is None and not any(c.is_described for c in self._client.contacts):
            names = ", ".join(c.name for c in self._client.contacts)
            raise PeerTimeout(
                f"none of {names} answered within {waited_s:.0f} s and this device holds no model; start the nodes "
                "with `offcut worker`, or set device_has_model = true"
            )


def load_local(deployment: Deployment, auto: AutoCodec) -> HostedModel:
    """Load the device's own copy of the model.

    Raises:
        ModelError: the model cannot be loaded or traced.
    """
    config = deployment.model
    return HostedModel.load(
        config.spec,
        weights=config.weights,
        seed=config.seed,
        batch_size=config.batch_size,
        device="cpu",
        auto=auto,
        emulator=None if deployment.device_emulate is None else Emulator(deployment.device_emulate),
    )


def _failed_result(plan: Plan, error: OffcutError) -> InferenceResult:
    nan = float("nan")
    unknown = LatencyBreakdown({}, nan, {}, nan, nan, nan, nan, source="estimated")
    return InferenceResult(plan, None, unknown, "failed", "", False, False, error, None)
