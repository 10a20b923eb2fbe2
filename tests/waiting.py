"""Waiting for what other processes do: by condition, never by a fixed time."""

import threading
import time
from collections.abc import Callable


def wait_for(is_true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Poll until a condition holds."""
    pause = threading.Event()
    until_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < until_s, "the condition did not come true in time"
        pause.wait(0.02)
