"""The program on a node: binds, loads its models, prints READY, runs its share of every plan, drains on SIGTERM.

The loop turns what the hub and the executor report into events for `NodeMachine` and executes its instructions.
"""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence

import msgspec
import torch

from runtime.errors import ConfigError, OffcutError, PlanError
from runtime.node.config import NextNode, WorkerConfig, parse_nodes
from runtime.node.emulation import Emulator
from runtime.node.executor import Done, Executor
from runtime.node.hosted import HostedModel
from runtime.node.job import Conditions, Job
from runtime.node.scatter import Scatter
from runtime.node.state import Forget, Forward, Instruction, Key, NodeMachine, Refuse, Reply, Resume, Run
from runtime.node.status import aged, explain_failure, last_bandwidth, tell_links
from runtime.node.tile import Held
from runtime.types import NodeState, Tier
from runtime.wire.channel import Hub
from runtime.wire.codec import AutoCodec
from runtime.wire.events import (
    Connected,
    Delivered,
    Event,
    Joined,
    Left,
    Limits,
    Lost,
    Peer,
    Received,
    ReceivedData,
    Rejected,
)
from runtime.wire.keys import load_keys
from runtime.wire.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Cancel,
    Describe,
    Described,
    Failure,
    Hello,
    Hop,
    Offer,
    Refused,
    Result,
    Status,
    Submit,
    Welcome,
)
from runtime.wire.pack import Packed

logger = logging.getLogger(__name__)

