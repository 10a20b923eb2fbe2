"""Addresses of nodes: `tcp://host:port` names the control port, tensors travel on the next one."""

import ipaddress
import re
from dataclasses import dataclass

from runtime.errors import ConfigError

_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5}|\*)")
_LAST_PORT = 65534  # the port after it must exist too


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a node listens: control on `port`, data on `port + 1`, so that a relay or a firewall knows both."""

    host: str  # IPv6 in brackets
    port: int | None  # None: any free pair of ports

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Read `tcp://host:port`, or `tcp://host:*` for any free pair of ports.

        Raises:
            ConfigError: if the text is not such an address.
        """
        match = _ADDRESS.fullmatch(text)
        port = match["port"] if match else ""
        if match is None or (port != "*" and not 0 < int(port) <= _LAST_PORT):
            raise ConfigError(
                f"expected an address like tcp://127.0.0.1:7001 (port 1 to {_LAST_PORT}, or * to bind any), got {text!r}"
            )
        # Numbers, not the name: zmq binds no host names, and ::1 might answer where 127.0.0.1 listens.
        host = "127.0.0.1" if match["host"] == "localhost" else match["host"]
        return cls(host=host, port=None if port == "*" else int(port))

    @property
    def control(self) -> str:
        """Address of the control port."""
        return f"tcp://{self.host}:{'*' if self.port is None else self.port}"

    @property
    def data(self) -> str:
        """Address of the data port."""
        return f"tcp://{self.host}:{'*' if self.port is None else self.port + 1}"

    @property
    def is_ipv6(self) -> bool:
        """Tell whether the host is an IPv6 address."""
        return self.host.startswith("[")

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach the address. A host name never counts."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
