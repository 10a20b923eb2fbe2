"""What happens to a cluster and when: link shapes, contention, load, failures, carried out on a clock of their own."""

import math
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from runtime.errors import ConfigError
from runtime.testbed.arrivals import LoadShape
from runtime.testbed.cluster import Cluster
from runtime.testbed.rate import LinkShape


@dataclass(frozen=True, slots=True)
class SetLink:
    """Give a link another shape; None leaves that direction as it is."""

    near: str
    far: str
    up: LinkShape | None = None
    down: LinkShape | None = None

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.link(self.near, self.far).shape(up=self.up, down=self.down)


@dataclass(frozen=True, slots=True)
class SetBlackHole:
    """Swallow everything on a link, or pass it on again."""

    near: str
    far: str
    on: bool

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.link(self.near, self.far).set_black_hole(self.on)


@dataclass(frozen=True, slots=True)
class SetContention:
    """Let a co-tenant slow an emulated node down."""

    node: str
    contention: float

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.set_contention(self.node, self.contention)


@dataclass(frozen=True, slots=True)
class SetLoad:
    """Give a node other background requests; `LoadShape()` ends them."""

    node: str
    shape: LoadShape

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.set_load(self.node, self.shape)


@dataclass(frozen=True, slots=True)
class Kill:
    """End a node as a crash would."""

    node: str

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.kill(self.node)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start a node again. It loads its model first, so it is back some seconds after the instant."""

    node: str

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.restart(self.node)


@dataclass(frozen=True, slots=True)
class Suspend:
    """Let a node hang: its sockets stay open and nothing answers."""

    node: str

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.suspend(self.node)


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a node that hangs go on."""

    node: str

    def apply(self, cluster: Cluster) -> None:
        """Carry it out."""
        cluster.resume(self.node)


Action = SetLink | SetBlackHole | SetContention | SetLoad | Kill | Restart | Suspend | Resume


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happens, seconds from the start of the timeline."""

    at_s: float
    action: Action


@dataclass(frozen=True, slots=True)
class Applied:
    """An event that was carried out: when it began and when it was done, on the timeline's clock."""

    event: Event
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Events in the order of their instants; those at one instant keep the order given."""

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        """Check and sort.

        Raises:
            ConfigError: when an instant is negative or not finite.
        """
        for event in self.events:
            if not 0.0 <= event.at_s < math.inf:
                raise ConfigError(f"expected at_s to be a number of at least 0, got {event.at_s!r} for {event.action}")
        object.__setattr__(self, "events", tuple(sorted(self.events, key=lambda event: event.at_s)))


@dataclass(eq=False)
class Player:
    """Carries a timeline out on a cluster in a thread of its own. Use as a context manager.

    A restart runs beside the others, for it takes seconds. The first action that fails ends the play; its error is
    raised by `close`.
    """

    cluster: Cluster
    timeline: Timeline
    applied: list[Applied] = field(default_factory=list)
    _errors: list[Exception] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _began_at_s: float = math.nan
    _is_stopped: bool = False
    _thread: threading.Thread | None = None
    _restarts: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Player":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes of the loads, which takes a while, and let the clock run from 0."""
        for node in {event.action.node for event in self.timeline.events if isinstance(event.action, SetLoad)}:
            self.cluster.start_load(node)
        self._began_at_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="offcut-timeline", daemon=True)
        self._thread.start()

    @property
    def now_s(self) -> float:
        """Seconds since the start, pauses left out."""
        return time.perf_counter() - self._began_at_s

    @property
    def error(self) -> Exception | None:
        """What an action has failed with; nothing is carried out after it."""
        with self._changed:
            return self._errors[0] if self._errors else None

    def postpone(self, seconds: float) -> None:
        """Turn the clock back, so that everything yet to come comes so much later."""
        with self._changed:
            self._began_at_s += seconds
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the last event has been carried out, or one has failed."""
        if self._thread is not None:
            self._thread.join()
        for thread in self._restarts:
            thread.join()

    def close(self) -> None:
        """Carry out nothing more, and wait for what is being carried out.

        Raises:
            OffcutError: what an action failed with.
        """
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self.wait()
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        for event in self.timeline.events:
            with self._changed:
                while not self._is_stopped and (left_s := event.at_s - self.now_s) > 0:
                    self._changed.wait(left_s)
                if self._is_stopped:
                    return
            if isinstance(event.action, Restart):
                thread = threading.Thread(target=self._apply, args=(event,), name="offcut-restart", daemon=True)
                self._restarts.append(thread)
                thread.start()
            else:
                self._apply(event)

    def _apply(self, event: Event) -> None:
        began_s = self.now_s
        try:
            event.action.apply(self.cluster)
        except Exception as error:
            with self._changed:
                self._errors.append(error)
                self._is_stopped = True
                self._changed.notify_all()
            return
        self.applied.append(Applied(event, began_s, self.now_s))
