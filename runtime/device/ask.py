"""Ask the nodes of a deployment how they are, without a session and without a model."""

import math
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.deployment import Deployment, NodeConfig
from runtime.types import DEVICE_NODE
from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Event, Lost, Peer, Received, Rejected
from runtime.wire.keys import load_keys
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Hello, Status, Welcome

PROBE_S = 1.0
"""How long a plain connection to a node that says nothing may take: far above any round trip."""

POLL_S = 0.02
"""A round-trip time is known without an event: it is looked for this often."""


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """What one node said. `state` is up, shutting down, refused, loading? (it listens and says nothing) or down."""

    state: str = "down"
    problem: str = ""
    """Why it is not up, and what to do."""
    welcome: Welcome | None = None
    status: Status | None = None
    rtt_s: float = math.nan

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.state == "refused" or (self.status is not None and not math.isnan(self.rtt_s))


def ask_nodes(deployment: Deployment, timeout_s: float) -> dict[str, NodeAnswer]:
    """Collect the status of every node, and the round trip to it, by name.

    Returns after `timeout_s` at the latest, but for at most `PROBE_S` to find out about nodes that said nothing.

    Raises:
        ConfigError: when the device's key file cannot be read.
    """
    security = deployment.security
    keys = None if security.secret_key is None else load_keys(Path(security.secret_key))
    hub = Hub(DEVICE_NODE, keys=keys, insecure=security.insecure)
    try:
        peers = {node.name: _call(hub, node) for node in deployment.nodes}
        answers = _listen(hub, peers, time.monotonic() + timeout_s)
    finally:
        hub.close()
    silent = [node for node in deployment.nodes if answers[node.name] == NodeAnswer()]
    return {**answers, **_probe(silent)}


def _call(hub: Hub, node: NodeConfig) -> Peer:
    server_key = None if node.public_key is None else node.public_key.encode()
    hello = Hello(PROTOCOL_VERSION, DEVICE_NODE, "", CAPABILITIES)
    return hub.connect(node.name, node.address, hello, server_key=server_key)


def _listen(hub: Hub, peers: Mapping[str, Peer], until_s: float) -> dict[str, NodeAnswer]:
    answers = dict.fromkeys(peers, NodeAnswer())
    while not all(answer.is_settled for answer in answers.values()) and time.monotonic() < until_s:
        for event in hub.poll(max(min(until_s - time.monotonic(), POLL_S), 0.0)):
            _note(answers, event)
        for name, answer in answers.items():
            if answer.status is not None:
                answers[name] = replace(answer, rtt_s=hub.link_state(peers[name]).rtt_s)
    return answers


def _note(answers: dict[str, NodeAnswer], event: Event) -> None:
    name = event.peer.name
    match event:
        case Connected(welcome=welcome):
            answers[name] = NodeAnswer("up", welcome=welcome)
        case Received(message=Status() as status):
            state = "up" if status.state.is_up else "shutting down"
            answers[name] = replace(answers[name], state=state, status=status)
        case Rejected(error=error):
            answers[name] = NodeAnswer("refused", str(error))
        case Lost():
            answers[name] = NodeAnswer()
        case _:
            pass


def _probe(nodes: Iterable[NodeConfig]) -> dict[str, NodeAnswer]:
    """Find out what can be known of nodes that said nothing, all at once."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        return dict(pool.map(lambda node: (node.name, _explain_silence(node)), nodes))


def _explain_silence(node: NodeConfig) -> NodeAnswer:
    host, port = node.endpoint.host.strip("[]"), node.endpoint.port
    try:
        socket.create_connection((host, port or 0), timeout=PROBE_S).close()
    except ConnectionRefusedError:
        return NodeAnswer("down", f"nothing listens at {node.address}; start it, or correct its address")
    except socket.gaierror:
        return NodeAnswer("down", f"no machine is called {host}; correct the address {node.address}")
    except TimeoutError:
        text = f"no way to {node.address}; is the machine on, and does its firewall let this port and the next through?"
        return NodeAnswer("down", text)
    except OSError as error:
        return NodeAnswer("down", f"no way to {node.address}: {error.strerror or error}; check the network")
    text = (
        f"{node.address} takes connections but does not answer: it is still loading its model, or hangs, or no node of "
        "Offcut listens there; a node prints READY when it serves"
    )
    return NodeAnswer("loading?", text)
