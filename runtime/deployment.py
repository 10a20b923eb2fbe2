"""What runs where: the model, the nodes, the constraints and the keys of one deployment, and `deployment.toml`.

What may be emulated on a test bed stands in the same file: `runtime.presets`.

    [model]
    spec = "torchvision:resnet50"

    [constraints]
    deadline_s = 0.5

    [[node]]
    name = "edge0"
    tier = "edge"
    address = "tcp://127.0.0.1:7001"
    emulate = { preset = "rpi4" }                      # or { slow_down = 4.0, mode = "compute" }

    [[link]]
    between = ["device", "edge0"]
    emulate = { rate_bps = 8e6, delay_s = 0.02 }       # or { trace = "lte.csv", scale = 0.3, jitter_s = 0.005 }

    [device]
    emulate = { preset = "rpi4" }

Every record checks itself when it is made and raises `ConfigError`: the field, what was expected, what was got.
`load_deployment` adds the file and the line.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from runtime import toml_lines
from runtime.address import Endpoint
from runtime.errors import ConfigError
from runtime.presets import LinkConfig, LinkEmulation, NodeEmulation
from runtime.types import DEVICE_NODE, INPUT_KINDS, Constraints, Tier

SEEDED = "seeded"
PRETRAINED = "pretrained"
"""The two words that `ModelConfig.weights` knows; anything else is a path."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_BIND_HOSTS = ("*", "0.0.0.0", "[::]")
_Z85_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class _FieldError(ConfigError):
    """A `ConfigError` that knows which field it means, so that the reader of a file can name the line."""

    def __init__(self, path: toml_lines.Path, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model runs, with which weights, on what input."""

    spec: str
    """`torchvision:NAME`, `timm:NAME` or `package.module:factory`."""
    weights: str | None = None
    """`seeded` (random, reproducible), `pretrained` (what the library offers), or the path of a weights file; left out:
    a factory's own, `seeded` for a library's model."""
    seed: int = 0
    """Seed of `seeded` weights; the same seed gives the same weights on every machine of one kind."""
    input_kind: str = "encoded"
    """What requests bring: `encoded` (JPEG or PNG bytes), `image` (uint8) or `tensor` (the model's own input)."""
    batch_size: int = 1
    """Samples per request."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field, its range and its value.
        """
        _check_text(self.spec, "spec")
        _check("spec", self.spec, all(self.spec.partition(":")), "LIBRARY:NAME, such as 'torchvision:resnet50'")
        if self.weights is not None:
            _check_text(self.weights, "weights")
        _check_whole(self.seed, "seed", 0)
        _check("input_kind", self.input_kind, self.input_kind in INPUT_KINDS, f"one of {', '.join(INPUT_KINDS)}")
        _check_whole(self.batch_size, "batch_size", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """One worker process, as the device reaches it."""

    name: str
    """Unique name, as plans and tables write it: letters, digits, `_`, `.`, `-`."""
    tier: Tier
    """`EDGE` or `CLOUD`."""
    address: str
    """Where it listens: `tcp://HOST:PORT`; tensors use the next port."""
    public_key: str | None = None
    """Its CURVE public key (Z85, 40 characters), as `offcut keys` printed it; None: the connection is not encrypted."""
    emulate: NodeEmulation | None = None
    """What it pretends to be when `Cluster.from_deployment` starts it; a real node is told on its own command line."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field, its range and its value.
        """
        _check_text(self.name, "name")
        _check("name", self.name, bool(_NAME.fullmatch(self.name)), "1 to 64 letters, digits, '_', '.' or '-'")
        _check("name", self.name, self.name != DEVICE_NODE, "any other name, this one is the device's own")
        _check("tier", self.tier, self.tier in (Tier.EDGE, Tier.CLOUD), "edge or cloud (the device is not listed)")
        _check_text(self.address, "address")
        with _field("address"):
            endpoint = self.endpoint
        can_connect = endpoint.port is not None and endpoint.host not in _BIND_HOSTS
        _check("address", self.address, can_connect, "one to connect to, with a host and a port number")
        if self.public_key is not None:
            _check_text(self.public_key, "public_key")
            is_key = bool(_Z85_KEY.fullmatch(self.public_key))
            _check("public_key", self.public_key, is_key, "40 characters of Z85, as `offcut keys` prints them")

    @property
    def endpoint(self) -> Endpoint:
        """The address, parsed."""
        return Endpoint.parse(self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """How the device proves who it is, and whether it may talk in the clear."""

    secret_key: str | None = None
    """Path of the device's own key file, made by `offcut keys`; needed as soon as a node has a public key."""
    insecure: bool = False
    """True: nodes that are not on this machine may be used without keys. Anyone on the network can then read and alter
    what is sent."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field, its range and its value.
        """
        if self.secret_key is not None:
            _check_text(self.secret_key, "secret_key")
        _check_flag(self.insecure, "insecure")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One model on one device and the nodes that help it."""

    model: ModelConfig
    """The model that every node of the deployment runs."""
    nodes: tuple[NodeConfig, ...]
    """The edge nodes and at most one cloud node, the device excluded; at least one."""
    constraints: Constraints = field(default_factory=Constraints)
    """What every plan must respect."""
    security: SecurityConfig = field(default_factory=SecurityConfig)
    """Keys, or the permission to do without."""
    links: tuple[LinkConfig, ...] = ()
    """The links that a test bed emulates."""
    device_emulate: NodeEmulation | None = None
    """What the device itself pretends to be, in every session; never `replay`, since its answers are the user's."""

    def __post_init__(self) -> None:
        """Check what no single record can: names, addresses, tiers, keys and constraints together.

        Raises:
            ConfigError: naming the field, its range and its value.
        """
        _check("nodes", self.nodes, bool(self.nodes), "at least one edge or cloud node")
        for index, node in enumerate(self.nodes):
            _check_against_earlier(index, node, self.nodes[:index])
            _check_keys_of(index, node, self.security)
        for index, link in enumerate(self.links):
            _check_link(index, link, self)
        if self.device_emulate is not None and self.device_emulate.is_replay:
            message = "expected mode compute and slow_down >= 1 for the device: its answers are the user's, got replay"
            raise _FieldError(("device", "emulate"), message)
        _check_constraints(self.constraints)

    @property
    def edges(self) -> tuple[NodeConfig, ...]:
        """The edge nodes, in the order of the file."""
        return tuple(node for node in self.nodes if node.tier is Tier.EDGE)

    @property
    def cloud(self) -> NodeConfig | None:
        """The cloud node, if there is one."""
        return next((node for node in self.nodes if node.tier is Tier.CLOUD), None)

    def node(self, name: str) -> NodeConfig:
        """Find a node by name.

        Raises:
            ConfigError: naming the nodes there are.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        names = [node.name for node in self.nodes]
        raise ConfigError(f"expected a node among {names}, got {name!r}{_suggestion(name, names)}")


def load_deployment(path: str | Path) -> Deployment:
    """Read and check a `deployment.toml`. Paths in it are relative to the file.

    Raises:
        ConfigError: naming the file, the line, and what to write instead.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: expected a deployment file, got: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected text in UTF-8, got: {error}; save the file as UTF-8") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: expected valid TOML, got: {error}") from error
    try:
        return _read_document(document, file.parent)
    except _FieldError as error:
        line = toml_lines.nearest_line(toml_lines.find_lines(text), error.path)
        place = f"{file}, line {line}" if line is not None else f"{file}"
        raise ConfigError(f"{place}: {error}") from error


_Record = TypeVar("_Record", ModelConfig, NodeConfig, SecurityConfig, LinkConfig, Constraints)

# --- reading a document; a path points at the value in the file ------------------------------------------------------


def _read_document(document: Mapping[str, Any], folder: Path) -> Deployment:
    _check_keys(document, ("model", "constraints", "security", "device", "node", "link"), ())
    model = _resolve(_table(document, "model"), "weights", folder, keep=(SEEDED, PRETRAINED))
    security = _resolve(_table(document, "security"), "secret_key", folder)
    nodes, links, device = _tables(document, "node"), _tables(document, "link"), _table(document, "device")
    _check_keys(device, ("emulate",), ("device",))
    constraints = _table(document, "constraints")
    if "allowed_tiers" in constraints:
        constraints = {**constraints, "allowed_tiers": _read_tiers(constraints["allowed_tiers"])}
    try:
        return Deployment(
            model=_read_record(ModelConfig, model, ("model",)),
            nodes=tuple(_read_node(node, ("node", i)) for i, node in enumerate(nodes)),
            links=tuple(_read_link(link, ("link", i), folder) for i, link in enumerate(links)),
            device_emulate=_read_emulation(NodeEmulation, device, "emulate", ("device",)),
            constraints=_read_record(Constraints, constraints, ("constraints",)),
            security=_read_record(SecurityConfig, security, ("security",)),
        )
    except _FieldError as error:
        if error.path[0] in ("nodes", "links"):  # the record's fields; the file says `node` and `link`
            raise _FieldError((str(error.path[0])[:-1], *error.path[1:]), str(error)) from error
        raise


def _read_record(kind: type[_Record], table: Mapping[str, Any], path: toml_lines.Path) -> _Record:
    """Make a record of a table's keys, its errors pointing into the file."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    _check_keys(table, known, path)
    for name, is_required in known.items():
        if is_required and name not in table:
            raise _FieldError(path, f"expected a key {name!r} in {_label(path)}, got none; add {name} = ...")
    with _inside(path):
        return kind(**table)


def _read_node(table: Mapping[str, Any], path: toml_lines.Path) -> NodeConfig:
    if "tier" in table:
        tiers = {tier.label: tier for tier in (Tier.EDGE, Tier.CLOUD)}
        table = {**table, "tier": _read_tier(table["tier"], tiers, (*path, "tier"))}
    if "emulate" in table:
        table = {**table, "emulate": _read_emulation(NodeEmulation, table, "emulate", path)}
    return _read_record(NodeConfig, table, path)


def _read_link(table: Mapping[str, Any], path: toml_lines.Path, folder: Path) -> LinkConfig:
    ends = table.get("between", [])
    if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, str) for end in ends):
        raise _FieldError(
            (*path, "between"), f'expected between to name two ends, such as ["device", "edge0"], got {ends!r}'
        )
    table = {**table, "between": tuple(ends)}
    for key in ("emulate", "back"):
        if isinstance(table.get(key), dict):
            resolved = _resolve(table[key], "trace", folder)
            if "trace" in resolved and not Path(str(resolved["trace"])).is_file():
                raise _FieldError((*path, key), f"expected trace to be a file, got {resolved['trace']}; check the path")
            table[key] = resolved
        if key in table:
            table[key] = _read_emulation(LinkEmulation, table, key, path)
    return _read_record(LinkConfig, table, path)


_Emulation = TypeVar("_Emulation", NodeEmulation, LinkEmulation)


def _read_emulation(
    kind: type[_Emulation], table: Mapping[str, Any], key: str, path: toml_lines.Path
) -> _Emulation | None:
    """Make a record of the inline table or subtable under a key."""
    inner = table.get(key)
    if inner is None:
        return None
    if not isinstance(inner, dict):
        raise _FieldError((*path, key), f"expected {key} to be a table such as {{ ... }}, got {inner!r}")
    _check_keys(inner, [f.name for f in fields(kind)], (*path, key))
    with _inside(path), _field(key):
        return kind(**inner)


def _read_tiers(labels: object) -> tuple[Tier, ...]:
    path = ("constraints", "allowed_tiers")
    if not isinstance(labels, list):
        raise _FieldError(path, f'expected allowed_tiers to be a list such as ["device", "edge"], got {labels!r}')
    tiers = {tier.label: tier for tier in Tier}
    return tuple(_read_tier(label, tiers, (*path, index)) for index, label in enumerate(labels))


def _read_tier(label: object, tiers: Mapping[str, Tier], path: toml_lines.Path) -> Tier:
    if not isinstance(label, str) or label not in tiers:
        raise _FieldError(path, f"expected a tier among {list(tiers)}, got {label!r}{_suggestion(label, tiers)}")
    return tiers[label]


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise _FieldError((name,), f"expected {name} to be a table; write [{name}] and its keys below")
    return table


def _tables(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    tables = document.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _FieldError((name,), f"expected {name} to be an array of tables; write [[{name}]] in double brackets")
    return tables


def _resolve(table: Mapping[str, Any], key: str, folder: Path, keep: Iterable[str] = ()) -> Mapping[str, Any]:
    value = table.get(key)
    if not isinstance(value, str) or not value or value in keep:
        return table
    return {**table, key: str(folder / value)}


def _check_keys(table: Mapping[str, Any], known: Iterable[str], path: toml_lines.Path) -> None:
    for key in table:
        if key not in known:
            raise _FieldError(
                (*path, key),
                f"expected a key among {list(known)} in {_label(path)}, got {key!r}{_suggestion(key, known)}",
            )


def _label(path: toml_lines.Path) -> str:
    if not path:
        return "the file"
    name = ".".join(part for part in path if isinstance(part, str))
    return f"[[{name}]]" if isinstance(path[-1], int) else f"[{name}]"


def _suggestion(word: object, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


# --- checks of fields ------------------------------------------------------------------------------------------------


@contextmanager
def _field(name: str) -> Iterator[None]:
    """Say which field an error of another module means."""
    try:
        yield
    except ConfigError as error:
        raise _FieldError((name,), f"{name}: {error}") from error


@contextmanager
def _inside(path: toml_lines.Path) -> Iterator[None]:
    """Put the path of a record before the path of its field."""
    try:
        yield
    except _FieldError as error:
        raise _FieldError((*path, *error.path), str(error)) from error


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise _FieldError((name,), f"expected {name} to be {expected}, got {value!r}")


def _check_text(value: object, name: str) -> None:
    _check(name, value, isinstance(value, str) and bool(value.strip()), "a text that is not empty")


def _check_flag(value: object, name: str) -> None:
    _check(name, value, isinstance(value, bool), "true or false")


def _check_whole(value: object, name: str, least: int) -> None:
    holds = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _check(name, value, holds, f"a whole number of at least {least}")


def _check_against_earlier(index: int, node: NodeConfig, earlier: tuple[NodeConfig, ...]) -> None:
    for other in earlier:
        if node.name == other.name:
            message = f"expected every node to have its own name, got {node.name!r} twice"
            raise _FieldError(("nodes", index, "name"), message)
        if _share_a_port(node.endpoint, other.endpoint):
            message = (
                f"expected every node to have two ports of its own (tensors use the one after its address), "
                f"got {other.address} for {other.name} and {node.address} for {node.name}"
            )
            raise _FieldError(("nodes", index, "address"), message)
        if node.tier is other.tier is Tier.CLOUD:
            message = f"expected at most one cloud node, got {other.name!r} and {node.name!r}"
            raise _FieldError(("nodes", index, "tier"), message)


def _check_link(index: int, link: LinkConfig, deployment: "Deployment") -> None:
    tiers = {DEVICE_NODE: Tier.DEVICE, **{node.name: node.tier for node in deployment.nodes}}
    path = ("links", index, "between")
    for name in link.between:
        if name not in tiers:
            raise _FieldError(path, f"expected ends among {list(tiers)}, got {name!r}{_suggestion(name, tiers)}")
    near, far = link.between
    if not (tiers[near] < tiers[far] or (tiers[near] is tiers[far] is Tier.EDGE and near != far)):
        got = f"{tiers[near].label} - {tiers[far].label}"
        raise _FieldError(path, f"expected device - edge, device - cloud, edge - edge or edge - cloud, got {got}")
    if any(set(other.between) == set(link.between) for other in deployment.links[:index]):
        raise _FieldError(path, f"expected every link once, got {near} - {far} twice")


def _share_a_port(one: Endpoint, other: Endpoint) -> bool:
    return one.host == other.host and abs((one.port or 0) - (other.port or 0)) <= 1


def _check_keys_of(index: int, node: NodeConfig, security: SecurityConfig) -> None:
    if node.public_key is not None and security.secret_key is None:
        raise _FieldError(
            ("nodes", index, "public_key"),
            f"expected a secret_key under [security], because node {node.name} has a public_key, got none; "
            "make the device's own with `offcut keys`: without it nothing would be encrypted",
        )
    if node.public_key is None and not security.insecure and not node.endpoint.is_loopback:
        raise _FieldError(
            ("nodes", index, "address"),
            f"expected a public_key for node {node.name}, whose address {node.address} is not on this machine, "
            "got none; make one with `offcut keys`, or allow plain traffic with insecure = true",
        )


def _check_constraints(limits: Constraints) -> None:
    """Check the constraints: the record itself does not, because it also travels inside problems already checked."""
    with _inside(("constraints",)):
        for name in ("private_input", "lossless_only", "device_has_model", "tiles"):
            _check_flag(getattr(limits, name), name)
        _check_deadline(limits)
        _check_tiers(limits)


def _check_deadline(limits: Constraints) -> None:
    deadline_s = limits.deadline_s
    if deadline_s is not None:
        is_number = isinstance(deadline_s, int | float) and not isinstance(deadline_s, bool)
        holds = is_number and 0 < deadline_s < math.inf
        _check("deadline_s", deadline_s, holds, "a number of seconds above 0")
    elif not limits.device_has_model:
        raise _FieldError(
            ("device_has_model",),
            "expected a deadline_s beside device_has_model = false, got none; "
            "a device that cannot finish a request itself must know when to give up",
        )


def _check_tiers(limits: Constraints) -> None:
    tiers = limits.allowed_tiers
    holds = bool(tiers) and len(set(tiers)) == len(tiers) and all(isinstance(tier, Tier) for tier in tiers)
    _check("allowed_tiers", tiers, holds, "one or more of device, edge and cloud, each once")
    has_first_layer = limits.device_has_model and Tier.DEVICE in tiers
    if limits.private_input and not has_first_layer:
        raise _FieldError(
            ("private_input",),
            "expected private_input = true only where the device runs the first layer of the model; "
            "allow tier device and device_has_model, or drop private_input",
        )
    if not limits.device_has_model and set(tiers) == {Tier.DEVICE}:
        message = "expected edge or cloud among allowed_tiers, because device_has_model = false, got only device"
        raise _FieldError(("allowed_tiers",), message)
