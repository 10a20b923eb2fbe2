"""What every test runs in: one thread, a home of its own, and nothing left behind by tests that start processes."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import zmq
from hypothesis import settings

# Before anything imports torch: two cores are shared with worker processes, and an idle thread must sleep, not spin.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

# A shared machine is sometimes slow; pytest-timeout is the limit that counts.
settings.register_profile("offcut", deadline=None)
settings.load_profile("offcut")

LEAK_TIMEOUT_S = 5.0


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's cached profiles and settings out of the tests, and the tests' out of his."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("XDG_CACHE_HOME", "TORCH_HOME", "PYTHONWARNINGS"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="session")
def zero_copy_thread() -> None:
    """Make pyzmq start the one thread that it keeps for messages sent without a copy."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as here, context.socket(zmq.PAIR) as there:
        here.bind("inproc://warm-up")
        there.connect("inproc://warm-up")
        there.send(bytes(2**20), copy=False)
        here.recv()


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a file of integration tests that leaves a process, a thread or a file descriptor."""
    if request.node.get_closest_marker("integration") is None:
        yield
        return
    request.getfixturevalue("zero_copy_thread")
    before = _Holdings.now()
    yield
    _wait_until(lambda: not _Holdings.now().beyond(before), LEAK_TIMEOUT_S)
    left = _Holdings.now().beyond(before)
    if left:
        pytest.fail(f"the tests left behind: {'; '.join(left)}", pytrace=False)


@dataclass(frozen=True, slots=True)
class _Holdings:
    children: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]
    num_fds: int

    @classmethod
    def now(cls) -> "_Holdings":
        me = psutil.Process()
        return cls(frozenset(me.children(recursive=True)), frozenset(threading.enumerate()), me.num_fds())

    def beyond(self, before: "_Holdings") -> list[str]:
        """Describe what there is now that was not there before."""
        left = [f"process {child}" for child in self.children - before.children]
        left += [f"thread {thread.name}" for thread in self.threads - before.threads]
        if self.num_fds > before.num_fds:
            me = psutil.Process()
            names = [file.path for file in me.open_files()] + [str(link.laddr) for link in me.net_connections()]
            left.append(f"{self.num_fds - before.num_fds} file descriptors, open now: {names}")
        return left


def _wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not is_true() and time.monotonic() < deadline:
        pause.wait(0.02)
