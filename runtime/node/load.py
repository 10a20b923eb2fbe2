"""What a node says of its own load: factor k, queue delay q, utilisation. Pure: every method is told the time.

References:
    Liu, Zheng, Li, Guo, "LoADPart", ICDCS 2022: k as measured over predicted idle time, and a watcher that resets it
    on an idle server. As reconstructed; differs where the paper is silent.
    Differs: q is kept apart from k; the watcher looks at requests and busy time instead of GPU utilisation.
"""

import math
from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 5.0
"""Readings older than this do not count. Guess: ten status periods."""

WINDOW_LENGTH = 16
"""At most this many readings count. Guess."""

LOAD_FACTOR_MAX = 100.0
"""Cap of k, so that one stalled segment cannot poison every prediction."""


@dataclass(slots=True)
class NodeLoad:
    """Windows over the last segments and queue delays, and the busy time of the last seconds."""

    _ratios: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW_LENGTH))
    _delays: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW_LENGTH))
    _busy: deque[tuple[float, float]] = field(default_factory=deque)  # (start, stop) of finished segments
    _started_at_s: float | None = None
    _last_work_at_s: float = -math.inf

    def start(self, queue_s: float, now_s: float) -> None:
        """A segment starts after `queue_s` in the queue."""
        self._delays.append((now_s, queue_s))
        self.resume(now_s)

    def resume(self, now_s: float) -> None:
        """A segment that was interrupted goes on."""
        self._started_at_s = now_s
        self._last_work_at_s = now_s

    def stop(self, now_s: float) -> None:
        """The segment that runs has ended."""
        if self._started_at_s is not None:
            self._busy.append((self._started_at_s, now_s))
        self._started_at_s = None
        self._last_work_at_s = now_s

    def add_segment(self, measured_s: float, predicted_s: float, now_s: float) -> None:
        """A segment took `measured_s` where an idle node was predicted to take `predicted_s`."""
        if predicted_s > 0 and math.isfinite(measured_s):
            self._ratios.append((now_s, measured_s / predicted_s))

    def watch(self, now_s: float, *, is_idle: bool) -> None:
        """Forget load that is gone: a node without work for a window is idle, whatever its last segments said.

        Without this a high k keeps requests away, and without requests k could never come down.
        """
        while self._busy and self._busy[0][1] < now_s - WINDOW_S:
            self._busy.popleft()
        if is_idle and now_s - self._last_work_at_s >= WINDOW_S:
            self._ratios.clear()
            self._delays.clear()

    def load_factor(self, now_s: float) -> float:
        """Give k over the window, within [1, LOAD_FACTOR_MAX]; 1 on an idle node."""
        recent = [ratio for at_s, ratio in self._ratios if now_s - at_s <= WINDOW_S]
        if not recent:
            return 1.0
        return min(max(math.fsum(recent) / len(recent), 1.0), LOAD_FACTOR_MAX)

    def queue_delay_s(self, now_s: float) -> float:
        """q: mean seconds that recent requests waited; 0 on an idle node."""
        recent = [delay_s for at_s, delay_s in self._delays if now_s - at_s <= WINDOW_S]
        return math.fsum(recent) / len(recent) if recent else 0.0

    def utilisation_frac(self, now_s: float) -> float:
        """Share of the last window that was spent computing."""
        since = now_s - WINDOW_S
        busy_s = math.fsum(stop - max(start, since) for start, stop in self._busy if stop > since)
        if self._started_at_s is not None:
            busy_s += now_s - max(self._started_at_s, since)
        return min(max(busy_s / WINDOW_S, 0.0), 1.0)
