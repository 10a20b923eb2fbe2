import logging

import pytest

from runtime.errors import ConfigError
from runtime.wire.channel import Hub, create_keys
from runtime.wire.events import Connected, Delivered, Joined, ReceivedData, Rejected
from runtime.wire.keys import load_keys, load_public_key
from tests.hubs import HELLO, Group, submit, welcome


@pytest.fixture
def folder(tmp_path):
    """Keys of an edge node, a device and a stranger; the node lets the device in."""
    for name in ("edge", "device", "stranger"):
        create_keys(tmp_path, name)
    (tmp_path / "authorised").mkdir()
    (tmp_path / "device.key").rename(tmp_path / "authorised" / "device.key")
    return tmp_path


def open_node(folder) -> Hub:
    return Hub("edge", keys=load_keys(folder / "edge.key_secret"), authorised=folder / "authorised")


def open_client(folder, name: str = "device") -> Hub:
    return Hub(name, keys=load_keys(folder / f"{name}.key_secret"))


def test_a_client_whose_key_is_known_is_served(folder):
    server_key = load_public_key(folder / "edge.key")
    with open_node(folder) as node, open_client(folder) as device:
        group = Group(node, device)
        peer = device.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), HELLO, server_key=server_key)
        group.wait(device, Connected)
        device.send_data(peer, submit(1, [bytes(10**6)]), [bytes(10**6)], 1)
        group.wait(node, ReceivedData)
        group.wait(device, Delivered)


def test_with_keys_a_node_may_listen_beyond_this_machine(folder):
    server_key = load_public_key(folder / "edge.key")
    with open_node(folder) as node, open_client(folder) as device:
        group = Group(node, device)
        port = node.bind("tcp://0.0.0.0:*", welcome).rpartition(":")[2]
        device.connect("edge", f"tcp://127.0.0.1:{port}", HELLO, server_key=server_key)
        group.wait(device, Connected)


def test_an_unknown_key_is_told_so_and_let_in_once_it_is_known(folder, caplog):
    server_key = load_public_key(folder / "edge.key")
    with open_node(folder) as node, open_client(folder, "stranger") as stranger:
        group = Group(node, stranger)
        with caplog.at_level(logging.WARNING):
            stranger.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), HELLO, server_key=server_key)
            error = group.wait(stranger, Rejected, timeout_s=2).error
        assert "it does not know our key; copy our *.key file into the folder of keys it reads" in str(error)
        assert "refused a connection from 127.0.0.1" in caplog.text
        assert group.of(node, Joined) == []
        (folder / "stranger.key").rename(folder / "authorised" / "stranger.key")
        group.wait(stranger, Connected, timeout_s=10)
        assert len(group.of(stranger, Rejected)) == 1


def test_a_wrong_server_key_is_told_so(folder):
    server_key = load_public_key(folder / "stranger.key")
    with open_node(folder) as node, open_client(folder) as device:
        group = Group(node, device)
        device.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), HELLO, server_key=server_key)
        assert "the public key we have is not the node's own" in str(group.wait(device, Rejected, timeout_s=3).error)
        assert group.of(node, Joined) == []


def test_a_client_without_keys_is_told_that_the_node_has_some(folder):
    with open_node(folder) as node, Hub("device") as device:
        group = Group(node, device)
        device.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), HELLO)
        assert "got no keys here and CURVE keys there" in str(group.wait(device, Rejected, timeout_s=3).error)
        assert group.of(node, Joined) == []


def test_a_client_with_keys_is_told_that_the_node_has_none(folder):
    server_key = load_public_key(folder / "edge.key")
    with Hub("edge") as node, open_client(folder) as device:
        group = Group(node, device)
        device.connect("edge", node.bind("tcp://127.0.0.1:*", welcome), HELLO, server_key=server_key)
        text = str(group.wait(device, Rejected, timeout_s=3).error)
        # Both sides see the difference; a node that closes first, each time, leaves us to name what may be.
        assert "got keys here and none there" in text or "or the node has no keys" in text


def test_missing_and_malformed_keys_are_named(folder):
    server_key = load_public_key(folder / "edge.key")
    with Hub("device") as hub:
        with pytest.raises(ConfigError, match="we have no key pair; pass keys"):
            hub.connect("edge", "tcp://127.0.0.1:7001", HELLO, server_key=server_key)
        with pytest.raises(
            ConfigError, match="expected 40 characters of Z85 as public key of node 'edge', got 5 bytes"
        ):
            hub.connect("edge", "tcp://127.0.0.1:7001", HELLO, server_key=b"short")
    with (
        Hub("edge", keys=load_keys(folder / "edge.key_secret")) as hub,
        pytest.raises(ConfigError, match="expected a folder of client keys"),
    ):
        hub.bind("tcp://127.0.0.1:*", welcome)


def test_a_failed_bind_with_keys_can_be_repeated(folder):
    with open_node(folder) as first, open_node(folder) as second:
        address = first.bind("tcp://127.0.0.1:*", welcome)
        with pytest.raises(OSError, match="the port is in use"):
            second.bind(address, welcome)
        second.bind("tcp://127.0.0.1:*", welcome)


def test_keys_are_never_overwritten(tmp_path):
    create_keys(tmp_path, "edge")
    with pytest.raises(ConfigError, match=r"edge.key exists; choose another name"):
        create_keys(tmp_path, "edge")
