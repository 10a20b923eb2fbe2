"""The two experiments: which cells there are, how their machines are emulated, how conditions change while they run."""

import itertools
from dataclasses import dataclass
from typing import Protocol

from agent.reproduce.grids import (
    LAN_DELAY_S,
    MAX_LOAD_HZ,
    PEER_DELAY_S,
    WAN_DELAY_S,
    D3Grid,
    Grid,
    Level,
    LoadpartGrid,
    Network,
)
from agent.reproduce.results import Cell
from runtime.deployment import ModelConfig
from runtime.device.session import Session
from runtime.model.inputs import find_input
from runtime.planning.estimators import Readings
from runtime.presets import PRESETS, LinkConfig, LinkEmulation, NodeEmulation
from runtime.profiles.shipped import load_shipped_profile
from runtime.testbed.arrivals import LoadShape
from runtime.testbed.cluster import Cluster
from runtime.testbed.rate import LinkShape
from runtime.types import DEVICE_NODE, Plan

EDGE, CLOUD = "edge0", "cloud"

KIND = "tensor"
"""What the papers send: the model's input tensor."""


class Paper(Protocol):
    """One experiment."""

    @property
    def name(self) -> str:
        """As the command line names it."""

    @property
    def grid(self) -> Grid:
        """The pinned constants."""

    @property
    def axis(self) -> str:
        """The condition that plots have along their x axis."""

    @property
    def machines(self) -> dict[str, str]:
        """Preset of every node, by name."""

    def cells(self) -> tuple[Cell, ...]:
        """Every cell, one network after the other."""

    def rules(self, model: str) -> tuple[str, ...]:
        """Rules that are compared on this network, in the order in which they take turns."""

    def start(self, model: str) -> Cluster:
        """Start nodes and links for a network."""

    def apply(self, cluster: Cluster, session: Session, cell: Cell) -> None:
        """Make the conditions those of a cell."""

    def sensors(self, session: Session) -> tuple[Plan, ...]:
        """Plans whose requests renew every reading that a change of conditions makes stale."""

    def expected(self, readings: Readings, cell: Cell) -> dict[str, tuple[float, float]]:
        """Pairs of what is read and what is emulated, by name."""

    def request_s(self, cell: Cell) -> float:
        """Rough seconds that one request takes, for the time that is left."""


@dataclass(frozen=True)
class LoadpartPaper:
    """A device and one server whose load and link change."""

    grid: LoadpartGrid
    name: str = "loadpart"
    axis: str = "level"

    @property
    def machines(self) -> dict[str, str]:
        """Preset of every node, by name."""
        return {DEVICE_NODE: self.grid.device, EDGE: self.grid.server}

    def cells(self) -> tuple[Cell, ...]:
        """Every cell; conditions that are slow to change change last."""
        found = []
        for model in self.grid.models:
            for level in self.grid.levels:
                for bps in self.grid.rates_bps:
                    condition = (("level", level.name), ("mbps", f"{bps / 1e6:g}"))
                    found.append(Cell(model, KIND, condition))
                    if level.name in self.grid.encoded_levels and bps in self.grid.encoded_rates_bps:
                        found.append(Cell(model, "encoded", condition))
        return tuple(found)

    def rules(self, model: str) -> tuple[str, ...]:
        """Rules that are compared on this network, in the order in which they take turns."""
        del model
        return self.grid.rules

    def start(self, model: str) -> Cluster:
        """Start the server and its link."""
        link = LinkConfig(between=(DEVICE_NODE, EDGE), emulate=LinkEmulation(delay_s=LAN_DELAY_S))
        config = ModelConfig(spec=model, input_kind=KIND)
        return Cluster(config, edges=(EDGE,), has_cloud=False, emulate=_emulate(self.machines), links=(link,))

    def apply(self, cluster: Cluster, session: Session, cell: Cell) -> None:
        """Shape the link, load the server."""
        level, bps = self._conditions(cell)
        _shape(cluster, (DEVICE_NODE, EDGE), bps, LAN_DELAY_S)
        cluster.set_contention(EDGE, level.contention)
        idle_s = sum(session.problem(KIND).profile.nodes[EDGE].layer_s)
        rate_hz = min(level.rate_frac / idle_s, MAX_LOAD_HZ)
        cluster.set_load(EDGE, LoadShape(rates_hz=(rate_hz,)))

    def sensors(self, session: Session) -> tuple[Plan, ...]:
        """Everything on the server."""
        n, first = session.graph.num_layers, session.graph.entry(KIND)
        return (Plan.split(n, first, n, edge_nodes=(EDGE,), codec="raw"),)

    def expected(self, readings: Readings, cell: Cell) -> dict[str, tuple[float, float]]:
        """The uplink's rate and the server's k."""
        level, bps = self._conditions(cell)
        rate = (readings.rate_bps(DEVICE_NODE, EDGE), bps)
        return {f"{DEVICE_NODE}>{EDGE}": rate, f"k {EDGE}": (readings.k(EDGE), level.contention)}

    def request_s(self, cell: Cell) -> float:
        """Rough seconds that one request takes, for the time that is left."""
        return _request_s(cell.model, self.machines, self._conditions(cell)[1])

    def _conditions(self, cell: Cell) -> tuple[Level, float]:
        wanted = dict(cell.condition)
        level = next(level for level in self.grid.levels if level.name == wanted["level"])
        return level, 1e6 * float(wanted["mbps"])


