"""The nodes as the device knows them: who answers, what they run, how they are."""

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.deployment import Deployment
from runtime.device.board import Board
from runtime.device.breaker import Breaker, BreakerState
from runtime.errors import HandshakeError
from runtime.types import DEVICE_NODE, GraphSpec, NodeProfile, Tier
from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Peer
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Describe, Described, Hello, Status

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Contact:
    """One node. Its profile and graph are None until it has described itself; `refused` says why it never will."""

    name: str
    tier: Tier
    peer: Peer
    breaker: Breaker = field(default_factory=Breaker)
    model_id: str = ""
    profile: NodeProfile | None = None
    graph: GraphSpec | None = None
    refused: HandshakeError | None = None
    threads: int = 1

    def why_not(self, now_s: float) -> str:
        """Why no request can go to the node at this moment; empty when one can."""
        if self.refused is not None:
            return f"{self.name} cannot be used: {self.refused}"
        if not self.peer.is_up:
            return f"{self.name} is down: not connected"
        if not self.is_described:
            return f"{self.name} is down: connected, but has not said yet what it runs"
        if self.breaker.state is BreakerState.CLOSED or not self.breaker.retry_in_s(now_s):
            return ""
        return f"{self.name} is paused: it left requests unanswered, next try in {self.breaker.retry_in_s(now_s):.1f} s"

    @property
    def is_described(self) -> bool:
        """Whether the node is up and has said what it runs."""
        return self.peer.is_up and self.profile is not None


class Contacts:
    """Handshakes and statuses of all nodes of a deployment. Changed by the client's loop thread only.

    Args:
        deployment: the nodes.
        hub: connects to them.
        model_id: of the model the device holds; empty: the weights of the first node that answers count, and every
            other node must run the same.
        threads: torch threads of this process.
    """

    def __init__(self, deployment: Deployment, hub: Hub, model_id: str, *, threads: int = 1) -> None:
        self.board = Board({node.name: node.tier for node in deployment.nodes})
        self.changed = threading.Condition()
        """Notified when a node has described itself, was lost or refused us."""
        self._deployment = deployment
        self._hub = hub
        self._model_id = model_id
        self._threads = threads
        self._by_name: dict[str, Contact] = {}

    def __iter__(self) -> Iterator[Contact]:
        return iter(tuple(self._by_name.values()))

    def __getitem__(self, name: str) -> Contact:
        return self._by_name[name]

    def connect(self) -> None:
        """Start to connect to every node."""
        for node in self._deployment.nodes:
            hello = Hello(PROTOCOL_VERSION, DEVICE_NODE, self._model_id, CAPABILITIES)
            server_key = None if node.public_key is None else node.public_key.encode()
            peer = self._hub.connect(node.name, node.address, hello, server_key=server_key)
            self._by_name[node.name] = Contact(node.name, node.tier, peer)
            self.board.set_up(node.name, is_up=False)

    def connected(self, event: Connected) -> None:
        """A node has welcomed us: ask it for its profile of our model."""
        contact = self._by_name[event.peer.name]
        self._note_threads(contact, event.welcome.threads)
        wanted, pinned = self._deployment.model.spec, self._pinned_model_id(contact)
        for offer in event.welcome.offers:
            if offer.model_id == pinned or (not pinned and offer.spec == wanted):
                contact.model_id = offer.model_id
                self._hub.send(contact.peer, Describe(offer.model_id))
                return
        contact.model_id = ""
        runs = ", ".join(f"{offer.spec} ({offer.model_id[:12]})" for offer in event.welcome.offers)
        self.rejected(
            contact.name,
            HandshakeError(
                f"expected a node that runs {wanted} ({pinned[:12] or 'any weights'}), {contact.name} runs {runs}; "
                "restart it with the model, weights and seed of the others"
            ),
        )

    def _pinned_model_id(self, contact: Contact) -> str:
        """The model all nodes must run: the device's own, else that of the other nodes that are up."""
        others = (c.model_id for c in self if c is not contact and c.peer.is_up and c.model_id)
        return self._model_id or next(others, "")

    def _note_threads(self, contact: Contact, threads: int) -> None:
        contact.threads = threads
        if threads != self._threads:
            logger.warning(
                "%s runs %d torch threads, this device %d: outputs agree within rounding, not bit for bit; "
                "start both with the same number",
                contact.name,
                threads,
                self._threads,
            )

    def rejected(self, name: str, error: HandshakeError) -> None:
        """A node must not be used, and why."""
        logger.info("%s cannot be used: %s", name, error)
        with self.changed:
            self._by_name[name].refused = error
            self.changed.notify_all()

    def described(self, name: str, described: Described) -> None:
        """A node has said what it runs and how fast: it can be used from now on. It says so again when it knows better."""
        contact = self._by_name[name]
        with self.changed:
            contact.graph, contact.profile, contact.refused = described.graph, described.profile, None
            contact.breaker.connected()
            self.board.set_up(name, is_up=True)
            self.changed.notify_all()

    def heard(self, name: str, status: Status) -> None:
        """A node's status has come."""
        self.board.hear(name, status, time.perf_counter())
        self.note_link(name)

    def note_link(self, name: str) -> None:
        """Put what we measured of the link to a node on the board."""
        self.board.set_link(self._hub.link_state(self._by_name[name].peer), time.perf_counter())

    def lost(self, name: str) -> None:
        """The link to a node is gone."""
        with self.changed:
            self._by_name[name].breaker.lost()
            self.board.set_up(name, is_up=False)
            self.changed.notify_all()

    def unusable(self, now_s: float) -> dict[str, str]:
        """Nodes that no request can go to at this moment, and why."""
        return {contact.name: why for contact in self if (why := contact.why_not(now_s))}

    def wait_described(self, timeout_s: float) -> None:
        """Block until every node has described itself or refused us, at most `timeout_s`."""
        with self.changed:
            self.changed.wait_for(
                lambda: all(contact.is_described or contact.refused for contact in self), timeout=timeout_s
            )

    def bandwidth_bps(self, name: str) -> float:
        """Newest reading of the link to a node, NaN without one."""
        samples = self._hub.link_state(self._by_name[name].peer).samples if name else ()
        return samples[0].bandwidth_bps if samples else float("nan")

    def uplink_backlog_bytes(self) -> int:
        """Bytes that wait for the device's own uplinks."""
        return sum(self._hub.link_state(contact.peer).backlog_bytes for contact in self)
