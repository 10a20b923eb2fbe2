"""When to stop asking a node, and when to ask it again. Pure: every method is told the time."""

import enum
from dataclasses import dataclass

FAILURES_TO_OPEN = 2
"""Requests in a row without an answer before a node that still talks counts as broken. Guess."""

COOL_DOWN_S = 1.0
COOL_DOWN_MAX_S = 30.0


class BreakerState(enum.Enum):
    """Closed: requests go. Open: none goes. Half open: one goes, to see."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(slots=True)
class Breaker:
    """Breaker of one node.

    It opens at once when the link is lost, and after `FAILURES_TO_OPEN` requests without an answer on a link that still
    talks. A new handshake closes it; after unanswered requests one request is tried when the cool-down has passed, which
    doubles each time it fails. A node that says *busy* is well: it opens nothing.
    """

    state: BreakerState = BreakerState.OPEN
    _failures: int = 0
    _cool_down_s: float = COOL_DOWN_S
    _retry_at_s: float = float("inf")

    def connected(self) -> None:
        """A handshake has succeeded."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._cool_down_s = COOL_DOWN_S

    def lost(self) -> None:
        """The link is gone: nothing but a new handshake helps."""
        self.state = BreakerState.OPEN
        self._retry_at_s = float("inf")

    def answered(self) -> None:
        """A request was answered, be it with *busy*."""
        if self.state is not BreakerState.OPEN or self._retry_at_s < float("inf"):
            self.connected()

    def unanswered(self, now_s: float) -> None:
        """A request ended without the node's answer."""
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN:
            self._cool_down_s = min(2 * self._cool_down_s, COOL_DOWN_MAX_S)
        elif self.state is BreakerState.OPEN or self._failures < FAILURES_TO_OPEN:
            return
        self.state = BreakerState.OPEN
        self._retry_at_s = now_s + self._cool_down_s

    def retry_in_s(self, now_s: float) -> float:
        """Seconds until a request may be tried; 0 when one may go now, inf when only a new handshake helps."""
        return max(self._retry_at_s - now_s, 0.0) if self.state is BreakerState.OPEN else 0.0

    def admits(self, now_s: float) -> bool:
        """Tell whether a request may go now; the one that a half-open breaker admits is taken by this call."""
        if self.state is BreakerState.OPEN and now_s >= self._retry_at_s:
            self.state = BreakerState.HALF_OPEN
            return True
        return self.state is BreakerState.CLOSED
