"""One thread that computes, so that the thread with the sockets never waits for a layer."""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Done:
    """One piece of work that has ended: `error` is None, or what it raised."""

    tag: Any  # what `submit` was given
    value: Any
    error: Exception | None
    seconds: float


class Executor:
    """Runs work one piece at a time, lowest priority number first, first in first out within one priority.

    Args:
        name: of the thread.
        notify: called from the executor's thread after each piece of work; wakes the loop that calls `finished`.
    """

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._order = itertools.count()
        self._todo: queue.PriorityQueue[tuple[int, int, Hashable, Callable[[], Any] | None]] = queue.PriorityQueue()
        self._done: deque[Done] = deque()
        self._running: tuple[Hashable, float] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, tag: Hashable, work: Callable[[], Any], *, priority: int = 1) -> None:
        """Queue a piece of work."""
        self._todo.put((priority, next(self._order), tag, work))

    @property
    def running(self) -> tuple[Hashable, float] | None:
        """Tag of the work that runs now and when it started; None when idle."""
        return self._running

    def finished(self) -> list[Done]:
        """Take what has ended since the last call, in the order it ended."""
        out = []
        while self._done:
            out.append(self._done.popleft())
        return out

    def close(self) -> None:
        """End the thread after the work that runs now; what is queued is dropped."""
        self._todo.put((-1, next(self._order), None, None))
        self._thread.join()

    def _run(self) -> None:
        while True:
            _, _, tag, work = self._todo.get()
            if work is None:
                return
            start_s = time.perf_counter()
            self._running = (tag, start_s)
            try:
                done = Done(tag, work(), None, time.perf_counter() - start_s)
            except Exception as error:
                done = Done(tag, None, error, time.perf_counter() - start_s)
            self._running = None
            del work  # it holds tensors; the next get may wait for long
            self._done.append(done)
            self._notify()
