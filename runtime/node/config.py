"""What a worker is told on its command line."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import ConfigError
from runtime.presets import Mode, NodeEmulation


@dataclass(frozen=True, slots=True)
class NextNode:
    """A node to send to, as `--connect` names it."""

    address: str
    server_key: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Run a node: serve its share of every plan until SIGTERM."""

    tier: Literal["edge", "cloud"]
    """Tier of this node."""

    model: tuple[str, ...]
    """Models to run: torchvision:NAME, timm:NAME or package.module:factory. A node runs nothing else."""

    bind: str = "tcp://127.0.0.1:*"
    """Address for control messages; tensors use the next port. `*` picks a free pair. Anything but loopback needs
    --keys or --insecure."""

    name: str = ""
    """Name of this node in the deployment; empty takes the tier's."""

    connect: tuple[str, ...] = ()
    """Nodes to send to, NAME=ADDRESS or NAME=ADDRESS,PUBLIC_KEY: an edge node names the cloud here, and the other edge
    nodes that may run tiles for it, by their names in the deployment."""

    weights: str | None = None
    """seeded, pretrained, or a file (safetensors, or a state dict that loads with weights_only); none: a factory's own,
    seeded for a library's model."""

    seed: int = 0
    """Seed of seeded weights; device and nodes must agree."""

    batch_size: int = 1
    """Images per request; fixed when the model is traced."""

    queue: int = 16
    """Requests that may wait; one more is answered `busy` at once."""

    keys: Path | None = None
    """Folder from `offcut keys`: NAME.key_secret is this node's own, every *.key in it may connect."""

    insecure: bool = False
    """Allow an address that is not loopback without keys: everybody who reaches it can use the node."""

    threads: int = 1
    """Torch threads. Outputs are bit-equal only between processes with the same number."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where layers run; auto takes CUDA when it is there."""

    preset: str | None = None
    """Take as long as another machine would: rpi4, desktop, jetson or gpu."""

    slow_down: float | None = None
    """Instead of a preset: take so many times longer than one idle thread of this machine."""

    mode: Mode | None = None
    """How an emulated node works. compute: really, then it waits. replay: it answers with the activations of a fixed
    sample, whatever was sent. Left out: replay for machines faster than this one, else compute."""

    exit_with_stdin: bool = False
    """For the program that starts this node: end when standard input closes, and take commands from it, one JSON object
    a line, such as {"contention": 2.0}; each is answered with OK or ERROR."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        if not self.model:
            raise ConfigError("expected at least one --model, got none; name one, such as torchvision:resnet50")
        for name, low in (("queue", 1), ("threads", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value < low:
                raise ConfigError(f"expected --{name.replace('_', '-')} >= {low}, got {value}")
        if not self.name:
            object.__setattr__(self, "name", self.tier)
        self.next_nodes()
        self.emulation()

    def next_nodes(self) -> dict[str, NextNode]:
        """Parse `connect`.

        Raises:
            ConfigError: when an entry is not NAME=ADDRESS[,PUBLIC_KEY].
        """
        return parse_nodes(self.connect)

    def emulation(self) -> NodeEmulation | None:
        """What the node pretends to be; None for itself.

        Raises:
            ConfigError: naming the option.
        """
        if self.preset is None and self.slow_down is None:
            if self.mode is not None:
                raise ConfigError(f"expected --preset or --slow-down beside --mode {self.mode}, got neither")
            return None
        return NodeEmulation(preset=self.preset, slow_down=self.slow_down, mode=self.mode)

    def torch_device(self) -> str:
        """The device that layers run on.

        Raises:
            ConfigError: when CUDA is asked for and not there.
        """
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("expected a CUDA device for --device cuda, got none; use --device cpu or auto")
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


def parse_nodes(entries: Iterable[str]) -> dict[str, NextNode]:
    """Parse nodes to connect to, by name.

    Raises:
        ConfigError: when an entry is not NAME=ADDRESS[,PUBLIC_KEY].
    """
    nodes = {}
    for entry in entries:
        name, found, rest = entry.partition("=")
        address, _, key = rest.partition(",")
        if not (name and found and address.startswith("tcp://")):
            raise ConfigError(
                f"expected --connect NAME=tcp://HOST:PORT[,PUBLIC_KEY], got {entry!r}; for example "
                "--connect cloud=tcp://127.0.0.1:7001"
            )
        nodes[name] = NextNode(address, key.encode() if key else None)
    return nodes
