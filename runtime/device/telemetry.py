"""What a session leaves on disk: one event per request, and its own status once a second.

`events.jsonl` holds one JSON object per line: `version`, `at` (UTC), then the fields of `Event`. NaN and inf are null.
The file is rotated, so a camera that runs for weeks fills no disk. `status.json` is replaced atomically.
"""

import datetime
import logging
import logging.handlers
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import ConfigError
from runtime.types import LatencyBreakdown, SystemState, TileSpan

EVENT_VERSION = 1
EVENT_FILE_BYTES = 32 * 2**20
EVENT_FILES = 4
STATUS_FILE = "status.json"
EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a policy that is watched and not obeyed would have done with a request."""

    policy: str
    plan: str = ""  # as `Event.plan`; empty where it gave none
    predicted_s: float = float("nan")  # in the same state as the plan that was taken
    agrees: bool = False  # with the plan that was taken
    guard_reason: str = ""  # why its own guard's fallback decided
    error: str = ""  # why it gave no plan


@dataclass(frozen=True, slots=True)
class Event:
    """One request, from what was known to how it ended. What is left out is so of one that was refused at once."""

    request: int
    arrived_after_s: float  # since the session began
    model_id: str
    policy: str
    plan: str  # device[0:10) edge0[10:20) ...; empty when the request was refused before a plan was made
    reason: str
    tiers: str = ""  # one digit per layer: 0 device, 1 edge, 2 cloud
    edge_nodes: tuple[str, ...] = ()
    tiles: tuple[TileSpan, ...] = ()
    codec: str = ""
    state: SystemState | None = None
    predicted: LatencyBreakdown | None = None
    measured: LatencyBreakdown | None = None  # None when there was no answer
    outcome: str = "failed"  # remote, device, local, failed
    deadline_met: bool = False
    is_protected: bool = False
    shadow: Opinion | None = None


class EventLog:
    """Appends events to a rotated file.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"expected {folder} to be a folder for events and status, got: {error.strerror}; move what is there"
            ) from error
        self._handler = logging.handlers.RotatingFileHandler(
            folder / EVENTS_FILE, maxBytes=EVENT_FILE_BYTES, backupCount=EVENT_FILES, delay=True, encoding="utf-8"
        )

    def write(self, event: Event) -> None:
        """Append one event."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        fields = msgspec.to_builtins(event)
        text = msgspec.json.encode({"version": EVENT_VERSION, "at": at, **fields}).decode()
        self._handler.handle(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Replace `status.json`, so that a reader never sees half of it."""
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(status)))
    os.replace(file.name, folder / STATUS_FILE)


def read_status(folder: Path) -> dict[str, Any]:
    """Read `status.json`.

    Raises:
        FileNotFoundError: when no session has run there.
    """
    status: dict[str, Any] = msgspec.json.decode((folder / STATUS_FILE).read_bytes())
    return status


def default_log_folder(deployment: Path) -> Path:
    """Where a session on this deployment file leaves its events and status."""
    return deployment.with_suffix(".offcut")
