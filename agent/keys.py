"""`offcut keys`."""

from rich.console import Console

from agent.config import KeysConfig
from runtime.wire.channel import create_keys
from runtime.wire.keys import load_keys


def run_keys(config: KeysConfig) -> None:
    """Make a key pair for each name and say what to do with them.

    Raises:
        ConfigError: when a key of that name exists.
    """
    console = Console(soft_wrap=True, highlight=False)
    for name in config.names:
        _, secret = create_keys(config.folder, name)
        console.print(f"{name}: public key {load_keys(secret).public.decode()}", markup=False)
    console.print(
        f"Keep each NAME.key_secret in {config.folder} on its own machine. A worker takes the folder with --keys; write "
        "a node's public key into deployment.toml as public_key, and the device's key_secret as secret_key.",
        markup=False,
    )
