"""runtime.deployment: records that check themselves, and `deployment.toml` with errors that name the line."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.deployment import (
    Deployment,
    ModelConfig,
    NodeConfig,
    SecurityConfig,
    load_deployment,
)
from runtime.errors import ConfigError
from runtime.toml_lines import find_lines, nearest_line
from runtime.types import Constraints, Tier

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"

WHOLE = f"""\
# A camera, two boxes and a cloud.
[model]
spec = "torchvision:resnet50"
weights = "weights/resnet50.safetensors"
seed = 3
input_kind = "image"
batch_size = 2

[constraints]
private_input = true
allowed_tiers = [
    "device",
    "edge",  # no cloud
]
lossless_only = false
deadline_s = 0.5

[security]
secret_key = "keys/device.key"

[[node]]
name = "edge0"
tier = "edge"
address = "tcp://192.168.1.20:7001"
public_key = "{KEY}"

[[node]]
name = "edge1"
tier = "edge"
address = "tcp://[::1]:7001"

[[node]]
name = "cloud"
tier = "cloud"
address = "tcp://localhost:7002"
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "deployment.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def edge(name: str = "edge0", address: str = "tcp://127.0.0.1:7001", **others: Any) -> NodeConfig:
    return NodeConfig(name=name, tier=Tier.EDGE, address=address, **others)


def deployment(*nodes: NodeConfig, **others: Any) -> Deployment:
    return Deployment(model=ModelConfig(spec="torchvision:alexnet"), nodes=nodes, **others)


# --- records --------------------------------------------------------------------------------------------------------


def test_a_deployment_finds_its_nodes_by_name_and_tier():
    cloud = NodeConfig(name="cloud", tier=Tier.CLOUD, address="tcp://127.0.0.1:7009")
    first, second = edge(), edge("edge1", "tcp://127.0.0.1:7003")
    found = deployment(first, cloud, second)
    assert found.edges == (first, second)
    assert found.cloud is cloud
    assert found.node("edge1") is second
    assert deployment(first).cloud is None


def test_an_unknown_node_name_is_answered_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"\['edge0'\], got 'egde0'; did you mean 'edge0'\?"):
        deployment(edge()).node("egde0")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("spec", "", "a text that is not empty"),
        ("spec", "resnet50", "LIBRARY:NAME"),
        ("weights", "", "a text that is not empty"),
        ("seed", -1, "a whole number of at least 0"),
        ("seed", True, "a whole number of at least 0"),
        ("input_kind", "jpeg", "one of encoded, image, tensor"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("batch_size", 1.5, "a whole number of at least 1"),
    ],
)
def test_a_model_field_outside_its_range_is_named_with_range_and_value(field: str, value: object, expected: str):
    fields: dict[str, Any] = {"spec": "torchvision:alexnet", field: value}
    with pytest.raises(ConfigError, match=re.escape(f"expected {field} to be {expected}")) as caught:
        ModelConfig(**fields)
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("name", "edge>0", "1 to 64 letters"),
        ("name", "x" * 65, "1 to 64 letters"),
        ("name", "device", "the device's own"),
        ("name", 7, "a text"),
        ("tier", Tier.DEVICE, "edge or cloud"),
        ("address", "127.0.0.1:7001", "like tcp://127.0.0.1:7001"),
        ("address", "tcp://host:0", "port 1 to 65534"),
        ("address", "tcp://host:65535", "port 1 to 65534"),
        ("address", "ipc:///tmp/x", "like tcp://127.0.0.1:7001"),
        ("address", "tcp://*:7001", "one to connect to"),
        ("address", "tcp://[::]:7001", "one to connect to"),
        ("address", "tcp://127.0.0.1:*", "one to connect to"),
        ("address", 7001, "a text that is not empty"),
        ("public_key", "short", "40 characters of Z85"),
        ("public_key", KEY[:-1] + "~", "40 characters of Z85"),
    ],
)
def test_a_node_field_outside_its_range_is_named(field: str, value: object, expected: str):
    fields: dict[str, Any] = {"name": "edge0", "tier": Tier.EDGE, "address": "tcp://127.0.0.1:7001", field: value}
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        NodeConfig(**fields)
    assert field in str(caught.value)


