"""A node as another machine: every segment takes as long as it would there.

    service time = slow_down x profiled idle time x contention, as it stood when the segment began

The profile is the cached one of the idle machine, never a reading of the moment, so noise of this machine stays out as
long as computing ends before the service time does. Where it does not, that is an overrun, and counted. Only layers are
emulated: coding, sockets and queues are real.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from runtime.errors import ConfigError
from runtime.model.segment import Stopped
from runtime.presets import NodeEmulation
from runtime.types import NodeProfile

_Made = TypeVar("_Made")

SLICE_S = 0.005
"""How often a waiting node looks whether it may stop."""

SPIN_S = 0.0003
"""The end of a wait is spun through: a sleep wakes up some 0.1 ms late, which is much for a model of 1 ms."""


class Emulator:
    """The pace of one node. `run` belongs to the executor's thread; the rest may be called from any.

    Args:
        emulation: what the node pretends to be.
    """

    def __init__(self, emulation: NodeEmulation) -> None:
        self.emulation = emulation
        self.overruns = 0
        """Segments whose computation took longer than their service time."""
        self._contention = 1.0

    @property
    def contention(self) -> float:
        """How many times longer everything takes because of a co-tenant."""
        return self._contention

    def set_contention(self, contention: float) -> None:
        """Change the co-tenant's share from the next segment on.

        Raises:
            ConfigError: unless it is a finite number of at least 1.
        """
        if not 1.0 <= contention < float("inf"):
            raise ConfigError(f"expected contention to be a number of at least 1, got {contention!r}")
        self._contention = float(contention)

    def pretend(self, idle: NodeProfile) -> NodeProfile:
        """This machine's idle profile as that of the emulated one."""
        factor = self.emulation.factor
        return replace(
            idle,
            layer_s=tuple(factor * seconds for seconds in idle.layer_s),
            tile_layer_s=tuple(factor * seconds for seconds in idle.tile_layer_s),
        )

    def run(
        self, work: Callable[[], _Made], idle_s: float, should_stop: Callable[[], bool] | None = None
    ) -> tuple[_Made, float]:
        """Do a piece of work and wait until the emulated machine would have done it.

        Args:
            work: computes.
            idle_s: seconds that the idle emulated machine needs.
            should_stop: asked while waiting.

        Returns:
            What `work` returned, and the seconds from start to end of the wait.

        Raises:
            Stopped: when `should_stop` said so while waiting.
        """
        start_s = time.perf_counter()
        end_s = start_s + idle_s * self._contention
        made = work()
        if time.perf_counter() > end_s:
            self.overruns += 1
        else:
            _wait_until(end_s, should_stop)
        return made, time.perf_counter() - start_s


def _wait_until(end_s: float, should_stop: Callable[[], bool] | None) -> None:
    while (left_s := end_s - time.perf_counter()) > SPIN_S:
        if should_stop is not None and should_stop():
            raise Stopped("stopped while an emulated node waited")
        time.sleep(min(left_s - SPIN_S, SLICE_S))
    while time.perf_counter() < end_s:
        pass
