"""What is run, pinned before the first run and not changed to suit its results: machines, levels, rates, counts.

LoADPart: Liu, Zheng, Li, Guo, ICDCS 2022. D3: Zhang, Xiang, Zhang, Li, Zhu, Gu, arXiv 2101.05952. Both as reconstructed:
networks, load levels and rates are recalled, not read. Each constant says where it is from, or that it is a guess.
"""

from dataclasses import dataclass, replace
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class Level:
    """One load level of the server: a co-tenant, and background requests that queue."""

    name: str
    contention: float
    """How many times longer everything takes."""
    rate_frac: float
    """Background requests per second, as a fraction of what the idle server could answer."""


@dataclass(frozen=True, slots=True)
class Network:
    """One backbone: the rates at which the edge node and the device reach the cloud."""

    name: str
    edge_cloud_bps: float
    device_cloud_bps: float


LEVELS = (
    Level("0", 1.0, 0.0),
    Level("30", 1.43, 0.21),
    Level("50", 2.0, 0.15),
    Level("70", 3.33, 0.09),
    Level("90", 10.0, 0.03),
    Level("100l", 30.0, 0.01),
    Level("100h", 90.0, 0.0033),
)
"""GPU utilisation of the background, per cent, at two intensities where it says no more. Guess: a processor that is
shared evenly and used to a share u by others takes 1 / (1 - u) times longer; from 90 on utilisation tells little, and
two more steps of three follow, the last below the cap of k (100). Background requests take 0.3 of the loaded server's
time at each level but the first. Guess: enough to keep its readings alive, too few to fill its queue."""

MAX_LOAD_HZ = 20.0
"""Background requests come no more often: above it the cores of this machine would be what is loaded, not the emulated
server. Only levels below 100 of the quicker networks reach it, where the queue costs least."""

LAN_DELAY_S = 0.001
"""One way, device - edge. Guess: a Wi-Fi in the same room."""

PEER_DELAY_S = 0.0002
"""One way, between two edge nodes. Guess: one switch, and the drivers at both ends."""

WAN_DELAY_S = 0.01
"""One way, to the cloud. Guess: a data centre of the same country; the papers' models count rates alone."""

DEADLINE_S = 3600.0
"""The papers know no deadline: none is near, and the device finishes nothing by itself."""


LATE_FRAC = 0.1
"""A request whose layers on the device took this share longer than what is emulated shows this machine, not that one:
it is repeated, and counted. Guess: scheduling noise of an idle machine is below."""

MAX_REPEATS = 8
"""First uses of a plan and late requests in a row that do not count; a rule that needs more counts as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadpartGrid:
    """LoADPart's experiment: load levels x uplink rates x networks."""

    models: tuple[str, ...] = (
        "torchvision:alexnet",
        "torchvision:squeezenet1_1",
        "torchvision:vgg16",
        "torchvision:resnet18",
        "torchvision:resnet50",
        "timm:xception",
    )
    """The recalled six."""
    levels: tuple[Level, ...] = LEVELS
    """Loads of the server."""
    rates_bps: tuple[float, ...] = (4e6, 8e6, 16e6, 32e6)
    """Both directions of the only link. Octaves around the recalled default of 8 Mbps, within the recalled 1 to 64."""
    rules: tuple[str, ...] = ("edge-only", "neurosurgeon", "neurosurgeon-k", "dads-light", "loadpart", "device-only")
    """In the order in which they take turns."""
    repeat: int = 3
    """Requests that count, per rule and cell."""
    encoded_levels: tuple[str, ...] = ("0", "90", "100h")
    """Levels at which the same is also sent encoded."""
    encoded_rates_bps: tuple[float, ...] = (8e6,)
    """The same with a photograph as its camera wrote it, in fewer cells."""
    device: str = "rpi4"
    """Preset."""
    server: str = "gpu"
    """Presets; the server is the only edge node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class D3Grid:
    """D3's experiment: backbones x networks."""

    models: tuple[str, ...] = (
        "torchvision:alexnet",
        "torchvision:vgg16",
        "torchvision:resnet18",
        "timm:darknet53",
        "timm:inception_v4",
    )
    """The recalled five."""
    chains: tuple[str, ...] = ("torchvision:alexnet", "torchvision:vgg16")
    """Where Neurosurgeon is compared with, as in the paper."""
    networks: tuple[Network, ...] = (
        Network("wifi", 31.53e6, 18.75e6),
        Network("4g", 13.79e6, 6.12e6),
        Network("5g", 22.75e6, 11.64e6),
        Network("optical", 50.23e6, 25.8e6),
    )
    """Recalled with little confidence. Guess: device - cloud over the optical backbone, which is not recalled, is to
    edge - cloud as in the geometric mean of the other three (0.513)."""
    device_edge_bps: float = 84.95e6
    """Recalled with little confidence: 5 GHz Wi-Fi. Every edge node is reached alike."""
    num_edges: int = 4
    """Recalled with little confidence: four where tiles are used. HPA alone leaves all but one of them idle."""
    edge_edge_bps: float = 1e9
    """Guess: desktops in one room, on gigabit Ethernet."""
    rules: tuple[str, ...] = (
        "cloud-only",
        "edge-only",
        "neurosurgeon@cloud",
        "dads-light@cloud",
        "d3-hpa",
        "d3",
        "optimal",
        "planner",
        "device-only",
    )
    """In the order in which they take turns: HPA alone (d3-hpa) just before HPA with tiles (d3)."""
    repeat: int = 5
    """Requests that count, per rule and cell."""
    encoded_networks: tuple[str, ...] = ("wifi",)
    """Networks over which the same is also sent encoded."""
    device: str = "rpi4"
    """Preset."""
    edge: str = "desktop"
    """Preset."""
    cloud: str = "gpu"
    """Preset."""


Grid = LoadpartGrid | D3Grid


def fingerprint(grid: Grid) -> str:
    """Short text that is another one as soon as any constant is."""
    constants = (grid, MAX_LOAD_HZ, LAN_DELAY_S, PEER_DELAY_S, WAN_DELAY_S, LATE_FRAC, MAX_REPEATS)
    return sha256(repr(constants).encode()).hexdigest()[:12]


LOADPART = LoadpartGrid()
D3 = D3Grid()

QUICK_LOADPART = replace(
    LOADPART,
    models=("torchvision:alexnet", "torchvision:squeezenet1_1"),
    levels=(LEVELS[0], LEVELS[-1]),
    rates_bps=(16e6,),
    repeat=1,
    encoded_levels=("100h",),
    encoded_rates_bps=(16e6,),
)
"""Shows that everything works, not what comes of it."""

QUICK_D3 = replace(
    D3, models=("torchvision:alexnet", "torchvision:resnet18"), networks=D3.networks[:2], num_edges=2, repeat=1
)
