"""Addresses of test-bed nodes: free, in pairs, and never lent to an outgoing connection."""

import socket

from runtime.testbed.ports import LOWEST, _first_borrowed, _is_free, pick_address


def test_an_address_is_a_free_pair_outside_the_ports_that_the_system_lends() -> None:
    port = int(pick_address().rpartition(":")[2])
    assert LOWEST <= port < port + 1 < _first_borrowed()
    with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
        assert not _is_free(port)
        assert not _is_free(port + 1)
    with socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", 0))
        assert outgoing.getsockname()[1] >= _first_borrowed()
