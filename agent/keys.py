"""`offcut keys`."""

import sys

from agent.config import KeysConfig
from runtime.wire.channel import create_keys
from runtime.wire.keys import check_new_name, load_keys


def run_keys(config: KeysConfig) -> None:
    """Make a key pair for each name and say which file goes where.

    Standard output holds one line per name, ready for `deployment.toml`.

    Raises:
        ConfigError: when a name is none, or a key of that name exists; then no key is made at all.
    """
    for name in config.names:
        check_new_name(config.folder, name)
    for name in config.names:
        _, secret = create_keys(config.folder, name)
        sys.stdout.write(f'public_key = "{load_keys(secret).public.decode()}"  # {name}\n')
    sys.stdout.flush()  # before what follows, where both are one terminal
    sys.stderr.write(
        f"""
NAME.key_secret goes to its own machine and to no other. NAME.key goes to every node that NAME connects to:
  device   needs its own key_secret (secret_key in deployment.toml) and the public_key lines of the nodes above
  edge     needs its own key_secret, and the device's *.key
  cloud    needs its own key_secret, the device's *.key, and the *.key of each edge that connects to it
A node takes its folder with --keys {config.folder} and finds its own file by --name. In a shell, write public keys in
single quotes: --connect 'cloud=tcp://HOST:7001,PUBLIC_KEY'.
"""
    )
