"""What a node tells of itself and of others, and how it words what went wrong."""

import dataclasses
import math
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from runtime.errors import PlanError
from runtime.types import LinkState
from runtime.wire.channel import Hub
from runtime.wire.events import Peer
from runtime.wire.link import SAMPLES, to_report
from runtime.wire.messages import LinkReport, Status


def aged(status: Status, age_s: float) -> Status:
    """A status as it must be forwarded: every age grown by how long we held it."""
    return Status(
        dataclasses.replace(status.state, age_s=status.state.age_s + age_s),
        tuple(
            LinkReport(
                link.target,
                tuple((sample_age_s + age_s, bps) for sample_age_s, bps in link.samples),
                link.mean_bandwidth_bps,
                link.rtt_s,
                link.backlog_bytes,
            )
            for link in status.links
        ),
    )


def join_links(states: Sequence[LinkState]) -> LinkState:
    """Put together what several conversations with one node measured of the link to it.

    Two edge nodes hold two, for each connects to the other; tiles go out in one and come back in the other.

    Args:
        states: one or more, of the same two ends.
    """
    if len(states) == 1:
        return states[0]
    samples = sorted((sample for state in states for sample in state.samples), key=lambda sample: sample.age_s)
    means = [math.log(state.mean_bandwidth_bps) for state in states if not math.isnan(state.mean_bandwidth_bps)]
    freshest = min(states, key=lambda state: state.samples[0].age_s if state.samples else math.inf)
    return dataclasses.replace(
        freshest,
        samples=tuple(samples[:SAMPLES]),
        mean_bandwidth_bps=math.exp(math.fsum(means) / len(means)) if means else math.nan,
        rtt_s=min((state.rtt_s for state in states if not math.isnan(state.rtt_s)), default=math.nan),
        backlog_bytes=sum(state.backlog_bytes for state in states),
    )


def tell_links(
    clients: Collection[Peer],
    onward: Mapping[str, Peer],
    equals: Collection[str],
    link_state: Callable[[Peer], LinkState],
) -> dict[Peer, tuple[LinkReport, ...]]:
    """Give what a status tells each client of our links: the way back to it, then those onward, each once.

    Args:
        clients: everybody who has connected to us.
        onward: the nodes that we connect to, by name.
        equals: those of them that are of our own tier, and may connect to us as well, by the same name. What is known of
            such a link comes from all conversations.
        link_state: what was measured in one conversation.
    """
    reports = {}
    for name, node in onward.items():
        also = [client for client in clients if client.name == name] if name in equals else []
        reports[name] = to_report(join_links([link_state(peer) for peer in (node, *also)]))
    links = {}
    for client in clients:
        own = client.name if client.name in equals else None
        back = to_report(link_state(client)) if own is None else reports[own]
        links[client] = (back, *(report for name, report in reports.items() if name != own))
    return links


def last_bandwidth(hub: Hub, peer: Peer) -> float:
    """Newest bandwidth reading of the link to a peer, NaN when there is none."""
    samples = hub.link_state(peer).samples
    return samples[0].bandwidth_bps if samples else float("nan")


def explain_failure(error: Exception) -> tuple[str, bool]:
    """Turn what a segment raised into a failure's text and say whether the plan is to blame: the one such place."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
    return text, out_of_memory or isinstance(error, PlanError)
