"""A world as a cluster plays it: the arrays that the twin steps through, carried out on real links and nodes.

Where it differs from the twin: background requests are whole models, as many as make up the world's work, at the instants
at which that much has come together, and no more than `BACKGROUND_HZ`; other clients of `contention` are such requests
too, of the share of the best nominal plan without tiles; links between edge nodes are as fast as the machine; service
noise is this machine's own; whatever was built stays warm; contention of the device is not played.
"""

from dataclasses import replace

import numpy as np

from env.kernel.layout import BACKGROUND
from env.site import Site
from env.traces import GRID_S, FloatArray
from env.world import Background, World
from runtime.planning.arrays import Link, blank_states
from runtime.planning.cost import predict_total
from runtime.planning.estimators import ReadingsArrays
from runtime.testbed.arrivals import LoadShape
from runtime.testbed.cluster import Cluster
from runtime.testbed.rate import LinkShape
from runtime.testbed.timeline import Event, Player, Resume, SetContention, SetLink, SetLoad, Suspend, Timeline
from runtime.types import DEVICE_NODE

CONNECT_BPS = 2e5
"""While a session connects links are no slower than this, and constant: its clock does not run yet."""

BACKGROUND_HZ = 100.0
"""Background requests of a node, at most: each costs this machine a millisecond or two. Guess. Where a world has more,
as on nodes that need a few milliseconds for the whole model, they are fewer and the node is less busy."""

_SAME = 1e-6
"""Instants nearer to each other than this are one."""


def playable(site: Site, world: World) -> World:
    """The same world with background that a cluster can play: the twin runs it as it is, too."""
    layout, period_s = site.candidates.costs.layout, world.period_s
    background = []
    for slot, name in enumerate(layout.nodes):
        jobs = world.background[slot]
        arrivals_s, work_s = jobs.arrivals_s, jobs.service_s
        for instants_s, share_s in _others(site, world, slot):
            arrivals_s = np.concatenate([arrivals_s, instants_s])
            work_s = np.concatenate([work_s, np.full(len(instants_s), share_s)])
        order = np.argsort(arrivals_s, kind="stable")
        background.append(
            _whole_models(arrivals_s[order], work_s[order], site.model_s(name) if slot else 1.0, period_s)
        )
    first = slice(0, 1)
    return replace(
        world,
        background=tuple(background),
        shift=world.shift[first],
        arrivals_s=world.arrivals_s[first],
        input_bytes=world.input_bytes[first],
        deadline_s=world.deadline_s[first],
        noise=np.ones_like(world.noise[first]),
        is_warm=np.ones_like(world.is_warm),
    )


def _others(site: Site, world: World, slot: int) -> list[tuple[FloatArray, float]]:
    """What the other clients ask of a node in a period, if each follows the best nominal plan."""
    if slot == 0 or len(world.shift) == 1:
        return []
    costs, plan = site.candidates.costs, _best_nominal(site, world)
    tiers = costs.full("node")[plan] == slot
    share_s = float((costs.full("idle_s")[plan] * tiers)[1:].sum())
    if share_s <= 0.0:
        return []
    return [(arrivals_s[arrivals_s < world.period_s], share_s) for arrivals_s in world.arrivals_s[1:]]


def _best_nominal(site: Site, world: World) -> int:
    """The candidate without tiles that is best at the world's mean rates while no node has a queue."""
    costs = site.candidates.costs
    state = blank_states(costs.layout, 1)
    state.input_bytes[:] = site.typical_bytes
    link_bps, rtt_s = world.rate_bps.mean(axis=1)[world.path] * world.scale, world.rtt_s.mean(axis=1)[world.path]
    load_factor = world.contention.mean(axis=1)
    readings = ReadingsArrays(link_bps[None], rtt_s[None], load_factor[None], np.zeros((1, len(load_factor))))
    total_s = predict_total(costs, readings, state)[0, : site.candidates.num_plans]
    has_tiles = np.array([bool(plan.tiles) for plan in site.candidates.plans[: site.candidates.num_plans]])
    return int(np.where(has_tiles, np.inf, total_s).argmin())


def _whole_models(arrivals_s: FloatArray, work_s: FloatArray, model_s: float, period_s: float) -> Background:
    """Put work together: one whole model at each instant at which as much has come."""
    done = np.cumsum(work_s)
    count = min(int(done[-1] / model_s), int(BACKGROUND_HZ * period_s), BACKGROUND) if len(done) else 0
    if count == 0:
        return Background(np.zeros(0), np.zeros(0))
    at = np.searchsorted(done, done[-1] / count * (np.arange(count) + 0.5))  # half a share ahead: not late on average
    return Background(np.minimum(arrivals_s[at], np.nextafter(period_s, 0.0)), np.full(count, model_s))


