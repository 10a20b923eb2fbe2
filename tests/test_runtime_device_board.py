import math

import pytest

from runtime.device.board import Board, RequestFacts
from runtime.device.breaker import COOL_DOWN_S, FAILURES_TO_OPEN, Breaker, BreakerState
from runtime.types import LinkState, NodeState, Plan, Tier
from runtime.wire.messages import LinkReport, Status

FACTS = RequestFacts("tensor", 100, 1.0, 0.0, 0)


def make_status(name: str, tier: Tier, *, age_s: float = 0.0, k: float = 2.0, peers: tuple[Status, ...] = ()) -> Status:
    state = NodeState(name, tier, True, k, 0.1, 3, 0.5, age_s)
    links = (LinkReport("me", ((0.5, 8e6),), 8e6, 0.01, 0), LinkReport("cloud", ((1.0, 4e6),), 4e6, 0.02, 7))
    return Status(state, links if tier is Tier.EDGE else links[:1], peers)


@pytest.fixture
def board() -> Board:
    return Board({"edge0": Tier.EDGE, "cloud": Tier.CLOUD})


def test_a_node_that_was_never_heard_of_is_unknown_not_zero(board: Board) -> None:
    node = board.state(FACTS, 0.0).node("edge0")
    assert node is not None
    assert not node.is_up
    assert math.isnan(node.load_factor)
    assert node.age_s == math.inf


def test_readings_grow_older_while_they_hang_on_the_board(board: Board) -> None:
    board.set_up("edge0", is_up=True)
    board.hear("edge0", make_status("other-name", Tier.EDGE), 10.0)
    state = board.state(FACTS, 12.0)
    node = state.node("edge0")
    assert node is not None
    assert (node.is_up, node.load_factor, node.age_s) == (True, 2.0, 2.0)
    back, onward = state.link("edge0", "device"), state.link("edge0", "cloud")
    assert back is not None
    assert onward is not None
    assert back.samples[0].age_s == pytest.approx(2.5)
    assert (onward.samples[0].age_s, onward.backlog_bytes) == (pytest.approx(3.0), 7)


def test_of_two_reports_of_one_node_the_fresher_counts(board: Board) -> None:
    stale = make_status("cloud", Tier.CLOUD, age_s=5.0, k=9.0)
    fresh = make_status("cloud", Tier.CLOUD, age_s=0.1, k=1.5)
    board.hear("cloud", make_status("cloud", Tier.CLOUD, k=3.0), 0.0)
    board.hear("edge0", make_status("edge0", Tier.EDGE, peers=(stale,)), 1.0)
    node = board.state(FACTS, 1.0).node("cloud")
    assert node is not None
    assert node.load_factor == 3.0
    board.hear("edge0", make_status("edge0", Tier.EDGE, peers=(fresh,)), 1.0)
    node = board.state(FACTS, 1.0).node("cloud")
    assert node is not None
    assert node.load_factor == 1.5


def test_a_head_tells_of_the_way_back_to_it_from_nodes_behind(board: Board) -> None:
    behind = make_status("cloud", Tier.CLOUD)
    board.hear("edge0", make_status("edge0", Tier.EDGE, peers=(behind,)), 1.0)
    link = board.state(FACTS, 2.0).link("cloud", "edge0")
    assert link is not None
    assert (link.samples[0].age_s, link.samples[0].bandwidth_bps) == (pytest.approx(1.5), 8e6)
    assert board.state(FACTS, 2.0).link("cloud", "device") is None


@pytest.mark.parametrize("told", [math.inf, -math.inf, -1.0, 1e300, math.nan])
def test_a_reading_that_cannot_be_one_is_unknown(board: Board, told: float) -> None:
    state = NodeState("edge0", Tier.EDGE, True, told, told, -3, told, told)
    good = (0.5, 8e6)
    link = LinkReport("me", ((told, 8e6), (0.5, told), good, (0.5, 0.0)), told, told, -4)
    board.hear("edge0", Status(state, (link,)), 1.0)
    heard = board.state(FACTS, 1.0).node("edge0")
    assert heard is not None
    assert all(math.isnan(value) for value in (heard.load_factor, heard.queue_delay_s, heard.utilisation_frac))
    assert (heard.queue_length, heard.age_s) == (0, math.inf)
    read = board.state(FACTS, 1.0).link("edge0", "device")
    assert read is not None
    assert [(s.age_s, s.bandwidth_bps) for s in read.samples] == [good]
    assert math.isnan(read.mean_bandwidth_bps)
    assert math.isnan(read.rtt_s)
    assert read.backlog_bytes == 0


def test_nodes_and_links_outside_the_deployment_are_not_kept(board: Board) -> None:
    stranger = Status(NodeState("stranger", Tier.CLOUD, True, 2.0), (LinkReport("me", (), 8e6, 0.01, 0),))
    links = (LinkReport("me", (), 8e6, 0.01, 0), LinkReport("stranger", (), 8e6, 0.01, 0))
    board.hear("edge0", Status(NodeState("edge0", Tier.EDGE, True), links, (stranger,)), 0.0)
    state = board.state(FACTS, 0.0)
    assert [node.name for node in state.nodes] == ["edge0", "cloud"]
    assert [(link.source, link.target) for link in state.links] == [("edge0", "device")]


def test_the_rate_is_that_of_the_last_arrivals(board: Board) -> None:
    assert math.isnan(board.state(FACTS, 0.0).request_rate_hz)
    for i in range(20):
        board.arrived(i * 0.25)
    assert board.state(FACTS, 5.0).request_rate_hz == pytest.approx(4.0)


def test_prediction_errors_are_kept_newest_first_and_unknown_ones_are_not(board: Board) -> None:
    plan = Plan.split(3, 1, 1)
    for error in (0.1, math.nan, 0.2):
        board.ended(plan, error)
    state = board.state(FACTS, 0.0)
    assert state.recent_errors == (0.2, 0.1)
    assert state.plan_in_force == plan


def test_own_links_are_read_as_measured(board: Board) -> None:
    board.set_link(LinkState("device", "edge0", rtt_s=0.5), 1.0)
    link = board.state(FACTS, 2.0).link("device", "edge0")
    assert link is not None
    assert link.rtt_s == 0.5


def test_a_lost_link_opens_the_breaker_until_the_next_handshake() -> None:
    breaker = Breaker()
    assert not breaker.admits(0.0)
    breaker.connected()
    assert breaker.admits(0.0)
    breaker.lost()
    breaker.answered()  # an answer that was on its way changes nothing
    assert not breaker.admits(1e9)
    breaker.connected()
    assert breaker.admits(0.0)


def test_requests_without_answer_open_it_and_one_is_tried_after_the_cool_down() -> None:
    breaker = Breaker()
    breaker.connected()
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.admits(0.0)
        breaker.unanswered(0.0)
    assert not breaker.admits(COOL_DOWN_S / 2)
    assert breaker.admits(COOL_DOWN_S)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.admits(COOL_DOWN_S)  # one at a time
    breaker.unanswered(COOL_DOWN_S)
    assert not breaker.admits(2 * COOL_DOWN_S)  # the cool-down has doubled
    assert breaker.admits(3 * COOL_DOWN_S)
    breaker.answered()
    assert breaker.state is BreakerState.CLOSED


def test_an_answer_in_between_starts_the_count_anew() -> None:
    breaker = Breaker()
    breaker.connected()
    for _ in range(3 * FAILURES_TO_OPEN):
        breaker.unanswered(0.0)
        breaker.answered()
    assert breaker.state is BreakerState.CLOSED
