import math
from dataclasses import replace

import pytest

from runtime.node.status import join_links
from runtime.types import LinkSample, LinkState

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
    assert (joined.mean_bandwidth_bps, joined.rtt_s, joined.backlog_bytes) == (4e9, 0.001, 15)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_conversation_that_has_measured_nothing_adds_nothing(turn):
    state = measured(1.0, rtt_s=0.1)
    assert join_links([state, EMPTY][::turn]) == state
    assert join_links([EMPTY, EMPTY]).samples == ()
