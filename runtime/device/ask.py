"""Ask the nodes of a deployment how they are, without a session and without a model."""

import time
from dataclasses import dataclass
from pathlib import Path

from runtime.deployment import Deployment
from runtime.types import DEVICE_NODE
from runtime.wire.channel import Hub
from runtime.wire.events import Connected, Received, Rejected
from runtime.wire.keys import load_keys
from runtime.wire.messages import CAPABILITIES, PROTOCOL_VERSION, Hello, Status


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """What one node said: its status, or the problem with it."""

    status: Status | None
    rtt_s: float
    problem: str


def ask_nodes(deployment: Deployment, timeout_s: float) -> dict[str, NodeAnswer]:
    """Collect one status from every node, by name; nodes that do not answer within `timeout_s` say so."""
    security = deployment.security
    keys = None if security.secret_key is None else load_keys(Path(security.secret_key))
    hub = Hub(DEVICE_NODE, keys=keys, insecure=security.insecure)
    answers = {node.name: NodeAnswer(None, float("nan"), "no answer") for node in deployment.nodes}
    waiting = set(answers)
    try:
        for node in deployment.nodes:
            server_key = None if node.public_key is None else node.public_key.encode()
            hub.connect(
                node.name, node.address, Hello(PROTOCOL_VERSION, DEVICE_NODE, "", CAPABILITIES), server_key=server_key
            )
        until_s = time.monotonic() + timeout_s
        while waiting and time.monotonic() < until_s:
            for event in hub.poll(max(until_s - time.monotonic(), 0.0)):
                match event:
                    case Received(peer=peer, message=Status() as status):
                        answers[peer.name] = NodeAnswer(status, hub.link_state(peer).rtt_s, "")
                        waiting.discard(peer.name)
                    case Rejected(peer=peer, error=error):
                        answers[peer.name] = NodeAnswer(None, float("nan"), str(error))
                        waiting.discard(peer.name)
                    case Connected(peer=peer):
                        answers[peer.name] = NodeAnswer(None, float("nan"), "up, no status yet")
                    case _:
                        pass
    finally:
        hub.close()
    return answers