class Play:
    """Plays one world on a cluster, on a clock that can be set back.

    Args:
        cluster: the site's, with a relay in every link that the world shapes.
        site: its nodes and links.
        world: as `playable` makes it.
        until_s: nothing changes after this instant.
    """

    def __init__(self, cluster: Cluster, site: Site, world: World, until_s: float) -> None:
        self._cluster, self._world = cluster, world
        self._layout = site.candidates.costs.layout
        self._loaded = [slot for slot, jobs in enumerate(world.background) if len(jobs.arrivals_s)]
        self._player = Player(cluster, Timeline(tuple(self._events(until_s))))

    def prepare(self) -> None:
        """Bring the cluster to how the world begins, but for links, which are not yet slower than `CONNECT_BPS`."""
        for slot, name in enumerate(self._layout.nodes):
            if slot == 0:
                continue
            self._cluster.resume(name)
            self._cluster.set_contention(name, float(self._world.contention[slot, 0]))
            if slot in self._loaded:
                self._cluster.start_load(name)
        for near, far in self._links():
            up, down = (self._steady(link) for link in ((near, far), (far, near)))
            self._cluster.link(near, far).shape(up=up, down=down)

    def start(self) -> None:
        """Let the clock run from 0."""
        self._player.start()

    @property
    def now_s(self) -> float:
        """Instant of the world."""
        return self._player.now_s

    @property
    def error(self) -> Exception | None:
        """What could not be carried out."""
        return self._player.error

    def postpone(self, seconds: float) -> None:
        """Turn the clock back, so that everything yet to come comes so much later: links and loads too."""
        self._player.postpone(seconds)
        now_s = self.now_s
        for near, far in self._links():
            self._set_link(near, far, now_s).apply(self._cluster)
        for slot in self._loaded:
            self._set_load(slot, now_s).apply(self._cluster)

    def close(self) -> None:
        """Carry out nothing more; end the background requests, let suspended nodes go on."""
        try:
            self._player.close()
        finally:
            for slot, name in enumerate(self._layout.nodes):
                if slot:
                    self._cluster.resume(name)
                if slot in self._loaded:
                    self._cluster.set_load(name, LoadShape())

    # --- what happens when ------------------------------------------------------------------------------------------

    def _events(self, until_s: float) -> list[Event]:
        world = self._world
        events = [Event(0.0, self._set_load(slot, 0.0)) for slot in self._loaded]
        for near, far in self._links():
            slot = self._layout.link_slot[near, far]
            delays = world.rtt_s[world.path[slot]]
            events += [Event(at_s, self._set_link(near, far, at_s)) for at_s in _changes(delays, until_s)]
        for slot, name in enumerate(self._layout.nodes):
            if slot:
                events += self._node_events(name, world.contention[slot], world.is_down[slot], until_s)
        return events

    @staticmethod
    def _node_events(
        name: str, contention: FloatArray, is_down: "np.typing.NDArray[np.bool_]", until_s: float
    ) -> list[Event]:
        """Spells of silence; a node that hangs takes no command, so it learns its contention when it goes on."""
        events: list[Event] = []
        for at_s in sorted({*_changes(contention, until_s), *_changes(is_down, until_s)}):
            step = round(at_s / GRID_S) % len(contention)
            if is_down[step]:
                events.append(Event(at_s, Suspend(name)))
            else:
                events += [Event(at_s, Resume(name)), Event(at_s, SetContention(name, float(contention[step])))]
        return events

    def _links(self) -> list[Link]:
        """Links with a relay, the end nearer to the device first."""
        slots = self._layout.node_slot
        ends = [(a, b) for a, b in self._layout.links if slots[a] < slots[b]]
        return [(a, b) for a, b in ends if a == DEVICE_NODE or slots[b] == len(slots) - 1]

    def _set_link(self, near: str, far: str, at_s: float) -> SetLink:
        return SetLink(near, far, up=self._shape((near, far), at_s), down=self._shape((far, near), at_s))

    def _shape(self, link: Link, at_s: float) -> LinkShape:
        """One direction from an instant on: rates of the whole period, the delay of this instant."""
        rate_bps, rtt_s = self._conditions(link)
        steps = len(rate_bps)
        first = int(at_s / GRID_S + _SAME)
        into_s = max(at_s - first * GRID_S, 0.0)  # the step at hand has begun so long ago; its rest comes last
        rates_bps = np.roll(rate_bps, -(first % steps)).tolist()
        starts_s = [0.0, *(GRID_S * np.arange(1, steps) - into_s).tolist()]
        if into_s > _SAME:
            rates_bps.append(rates_bps[0])
            starts_s.append(GRID_S * steps - into_s)
        kept = [at for at in range(len(rates_bps)) if at == 0 or rates_bps[at] != rates_bps[at - 1]]
        return LinkShape(
            rates_bps=tuple(rates_bps[at] for at in kept),
            starts_s=tuple(starts_s[at] for at in kept),
            period_s=steps * GRID_S if len(kept) > 1 else None,
            delay_s=float(rtt_s[first % steps]) / 2.0,
        )

    def _steady(self, link: Link) -> LinkShape:
        rate_bps, rtt_s = self._conditions(link)
        return LinkShape(rates_bps=(max(float(rate_bps[0]), CONNECT_BPS),), delay_s=float(rtt_s[0]) / 2.0)

    def _conditions(self, link: Link) -> tuple[FloatArray, FloatArray]:
        slot, world = self._layout.link_slot[link], self._world
        return world.rate_bps[world.path[slot]] * world.scale[slot], world.rtt_s[world.path[slot]]

    def _set_load(self, slot: int, at_s: float) -> SetLoad:
        period_s = self._world.period_s
        instants_s = np.sort((self._world.background[slot].arrivals_s - at_s) % period_s)
        return SetLoad(self._layout.nodes[slot], LoadShape(instants_s=tuple(instants_s.tolist()), period_s=period_s))


def _changes(values: "np.typing.NDArray[np.generic]", until_s: float) -> list[float]:
    """Instants from 0 on at which values on the grid change, period after period."""
    steps = np.flatnonzero(values != np.roll(values, 1))
    period_s = len(values) * GRID_S
    later = [turn * period_s + step * GRID_S for turn in range(int(until_s / period_s) + 1) for step in steps.tolist()]
    return sorted({0.0, *(at_s for at_s in later if at_s <= until_s)})
