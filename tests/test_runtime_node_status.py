import math
from dataclasses import replace

import pytest

from runtime.device.board import Board
from runtime.node.status import join_links, tell_links
from runtime.types import DEVICE_NODE, LinkSample, LinkState, NodeState, Tier
from runtime.wire.events import Peer
from runtime.wire.messages import Status

EMPTY = LinkState("edge0", "edge1", (), math.nan, math.nan, 0)


def measured(*ages_s: float, bps: float = 1e6, **fields) -> LinkState:
    samples = tuple(LinkSample(age_s=age_s, bandwidth_bps=bps) for age_s in ages_s)
    return replace(EMPTY, samples=samples, mean_bandwidth_bps=bps, **fields)


def test_one_conversation_tells_the_link_as_it_is():
    state = measured(1.0, 2.0, rtt_s=0.1, backlog_bytes=7)
    assert join_links([state]) == state


def test_of_several_conversations_the_newest_samples_count_and_the_shortest_round_trip():
    busy = measured(0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, bps=4e9, rtt_s=0.002, backlog_bytes=10)
    probed = measured(0.4, 5.4, bps=1e9, rtt_s=0.001, backlog_bytes=5)
    joined = join_links([probed, busy])
    assert [sample.age_s for sample in joined.samples] == [0.1, 0.3, 0.4, 0.5, 0.7, 0.9, 1.1, 1.3]
    assert (joined.mean_bandwidth_bps, joined.rtt_s, joined.backlog_bytes) == (pytest.approx(2e9), 0.001, 15)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_conversation_that_has_measured_nothing_adds_nothing(turn):
    state = measured(1.0, rtt_s=0.1)
    joined = join_links([state, EMPTY][::turn])
    assert joined.mean_bandwidth_bps == pytest.approx(state.mean_bandwidth_bps)
    assert replace(joined, mean_bandwidth_bps=state.mean_bandwidth_bps) == state
    assert join_links([EMPTY, EMPTY]).samples == ()


# --- what an edge node between a device, another edge node and a cloud tells each of them -------------------------------

TIERS = {"edge0": Tier.EDGE, "edge1": Tier.EDGE, "cloud": Tier.CLOUD}
DEVICE = Peer(DEVICE_NODE, "", is_client=True)
CALLS, CALLED_BY = Peer("edge0", "tcp://edge0:1", is_client=False), Peer("edge0", "", is_client=True)
CLOUD = Peer("cloud", "tcp://cloud:1", is_client=False)
READINGS = {DEVICE: 1e6, CALLS: 4e9, CALLED_BY: 1e9, CLOUD: 12e6}


def tell(client: Peer, clients: tuple[Peer, ...] = (DEVICE, CALLED_BY)) -> Status:
    """What edge1 tells."""

    def link_state(peer: Peer) -> LinkState:
        return replace(measured(0.1, bps=READINGS[peer]), source="edge1", target=peer.name)

    links = tell_links(clients, {"cloud": CLOUD, "edge0": CALLS}, ["edge0"], link_state)
    return Status(NodeState("edge1", Tier.EDGE, True), links[client])


def test_whoever_is_told_hears_of_the_way_back_to_it_first_and_of_each_link_once():
    links = {client.name: [link.target for link in tell(client).links] for client in (DEVICE, CALLED_BY)}
    assert links == {DEVICE_NODE: [DEVICE_NODE, "cloud", "edge0"], "edge0": ["edge0", "cloud"]}
    assert [len(link.samples) for link in tell(DEVICE).links] == [1, 1, 2]


def test_a_client_that_bears_the_name_of_a_node_of_another_tier_changes_nothing_of_that_link():
    impostor = Peer("cloud", "", is_client=True)
    READINGS[impostor] = 1.0
    links = tell(DEVICE, (DEVICE, impostor)).links
    assert [(link.target, link.samples[0][1]) for link in links] == [
        (DEVICE_NODE, 1e6),
        ("cloud", 12e6),
        ("edge0", 4e9),
    ]
    assert tell(impostor, (DEVICE, impostor)).links[0].samples[0][1] == 1.0


def test_a_device_reads_the_same_of_a_link_whether_it_hears_of_it_directly_or_through_the_head():
    board = Board(TIERS)
    head = NodeState("edge0", Tier.EDGE, True)
    for name, status in (("edge1", tell(DEVICE)), ("edge0", Status(head, (), (tell(CALLED_BY),)))):
        board.hear(name, status, 1.0)
        _, link = board._links["edge1", "edge0"]
        assert [sample.bandwidth_bps for sample in link.samples] == [4e9, 1e9]
