"""What a node tells of itself and of others, and how it words what went wrong."""

import dataclasses
import traceback

import torch

from runtime.errors import PlanError
from runtime.wire.channel import Hub
from runtime.wire.events import Peer
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