@pytest.mark.parametrize("others", [{"secret_key": ""}, {"insecure": 1}])
def test_a_security_field_outside_its_range_is_named(others: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"expected {next(iter(others))} to be"):
        SecurityConfig(**others)


def test_nodes_share_neither_name_nor_port_and_one_is_the_cloud_at_most():
    with pytest.raises(ConfigError, match="at least one"):
        deployment()
    with pytest.raises(ConfigError, match="own name, got 'edge0' twice"):
        deployment(edge(), edge(address="tcp://127.0.0.1:7003"))
    for address in ("tcp://127.0.0.1:7000", "tcp://localhost:7001", "tcp://127.0.0.1:7002"):
        with pytest.raises(ConfigError, match="two ports of its own"):
            deployment(edge(), edge("edge1", address))
    clouds = [NodeConfig(name=f"c{i}", tier=Tier.CLOUD, address=f"tcp://127.0.0.{i}:7001") for i in (1, 2)]
    with pytest.raises(ConfigError, match="at most one cloud node, got 'c1' and 'c2'"):
        deployment(*clouds)


def test_a_node_elsewhere_needs_a_key_or_the_word_insecure():
    away = "tcp://10.0.0.7:7001"
    with pytest.raises(ConfigError, match="expected a public_key for node edge0") as caught:
        deployment(edge(address=away))
    assert "offcut keys" in str(caught.value)
    keys = SecurityConfig(secret_key="keys/device.key_secret")
    assert deployment(edge(address=away, public_key=KEY), security=keys).nodes[0].public_key == KEY
    assert deployment(edge(address=away), security=SecurityConfig(insecure=True)).security.insecure