@dataclass(frozen=True)
class D3Paper:
    """A device, some edge nodes in one place and a cloud behind one of several backbones."""

    grid: D3Grid
    name: str = "d3"
    axis: str = "network"

    @property
    def machines(self) -> dict[str, str]:
        """Preset of every node, by name."""
        return {DEVICE_NODE: self.grid.device, **dict.fromkeys(self.edges, self.grid.edge), CLOUD: self.grid.cloud}

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the edge nodes, each of which may be a head."""
        return tuple(f"edge{index}" for index in range(self.grid.num_edges))

    def cells(self) -> tuple[Cell, ...]:
        """Every cell."""
        found = []
        for model in self.grid.models:
            for network in self.grid.networks:
                found.append(Cell(model, KIND, (("network", network.name),)))
                if network.name in self.grid.encoded_networks:
                    found.append(Cell(model, "encoded", (("network", network.name),)))
        return tuple(found)

    def rules(self, model: str) -> tuple[str, ...]:
        """Rules that are compared on this network, in the order in which they take turns; Neurosurgeon on chains."""
        is_chain = model in self.grid.chains
        return tuple(rule for rule in self.grid.rules if is_chain or not rule.startswith("neurosurgeon"))

    def start(self, model: str) -> Cluster:
        """Start edge nodes, cloud and the links between all of them."""
        near = LinkEmulation(rate_bps=self.grid.device_edge_bps, delay_s=LAN_DELAY_S)
        beside = LinkEmulation(rate_bps=self.grid.edge_edge_bps, delay_s=PEER_DELAY_S)
        far = LinkEmulation(delay_s=WAN_DELAY_S)
        links = (
            *(LinkConfig(between=(DEVICE_NODE, edge), emulate=near) for edge in self.edges),
            *(LinkConfig(between=pair, emulate=beside) for pair in itertools.combinations(self.edges, 2)),
            *(LinkConfig(between=(edge, CLOUD), emulate=far) for edge in self.edges),
            LinkConfig(between=(DEVICE_NODE, CLOUD), emulate=far),
        )
        config = ModelConfig(spec=model, input_kind=KIND)
        return Cluster(config, edges=self.edges, emulate=_emulate(self.machines), links=links)

    def apply(self, cluster: Cluster, session: Session, cell: Cell) -> None:
        """Give the links to the cloud the rates of a backbone."""
        del session
        network = self._network(cell)
        for edge in self.edges:
            _shape(cluster, (edge, CLOUD), network.edge_cloud_bps, WAN_DELAY_S)
        _shape(cluster, (DEVICE_NODE, CLOUD), network.device_cloud_bps, WAN_DELAY_S)

    def sensors(self, session: Session) -> tuple[Plan, ...]:
        """The input to the cloud, straight and through each edge node."""
        n, first = session.graph.num_layers, session.graph.entry(KIND)
        heads = ((), *((edge,) for edge in self.edges))
        return tuple(Plan.split(n, first, first, edge_nodes=head, codec="raw") for head in heads)

    def expected(self, readings: Readings, cell: Cell) -> dict[str, tuple[float, float]]:
        """The rates of the device's links and the cloud's; those between edge nodes never change."""
        network = self._network(cell)
        rates = {(DEVICE_NODE, CLOUD): network.device_cloud_bps}
        for edge in self.edges:
            rates[DEVICE_NODE, edge] = self.grid.device_edge_bps
            rates[edge, CLOUD] = network.edge_cloud_bps
        return {f"{a}>{b}": (readings.rate_bps(a, b), bps) for (a, b), bps in rates.items()}

    def request_s(self, cell: Cell) -> float:
        """Rough seconds that one request takes, for the time that is left."""
        return _request_s(cell.model, self.machines, self._network(cell).device_cloud_bps)

    def _network(self, cell: Cell) -> Network:
        wanted = dict(cell.condition)
        return next(network for network in self.grid.networks if network.name == wanted["network"])


def _emulate(machines: dict[str, str]) -> dict[str, NodeEmulation]:
    """As fast as the presets: slower machines compute, faster ones replay."""
    return {name: NodeEmulation(preset=preset) for name, preset in machines.items()}


def _shape(cluster: Cluster, ends: tuple[str, str], bps: float, delay_s: float) -> None:
    shape = LinkShape(rates_bps=(bps,), delay_s=delay_s)
    cluster.link(*ends).shape(up=shape, down=shape)


def _request_s(model: str, machines: dict[str, str], bps: float) -> float:
    """Half of what the device alone takes and half of what sending the input takes."""
    shipped = load_shipped_profile(model)
    here_s = PRESETS[machines[DEVICE_NODE]].slow_down * sum(shipped.profile.layer_s[shipped.graph.num_stage_layers :])
    return 0.5 * here_s + 0.5 * 8.0 * find_input(shipped.graph).tensor.nbytes / bps
