"""Chains of tiled spans in the twin: only borders cross, and a tile that is lost is done from the chain's start on."""

import pytest

from env.kernel import tiles
from runtime.planning.tiles import TILE_HAND_OVER_S, TileNode, cost_tiles
from runtime.types import TileSpan
from tests.test_env_tiles import (
    FIXED_S,
    LAYER_S,
    LAYERS,
    PEER_BPS,
    PEER_RTT_S,
    SIZE,
    SPEEDS,
    edge_plan,
    play,
    quiet_world,
    tower_site,
    way_s,
)
from tests.test_env_twin import in_plain_python

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

CHAIN = (TileSpan(1, 3, (SIZE // 2,), ()), TileSpan(3, 5, (SIZE // 2,), ()), TileSpan(5, LAYERS, (SIZE // 2,), ()))
CHAINED = edge_plan("edge0", "edge1", spans=CHAIN)


@pytest.fixture(scope="module")
def site():
    return tower_site(SPEEDS)


def costs_of(site, *names):
    nodes = tuple(
        TileNode(
            (LAYER_S / SPEEDS[name],) * LAYERS, PEER_BPS, PEER_BPS, PEER_RTT_S if at else 0.0, FIXED_S, TILE_HAND_OVER_S
        )
        for at, name in enumerate(names)
    )
    return cost_tiles(site.problem.graph, CHAIN, nodes)


def test_idle_nodes_take_what_the_spans_of_a_chain_take(site):
    up_s, back_s = way_s(site)
    costs = costs_of(site, "edge0", "edge1")
    assert costs[1].scatter_bytes[1] < 0.1 * costs[0].scatter_bytes[1]
    (latency_s,) = play(site, quiet_world(site, [2.0, 9.0]), [CHAINED])
    assert latency_s == pytest.approx(up_s + LAYER_S + sum(cost.total_s for cost in costs) + back_s, abs=1e-9)


def test_a_tile_that_is_lost_within_a_chain_is_done_from_its_start_on_and_stays_with_the_head(site):
    up_s, back_s = way_s(site)
    first, second, third = costs_of(site, "edge0", "edge1")
    # The peer has so much to do when the second tile comes to it that the head gives that up.
    begins_s = 2.0 + up_s + LAYER_S + first.total_s
    busy = ([begins_s - 0.5 * first.compute_s[1]], [5.0])
    (latency_s,) = play(site, quiet_world(site, [2.0, 9.0], edge1=busy), [CHAINED])
    own_s = second.compute_s[0] + 2 * FIXED_S
    probed_bps = 8 * 65536 / (8 * 65536 / PEER_BPS + PEER_RTT_S / 2)
    nbytes = second.scatter_bytes[1] + second.gather_bytes[1]
    wait_s = tiles.PATIENCE * (own_s + PEER_RTT_S + nbytes * 8 / probed_bps) + tiles.SLACK_S
    replay_s = first.compute_s[1] + second.compute_s[1]  # both nodes are as fast
    last_s = sum(third.compute_s) + 2 * FIXED_S  # both tiles
    assert latency_s == pytest.approx(begins_s + wait_s + replay_s + last_s + back_s - 2.0, abs=1e-9)


def test_a_peer_that_comes_back_within_a_chain_is_not_asked_before_its_end(site):
    slots, (up_s, back_s) = site.candidates.costs.layout.node_slot, way_s(site)
    sent_s = 4.0 - up_s - LAYER_S - 1e-3  # the chain begins just before the peer is back
    world = quiet_world(site, [sent_s, 9.0])
    world.is_down[slots["edge1"], :20] = True  # until 4 s
    (latency_s,) = play(site, world, [CHAINED])
    assert latency_s == pytest.approx(up_s + LAYERS * LAYER_S + back_s, abs=1e-9)  # in one piece
    apart = edge_plan("edge0", "edge1", spans=(CHAIN[0], CHAIN[2]))
    (latency_s,) = play(site, quiet_world(site, [sent_s, 9.0]), [apart])
    assert latency_s < up_s + LAYERS * LAYER_S + back_s - 0.01


def play_chains():
    """Chains that are helped, left alone and given up on the way: their latencies."""
    place = tower_site(SPEEDS)
    slots = place.candidates.costs.layout.node_slot
    busy = quiet_world(place, [2.0, 2.06, 2.12, 9.0], edge1=([2.1, 2.2], [3.0, 0.1]))
    gone = quiet_world(place, [2.0, 9.0])
    gone.is_down[slots["edge1"], :20] = True
    return [*play(place, busy, [CHAINED] * 3), *play(place, gone, [CHAINED])]


def test_plain_python_plays_chains_as_they_are_compiled():
    expected = play_chains()
    assert in_plain_python(__name__, "play_chains") == pytest.approx(expected, rel=1e-9)
    assert max(expected) > 2 * min(expected)