def test_a_key_of_a_node_is_never_silently_left_unused():
    with pytest.raises(ConfigError, match=r"expected a secret_key under \[security\], because node edge0 has"):
        deployment(edge(public_key=KEY), security=SecurityConfig(insecure=True))


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(device_has_model=False), "expected a deadline_s beside device_has_model = false"),
        (Constraints(deadline_s=0.0), "expected deadline_s to be a number of seconds above 0, got 0.0"),
        (Constraints(deadline_s=float("inf")), "got inf"),
        (Constraints(deadline_s=float("nan")), "got nan"),
        (Constraints(allowed_tiers=()), "expected allowed_tiers to be one or more"),
        (Constraints(allowed_tiers=(Tier.EDGE, Tier.EDGE)), "each once"),
        (Constraints(private_input=True, allowed_tiers=(Tier.EDGE,)), "expected private_input = true only where"),
        (Constraints(private_input=True, device_has_model=False, deadline_s=1.0), "expected private_input"),
        (
            Constraints(device_has_model=False, deadline_s=1.0, allowed_tiers=(Tier.DEVICE,)),
            "expected edge or cloud among allowed_tiers",
        ),
    ],
)
def test_constraints_that_no_plan_can_satisfy_are_refused(constraints: Constraints, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        deployment(edge(), constraints=constraints)


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_whole_file_becomes_a_deployment_with_paths_beside_the_file(write: Write):
    path = write(WHOLE)
    loaded = load_deployment(path)
    assert loaded.model == ModelConfig(
        spec="torchvision:resnet50",
        weights=str(path.parent / "weights/resnet50.safetensors"),
        seed=3,
        input_kind="image",
        batch_size=2,
    )
    assert loaded.constraints == Constraints(
        private_input=True, allowed_tiers=(Tier.DEVICE, Tier.EDGE), lossless_only=False, deadline_s=0.5
    )
    assert loaded.security == SecurityConfig(secret_key=str(path.parent / "keys/device.key"))
    assert [node.name for node in loaded.nodes] == ["edge0", "edge1", "cloud"]
    assert loaded.nodes[0].public_key == KEY


def test_a_short_file_gets_the_defaults(write: Write):
    node = '[[node]]\nname = "e"\ntier = "edge"\naddress = "tcp://127.0.0.1:1"\n'
    loaded = load_deployment(str(write(f'model.spec = "timm:xception"\nmodel.weights = "pretrained"\n{node}')))
    assert loaded.model == ModelConfig(spec="timm:xception", weights="pretrained")
    assert loaded.constraints == Constraints()
    assert loaded.security == SecurityConfig()


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seed = 3", "sede = 3", 5, "in [model], got 'sede'; did you mean 'seed'?"),
        ("[constraints]", "[constraint]", 9, "in the file, got 'constraint'; did you mean 'constraints'?"),
        ('"torchvision:resnet50"', '"resnet50"', 3, "expected spec to be LIBRARY:NAME"),
        ("seed = 3", 'seed = "3"', 5, "expected seed to be a whole number of at least 0, got '3'"),
        ("seed = 3", "'seed' = -1", 5, "got -1"),
        ("seed = 3", '"s\\u0065ed" = -1', 5, "got -1"),
        ('    "edge",  # no cloud', '    "fog",', 13, "expected a tier among ['device', 'edge', 'cloud'], got 'fog'"),
        ("allowed_tiers = [", "allowed_tiers = [[],", 11, "got []"),
        ("deadline_s = 0.5", "deadline_s = -1", 16, "expected deadline_s to be a number of seconds above 0, got -1"),
        ("deadline_s = 0.5", "device_has_model = false", 16, "expected a deadline_s"),
        ("deadline_s = 0.5", "lossless_only_ = 1", 16, "did you mean 'lossless_only'?"),
        ('secret_key = "keys/device.key"', "secret_key = 1", 19, "expected secret_key to be a text"),
        ('secret_key = "keys/device.key"', "", 25, "expected a secret_key under [security]"),
        (f'public_key = "{KEY}"', "", 24, "expected a public_key for node edge0"),
        (f'public_key = "{KEY}"', 'public_key = ""', 25, "expected public_key to be a text"),
        ('name = "edge1"', 'name = "edge0"', 28, "expected every node to have its own name, got 'edge0' twice"),
        ('name = "edge1"', 'name = "device"', 28, "the device's own"),
        ('name = "edge1"', "", 27, "expected a key 'name' in [[node]], got none"),
        ('tier = "cloud"', 'tier = "clod"', 34, "['edge', 'cloud'], got 'clod'; did you mean 'cloud'?"),
        ('tier = "cloud"', "tier = 2", 34, "expected a tier among ['edge', 'cloud'], got 2"),
        ('tier = "cloud"', 'tier = "device"', 34, "['edge', 'cloud'], got 'device'"),
        ('name = "edge1"\ntier = "edge"', 'name = "edge1"\ntier = "cloud"', 34, "at most one cloud node"),
        ("[::1]:7001", "[::1]", 30, "address: expected an address like"),
        ("[::1]:7001", "localhost:7001", 35, "two ports of its own"),
    ],
)
def test_an_error_in_the_file_names_file_and_line(write: Write, old: str, new: str, line: int, message: str):
    assert WHOLE.count(old) == 1
    path = write(WHOLE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_deployment(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "expected a key 'spec' in [model], got none"),
        ('[model]\nspec = "a:b"\n', None, "expected nodes to be at least one"),
        ("[model]\n\n[security]\n", 1, "expected a key 'spec'"),
        ('model = "a:b"\n', 1, "expected model to be a table; write [model]"),
        ("\n[node]\n", 2, "write [[node]]"),
        ('node = ["edge0"]\n', 1, "write [[node]]"),
        ('[constraints]\nallowed_tiers = "edge"\n', 2, "expected allowed_tiers to be a list"),
    ],
)
def test_what_is_missing_or_misshapen_is_named_at_the_closest_line(
    write: Write, text: str, line: int | None, message: str
):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_deployment(path)
    place = f"{path}, line {line}: " if line else f"{path}: "
    assert str(caught.value).startswith(place)
    assert message in str(caught.value)


