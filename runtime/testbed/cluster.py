"""A whole deployment on this machine: real worker processes on loopback, and links that can be cut."""

import contextlib
import itertools
import logging
import re
import shutil
import signal
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from runtime.deployment import Deployment, ModelConfig, NodeConfig
from runtime.device.session import Session
from runtime.errors import ClusterError, ConfigError, ModelError
from runtime.model.zoo import check_library_name
from runtime.planning.policies.registry import PolicySpec
from runtime.presets import LinkConfig, NodeEmulation
from runtime.testbed.arrivals import LoadShape
from runtime.testbed.load import Load, LoadReport
from runtime.testbed.ports import pick_address
from runtime.testbed.process import READY_S, ManagedProcess
from runtime.testbed.rate import LinkShape
from runtime.testbed.workload import shape_link
from runtime.types import DEVICE_NODE, Constraints, Tier

logger = logging.getLogger(__name__)

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
        self._process.command(msgspec.json.encode(command).decode())

    def stop(self) -> None:
        """End the relay."""
        self._process.ask_to_stop()
        self._process.wait()


@dataclass(frozen=True, slots=True)
class RelayPair:
    """The relays between two edge nodes, each of which calls the other.

    Each relay has its own budget per direction; two heads that send tiles at the same time share none.
    """

    there: Relay  # the first end calls the second
    back: Relay

    def set_black_hole(self, on: bool) -> None:
        """Swallow everything from now on, without a reset; or pass it on again."""
        self.there.set_black_hole(on)
        self.back.set_black_hole(on)

    def shape(self, *, up: LinkShape | None = None, down: LinkShape | None = None) -> None:
        """Give a direction another shape from now on: `up` is first end to second; None leaves it as it is."""
        self.there.shape(up=up, down=down)
        self.back.shape(up=down, down=up)


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
        has_cloud: whether there is a cloud node.
        constraints: of the deployment.
        relays: links that go through a `Relay`: the name of a node for its link from the device, or both ends, the one
            nearer to the device first, two edge nodes in any order.
        worker_options: more command line for every worker, such as `--queue 2`.
        emulate: what nodes pretend to be, by name; `device` for the device itself.
        links: links that are emulated; each goes through a `Relay`.
        cloud: name of the cloud node.

    Raises:
        ClusterError: a process did not become ready; with the tail of its log.
        ConfigError: a name or an emulation that cannot be.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        edges: tuple[str, ...] = ("edge0",),
        has_cloud: bool = True,
        constraints: Constraints | None = None,
        relays: tuple[str | tuple[str, str], ...] = (),
        worker_options: tuple[str, ...] = (),
        emulate: Mapping[str, NodeEmulation] | None = None,
        links: tuple[LinkConfig, ...] = (),
        cloud: str = "cloud",
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="offcut-"))
        """Logs of all processes; gone after `stop`."""
        self._processes: dict[str, ManagedProcess] = {}
        self._addresses: dict[str, str] = {}
        self._nodes: dict[str, _Node] = {}
        self._introductions: dict[str, tuple[str, ...]] = {}  # edge node -> the others, as it reaches them
        self._restarts: Counter[str] = Counter()
        self._gates: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)  # one restart or command a node
        self._contention: dict[str, float] = {}
        self._loads: dict[str, Load] = {}
        self._sessions = contextlib.ExitStack()
        self._model = model
        self._emulate = dict(emulate or {})
        wanted = {(DEVICE_NODE, end) if isinstance(end, str) else end for end in relays}
        self._wanted = wanted | {link.between for link in links}
        self._relays: dict[tuple[str, str], Relay] = {}
        try:
            self._start(model, edges, cloud if has_cloud else None, worker_options)
            for link in links:
                back = link.emulate if link.back is None else link.back
                self.link(*link.between).shape(up=shape_link(link.emulate), down=shape_link(back))
            self.deployment = Deployment(
                model=model,
                nodes=tuple(self._config(node) for node in self._nodes.values()),
                constraints=constraints or Constraints(),
                links=links,
                device_emulate=self._emulate.get(DEVICE_NODE),
            )
        except BaseException:
            for process in self._processes.values():
                process.kill()  # there is nothing to drain, and one that loads its model hears no request to stop
            self.stop()
            raise

    @classmethod
    def from_deployment(cls, deployment: Deployment, *, worker_options: tuple[str, ...] = ()) -> "Cluster":
        """Start every node of a deployment on this machine, emulated as it says, with a relay in each emulated link.

        Addresses and keys are those of the real machines and do not matter here: the cluster has its own.

        Raises:
            ClusterError: a process did not become ready.
            ConfigError: a trace cannot be read.
        """
        emulate = {node.name: node.emulate for node in deployment.nodes if node.emulate is not None}
        if deployment.device_emulate is not None:
            emulate[DEVICE_NODE] = deployment.device_emulate
        return cls(
            deployment.model,
            edges=tuple(node.name for node in deployment.edges),
            has_cloud=deployment.cloud is not None,
            constraints=deployment.constraints,
            worker_options=worker_options,
            emulate=emulate,
            links=deployment.links,
            cloud="cloud" if deployment.cloud is None else deployment.cloud.name,
        )

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

    def session(
        self, *, policy: PolicySpec, shadow: PolicySpec | None = None, log_folder: Path | None = None
    ) -> Session:
        """Open a session on this cluster; it is closed with the cluster at the latest."""
        return self._sessions.enter_context(Session(self.deployment, policy, shadow=shadow, log_folder=log_folder))

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
        """Start a node again at its old address, its contention kept; one that runs is stopped in order first.

        Raises:
            ClusterError: it did not become ready, or has been restarted too often.
        """
        with self._gates[name]:
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
            self._introduce(name)
            if name in self._contention:
                self.set_contention(name, self._contention[name])

    def pid(self, name: str) -> int:
        """Process id of a node."""
        return self._processes[name].pid

    # --- conditions -------------------------------------------------------------------------------------------------

    @property
    def relays(self) -> dict[str, Relay]:
        """Relays in the device's own links, by the node at the other end."""
        return {far: relay for (near, far), relay in self._relays.items() if near == DEVICE_NODE}

    def link(self, near: str, far: str) -> Relay | RelayPair:
        """The relay in a link, its end nearer to the device first; of two edge nodes any may be first.

        Raises:
            ClusterError: when this link has none.
        """
        relay, back = self._relays.get((near, far)), self._relays.get((far, near))
        if relay is not None and back is not None:
            return RelayPair(relay, back)
        if relay is None:
            known = ", ".join(f"{a} - {b}" for a, b in self._relays) or "none"
            raise ClusterError(
                f"expected a link with a relay ({known}), got {near} - {far}; name it in relays or links"
            )
        return relay

    def set_contention(self, name: str, contention: float) -> None:
        """Let an emulated node take so many times longer from its next segment on; one that is down learns it later.

        Raises:
            ClusterError: when the node is not emulated, or `contention` is less than 1.
        """
        with self._gates[name]:
            if self._processes[name].is_alive:
                self._processes[name].command(msgspec.json.encode({"contention": contention}).decode())
            self._contention[name] = contention

    def start_load(self, name: str) -> Load:
        """Start the process of a node's background requests, if it does not run; it sends none yet.

        Raises:
            ClusterError: when it did not start.
        """
        with self._gates[name]:
            if name not in self._loads:
                self._loads[name] = Load(f"load-{name}", self._addresses[name], self._model.spec, self.folder)
            return self._loads[name]

    def set_load(self, name: str, shape: LoadShape) -> None:
        """Send background requests to a node from now on, past its links; `LoadShape()` ends them.

        Raises:
            ClusterError: when the load's process did not start.
        """
        self.start_load(name).set_shape(shape)

    def load_report(self, name: str) -> LoadReport:
        """What became of a node's background requests since the last report."""
        return self._loads[name].report()

    # --- starting and ending ----------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End sessions, loads, nodes and relays; remove every file."""
        try:
            self._sessions.close()
        finally:
            for load in self._loads.values():
                load.stop()
            for process in self._processes.values():
                process.ask_to_stop()
            for process in self._processes.values():
                process.wait()
            for relay in self._relays.values():
                relay.stop()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _config(self, node: _Node) -> NodeConfig:
        relay = self._relays.get((DEVICE_NODE, node.name))
        address = self._addresses[node.name] if relay is None else relay.address
        return NodeConfig(name=node.name, tier=node.tier, address=address, emulate=self._emulate.get(node.name))

    def _start(self, model: ModelConfig, edges: tuple[str, ...], cloud: str | None, options: tuple[str, ...]) -> None:
        """Start all nodes at once: an edge needs the cloud's address, which is known long before its model is loaded."""
        _check_name(model.spec)
        nodes = (*edges, *(() if cloud is None else (cloud,)))
        possible = {(DEVICE_NODE, name) for name in nodes} | {(name, cloud) for name in edges if cloud is not None}
        possible |= set(itertools.permutations(edges, 2))
        if unknown := self._wanted - possible:
            raise ConfigError(f"expected links among {sorted(possible)}, got {sorted(unknown)}; the nearer end first")
        if unknown_nodes := self._emulate.keys() - {DEVICE_NODE, *nodes}:
            raise ConfigError(f"expected nodes to emulate among {[DEVICE_NODE, *nodes]}, got {sorted(unknown_nodes)}")
        base = (
            *("--model", model.spec, "--seed", str(model.seed)),
            *(() if model.weights is None else ("--weights", model.weights)),
            *("--batch-size", str(model.batch_size), "--exit-with-stdin", *options),
        )
        if cloud is not None:
            self._launch(_Node(cloud, Tier.CLOUD, (*base, *self._pace(cloud))), pick_address())
            self._addresses[cloud] = self._wait_line(cloud, "BOUND")
        for name in edges:
            onward = () if cloud is None else ("--connect", f"{cloud}={self._route(name, cloud)}")
            self._launch(_Node(name, Tier.EDGE, (*base, *onward, *self._pace(name))), pick_address())
        for name in self._nodes:
            self._await(name)
        for name in edges:
            others = tuple(f"{other}={self._route(name, other)}" for other in edges if other != name)
            self._introductions[name] = others
            self._introduce(name)
        for name in self._nodes:
            self._route(DEVICE_NODE, name)

    def _introduce(self, name: str) -> None:
        """Tell an edge node where the others are: their addresses are not known before it has started."""
        if others := self._introductions.get(name):
            self._processes[name].command(msgspec.json.encode({"connect": others}).decode())

    def _pace(self, name: str) -> tuple[str, ...]:
        """The part of a worker's command line that says what it pretends to be."""
        emulation = self._emulate.get(name)
        if emulation is None:
            return ()
        options = {"--preset": emulation.preset, "--slow-down": emulation.slow_down, "--mode": emulation.mode}
        return tuple(str(part) for pair in options.items() if pair[1] is not None for part in pair)

    def _route(self, near: str, far: str) -> str:
        """Address at which one end of a link reaches the other: its relay's, where there is to be one."""
        is_wanted = (near, far) in self._wanted or (far, near) in self._wanted  # two edge nodes stand in any order
        if not is_wanted:
            return self._addresses[far]
        relay = self._relays[near, far] = Relay(f"relay-{near}-{far}", self._addresses[far], self.folder)
        return relay.address

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