STATUS_PERIOD_S = 0.5
DRAIN_S = 5.0
"""How long a node that was told to stop may take to finish what it has."""


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of standard input; what is left out stays as it is."""

    contention: float | None = None
    connect: tuple[str, ...] = ()  # more nodes, as `--connect` names them


class Worker:
    """One node: its models, its hub, its executor and its state machine."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._tier = Tier[config.tier.upper()]
        self._limits = Limits()
        self._auto = AutoCodec()
        emulation = config.emulation()
        self._emulator = None if emulation is None else Emulator(emulation)
        self._models: dict[str, HostedModel] = {}
        self._machine = NodeMachine(capacity=config.queue)
        self._jobs: dict[Key, Job] = {}
        self._upstream: dict[int, Key] = {}  # our request number at the next node -> whose request it is
        self._next_number = 0
        self._clients: dict[Peer, set[str]] = {}  # and the models that each has asked about
        self._heard: dict[str, tuple[float, Status]] = {}  # next node -> when, what
        self._stop = threading.Event()
        self._next_status_at_s = 0.0
        keys = None if config.keys is None else load_keys(config.keys / f"{config.name}.key_secret")
        self._hub = Hub(config.name, keys=keys, authorised=config.keys, insecure=config.insecure, limits=self._limits)
        self._executor = Executor(f"offcut-compute-{config.name}", self._hub.wake)
        self._next: dict[str, Peer] = {}  # nodes that we connect to: of the next tier, and other edge nodes
        self._next_tiers: dict[str, Tier] = {}  # as far as they have said so
        self._introduced: deque[tuple[str, NextNode]] = deque()  # to connect to; from any thread
        self._measured: deque[HostedModel] = deque()  # from the thread that measures
        self._scatter = Scatter(self._hub, self._jobs, self._take_number)
        self._held = Held()
        self._refusals: dict[str, str] = {}  # next node -> why it does not want us

    def bind(self) -> str:
        """Bind, connect to the next nodes, and return the address that clients use.

        Raises:
            TransportError: when the address is taken.
            ConfigError: when it is not loopback and there are neither keys nor `insecure`.
        """
        address = self._hub.bind(self.config.bind, self._welcome)
        for name, node in self.config.next_nodes().items():
            self._connect(name, node)
        return address

    def load(self) -> None:
        """Load, trace and profile the models; clients that knock meanwhile are answered by `serve`.

        Raises:
            ModelError: when one cannot be found, built or traced.
        """
        for spec in self.config.model:
            model = HostedModel.load(
                spec,
                weights=self.config.weights,
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                device=self.config.torch_device(),
                auto=self._auto,
                emulator=self._emulator,
                may_predict=self._emulator is None,
            )
            self._models[model.graph.model_id] = model

    def _measure(self, models: Sequence[HostedModel]) -> None:
        """Measure what was predicted, beside the requests; they are told apart by the time of this thread alone."""
        torch.set_num_threads(self.config.threads)
        for model in models:
            self._measured.append(model.measured(self._auto))
            self._hub.wake()

    def _connect(self, name: str, node: NextNode) -> None:
        hello = Hello(PROTOCOL_VERSION, self.config.name, "", CAPABILITIES)
        self._next[name] = self._hub.connect(name, node.address, hello, server_key=node.server_key)

    def obey(self, command: Command) -> None:
        """Carry out a command; callable from any thread.

        Raises:
            ConfigError: when this node cannot.
        """
        if command.contention is not None:
            if self._emulator is None:
                raise ConfigError("expected an emulated node for contention, got a real one; start it with --slow-down")
            self._emulator.set_contention(command.contention)
        self._introduced.extend(parse_nodes(command.connect).items())
        self._hub.wake()

    def stop(self) -> None:
        """Ask the loop to drain and end; callable from signal handlers and other threads."""
        self._stop.set()
        self._hub.wake()

    def serve(self) -> None:
        """Run until `stop`, then finish what is here, say goodbye and close everything."""
        drain_until_s: float | None = None
        predicted = [model for model in self._models.values() if model.profile.is_predicted]
        if predicted:
            name = f"offcut-measure-{self.config.name}"
            threading.Thread(target=self._measure, args=(predicted,), name=name, daemon=True).start()
        try:
            while True:
                self._step()
                if self._stop.is_set() and drain_until_s is None:
                    self._machine.drain()
                    drain_until_s = time.perf_counter() + DRAIN_S
                if drain_until_s is not None and (self._is_drained() or time.perf_counter() > drain_until_s):
                    return
        finally:
            self.close()

    def close(self) -> None:
        """Close everything at once."""
        self._executor.close()
        self._hub.close()

    def _is_drained(self) -> bool:
        backlog = sum(self._hub.link_state(peer).backlog_bytes for peer in self._clients)
        return self._machine.is_idle and backlog == 0

    def _step(self) -> None:
        """One turn of the loop: hear, compute, tick, tell."""
        for event in self._hub.poll(self._wait_s()):
            self._handle(event)
        while self._introduced:
            self._connect(*self._introduced.popleft())
        while self._measured:
            self._replace(self._measured.popleft())
        finished = self._executor.finished()  # what they have posted is sent first
        self._gathered(self._scatter.send_posted(self._next, time.perf_counter()))
        for done in finished:
            self._finish(done)
        now_s = time.perf_counter()
        self._gathered(self._scatter.give_up(now_s))
        self._execute(self._machine.tick(now_s))
        if now_s >= self._next_status_at_s:
            self._next_status_at_s = now_s + STATUS_PERIOD_S
            self._held.drop_late(now_s)
            self._send_status(now_s)

    def _replace(self, model: HostedModel) -> None:
        """Take a model's measured times from now on, and tell those who have asked for the predicted ones."""
        self._models[model.graph.model_id] = model
        for client, asked in self._clients.items():
            if model.graph.model_id in asked:
                self._describe(client, model)

    def _describe(self, client: Peer, model: HostedModel) -> None:
        told = Described(model.graph.model_id, model.graph.spec, model.profile, self.config.emulation())
        self._hub.send(client, told)

    def _wait_s(self) -> float:
        until_s = min(self._next_status_at_s, self._scatter.next_due_s) - time.perf_counter()
        return min(max(until_s, 0.0), 0.1 if self._jobs or self._stop.is_set() else STATUS_PERIOD_S)

    # --- events -----------------------------------------------------------------------------------------------------

    def _welcome(self, hello: Hello) -> Welcome | Refused:
        if hello.model_id and hello.model_id not in self._models:
            ours = ", ".join(f"{m.spec} ({m.graph.model_id[:12]})" for m in self._models.values())
            return Refused(
                "model",
                f"expected a model among {ours}, got {hello.model_id[:12]}; start the node and the device with the "
                "same model, weights, seed, batch size and torch version, or give both the same weights file",
            )
        offers = tuple(Offer(i, m.spec, m.graph.spec.graph_id) for i, m in self._models.items())
        return Welcome(PROTOCOL_VERSION, self.config.name, self._tier, offers, CAPABILITIES, self.config.threads)

    def _handle(self, event: Event) -> None:
        match event:
            case Joined(peer=peer):
                self._clients[peer] = set()
                self._next_status_at_s = 0.0  # the newcomer hears our load at once
            case Left(peer=peer):
                self._clients.pop(peer, None)
                self._held.drop_client(peer)
                self._execute(self._machine.client_left(peer))
            case ReceivedData(peer=peer, body=Submit() as submit, frames=frames, nbytes=nbytes):
                self._accept(peer, submit, Packed(submit.tensors, frames), nbytes)
            case ReceivedData(body=Result() as result, frames=frames):
                self._take_result(result, Packed(result.tensors, frames))
            case Received(peer=peer, message=message):
                self._hear(peer, message)
            case Delivered(tag=int() as number, transfer_s=transfer_s) if number in self._upstream:
                self._jobs[self._upstream[number]].upload_s = transfer_s
            case Lost(peer=peer, reason=reason):
                self._lose(peer, reason)
            case Connected() | Rejected():
                self._note_next(event)
            case Delivered() | ReceivedData():
                logger.debug("%s", event)

    def _note_next(self, event: Connected | Rejected) -> None:
        """The node behind this one wants us, or does not."""
        self._refusals.pop(event.peer.name, None)
        if isinstance(event, Connected):
            self._next_tiers[event.peer.name] = event.welcome.tier
        if isinstance(event, Rejected):
            self._refusals[event.peer.name] = str(event.error)
            logger.error("%s refuses this node: %s", event.peer.name, event.error)

    def _hear(self, peer: Peer, message: object) -> None:
        match message:
            case Describe(model_id=model_id) if model_id in self._models:
                if peer in self._clients:
                    self._clients[peer].add(model_id)
                self._describe(peer, self._models[model_id])
            case Cancel(request=request):
                self._held.drop((peer, request))
                self._execute(self._machine.cancel((peer, request)))
            case Failure(request=number, kind=kind, text=text) as failure if number in self._upstream:
                key = self._upstream[number]
                self._execute(self._machine.next_failed(key, kind=kind, text=text, is_plan_fault=failure.is_plan_fault))
            case Failure(request=number, kind=kind, text=text):
                self._gathered(self._scatter.fail(number, f"{kind}: {text}"))
            case Status() as status if not peer.is_client:
                self._heard[peer.name] = (time.perf_counter(), status)

    def _accept(self, client: Peer, submit: Submit, received: Packed, nbytes: int) -> None:
        now_s = time.perf_counter()
        key: Key = (client, submit.request)
        if key in self._jobs:
            return  # the same request twice: the first one counts
        try:
            job = Job.accept(client, submit, self._model(submit), self._tier, received, nbytes, now_s)
            job.enter(self._held)
        except (OffcutError, ValueError) as error:
            self._fail(client, submit.request, "error", str(error), is_plan_fault=isinstance(error, PlanError))
            return
        self._jobs[key] = job
        instructions = self._machine.arrive(
            key,
            remaining_s=submit.remaining_s,
            has_compute=bool(job.stage.layers),
            has_next=job.has_next,
            num_chains=len(self._held) if job.tile is not None else 0,
            goes_on=job.goes_on,
            now_s=now_s,
        )
        self._execute(instructions)

    def _model(self, submit: Submit) -> HostedModel:
        model = self._models.get(submit.model_id)
        if model is None:
            ours = ", ".join(m.spec for m in self._models.values())
            raise PlanError(f"node {self.config.name} runs {ours}, not model {submit.model_id[:12]}")
        return model

    def _take_result(self, result: Result, tensors: Packed) -> None:
        key = self._upstream.get(result.request)
        if key is None:  # a tile, or cancelled meanwhile
            self._gathered(self._scatter.take(result.request, tensors))
            return
        job = self._jobs[key]
        job.outputs = tensors + job.outputs
        job.hops_beyond = result.hops
        self._execute(self._machine.answered(key, now_s=time.perf_counter()))

    def _lose(self, peer: Peer, reason: str) -> None:
        self._heard.pop(peer.name, None)
        self._gathered(self._scatter.lose(peer, reason))
        for number, key in list(self._upstream.items()):
            if self._jobs[key].next_peer is peer:
                text = f"the link from {self.config.name} to {peer.name} is down: {reason}"
                self._execute(self._machine.next_failed(key, kind="lost", text=text))
                self._upstream.pop(number, None)

    def _finish(self, done: Done) -> None:
        key: Key = done.tag
        now_s = time.perf_counter()
        job = self._jobs[key]  # the machine keeps what runs
        if done.error is None and not done.value:
            self._scatter.wait(key, job.arrived_at_s + job.submit.remaining_s, now_s)
            is_gathered = job.tiled is None or not job.tiled.is_waiting
            self._execute(self._machine.scattered(key, is_gathered=is_gathered, now_s=now_s))
            return
        if done.error is None:
            job.keep(self._held)
            if job.tiled is not None:
                job.tiles_s = now_s - job.started_at_s - job.compute_s - job.codec_s
            self._execute(
                self._machine.computed(key, measured_s=job.compute_s, predicted_s=job.predicted_s, now_s=now_s)
            )
            return
        text, is_plan_fault = explain_failure(done.error)
        self._execute(self._machine.crashed(key, text=text, is_plan_fault=is_plan_fault, now_s=now_s))

    # --- instructions -----------------------------------------------------------------------------------------------

    def _execute(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(key=key, queue_s=queue_s):
                    self._jobs[key].queue_s, self._jobs[key].started_at_s = queue_s, time.perf_counter()
                    self._run(key)
                case Resume(key=key):
                    self._run(key)
                case Forward(key=key, remaining_s=remaining_s):
                    self._forward(key, remaining_s)
                case Reply(key=key):
                    self._reply(key)
                case Refuse(key=key, kind=kind, text=text) as refuse:
                    self._drop(key, tell_next=refuse.was_forwarded)
                    self._fail(key[0], key[1], kind, text, is_plan_fault=refuse.is_plan_fault)
                case Forget(key=key, was_forwarded=was_forwarded):
                    self._drop(key, tell_next=was_forwarded)

    def _run(self, key: Key) -> None:
        job = self._jobs[key]
        job.recall(self._held)
        peer = self._next_peer(job)
        conditions = Conditions(
            up_bps=float("nan") if peer is None else last_bandwidth(self._hub, peer),
            down_bps=last_bandwidth(self._hub, job.client),
            peers_bps={
                tile: last_bandwidth(self._hub, self._next[name])
                for tile, name in enumerate(job.submit.plan.edge_nodes)
                if tile and name in self._next and self._next[name].is_up
            },
        )
        stop, scatter = self._stopper(key), functools.partial(self._scatter.post, key)
        self._executor.submit(key, lambda: job.compute(self._auto, self._limits, conditions, stop, scatter))

    def _gathered(self, keys: Iterable[Key]) -> None:
        """No tile of these requests is out any more."""
        for key in keys:
            self._execute(self._machine.gathered(key, now_s=time.perf_counter()))

    def _stopper(self, key: Key) -> Callable[[], bool]:
        return lambda: self._machine.is_cancelled(key)

    def _next_peer(self, job: Job) -> Peer | None:
        """The node that this job goes on to: the one connected node of the next tier that is up."""
        if not job.has_next:
            return None
        return next((peer for peer in self._onward_nodes() if peer.is_up), None)

    def _onward_nodes(self) -> list[Peer]:
        """Nodes of the next tier, and those that have not said of which they are."""
        return [peer for name, peer in self._next.items() if self._next_tiers.get(name) is not self._tier]

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number

    def _forward(self, key: Key, remaining_s: float) -> None:
        job = self._jobs[key]
        if not job.stage.layers:
            job.relay()
        peer = self._next_peer(job)
        if peer is None:
            self._execute(self._machine.next_failed(key, kind="lost", text=self._why_no_next()))
            return
        number = self._take_number()
        job.next_request, job.next_peer = number, peer
        self._upstream[number] = key
        submit = job.submit
        onward = Submit(number, submit.model_id, submit.plan, submit.input_kind, remaining_s, job.onward.headers)
        self._hub.send_data(peer, onward, job.onward.frames, number)
        job.onward = Packed()

    def _why_no_next(self) -> str:
        if self._refusals:
            return "; ".join(f"{name} refuses {self.config.name}: {why}" for name, why in self._refusals.items())
        if nodes := self._onward_nodes():
            names = ", ".join(peer.name for peer in nodes)
            return f"{self.config.name} is not connected to {names}; is it running?"
        return f"{self.config.name} knows no node of the next tier; start it with --connect cloud=ADDRESS"

    def _reply(self, key: Key) -> None:
        self._scatter.drop(key)
        job = self._jobs.pop(key)
        if job.next_request is not None:
            self._upstream.pop(job.next_request, None)
        hop = Hop(
            node=self.config.name,
            compute_s=job.compute_s,
            queue_s=job.queue_s,
            codec_s=job.codec_s,
            residence_s=time.perf_counter() - job.arrived_at_s,
            state=self._state(time.perf_counter()),
            upload_s=job.upload_s,
            next_node=job.next_peer.name if job.next_peer is not None else "",
            predicted_s=job.predicted_s,
            tiles_s=job.tiles_s,
            reason="" if job.tiled is None else job.tiled.reason,
        )
        result = Result(key[1], (hop, *job.hops_beyond), job.outputs.headers)
        self._hub.send_data(job.client, result, job.outputs.frames, key)

    def _drop(self, key: Key, *, tell_next: bool) -> None:
        self._scatter.drop(key)
        job = self._jobs.pop(key, None)
        if job is not None:
            job.forget(self._held)
        if job is None or job.next_request is None:
            return
        self._upstream.pop(job.next_request, None)
        if tell_next and job.next_peer is not None:
            self._hub.withdraw(job.next_peer, job.next_request)
            self._hub.send(job.next_peer, Cancel(job.next_request))

    def _fail(self, client: Hashable, request: int, kind: str, text: str, *, is_plan_fault: bool) -> None:
        if isinstance(client, Peer) and client in self._clients:
            self._hub.send(client, Failure(request, kind, text, self.config.name, is_plan_fault))

    # --- status -----------------------------------------------------------------------------------------------------

    def _send_status(self, now_s: float) -> None:
        state = self._state(now_s)
        peers = tuple(aged(status, now_s - at_s) for at_s, status in self._heard.values())
        equals = [name for name, tier in self._next_tiers.items() if tier is self._tier]
        for client, links in tell_links(self._clients, self._next, equals, self._hub.link_state).items():
            self._hub.send(client, Status(state, links, peers))

    def _state(self, now_s: float) -> NodeState:
        load = self._machine.load
        return NodeState(
            name=self.config.name,
            tier=self._tier,
            is_up=not self._machine.is_draining,
            load_factor=load.load_factor(now_s),
            queue_delay_s=load.queue_delay_s(now_s),
            queue_length=self._machine.queue_length,
            utilisation_frac=load.utilisation_frac(now_s),
            age_s=0.0,
            mode="real" if self._emulator is None else self._emulator.emulation.label,
            overruns=0 if self._emulator is None else self._emulator.overruns,
        )