def test_broken_toml_names_the_line_too(write: Write):
    with pytest.raises(ConfigError, match=r"deployment\.toml: expected valid TOML, got: .*line 2"):
        load_deployment(write("[model]\nspec = \n"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml: expected a deployment file"):
        load_deployment(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: expected text in UTF-8"):
        load_deployment(tmp_path / "binary.toml")


# --- lines ----------------------------------------------------------------------------------------------------------

TRICKY = '''\
title = "not [a] table" # = nor [this]
text = """
[fake]
key = 1 \\""" still
"""  # done
literal = \'\'\'
# no comment
\'\'\'\'
"quoted = \\" key".'and # this' = 1

[ plain . "dotted.name" ]
date = 1979-05-27 07:32:00Z
[[node]]
name = "a" # [[node]]
inline = { x = 1, y = { z = [1, 2] } }

[node.emulate]
rate = 1.5e3

[[node]]
list = [
    # comment ]
    { name = "p" }, {name = "q"},
    [[7]],
]
[[node.link]]
to = "x"
[[node.link]]
to = "y"
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 1),
        (("text",), 2),
        (("literal",), 6),
        (('quoted = " key',), 9),
        (('quoted = " key', "and # this"), 9),
        (("plain",), 11),
        (("plain", "dotted.name"), 11),
        (("plain", "dotted.name", "date"), 12),
        (("node",), 13),
        (("node", 0), 13),
        (("node", 0, "name"), 14),
        (("node", 0, "inline", "y", "z", 1), 15),
        (("node", 0, "emulate"), 17),
        (("node", 0, "emulate", "rate"), 18),
        (("node", 1), 20),
        (("node", 1, "list"), 21),
        (("node", 1, "list", 0, "name"), 23),
        (("node", 1, "list", 1, "name"), 23),
        (("node", 1, "list", 2, 0, 0), 24),
        (("node", 1, "link", 0, "to"), 27),
        (("node", 1, "link", 1), 28),
        (("node", 1, "link", 1, "to"), 29),
    ],
)
def test_every_key_table_and_element_has_its_line(path: tuple[str | int, ...], line: int):
    assert find_lines(TRICKY)[path] == line


def test_the_scanner_finds_exactly_what_tomllib_parses():
    assert set(find_lines(TRICKY)) == set(_paths(tomllib.loads(TRICKY)))
    assert set(find_lines(WHOLE)) == set(_paths(tomllib.loads(WHOLE)))


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.text(alphabet=' #[]{}=,."abc\n', max_size=8),
            st.recursive(st.integers() | st.text(alphabet="#[]{}=,.\"'\\ab\n", max_size=8), st.lists, max_leaves=6),
        ),
        max_size=6,
    )
)
def test_any_names_and_values_are_found_where_they_were_written(entries: list[tuple[bool, str, Any]]):
    text, expected = "", {}
    for index, (is_table, name, value) in enumerate(entries):
        key = f"{name}{index}"
        text += f"[[many]]  # [{index}]\n" if is_table else "\n"
        tables = text.count("[[many]]  # [")
        path = ("many", tables - 1, key) if tables else (key,)
        expected[path] = text.count("\n") + 1
        text += f"{_toml(key)} = {_toml(value)}\n"
    lines = find_lines(text)
    assert {path: lines[path] for path in expected} == expected
    assert set(lines) == set(_paths(tomllib.loads(text)))


def test_a_missing_key_is_placed_at_the_table_around_it():
    lines = find_lines(TRICKY)
    assert nearest_line(lines, ("node", 1, "address")) == 20
    assert nearest_line(lines, ("model", "spec")) is None


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    own = [path] if path else []
    return own + [found for key, child in children for found in _paths(child, (*path, key))]


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",\n".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return str(value)
