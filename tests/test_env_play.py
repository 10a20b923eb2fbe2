"""A world as a cluster plays it, without any process."""

import math

import numpy as np
import pytest

from env.catalogue import make_sites
from env.play import BACKGROUND_HZ, Play, playable
from env.scenario import SyntheticScenario
from env.traces import GRID_S
from env.world import World
from runtime.testbed.timeline import Resume, SetContention, SetLink, Suspend
from tests.sites import still_world, toy_site

(SITE,) = make_sites(("random:2",))


class Recorder:
    """Stands where a cluster would: a play only sends it actions."""


def make_play(world: World, site=SITE) -> Play:
    return Play(Recorder(), site, world, 150.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_s", [0.0, 0.2, 3.0, 3.061, 102.3, 102.4, 250.0])
def test_a_link_that_is_set_at_any_instant_has_the_rates_of_the_world_from_then_on(at_s: float) -> None:
    world = SyntheticScenario("handover").world(SITE, 3, 10)
    play = make_play(world)
    for link in (("device", "edge0"), ("cloud", "edge0")):
        slot = SITE.candidates.costs.layout.link_slot[link]
        schedule = play._shape(link, at_s).schedule()
        assert schedule is not None
        for later_s in (0.01, 0.11, 0.33, 7.77, 60.05, 130.05):
            step = int((at_s + later_s) / GRID_S) % world.rate_bps.shape[1]
            expected = world.rate_bps[world.path[slot], step] * world.scale[slot]
            assert schedule.rate_bps(later_s) == pytest.approx(max(expected, 1000.0))


def test_work_of_others_is_kept_and_comes_in_whole_models() -> None:
    for kind in ("load", "contention"):
        world = SyntheticScenario(kind).world(SITE, 4, 30)
        played = playable(SITE, world)
        assert len(played.shift) == 1
        for slot, name in enumerate(SITE.candidates.costs.layout.nodes):
            if slot == 0:
                assert len(played.background[0].arrivals_s) == 0
                continue
            model_s = SITE.model_s(name)
            before, after = world.background[slot].service_s.sum(), played.background[slot].service_s.sum()
            limit = int(BACKGROUND_HZ * world.period_s)
            assert len(played.background[slot].arrivals_s) <= limit
            if kind == "load" and before / model_s < limit:
                assert after == pytest.approx(before, abs=model_s)
            assert (np.diff(played.background[slot].arrivals_s) >= 0).all()


def test_a_node_that_is_silent_hears_of_contention_when_it_goes_on() -> None:
    site = toy_site()
    world = still_world(site, [2.0, 9.0])
    edge = site.candidates.costs.layout.node_slot["edge0"]
    world.is_down[edge, 10:20] = True
    world.contention[edge, 15:] = 2.0
    events = [event for event in make_play(world, site)._player.timeline.events if event.at_s < 100.0]
    nodes = [(round(e.at_s, 3), e.action) for e in events if isinstance(e.action, Suspend | Resume | SetContention)]
    of_edge = [(at_s, action) for at_s, action in nodes if action.node == "edge0"]
    assert of_edge == [
        (0.0, Resume("edge0")),
        (0.0, SetContention("edge0", 1.0)),
        (2.0, Suspend("edge0")),
        (3.0, Suspend("edge0")),
        (4.0, Resume("edge0")),
        (4.0, SetContention("edge0", 2.0)),
    ]
    assert sum(isinstance(event.action, SetLink) for event in events) == 3


def test_background_that_starts_over_is_turned_to_the_instant() -> None:
    site = toy_site()
    world = still_world(site, [2.0, 9.0], background={1: ([1.0, 5.0], [0.3, 0.3])})
    shape = make_play(world, site)._set_load(1, 3.0).shape
    assert shape.instants_s == (2.0, pytest.approx(world.period_s - 2.0))
    assert math.isclose(shape.period_s or 0.0, world.period_s)
