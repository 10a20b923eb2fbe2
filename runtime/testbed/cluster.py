"""A whole deployment on this machine: real worker processes on loopback, and links that can be cut."""

import contextlib
import logging
import re
import shutil
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import Session
from runtime.errors import ClusterError, ModelError
from runtime.model.zoo import check_library_name
from runtime.planning.policies.registry import PolicySpec
from runtime.testbed.process import ManagedProcess
from runtime.testbed.rate import LinkShape
from runtime.types import Constraints, Tier

logger = logging.getLogger(__name__)

READY_S = 180.0
"""How long a process may take to be ready: a worker loads and traces its model, on a busy machine."""

MAX_RESTARTS = 100
"""A node that had to be restarted more often than this is broken, not unlucky."""


class Relay:
    """A relay in front of one node: passes everything on, shapes it, or swallows it.

    Args:
        name: of its process.
        target: address of the node.
        log_folder: where its log goes.

    Raises:
        ClusterError: when it did not start.
    """

    def __init__(self, name: str, target: str, log_folder: Path) -> None:
        self._process = ManagedProcess(name, "runtime.testbed.shaping", ["--target", target], log_folder)
        try:
            self.address = self._process.wait_line("READY", READY_S)
        except BaseException:
            self.stop()
            raise

    def set_black_hole(self, on: bool) -> None:
        """Swallow everything from now on, without a reset; or pass it on again."""
        self._command({"black_hole": on})

    def shape(self, *, up: LinkShape | None = None, down: LinkShape | None = None) -> None:
        """Give a direction another shape from now on: `up` is client to node; None leaves it as it is."""
        shapes = {"up": up, "down": down}
        self._command({name: shape for name, shape in shapes.items() if shape is not None})

    def _command(self, command: dict[str, Any]) -> None:
        self._process.send_line(msgspec.json.encode(command).decode())
        self._process.wait_line("OK", READY_S)

    def stop(self) -> None:
        """End the relay."""
        self._process.ask_to_stop()
        self._process.wait()


@dataclass(frozen=True, slots=True)
class _Node:
    """How one worker is started."""

    name: str
    tier: Tier
    arguments: tuple[str, ...]


