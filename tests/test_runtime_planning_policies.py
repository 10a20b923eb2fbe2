import dataclasses
import math

import pytest

from runtime.errors import ConfigError, PlanError
from runtime.planning.cost import estimate
from runtime.planning.estimators import NOMINAL_BANDWIDTH_BPS, NOMINAL_RTT_S
from runtime.planning.policies.registry import load_policy
from runtime.types import Constraints, LinkSample, LinkState, ModelProfile, NodeState, Plan, Tier
from tests.graphs import chain, make_problem, make_state


@pytest.mark.parametrize("name", ["edge-only", "cloud-only", "encoded-input-to-cloud"])
def test_a_rule_that_private_input_forbids_refuses_at_build(name: str) -> None:
    limits = Constraints(private_input=True)
    problem = make_problem(chain(3, has_stage=True), constraints=limits, input_kind="encoded")
    with pytest.raises(PlanError, match="private_input"):
        load_policy(name).build(problem)


def test_a_rule_that_needs_a_node_that_is_not_there_refuses_at_build() -> None:
    with pytest.raises(PlanError, match="needs an edge node"):
        load_policy("edge-only").build(make_problem(chain(2), edges=0))
    with pytest.raises(PlanError, match="no cloud node"):
        load_policy("cloud-only").build(make_problem(chain(2), has_cloud=False))


def test_edge_only_takes_the_first_edge_node_that_is_up() -> None:
    problem = make_problem(chain(2), edges=3)
    policy = load_policy("edge-only").build(problem)
    assert policy.plan(make_state(problem)).head == "edge0"
    assert policy.plan(make_state(problem, down=("edge0", "edge1"))).head == "edge2"


def test_fixed_reads_split_points_and_edge_from_its_name() -> None:
    problem = make_problem(chain(4), edges=2)
    plan = load_policy("fixed:1,3@edge1").build(problem).plan(make_state(problem))
    assert plan == Plan.split(4, 1, 3, edge_nodes=("edge1",))
    with pytest.raises(PlanError, match="0 <= i <= j <= 4"):
        load_policy("fixed:3,9").build(problem)


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="did you mean cloud-only"):
        load_policy("cloudonly")


def test_an_estimate_adds_up_compute_transfer_and_queue_by_hand() -> None:
    problem = make_problem(chain(4), layer_s=0.01)
    links = tuple(
        LinkState(a, b, (LinkSample(0.1, 8e3),), 8e3, 0.02) for a, b in (("device", "cloud"), ("cloud", "device"))
    )
    nodes = (NodeState("edge0", Tier.EDGE, True), NodeState("cloud", Tier.CLOUD, True, 2.0, 0.005, age_s=0.0))
    state = make_state(problem, links=links, nodes=nodes, device_backlog_s=0.003)
    latency = estimate(problem, Plan.split(4, 1, 1), state)
    assert latency.compute_s == pytest.approx({"device": 0.01, "cloud": 0.06})  # k = 2 on three layers
    assert latency.transfer_s == pytest.approx({"device>cloud": 0.41, "cloud>device": 0.41})  # 400 bytes + rtt / 2
    assert latency.total_s == pytest.approx(0.01 + 0.06 + 0.82 + 0.008)
    assert latency.source == "estimated"


def test_an_estimate_without_a_reading_takes_nominal_rates_and_device_only_needs_none() -> None:
    problem = make_problem(chain(4))
    latency = estimate(problem, Plan.split(4, 1, 1), make_state(problem))
    transfer_s = 400 * 8 / NOMINAL_BANDWIDTH_BPS + NOMINAL_RTT_S / 2
    assert latency.transfer_s == pytest.approx({"device>cloud": transfer_s, "cloud>device": transfer_s})
    assert estimate(problem, Plan.split(4, 4, 4), make_state(problem)).total_s == pytest.approx(0.04)


def test_an_estimate_for_a_node_that_has_not_described_itself_is_nan() -> None:
    problem = make_problem(chain(4))
    nodes = {"device": problem.profile.nodes["device"]}
    problem = dataclasses.replace(problem, profile=ModelProfile(problem.graph, nodes))
    assert math.isnan(estimate(problem, Plan.split(4, 1, 1), make_state(problem)).total_s)


def test_encoded_input_to_cloud_is_for_requests_that_bring_a_file() -> None:
    problem = make_problem(chain(3, has_stage=True), input_kind="encoded")
    plan = load_policy("encoded-input-to-cloud").build(problem).plan(make_state(problem))
    assert plan == Plan.split(5, 0, 0)
    with pytest.raises(PlanError, match="bring a JPEG or PNG"):
        load_policy("encoded-input-to-cloud").build(make_problem(chain(3, has_stage=True), input_kind="image"))
