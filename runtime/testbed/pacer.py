"""One direction of a link: who may send next, and when what was sent arrives."""

import asyncio
import random
from collections import deque

from runtime.testbed.rate import LinkShape, RateSchedule

CHUNK_S = 0.005
"""A chunk takes about this long to send, so that control waits no longer behind data."""

MIN_CHUNK_BYTES = 1448
MAX_CHUNK_BYTES = 64 * 1024


class Pacer:
    """One rate budget for all connections of a direction: the lower number first, then first come, first served.

    The link's own time is kept as arithmetic (`_busy_until_s`), so late wake-ups of this process delay one chunk and do
    not add up.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}
        self._is_busy = False
        self._busy_until_s = 0.0
        self._last_arrival_s = 0.0
        self.shape(LinkShape())

    def shape(self, shape: LinkShape) -> None:
        """Behave like `shape` from now on; its rates begin now. What has left keeps its time of arrival."""
        self._shape = shape
        self._schedule: RateSchedule | None = shape.schedule()
        self._began_s = self._loop.time()
        self._random = random.Random(shape.seed)

    def chunk_bytes(self) -> int:
        """How much to read at a time now."""
        if self._schedule is None:
            return MAX_CHUNK_BYTES
        rate_bps = self._schedule.rate_bps(self._loop.time() - self._began_s)
        return min(max(int(rate_bps * CHUNK_S / 8), MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)

    async def send(self, priority: int, nbytes: int, ready_s: float) -> float:
        """Wait for a turn, take the link for as long as `nbytes` need, and give the loop's time of their arrival.

        Args:
            priority: the lower number goes first.
            nbytes: how much.
            ready_s: since when it could have been sent: it follows what was sent before without a gap, however late
                this process was woken in between.
        """
        await self._take_turn(priority)
        try:
            self._busy_until_s = self._finish_s(max(ready_s, self._busy_until_s), nbytes)
            pause_s = self._busy_until_s - self._loop.time()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
        finally:
            self._pass_turn()
        delay_s = self._shape.delay_s + self._random.uniform(0.0, self._shape.jitter_s)
        self._last_arrival_s = max(self._busy_until_s + delay_s, self._last_arrival_s)
        return self._last_arrival_s

    def _finish_s(self, start_s: float, nbytes: int) -> float:
        if self._schedule is None:
            return start_s
        began_s = max(start_s - self._began_s, 0.0)
        return self._began_s + self._schedule.finish_s(began_s, 8.0 * nbytes)

    async def _take_turn(self, priority: int) -> None:
        """Become the one who sends."""
        if not self._is_busy:
            self._is_busy = True
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.setdefault(priority, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_turn()  # it was our turn just now: the next one must not wait for ever
            raise

    def _pass_turn(self) -> None:
        for priority in sorted(self._waiting):
            queue = self._waiting[priority]
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._is_busy = False