class Cluster:
    """Workers for a deployment, each in its own process, on loopback. Use as a context manager.

    Leaves no process, thread, socket or file behind, also when this program crashes or is interrupted.

    Args:
        model: what every node runs.
        edges: names of the edge nodes.
        has_cloud: whether there is a cloud node, named `cloud`.
        constraints: of the deployment.
        relays: names of nodes whose link from the device goes through a `Relay`.
        worker_options: more command line for every worker, such as `--queue 2`.

    Raises:
        ClusterError: a process did not become ready; with the tail of its log.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        edges: tuple[str, ...] = ("edge0",),
        has_cloud: bool = True,
        constraints: Constraints | None = None,
        relays: tuple[str, ...] = (),
        worker_options: tuple[str, ...] = (),
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="offcut-"))
        """Logs of all processes; gone after `stop`."""
        self._processes: dict[str, ManagedProcess] = {}
        self._addresses: dict[str, str] = {}
        self._nodes: dict[str, _Node] = {}
        self._restarts: Counter[str] = Counter()
        self._sessions = contextlib.ExitStack()
        self.relays: dict[str, Relay] = {}
        try:
            self._start(model, edges, has_cloud, worker_options)
            for name in relays:
                self.relays[name] = Relay(f"relay-{name}", self._addresses[name], self.folder)
        except BaseException:
            for process in self._processes.values():
                process.kill()  # there is nothing to drain, and one that loads its model hears no request to stop
            self.stop()
            raise
        nodes = tuple(
            NodeConfig(name=n.name, tier=n.tier, address=self._device_address(n.name)) for n in self._nodes.values()
        )
        self.deployment = Deployment(model=model, nodes=nodes, constraints=constraints or Constraints())

    @classmethod
    def local(cls, model: str, *, edges: int = 1, has_cloud: bool = True, batch_size: int = 1) -> "Cluster":
        """Start `edges` edge nodes (`edge0`, `edge1`, ...) and a cloud for a model.

        Raises:
            ClusterError: a process did not become ready.
        """
        names = tuple(f"edge{i}" for i in range(edges))
        return cls(ModelConfig(spec=model, batch_size=batch_size), edges=names, has_cloud=has_cloud)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def session(self, *, policy: PolicySpec, log_folder: Path | None = None) -> Session:
        """Open a session on this cluster; it is closed with the cluster at the latest."""
        return self._sessions.enter_context(Session(self.deployment, policy, log_folder=log_folder))

    # --- nodes ------------------------------------------------------------------------------------------------------

    def is_alive(self, name: str) -> bool:
        """Whether a node's process runs."""
        return self._processes[name].is_alive

    def heal(self) -> tuple[str, ...]:
        """Restart every node whose process has died, and return their names.

        Raises:
            ClusterError: a node did not become ready, or has died too often.
        """
        dead = tuple(name for name in self._processes if not self.is_alive(name))
        for name in dead:
            self.restart(name)
        return dead

    def kill(self, name: str) -> None:
        """End a node as a crash would (SIGKILL)."""
        self._processes[name].kill()

    def suspend(self, name: str) -> None:
        """Make a node hang (SIGSTOP): its sockets stay open and nothing answers."""
        self._processes[name].signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a node that hangs go on (SIGCONT)."""
        self._processes[name].signal(signal.SIGCONT)

    def restart(self, name: str) -> None:
        """Start a node again at its old address; one that runs is stopped in order first.

        Raises:
            ClusterError: it did not become ready, or has been restarted too often.
        """
        self._restarts[name] += 1
        if self._restarts[name] > MAX_RESTARTS:
            raise ClusterError(
                f"{name} was restarted {MAX_RESTARTS} times; see its log:\n{self._processes[name].tail()}"
            )
        process = self._processes[name]
        process.ask_to_stop()
        process.wait()
        self._launch(self._nodes[name], self._addresses[name])
        self._await(name)

    def pid(self, name: str) -> int:
        """Process id of a node."""
        return self._processes[name].pid

    def stop(self) -> None:
        """End sessions, nodes and relays; remove every file."""
        try:
            self._sessions.close()
        finally:
            for process in self._processes.values():
                process.ask_to_stop()
            for process in self._processes.values():
                process.wait()
            for relay in self.relays.values():
                relay.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _device_address(self, name: str) -> str:
        return self.relays[name].address if name in self.relays else self._addresses[name]

    def _start(self, model: ModelConfig, edges: tuple[str, ...], has_cloud: bool, options: tuple[str, ...]) -> None:
        """Start all nodes at once: an edge needs the cloud's address, which is known long before its model is loaded."""
        _check_name(model.spec)
        base = (
            *("--model", model.spec, "--seed", str(model.seed)),
            *(() if model.weights is None else ("--weights", model.weights)),
            *("--batch-size", str(model.batch_size), "--exit-with-stdin", *options),
        )
        onward: tuple[str, ...] = ()
        if has_cloud:
            self._launch(_Node("cloud", Tier.CLOUD, base), "tcp://127.0.0.1:*")
            self._addresses["cloud"] = self._wait_line("cloud", "BOUND")
            onward = ("--connect", f"cloud={self._addresses['cloud']}")
        for name in edges:
            self._launch(_Node(name, Tier.EDGE, (*base, *onward)), "tcp://127.0.0.1:*")
        for name in self._nodes:
            self._await(name)

    def _launch(self, node: _Node, bind: str) -> None:
        self._nodes[node.name] = node
        arguments = ["--tier", node.tier.label, "--name", node.name, "--bind", bind, *node.arguments]
        self._processes[node.name] = ManagedProcess(node.name, "runtime.node", arguments, self.folder)

    def _await(self, name: str) -> None:
        self._addresses[name] = self._wait_line(name, "READY")
        logger.debug("%s is ready at %s", name, self._addresses[name])

    def _wait_line(self, name: str, prefix: str) -> str:
        """Wait for a line of a worker; one that ends with an error of ours is quoted by that error alone."""
        process = self._processes[name]
        try:
            return process.wait_line(prefix, READY_S)
        except ClusterError as error:
            reason = _own_error(process.tail())
            if reason is None:
                raise
            raise ClusterError(f"{name} could not start: {reason}") from error


def _check_name(spec: str) -> None:
    """Tell a misspelt name at once, not when a worker has loaded its libraries; sessions here load the same ones."""
    try:
        check_library_name(spec)
    except ModelError as error:
        raise ClusterError(f"no node can start: {error}") from error


def _own_error(log: str) -> str | None:
    """The message of the error of ours that a worker's log ends with, if it does."""
    found = re.search(r"^runtime\.errors\.\w+: (?P<text>.*)\Z", log, flags=re.MULTILINE | re.DOTALL)
    return found["text"].strip() if found else None
