"""Plans in tiles in the twin: what they take by hand, where nodes are busy or gone, and as planning predicts them."""

from dataclasses import replace

import numpy as np
import pytest

from env.backend import Ended
from env.calibrate import probe
from env.draw import SCENARIOS
from env.kernel import tiles
from env.kernel.layout import SLOTS
from env.kernel.nodes import CAPACITY
from env.play import playable
from env.scenario import SyntheticScenario
from env.site import Site
from env.twin import OUTCOMES, Twin
from env.world import PEERS, World
from runtime.node import scatter
from runtime.planning.cost import predict_total
from runtime.planning.estimators import tuned_arrays
from runtime.planning.features import FeatureEncoder
from runtime.planning.policies.planner import build_planner
from runtime.planning.problem import PlanningProblem
from runtime.planning.tiles import TILE_HAND_OVER_S, TileCost, TileNode, cost_tiles
from runtime.types import (
    DEVICE_NODE,
    Constraints,
    ModelProfile,
    NodeProfile,
    Plan,
    SpatialOp,
    Tier,
    TileSpan,
    Window,
)
from tests.graphs import make_deployment
from tests.nets import spatial_graph
from tests.sites import DOWN_BPS, EDGE_RTT_S, UP_BPS, still_world

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them

LANE = np.zeros(1, dtype=np.int64)
SIZE, LAYERS, LAYER_S, FIXED_S = 64, 7, 0.02, 1e-4
SPEEDS = {"edge0": 1.0, "edge1": 1.0, "edge2": 0.5}
PEER_BPS, PEER_RTT_S = 5e8, 6e-4
FIRST, SECOND = TileSpan(1, 4, (SIZE // 2,), ()), TileSpan(5, LAYERS, (SIZE // 2,), ())
THREE = TileSpan(1, 4, (26, 52), ())


def tower_site(speeds: dict[str, float], *, device_has_model: bool = True) -> Site:
    """Convolutions of one size; edge nodes are far faster than device and cloud, unless told otherwise."""
    same = (Window(3, 1, 1), Window(3, 1, 1))
    ops = [
        SpatialOp(f"v{i}", (f"v{i - 1}" if i else "x",), (SIZE, SIZE), same, 1000.0 * SIZE * SIZE)
        for i in range(LAYERS)
    ]
    graph = spatial_graph((SIZE, SIZE), ops)
    deployment = make_deployment(
        edges=sum(name.startswith("edge") for name in speeds),
        constraints=Constraints(deadline_s=60.0, device_has_model=device_has_model),
    )
    nodes = {
        name: NodeProfile((LAYER_S / speed,) * LAYERS, 1e9, 1e9, FIXED_S)
        for name, speed in {DEVICE_NODE: 0.1, "cloud": 0.1, **speeds}.items()
    }
    problem = PlanningProblem(ModelProfile(graph, nodes), deployment, deployment.constraints, "tensor")
    return Site("tower", problem)


@pytest.fixture(scope="module")
def site():
    return tower_site(SPEEDS)


def edge_plan(*names: str, spans: tuple[TileSpan, ...] = ()) -> Plan:
    return Plan((Tier.EDGE,) * LAYERS, names, spans)


TWO_SPANS = edge_plan("edge0", "edge1", spans=(FIRST, SECOND))
WHOLE = edge_plan("edge0")


def quiet_world(site: Site, arrivals_s: list[float], **background: tuple[list[float], list[float]]) -> World:
    slots = site.candidates.costs.layout.node_slot
    jobs = {slots[name]: of_node for name, of_node in background.items()}
    world = still_world(site, arrivals_s, deadline_s=60.0, background=jobs)
    world.rate_bps[PEERS], world.rtt_s[PEERS] = PEER_BPS, PEER_RTT_S
    return world


def play(site: Site, world: World, plans: list[Plan]) -> np.ndarray:
    """Latency of every request; all are answered by nodes."""
    twin = Twin(1, len(plans) + 1)
    twin.load(0, site, world)
    twin.begin(LANE)
    for plan in plans:
        twin.step(LANE, np.array([twin.add_plan(0, plan)]))
    numbers = np.arange(len(plans))
    latency_s, _, outcomes = twin.requests(np.zeros_like(numbers), numbers)
    assert [OUTCOMES[code] for code in outcomes] == ["remote"] * len(plans)
    return latency_s


def cost_of(site: Site, span: TileSpan, *names: str) -> TileCost:
    nodes = tuple(
        TileNode(
            (LAYER_S / SPEEDS[name],) * LAYERS, PEER_BPS, PEER_BPS, PEER_RTT_S if at else 0.0, FIXED_S, TILE_HAND_OVER_S
        )
        for at, name in enumerate(names)
    )
    (cost,) = cost_tiles(site.problem.graph, [span], nodes)
    return cost


def way_s(site: Site) -> tuple[float, float]:
    """Seconds to the head, and back to the device."""
    sizes = {value.name: value.tensor.nbytes for value in site.problem.graph.values}
    up_s = sizes["x"] * 8 / UP_BPS + EDGE_RTT_S / 2
    back_s = sizes[site.problem.graph.outputs[0]] * 8 / DOWN_BPS + EDGE_RTT_S / 2 + 2 * FIXED_S
    return up_s, back_s


def test_idle_nodes_take_what_the_tiles_of_each_span_take(site):
    up_s, back_s = way_s(site)
    span_s = [cost_of(site, span, "edge0", "edge1").total_s for span in (FIRST, SECOND)]
    assert sum(span_s) < 0.8 * 5 * LAYER_S  # or there would be nothing to win
    (latency_s,) = play(site, quiet_world(site, [2.0, 9.0]), [TWO_SPANS])
    assert latency_s == pytest.approx(up_s + 2 * LAYER_S + sum(span_s) + back_s, abs=1e-9)


def test_three_nodes_wait_for_the_slowest(site):
    up_s, back_s = way_s(site)
    cost = cost_of(site, THREE, "edge1", "edge0", "edge2")
    plan = edge_plan("edge1", "edge0", "edge2", spans=(THREE,))
    (latency_s,) = play(site, quiet_world(site, [2.0, 9.0]), [plan])
    assert cost.total_s > cost.compute_s[0] + 2 * FIXED_S  # the own one is not it
    assert latency_s == pytest.approx(up_s + 4 * LAYER_S + cost.total_s + back_s, abs=1e-9)


ONE_SPAN = edge_plan("edge0", "edge1", spans=(FIRST,))


def begins_s(site: Site) -> float:
    """When the span of `ONE_SPAN` begins, asked for at 2 s: the head's untiled layers all run before it."""
    return 2.0 + way_s(site)[0] + 4 * LAYER_S


def test_a_tile_waits_at_its_node_and_the_head_serves_others_meanwhile(site):
    cost, (_, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    free_s = begins_s(site) + cost.scatter_s[1] + 0.09  # the peer
    own_s = begins_s(site) + cost.compute_s[0] + 2 * FIXED_S
    back_at_s = free_s + cost.compute_s[1] + cost.gather_s[1]
    peer = ([2.0], [free_s - 2.0])
    (latency_s,) = play(site, quiet_world(site, [2.0, 9.0], edge1=peer), [ONE_SPAN])
    assert latency_s == pytest.approx(back_at_s + back_s - 2.0, abs=1e-9)
    for service_s in (0.5 * LAYER_S, 10 * LAYER_S):
        head = ([own_s - 1e-3, own_s - 5e-4], [service_s, 1.0])
        (latency_s,) = play(site, quiet_world(site, [2.0, 9.0], edge1=peer, edge0=head), [ONE_SPAN])
        # One that came before has the head until its end; the other, which had not begun by then, waits.
        is_short = own_s + service_s < back_at_s
        expected_s = own_s + service_s + (1.0 if is_short else 0.0)
        assert latency_s == pytest.approx(expected_s + back_s - 2.0, abs=1e-9)


def test_what_goes_on_stands_ahead_of_what_waits(site):
    cost, (_, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    own_s = begins_s(site) + cost.compute_s[0] + 2 * FIXED_S
    free_s = own_s + 0.05
    back_at_s = free_s + cost.compute_s[1] + cost.gather_s[1]
    # The first is served until after the tile is back; the second came long before that, and is served after.
    world = quiet_world(
        site, [2.0, 9.0], edge1=([2.0], [free_s - 2.0]), edge0=([own_s + 1e-3, own_s + 2e-3], [back_at_s - own_s, 1.0])
    )
    (latency_s,) = play(site, world, [ONE_SPAN])
    assert latency_s == pytest.approx(own_s + 1e-3 + back_at_s - own_s + back_s - 2.0, abs=1e-9)


@pytest.mark.parametrize("later_s", np.arange(0.0, 0.5, 0.0625).tolist())
def test_readings_do_not_let_what_waits_overtake_what_goes_on(site, later_s):
    """A status tells, and a request that comes asks, how many background requests wait: they wait on all the same."""
    cost, (up_s, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    begins_s = 4.0 + later_s + up_s + 4 * LAYER_S
    own_s = begins_s + cost.compute_s[0] + 2 * FIXED_S
    back_at_s = own_s + 0.15
    peer = ([4.0 + later_s], [back_at_s - cost.compute_s[1] - cost.gather_s[1] - 4.0 - later_s])
    # One has the head from before the tile is back until after; the second waits behind it, for long.
    free_s = back_at_s + 0.05
    head = ([own_s + 1e-3, own_s + 2e-3], [free_s - own_s - 1e-3, 1.0])
    world = quiet_world(site, [4.0 + later_s, 30.0], edge1=peer, edge0=head)
    (latency_s,) = play(site, world, [ONE_SPAN])
    assert latency_s == pytest.approx(free_s + back_s - 4.0 - later_s, abs=1e-9)
    # Another request is there while the tile is out: behind the background requests that came before it.
    sent_s = own_s + 0.1 - up_s
    world = quiet_world(site, [4.0 + later_s, sent_s, 30.0], edge1=peer, edge0=head)
    latency_s = play(site, world, [ONE_SPAN, WHOLE])
    ends_s = free_s, free_s + 1.0 + LAYERS * LAYER_S
    assert latency_s + np.array([4.0 + later_s, sent_s]) == pytest.approx(
        [end_s + back_s for end_s in ends_s], abs=1e-9
    )


@pytest.mark.parametrize("later_s", [0.0, 0.125, 0.25, 0.375])
def test_readings_keep_what_runs_however_many_wait_behind_it(site, later_s):
    """Of some of these a tick lies within the gather; more requests came before and wait then than a node remembers."""
    cost, (up_s, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    own_s = 4.0 + later_s + up_s + 4 * LAYER_S + cost.compute_s[0] + 2 * FIXED_S
    back_at_s = own_s + 0.15
    peer = ([4.0 + later_s], [back_at_s - cost.compute_s[1] - cost.gather_s[1] - 4.0 - later_s])
    free_s = back_at_s + 0.05
    before_s = [1.0 + 0.05 * at for at in range(20)]
    behind_s = [own_s + 2e-3 + 1e-4 * at for at in range(18)]
    head = (
        [*before_s, own_s + 1e-3, *behind_s],
        [*[1e-3] * len(before_s), free_s - own_s - 1e-3, *[1e-3] * len(behind_s)],
    )
    world = quiet_world(site, [4.0 + later_s, 30.0], edge1=peer, edge0=head)
    (latency_s,) = play(site, world, [ONE_SPAN])
    assert latency_s == pytest.approx(free_s + back_s - 4.0 - later_s, abs=1e-9)


def test_what_waits_stays_behind_when_the_request_before_it_is_given_up():
    """The head is free at once, and goes on with what has its tiles back: not with background that was counted."""
    site = tower_site({**SPEEDS, DEVICE_NODE: 1.0})
    cost, (up_s, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    own_s = begins_s(site) + cost.compute_s[0] + 2 * FIXED_S
    sent_s = own_s + 1e-3 - up_s  # comes to the head when it has just left its processor
    back_at_s = own_s + 0.06
    world = quiet_world(
        site,
        [2.0, sent_s, 9.0],
        edge1=([2.0], [back_at_s - cost.compute_s[1] - cost.gather_s[1] - 2.0]),
        edge0=([own_s + 0.05], [1.0]),
    )
    given_up_s = own_s + 0.11  # the second has its answer from the device, which began when all was late
    world.deadline_s[0, 1] = given_up_s - LAYERS * LAYER_S - sent_s + 0.01 + 1.5 * LAYERS * LAYER_S
    twin = Twin(1, 3)
    twin.load(0, site, world)
    twin.begin(LANE)
    for plan in (ONE_SPAN, WHOLE):
        twin.step(LANE, np.array([twin.add_plan(0, plan)]))
    latency_s, _, outcomes = twin.requests(np.zeros(2, dtype=np.int64), np.arange(2))
    assert [OUTCOMES[code] for code in outcomes] == ["remote", "local"]
    assert latency_s + np.array([2.0, sent_s]) == pytest.approx([given_up_s + back_s, given_up_s], abs=1e-9)


def test_head_does_a_tile_itself_that_is_refused(site):
    cost, (_, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    many = CAPACITY + 2
    world = quiet_world(site, [2.0, 9.0], edge1=([2.0 + 1e-3 * at for at in range(many)], [1.0] * many))
    (latency_s,) = play(site, world, [ONE_SPAN])
    heard_s = begins_s(site) + cost.scatter_s[1] + PEER_RTT_S / 2
    own_s = begins_s(site) + cost.compute_s[0] + 2 * FIXED_S
    redone_s = cost.compute_s[1]  # both are as fast
    assert latency_s == pytest.approx(max(heard_s, own_s) + redone_s + back_s - 2.0, abs=1e-9)


def test_a_head_counts_requests_whose_tiles_are_out_against_its_capacity():
    site = tower_site({"edge0": 50.0, "edge1": 50.0})
    count = CAPACITY + 1
    # No tile is back before the last request comes, and the head has done its own work of all the others.
    world = quiet_world(site, [*np.linspace(2.0, 2.1, count), 9.0], edge1=([2.0], [0.3]))
    world.rate_bps[:], world.scale[:], world.rtt_s[:] = PEER_BPS, 1.0, PEER_RTT_S
    twin = Twin(1, count + 1)
    twin.load(0, site, world)
    twin.begin(LANE)
    for _ in range(count):
        twin.step(LANE, np.array([twin.add_plan(0, ONE_SPAN)]))
    latency_s, _, outcomes = twin.requests(np.zeros(count, dtype=np.int64), np.arange(count))
    assert [OUTCOMES[code] for code in outcomes] == ["remote"] * CAPACITY + ["local"]
    # The last is refused at once, and the device does it all when it hears of that.
    up_s = site.problem.graph.values[0].tensor.nbytes * 8 / PEER_BPS
    assert latency_s[-1] == pytest.approx(up_s + PEER_RTT_S + LAYERS * LAYER_S / 0.1, abs=1e-9)


def test_a_tile_is_left_to_the_head_when_there_is_no_slot_for_it(site):
    cost, (up_s, back_s) = cost_of(site, THREE, "edge0", "edge1", "edge2"), way_s(site)
    waiting = SLOTS - 2  # of two tiles the second finds no slot
    world = quiet_world(site, [*np.linspace(1.9, 2.0, waiting), 2.05, 9.0])
    twin = Twin(1, waiting + 2)
    twin.load(0, site, world)
    twin.begin(LANE)
    for _ in range(waiting):
        twin.step(LANE, np.array([twin.add_plan(0, Plan((Tier.DEVICE,) * LAYERS))]))
    twin.step(LANE, np.array([twin.add_plan(0, edge_plan("edge0", "edge1", "edge2", spans=(THREE,)))]))
    (latency_s,), _, (outcome,) = twin.requests(LANE, LANE + waiting)
    assert OUTCOMES[outcome] == "remote"
    own_s = max(cost.compute_s[0] + 2 * FIXED_S, cost.scatter_s[1] + cost.compute_s[1] + cost.gather_s[1])
    redone_s = cost.compute_s[2] * SPEEDS["edge2"] / SPEEDS["edge0"]
    assert latency_s == pytest.approx(up_s + 4 * LAYER_S + own_s + redone_s + back_s, abs=1e-9)


def test_head_waits_for_a_tile_only_so_long(site):
    cost, (_, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    world = quiet_world(site, [2.0, 9.0], edge1=([2.0], [5.0]))
    (latency_s,) = play(site, world, [ONE_SPAN])
    nbytes, rtt_s = cost.scatter_bytes[1] + cost.gather_bytes[1], PEER_RTT_S
    own_s = cost.compute_s[0] + 2 * FIXED_S
    # Rates are measured with half a round trip in them: the probe's bytes came that much more slowly.
    probed_bps = 8 * 65536 / (8 * 65536 / PEER_BPS + PEER_RTT_S / 2)
    wait_s = tiles.PATIENCE * (own_s + rtt_s + nbytes * 8 / probed_bps) + tiles.SLACK_S
    assert latency_s == pytest.approx(begins_s(site) + wait_s + cost.compute_s[1] + back_s - 2.0, abs=1e-9)


def test_nodes_that_are_gone_are_done_without(site):
    slots, (up_s, back_s) = site.candidates.costs.layout.node_slot, way_s(site)
    world = quiet_world(site, [4.0, 9.0])
    world.is_down[slots["edge1"]] = True
    (latency_s,) = play(site, world, [TWO_SPANS])
    assert latency_s == pytest.approx(up_s + LAYERS * LAYER_S + back_s, abs=1e-9)  # in one piece
    cost = cost_of(site, THREE, "edge0", "edge1", "edge2")
    (latency_s,) = play(site, world, [edge_plan("edge0", "edge1", "edge2", spans=(THREE,))])
    others_s = max(cost.compute_s[0] + 2 * FIXED_S, cost.scatter_s[2] + cost.compute_s[2] + cost.gather_s[2])
    assert latency_s == pytest.approx(up_s + 4 * LAYER_S + others_s + cost.compute_s[1] + back_s, abs=1e-9)
    # One that has just gone silent is sent a tile, and waited for.
    world.is_down[slots["edge1"]] = False
    world.is_down[slots["edge1"], 20:] = True  # from 4 s on
    (latency_s,) = play(site, world, [ONE_SPAN])
    assert latency_s > tiles.SLACK_S + up_s + 4 * LAYER_S + cost_of(site, FIRST, "edge0", "edge1").total_s + back_s


def test_tiles_hold_their_nodes(site):
    slots = site.candidates.costs.layout.node_slot
    cost, (up_s, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    reach_s = begins_s(site) + cost.scatter_s[1]
    sent_s = reach_s + 0.3 * cost.compute_s[1] - up_s  # comes to the peer while its tile runs
    world = quiet_world(site, [2.0, sent_s, 9.0])
    latency_s = play(site, world, [ONE_SPAN, edge_plan("edge1")])
    assert latency_s[1] == pytest.approx(reach_s + cost.compute_s[1] + LAYERS * LAYER_S + back_s - sent_s, abs=1e-9)
    twin = Twin(1, 60)
    twin.load(0, site, quiet_world(site, [2.0 + 0.5 * at for at in range(60)]))
    twin.begin(LANE)
    for _ in range(20):
        twin.step(LANE, np.array([twin.add_plan(0, ONE_SPAN)]))
    busy_frac = twin.known("utilisation_frac", LANE)[0]
    assert busy_frac[slots["edge1"]] == pytest.approx(cost.compute_s[1] / 0.5, rel=0.11)  # ten of them in a window
    assert busy_frac[slots["edge2"]] == 0.0


def test_a_request_that_is_given_up_takes_its_tiles_back():
    site = tower_site({**SPEEDS, DEVICE_NODE: 1.0})
    cost, (up_s, back_s) = cost_of(site, FIRST, "edge0", "edge1"), way_s(site)
    world = quiet_world(site, [2.0, 3.0, 9.0], edge1=([2.0], [1.2]))
    wait_s = up_s + 4 * LAYER_S + cost.compute_s[0] + 0.02  # until the device begins: the tile stands in a queue
    world.deadline_s[0, 0] = wait_s + 0.01 + 1.5 * LAYERS * LAYER_S
    twin = Twin(1, 3)
    twin.load(0, site, world)
    twin.begin(LANE)
    for plan in (ONE_SPAN, edge_plan("edge1")):
        twin.step(LANE, np.array([twin.add_plan(0, plan)]))
    latency_s, _, outcomes = twin.requests(np.zeros(2, dtype=np.int64), np.arange(2))
    assert [OUTCOMES[code] for code in outcomes] == ["local", "remote"]
    # The background request ends at 3.2 s; no tile stands between it and the second request.
    assert latency_s == pytest.approx([wait_s + LAYERS * LAYER_S, 3.2 + LAYERS * LAYER_S + back_s - 3.0], abs=1e-9)


@pytest.fixture(scope="module")
def rollouts():
    """Random plans through every scenario, with what was known at each step, twice; and forks beside the lanes."""
    sites = [tower_site({"edge0": 1.0, "edge1": 0.7}), tower_site(SPEEDS)]
    assert all(any(plan.tiles for plan in place.candidates.plans) for place in sites)
    lanes, runs = np.arange(len(sites)), []
    for _ in range(2):
        rng, twin, seen = np.random.default_rng(3), Twin(len(sites), 17, num_forks=len(sites)), []
        for kind in SCENARIOS:
            for lane, place in enumerate(sites):
                world = SyntheticScenario(kind).world(place, (5, lane), 17)
                world.is_down[2, 8:20] |= kind == "outage"
                twin.load(lane, place, world)
            twin.begin(lanes)
            for number in range(16):
                for lane, place in enumerate(sites):
                    at = np.array([lane])
                    shown = [rows[lane].copy() for rows in twin.seen]
                    known = [
                        twin.known(name, at)[:, :32] if name == "total_s" else twin.known(name, at)
                        for name in ("current", "total_s")
                    ]
                    seen.append((place, twin.state_arrays(place, at), *known, shown))
                rows = np.array([rng.integers(place.candidates.num_plans) for place in sites])
                if number == 9:
                    forks = twin.fork(lanes)
                if number >= 9:
                    twin.step(forks, rows)
                twin.step(lanes, rows)
            numbers = np.arange(16)
            of_lanes, of_forks = (
                np.stack([twin.requests(np.full(16, lane), numbers)[0] for lane in those]) for those in (lanes, forks)
            )
            assert (of_lanes == of_forks).all()
            seen.append(of_lanes)
        runs.append(seen)
    return runs


def test_rollouts_repeat_under_a_seed(rollouts):
    first, second = ([x for x in run if isinstance(x, np.ndarray)] for run in rollouts)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_compiled_prediction_and_features_equal_those_of_planning(rollouts):
    masked = 0
    for step in rollouts[0]:
        if isinstance(step, np.ndarray):
            continue
        place, state, current, total_s, (rows, context, mask) = step
        known, count = place.candidates, place.candidates.num_plans
        expected_s = predict_total(known.costs, tuned_arrays(state), state)[0]
        assert total_s[0, :count] == pytest.approx(expected_s[:count], rel=1e-9)
        expected = FeatureEncoder(place.problem).encode(state, current=np.where(current < 32, current, -1))
        assert np.abs(rows - expected.candidates.ravel()).max() < 1e-6
        assert np.abs(context - expected.context[0]).max() < 1e-6
        assert (mask == expected.mask[0]).all()
        masked += sum(bool(plan.tiles) and not mask[row] for row, plan in enumerate(known.plans[:count]))
    assert masked > 0  # nodes went down


@pytest.mark.parametrize("device_has_model", [True, False])
def test_tiles_are_masked_whose_head_has_been_silent_from_the_start(device_has_model):
    place = tower_site({"edge0": 1.0, "edge1": 0.7}, device_has_model=device_has_model)
    known, slots = place.candidates, place.candidates.costs.layout.node_slot
    for gone in (["edge0"], ["edge0", "edge1"], ["edge0", "edge1", "cloud"]):
        world = quiet_world(place, [2.0, 9.0])
        for name in gone:
            world.is_down[slots[name]] = True
        twin = Twin(1, 2)
        twin.load(0, place, world)
        twin.begin(LANE)
        mask = twin.seen.mask[0, : known.num_plans] > 0
        assert (mask == known.mask(twin.state_arrays(place, LANE))[0, : known.num_plans]).all()
        assert not any(mask[row] for row, plan in enumerate(known.plans[: known.num_plans]) if plan.tiles)


def test_compiled_planner_chooses_tiles_as_that_of_planning():
    place = tower_site({"edge0": 1.0, "edge1": 0.7})
    planner = build_planner(place.problem)
    twin, tiled = Twin(1, 25), 0
    for seed in range(3):
        world = SyntheticScenario("streaming").world(place, seed, 25)
        twin.load(0, place, world)
        expected_s = twin.start(LANE)[0, :24].copy()
        for _ in range(24):
            row = planner.choose(twin.state_arrays(place, LANE)).astype(np.int64)
            tiled += bool(place.candidates.plans[row[0]].tiles)
            twin.step(LANE, row)
        latency_s, _, _ = twin.requests(np.zeros(24, dtype=np.int64), np.arange(24))
        assert (latency_s == expected_s).all()
    assert tiled > 0


class Probed:
    """Stands where live nodes would: it keeps the plans that it is given."""

    def __init__(self, site: Site) -> None:
        self.sites, self.plans = (site,), []

    def start_world(self, site: int, world: World) -> None: ...

    def step(self, plan: Plan) -> tuple[bool, list[Ended]]:
        self.plans.append(plan)
        return False, []


def test_plans_in_tiles_are_neither_probed_nor_played_as_other_clients(site):
    backend = Probed(site)
    probe(backend, 0, 40)
    assert len(set(backend.plans)) > 5
    assert any(plan.tiles for plan in site.candidates.plans)
    assert not any(plan.tiles for plan in backend.plans)
    world = quiet_world(site, [1.0, 2.0, 3.0])
    both = replace(world, shift=np.zeros(2, dtype=np.intp), arrivals_s=np.tile(world.arrivals_s, (2, 1)))
    asked_s = [sum(node.service_s) for node in playable(site, both).background]
    # All that a client asks of one head, and nothing of the nodes that would run its tiles.
    whole_s = [len(world.arrivals_s[0]) * LAYERS * LAYER_S, 0.0, 0.0, 0.0, 0.0]
    assert sorted(asked_s, reverse=True) == pytest.approx(whole_s)


def test_constants_are_those_of_the_runtime():
    assert (tiles.PATIENCE, tiles.SLACK_S, tiles.PROTECTION_FACTOR) == (
        scatter.PATIENCE,
        scatter.SLACK_S,
        scatter.PROTECTION_FACTOR,
    )
