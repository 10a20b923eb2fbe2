"""What the sub-commands of `offcut` take: the fields and their texts are the `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from runtime.errors import ConfigError
from runtime.types import CODECS


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysConfig:
    """Make CURVE key pairs: one for the device, one for each node."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Where to put them; a node gets such a folder with `offcut worker --keys`."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names of the device and the nodes, such as: device edge0 cloud."""

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ConfigError: when there is none, or one twice.
        """
        if not self.names:
            raise ConfigError("expected at least one name, got none; name the device and each node: device edge0 cloud")
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"expected every name once, got {' '.join(self.names)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InferConfig:
    """Run pictures through a deployment and print answers, plans and where the time went.

    A row is printed as each answer comes. Times are milliseconds. total: request in to result out, `!` where that was
    past the deadline. device, edge, cloud: computing there. up, down: transfers, towards the cloud and back. codec:
    packing and compressing tensors. rest: queues, decision, hand-overs. outcome: remote (nodes answered), device (the
    plan needs no node), local (the device finished what a node did not; [1] is the reason, below), failed.
    """

    deployment: Annotated[Path, tyro.conf.Positional]
    """A deployment.toml."""

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JPEG or PNG files; with batch_size N in the deployment, every N of them make one request."""

    policy: str | None = None
    """Rule that picks the plan: device-only, edge-only, cloud-only, planner, fixed:I,J[@EDGE] (`offcut layers` shows
    where to cut), or the folder of a trained policy (checkpoints/NAME). None takes cloud-only, or edge-only where there is
    no cloud."""

    shadow: str | None = None
    """A policy, named as for --policy, that is asked too and never obeyed: what it would have done goes into
    events.jsonl, beside every decision, and into the summary."""

    codec: str | None = None
    """Codec of the plan: auto, raw, lossless, fp16, int8; the last two need lossless_only = false."""

    deadline_s: float | None = None
    """Seconds each request has; none takes the deployment's, or three times the predicted device-only time (at least
    50 ms and two round trips)."""

    repeat: int = 1
    """Run the inputs this many times: the first use of a plan pays for building its segments."""

    verify: bool = False
    """Also run the whole model here, and print how far the outputs are from it."""

    top: int = 5
    """How many of the largest outputs to print."""

    json: bool = False
    """Print one JSON object per request on standard output, and nothing else there."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        if not self.inputs:
            raise ConfigError("expected at least one picture, got none; name a JPEG or PNG file")
        for name in ("repeat", "top"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected --{name} >= 1, got {getattr(self, name)}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"expected --deadline-s > 0, got {self.deadline_s}")
        if self.codec is not None and self.codec not in CODECS:
            raise ConfigError(f"expected --codec among {', '.join(CODECS)}, got {self.codec!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    """Show the last session of a deployment and ask its nodes how they are; exits with 1 when none answers.

    k: how many times slower the node computes than when its model was profiled, 1.00 when idle. queue: requests that
    wait. waits: how long a new one would. busy: share of the last seconds spent computing. rtt: round trip from here.
    breaker: what the running session makes of the node: closed (used), open (left out), half-open (being tried).
    """

    deployment: Annotated[Path, tyro.conf.Positional]
    """A deployment.toml."""

    timeout_s: float = 2.0
    """How long to wait for nodes."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        _check_timeout(self.timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Show the plans that are predicted to be fastest now, where their time would go, and why the others lose."""

    deployment: Annotated[Path, tyro.conf.Positional]
    """A deployment.toml."""

    input_bytes: int | None = None
    """Bytes of one request; none takes the tensor's own, or a typical picture's."""

    top: int = 5
    """How many plans to print."""

    listen_s: float = 2.0
    """How long to listen to the nodes before planning: links are measured meanwhile."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        if self.top < 1:
            raise ConfigError(f"expected --top >= 1, got {self.top}")
        if self.input_bytes is not None and self.input_bytes < 1:
            raise ConfigError(f"expected --input-bytes >= 1, got {self.input_bytes}")
        if not 0.0 <= self.listen_s < float("inf"):
            raise ConfigError(f"expected --listen-s >= 0, got {self.listen_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """Check a deployment: the file, the keys, that every node answers and runs the same model; exits with 1 if not."""

    deployment: Annotated[Path, tyro.conf.Positional]
    """A deployment.toml."""

    timeout_s: float = 2.0
    """How long to wait for nodes."""

    quick: bool = False
    """Compare the names of models only: weights and torch version are compared by loading the model here."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        _check_timeout(self.timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersConfig:
    """List the layers of a model, and what crosses the network when it is cut before each of them.

    A cut before layer i is `fixed:i,i` (device, then cloud) or `fixed:i,j` (device, edge, then cloud from layer j on).
    """

    model: Annotated[str, tyro.conf.Positional]
    """torchvision:NAME, timm:NAME or package.module:factory."""

    batch_size: int = 1
    """Images per request."""

    encoded_bytes: int | None = None
    """Size of one of your JPEG or PNG files, to compare with; none takes a typical camera's."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        for name in ("batch_size", "encoded_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"expected --{name.replace('_', '-')} >= 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """Measure layers, segments and how well cuts pack, on this machine and on the nodes of a deployment."""

    deployment: Annotated[Path | None, tyro.conf.Positional] = None
    """A deployment.toml: its model is measured here and on its nodes."""

    model: tuple[str, ...] = ()
    """Models to measure here, without any deployment: torchvision:NAME, timm:NAME or package.module:factory."""

    weights: str | None = None
    """Of --model: seeded, pretrained, or a file; none: a factory's own, seeded for a library's model."""

    seed: int = 0
    """Seed of seeded weights."""

    batch_size: int = 1
    """Of --model: images per request."""

    threads: int = 1
    """Torch threads; a profile serves workers with the same number."""

    reprofile: bool = False
    """Forget what this machine has measured before, for example when its processor was slowed down for good."""

    json: Path | None = None
    """Write everything to this file."""

    def __post_init__(self) -> None:
        """Check what is to be measured.

        Raises:
            ConfigError: naming the field.
        """
        if (self.deployment is None) == (not self.model):
            raise ConfigError("expected a deployment.toml or --model SPEC, one of the two; see `offcut measure --help`")
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected --{name.replace('_', '-')} >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceConfig:
    """Run a paper's experiment on emulated machines and links: loadpart or d3. Run again, it goes on where it stopped.

    Every node is a real process on this machine. Nodes slower than it compute and wait; faster ones answer with the
    activations of a fixed sample after the time that they would need, and tables call them replayed. The constants are
    in agent/reproduce/grids.py. It takes the better part of an hour on two idle cores.
    """

    paper: Annotated[Literal["loadpart", "d3"], tyro.conf.Positional]
    """loadpart: six networks under seven load levels of a server and four uplink rates. d3: five networks on a device,
    an edge node and a cloud behind four backbones."""

    out: Path | None = None
    """Folder for results.jsonl, table.md, table.csv, pictures and TensorBoard; none takes runs/reproduce-PAPER, with
    -quick behind it."""

    quick: bool = False
    """Two small networks, few cells, one request each: shows that everything works, in two minutes."""

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        suffix = "-quick" if self.quick else ""
        return Path("runs") / f"reproduce-{self.paper}{suffix}" if self.out is None else self.out


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """Find out how far the twin's seconds are from the runtime's, here or in your own deployment, and write a correction.

    Without --from-logs real processes on this machine run every model, emulated as slow as --slow-down says: first one
    request at a time, to which the correction is fitted, then the worlds of every scenario, in which it is checked
    against what was never fitted to. It takes minutes per model and scenario, and wants an idle machine.

    With --from-logs the events of your own sessions take the place of the processes.
    """

    model: tuple[str, ...] = ("torchvision:resnet18",)
    """Models: torchvision:NAME, timm:NAME or package.module:factory. With --from-logs the one that the log is of; its
    profile must ship with Offcut."""

    scenario: tuple[str, ...] = ("static", "both")
    """Scenarios to check in: static, bandwidth, load, both, streaming, contention, outage, handover."""

    slow_down: tuple[float, float, float] = (12.0, 4.0, 3.0)
    """How many times slower than this machine the device, the edge node and the cloud pretend to be. From 3 on a node
    really computes; a faster one replays a fixed sample after the time it would need."""

    probes: int = 60
    """Requests per model that the correction is fitted to."""

    requests: int = 100
    """Requests per model, scenario and seed that it is checked with."""

    seeds: int = 2
    """Worlds per model and scenario."""

    from_logs: Path | None = None
    """The events.jsonl of a session, or its folder, instead of running anything."""

    out: Path = Path("correction.json")
    """Where the correction goes; `env.correction.corrected` gives sites and scenarios with it."""

    json: Path | None = None
    """Write everything that was found to this file."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field.
        """
        for name in ("probes", "requests", "seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected --{name} >= 1, got {getattr(self, name)}")
        if not self.model or not self.scenario:
            raise ConfigError("expected at least one --model and one --scenario")
        if self.from_logs is not None and len(self.model) != 1:
            raise ConfigError(f"expected the one model that the log is of, got {len(self.model)}")
        if min(self.slow_down) <= 0.0:
            raise ConfigError(f"expected --slow-down of three numbers above 0, got {self.slow_down}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Compare policies in the same worlds, and write tables, pictures and TensorBoard logs.

    Statistics are of latencies over each site's best latency on idle nodes. Ratios are to the best of the baselines, and
    to each; intervals are bootstrapped over worlds. Worlds and sites are drawn from seeds that no training uses: those
    of trainings are below 1000000.
    """

    policies: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Rules (planner, loadpart, d3+tuned, fixed:10,20 and so on), checkpoints (checkpoints/NAME, with its guard;
    checkpoints/NAME:raw without), bounds (clairvoyant, rollout). None: the rules of the README."""

    scenarios: tuple[str, ...] = ()
    """What happens around a site: static, bandwidth, load, both, streaming, contention, outage, handover; none: all."""

    models: tuple[str, ...] = ()
    """Shipped models, or random:NUMBER; none: all shipped ones. Those that no policy was trained on count apart too."""

    baselines: tuple[str, ...] = ("planner", "planner-priced", "dads-heavy")
    """Policies that ratios are to."""

    bounds: bool = True
    """Also play the two that know the future; twin only."""

    traces: Path | None = None
    """Folder with network/ and load/ to play recordings of; none plays the families fitted to them."""

    split: Literal["validation", "train", "all"] = "validation"
    """Which files of --traces."""

    per_model: int = 2
    """Sites of each model, with machines of their own."""

    episodes: int = 4
    """Worlds of each site and scenario."""

    num_requests: int = 128
    """Requests of each world."""

    input_kind: Literal["encoded", "image", "tensor"] = "encoded"
    """What requests bring."""

    seed: int = 1_000_000
    """First seed of sites and worlds."""

    resamples: int = 1000
    """Bootstrap draws."""

    self_play: bool = False
    """In contention the other devices decide by the same policy as the one that is compared, instead of by the planner;
    twin only, and slower: one decision at a time."""

    backend: Literal["twin", "live"] = "twin"
    """twin: simulated; live: real processes and sockets, links and machines emulated, in real time."""

    workers: int = 2
    """Processes side by side; twin only."""

    out: Path | None = None
    """Folder for table.md, table.csv, episodes.csv, latencies.npz, pictures and TensorBoard; none: runs/compare-BACKEND,
    with -quick behind it."""

    quick: bool = False
    """Two small models, three scenarios, few worlds, unless told otherwise: shows that everything works, in a minute."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: naming the field.
        """
        for name in ("per_model", "episodes", "num_requests", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected --{name.replace('_', '-')} >= 1, got {getattr(self, name)}")
        for name in ("seed", "resamples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"expected --{name} >= 0, got {getattr(self, name)}")
        if self.self_play and self.backend == "live":
            raise ConfigError(
                "expected --self-play with --backend twin, got live, where the other devices have a planner"
            )

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        suffix = "-quick" if self.quick else ""
        return Path("runs") / f"compare-{self.backend}{suffix}" if self.out is None else self.out


def _check_timeout(timeout_s: float) -> None:
    if not timeout_s > 0:
        raise ConfigError(f"expected --timeout-s > 0, got {timeout_s}")
