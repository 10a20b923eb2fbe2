"""Background requests: a client of its own that keeps a node busy, open loop, and so raises its queue delay q.

A process, not a thread: a session measured beside it must not share an interpreter's lock with it. Run as
`python -m runtime.testbed.load --target tcp://HOST:PORT --model SPEC`: prints `READY`, takes one JSON command per line
on standard input (`{"shape": {"rates_hz": [5.0]}}`, `{"report": true}`), answers each with `OK` (and the report) or
`ERROR` and a text, and ends with standard input. Imports no torch.

Each request is whole: the node runs every layer of the model on a sample, and answers. The load goes straight to the
node, past the links of the deployment.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import tyro

from runtime.errors import ConfigError
from runtime.model.samples import sample_file
from runtime.node.commands import listen
from runtime.testbed.arrivals import Arrivals, LoadShape
from runtime.testbed.process import READY_S, ManagedProcess
from runtime.types import GraphSpec, Plan, Tier, ValueSpec
from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Event, Lost, Received, ReceivedData
from runtime.wire.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Describe,
    Described,
    Failure,
    Hello,
    Result,
    Submit,
    TensorHeader,
)

DESCRIBED_S = 10.0
"""How long a new load waits for its node before it says READY without it."""

BURST = 16
"""Requests in a row before commands and answers are looked at: a load that cannot keep up must still hear its end."""


class LoadReport(msgspec.Struct, frozen=True):
    """What became of a load's requests since the last report."""

    sent: int = 0
    answered: int = 0
    busy: int = 0  # refused, because the node's queue was full
    failed: int = 0  # any other failure, or the node was lost
    unsent: int = 0  # due while the node was not there
    queue_s: float = 0.0  # sum over the answers
    service_s: float = 0.0  # sum over the answers: compute alone
    held_s: float = 0.0  # sum over the answers: how long each kept the node from the next, coding and hand-overs too
    latency_s: float = 0.0  # sum over the answers, as this client saw them

    @property
    def mean_queue_s(self) -> float:
        """Mean wait in the node's queue; NaN without an answer."""
        return self.queue_s / self.answered if self.answered else math.nan

    @property
    def mean_service_s(self) -> float:
        """Mean compute seconds; NaN without an answer."""
        return self.service_s / self.answered if self.answered else math.nan

    @property
    def mean_held_s(self) -> float:
        """Mean seconds that a request kept the node from the next one; NaN without an answer."""
        return self.held_s / self.answered if self.answered else math.nan


class Load:
    """A background load on one node, from the outside.

    Args:
        name: of its process.
        target: address of the node.
        model: spec of the model to ask for.
        log_folder: where its log goes.

    Raises:
        ClusterError: when it did not start.
    """

    def __init__(self, name: str, target: str, model: str, log_folder: Path) -> None:
        arguments = ["--target", target, "--model", model, "--name", name]
        self._process = ManagedProcess(name, "runtime.testbed.load", arguments, log_folder)
        try:
            self._process.wait_line("READY", READY_S)
        except BaseException:
            self.stop()
            raise

    def set_shape(self, shape: LoadShape) -> None:
        """Send like `shape` from now on; its time begins now."""
        self._command({"shape": shape})

    def report(self) -> LoadReport:
        """What became of its requests since the last report."""
        return msgspec.json.decode(self._command({"report": True}), type=LoadReport)

    def _command(self, command: dict[str, object]) -> str:
        return self._process.command(msgspec.json.encode(command).decode())

    def stop(self) -> None:
        """End the process."""
        self._process.ask_to_stop()
        self._process.wait()


