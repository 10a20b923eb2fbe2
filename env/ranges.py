"""What a scenario may draw from: every range of the randomised worlds, in one record."""

from dataclasses import dataclass

Range = tuple[float, float]
"""Low and high; drawn evenly in the logarithm where the field says so."""

NETWORK_FAMILIES = (
    "fcc16", "ghent4g", "norway3g", "oboe", "pitreehsr4g", "pitreelab", "puffer", "soliswifi", "ucc5g", "zhuge4g",
    "zhugeofficewifi",
)  # fmt: skip
"""Families of access links. The hairpin ones are a sender's estimates with a floor, so they are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """Ranges of everything that differs between sites and between episodes. Guesses unless a source is named."""

    # --- a site: model, machines
    slow_device: Range = (2.0, 16.0)
    """Device over the profiled machine, seconds per second, log. A small board to a phone."""
    slow_edge: Range = (0.5, 2.0)
    """Edge nodes, log: a desktop processor to one with a small GPU."""
    slow_cloud: Range = (0.1, 0.5)
    """Cloud, log: a shared GPU."""
    num_edges: tuple[int, int] = (1, 3)
    """Edge nodes of a site, both ends included."""
    warm_frac: Range = (0.5, 1.0)
    """Share of the plans whose segments are built when an episode begins."""

    # --- links
    families: tuple[str, ...] = NETWORK_FAMILIES
    """Families of access links, each as likely."""
    access_scale: Range = (0.5, 2.0)
    """Factor on a recorded access link, log; over several links of one device."""
    uplink_frac: Range = (0.1, 0.5)
    """Uplink over downlink, log: what was recorded are downlinks (traces' own notes)."""
    edge_rtt_s: Range = (0.002, 0.03)
    """Round trip from the device to an edge node, log."""
    cloud_rtt_s: Range = (0.02, 0.12)
    """From the device to the cloud, log."""
    backbone_bps: Range = (50e6, 1e9)
    """From an edge node to the cloud, log."""
    backbone_rtt_s: Range = (0.005, 0.04)
    """Round trip from an edge node to the cloud, log."""

    peer_bps: Range = (0.3e9, 1e9)
    """Between edge nodes, log: a wired switch, shared with others at worst. The same both ways, as long as an episode."""
    peer_rtt_s: Range = (0.0002, 0.001)
    """Round trip between edge nodes, log: a switch or two between processes that answer at once."""

    # --- load
    utilisation: Range = (0.1, 0.7)
    """Mean share of a node's time that background requests take."""
    utilisation_max: float = 0.9
    """Of background requests at any instant."""
    background_size: Range = (0.3, 1.5)
    """A background request over the whole model on that node, log."""
    co_tenant: Range = (0.0, 0.6)
    """Share of a node's speed that a co-tenant takes while it is busy."""
    co_tenant_on_s: Range = (1.0, 10.0)
    """Mean time it is busy, log; idle for as long on average."""
    service_noise: float = 0.03
    """Sigma of the log of a segment's time around its profile."""

    # --- requests
    gap: Range = (0.5, 5.0)
    """Mean gap between requests over the best nominal latency, log."""
    gap_streaming: Range = (0.5, 1.2)
    """The same in `streaming` (rl-study: high rate)."""
    clients: tuple[int, int] = (3, 6)
    """Devices that share the edge in `contention`."""
    utilisation_cap: float = 0.9
    """No server is busier than this under the best nominal plan; where it would be, requests come more slowly."""
    input_sigma: float = 0.3
    """Sigma of the log of an encoded input's size."""
    deadline_factor: Range = (2.0, 4.0)
    """Deadline over the predicted device-only latency; a session's default is 3."""

    # --- faults
    outage_gap_s: Range = (10.0, 40.0)
    """Mean time between outages of a link or node in `outage`, log."""
    outage_s: Range = (0.5, 6.0)
    """Mean length of an outage, log: recorded outages last 1 to 7 s on average (fit report)."""
    handover_every_s: Range = (5.0, 20.0)
    """Time at one edge node in `handover`, log."""
    handover_outage_s: Range = (0.1, 0.5)
    """Silence of all access links at each handover, log."""
    handover_weak: Range = (0.05, 0.3)
    """Rate of the links to the other edge nodes, over the one at hand."""
    handover_rtt_s: float = 0.02
    """Added to the round trip to the other edge nodes."""
