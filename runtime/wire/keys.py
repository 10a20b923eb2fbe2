"""CURVE key files, in the format of zmq's certificates: NAME.key is public, NAME.key_secret never leaves its machine."""

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import ConfigError

_log = logging.getLogger(__name__)
_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
_LINE = re.compile(rf'\s*(?P<kind>public|secret)-key\s*=\s*"(?P<key>{_Z85})"\s*')


@dataclass(frozen=True, slots=True)
class Keys:
    """A CURVE key pair, each key as 40 characters of Z85."""

    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check both keys.

        Raises:
            ConfigError: if either is not 40 characters of Z85.
        """
        check_key(self.public, "public key")
        check_key(self.secret, "secret key")


def check_key(key: bytes, what: str) -> None:
    """Check the form of one key.

    Raises:
        ConfigError: if it is not 40 characters of Z85.
    """
    if not re.fullmatch(_Z85.encode(), key):
        raise ConfigError(f"expected 40 characters of Z85 as {what}, got {len(key)} bytes; copy it from a *.key file")


def check_new_name(folder: Path, name: str) -> None:
    """Check that a key pair may be made under a name.

    Raises:
        ConfigError: if the name is none, or a key of that name exists: an old key is never overwritten.
    """
    if not re.fullmatch(r"[\w.\-]+", name):
        raise ConfigError(f"expected a key name of letters, digits, '.', '-' and '_', got {name!r}")
    for path in _paths(folder, name):
        if path.exists():
            raise ConfigError(f"{path} exists; choose another name, or remove it if no machine uses it any more")


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.key", folder / f"{name}.key_secret"


def write_keys(folder: Path, name: str, keys: Keys) -> tuple[Path, Path]:
    """Write a key pair as NAME.key and NAME.key_secret; only the owner may read the second.

    Returns:
        The public and the secret file.

    Raises:
        ConfigError: as `check_new_name`, or the files cannot be written.
    """
    check_new_name(folder, name)
    public, secret = _paths(folder, name)
    title = "# ZeroMQ CURVE {} key, made by offcut\n\ncurve\n"
    lines = f'    public-key = "{keys.public.decode()}"\n'  # apart from the title: Z85 has braces of its own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(public, title.format("public") + lines, 0o644)
        _write(secret, title.format("**secret**") + lines + f'    secret-key = "{keys.secret.decode()}"\n', 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {folder}: {error}; choose a folder you may write to") from error
    return public, secret


def load_keys(path: Path) -> Keys:
    """Read a key pair from a NAME.key_secret file, or from a folder that holds exactly one.

    Raises:
        ConfigError: if there is no such file, or it holds no key pair.
    """
    if path.is_dir():
        found = sorted(path.glob("*.key_secret"))
        if len(found) != 1:
            raise ConfigError(
                f"expected exactly one *.key_secret in {path}, got {[p.name for p in found]}; name the file itself, "
                "or make one with `offcut keys`"
            )
        path = found[0]
    keys = _read(path)
    if "public" not in keys or "secret" not in keys:
        raise ConfigError(f"expected a public-key and a secret-key in {path}; make one with `offcut keys`")
    if path.stat().st_mode & 0o077:
        _log.warning("%s can be read by others than its owner; chmod 600 it", path)
    return Keys(public=keys["public"], secret=keys["secret"])


def load_public_key(path: Path) -> bytes:
    """Read the public key from a key file.

    Raises:
        ConfigError: if there is no such file, or it holds no public key.
    """
    key = _read(path).get("public")
    if key is None:
        raise ConfigError(f"expected a public-key in {path}; copy the NAME.key file that `offcut keys` made")
    return key


def load_authorised(folder: Path) -> frozenset[bytes]:
    """Read the public keys of all clients that may connect: the *.key files of a folder.

    A file that cannot be read is left out and logged: one bad file must not lock out everybody.
    """
    keys = set()
    for path in sorted(folder.glob("*.key")):
        try:
            keys.add(load_public_key(path))
        except ConfigError as error:
            _log.warning("ignored a client key: %s", error)
    return frozenset(keys)


def _write(path: Path, text: str, mode: int) -> None:
    # The mode is given at creation: the secret is at no moment readable by others.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _read(path: Path) -> dict[str, bytes]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {path}: {error}; make one with `offcut keys`") from error
    matches = (_LINE.fullmatch(line) for line in lines)
    return {match["kind"]: match["key"].encode() for match in matches if match}