# --- the process --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Send requests of a model to a node."""

    target: str
    """Address of the node, tcp://HOST:PORT."""
    model: str
    """The model to ask for, as the node's command line names it."""
    name: str = "load"
    """How this client calls itself."""


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of standard input."""

    shape: LoadShape | None = None
    report: bool = False


@dataclass(frozen=True, slots=True)
class _Template:
    """A request, but for its number."""

    model_id: str
    plan: Plan
    input_kind: str
    headers: tuple[TensorHeader, ...]
    frames: tuple[bytes, ...]


class LoadClient:
    """The loop of the process."""

    def __init__(self, config: LoadConfig) -> None:
        self._config = config
        self._hub = Hub(config.name)
        hello = Hello(PROTOCOL_VERSION, config.name, "", CAPABILITIES)
        self._peer = self._hub.connect("node", config.target, hello)
        self._tier, self._node = Tier.EDGE, ""
        self._template: _Template | None = None
        self._arrivals: Arrivals | None = None
        self._began_s = self._next_at_s = math.inf
        self._number = 0
        self._under_way: dict[int, float] = {}
        self._report = LoadReport()
        self._commands: deque[Callable[[], None]] = deque()
        self._is_stopped = False

    def run(self) -> None:
        """Send until standard input ends."""
        threading.Thread(target=self._listen, name="offcut-commands", daemon=True).start()
        until_s = time.perf_counter() + DESCRIBED_S
        is_ready = False
        try:
            while not self._is_stopped:
                for event in self._hub.poll(self._wait_s()):
                    self._handle(event)
                while self._commands:
                    self._commands.popleft()()
                for _ in range(BURST):
                    if time.perf_counter() < self._next_at_s:
                        break
                    self._send()
                if not is_ready and (self._template is not None or time.perf_counter() >= until_s):
                    is_ready = True
                    print("READY", flush=True)
        finally:
            self._hub.close()

    def _wait_s(self) -> float:
        return min(max(self._next_at_s - time.perf_counter(), 0.0), 0.25)

    # --- commands ---------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        listen(self._answer)
        self._is_stopped = True
        self._hub.wake()

    def _answer(self, line: bytes) -> str:
        """Have the loop carry out a command, and wait for it."""
        try:
            command = msgspec.json.decode(line, type=Command)
        except (msgspec.MsgspecError, ConfigError) as error:
            return f"ERROR {error}"
        done = threading.Event()
        texts = ["OK"]

        def obey() -> None:
            if command.shape is not None:
                self._start(command.shape)
            if command.report:
                texts.append(msgspec.json.encode(self._report).decode())
                self._report = LoadReport()
            done.set()

        self._commands.append(obey)
        self._hub.wake()
        done.wait()
        return " ".join(texts)

    def _start(self, shape: LoadShape) -> None:
        self._arrivals = Arrivals(shape)
        self._began_s = time.perf_counter()
        self._next_at_s = self._began_s + self._arrivals.next_s()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        assert self._arrivals is not None
        self._next_at_s = self._began_s + self._arrivals.next_s()
        template = self._template
        if template is None or not self._peer.is_up:
            self._count(unsent=1)
            return
        self._number += 1
        submit = Submit(self._number, template.model_id, template.plan, template.input_kind, math.inf, template.headers)
        self._under_way[self._number] = time.perf_counter()
        self._hub.send_data(self._peer, submit, template.frames, self._number)
        self._count(sent=1)

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._report, name) + value for name, value in more.items()}
        self._report = msgspec.structs.replace(self._report, **now)

    def _handle(self, event: Event) -> None:
        match event:
            case Connected(welcome=welcome):
                self._tier, self._node = welcome.tier, welcome.node
                offers = {offer.spec: offer.model_id for offer in welcome.offers}
                if self._config.model not in offers:
                    sys.exit(f"load: expected a node that runs {self._config.model}, got one that runs {list(offers)}")
                self._hub.send(self._peer, Describe(offers[self._config.model]))
            case Received(message=Described() as described):
                self._template = _make_template(described, self._tier, self._node)
            case Received(message=Failure(request=number, kind=kind)) if number in self._under_way:
                del self._under_way[number]
                self._count(**{"busy" if kind == "busy" else "failed": 1})
            case ReceivedData(body=Result(request=number, hops=hops)) if number in self._under_way:
                latency_s = time.perf_counter() - self._under_way.pop(number)
                hop = hops[0]
                held_s = hop.residence_s - hop.queue_s
                self._count(
                    answered=1, queue_s=hop.queue_s, service_s=hop.compute_s, held_s=held_s, latency_s=latency_s
                )
            case Lost():
                self._count(failed=len(self._under_way))
                self._under_way.clear()
            case _:
                pass


def _make_template(described: Described, tier: Tier, node: str) -> _Template:
    """A request for the whole model on one node: files where there is an input stage, else a tensor of noise."""
    graph: GraphSpec = described.graph
    inputs = [value for value in graph.values if value.producer < 0]
    frames = tuple(_sample_frame(value, seed) for seed, value in enumerate(inputs))
    headers = tuple(_header(value, frame) for value, frame in zip(inputs, frames, strict=True))
    edge_nodes = (node,) if tier is Tier.EDGE else ()
    plan = Plan((tier,) * graph.num_layers, edge_nodes, codec="raw")
    kind = "encoded" if graph.num_stage_layers else "tensor"
    return _Template(described.model_id, plan, kind, headers, frames)


def _sample_frame(value: ValueSpec, seed: int) -> bytes:
    if not value.is_sized:
        return sample_file(seed)
    if value.tensor.dtype != "float32":
        return bytes(value.tensor.nbytes)
    return np.random.default_rng(seed).standard_normal(value.tensor.shape, dtype=np.float32).tobytes()


def _header(value: ValueSpec, frame: bytes) -> TensorHeader:
    shape = value.tensor.shape if value.is_sized else (len(frame),)
    return TensorHeader(value.name, shape, value.tensor.dtype, tuple(range(len(shape))), "raw", len(frame))


if __name__ == "__main__":
    LoadClient(tyro.cli(LoadConfig)).run()
