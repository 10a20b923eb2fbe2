"""The records check themselves: what comes in is a plan, or a named error."""

import pytest

import runtime
from runtime.errors import PlanError
from runtime.types import Plan, Tier


def test_a_plan_takes_any_sequence_of_tiers_and_names() -> None:
    plan = Plan(["device", 1, Tier.CLOUD], ["edge0"])  # type: ignore[list-item, arg-type]
    assert plan == Plan((Tier.DEVICE, Tier.EDGE, Tier.CLOUD), ("edge0",))
    assert len({plan, Plan((Tier.DEVICE, Tier.EDGE, Tier.CLOUD), ("edge0",))}) == 1


@pytest.mark.parametrize("tiers", ["device", ["fog"], [3], 1, None])
def test_what_is_no_tier_is_refused(tiers: object) -> None:
    with pytest.raises(PlanError, match="sequence of device, edge, cloud"):
        Plan(tiers)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", ["edge0", 1, None])
def test_edge_nodes_are_a_sequence_of_names(names: object) -> None:
    with pytest.raises(PlanError, match=r"write \(NAME,\)"):
        Plan((Tier.DEVICE,), names)  # type: ignore[arg-type]


def test_split_points_outside_the_model_are_refused() -> None:
    with pytest.raises(PlanError, match="0 <= i <= j <= 3"):
        Plan.split(3, 2, 1)


def test_the_public_names_show_themselves() -> None:
    assert {"Plan", "connect", "Cluster"} <= set(dir(runtime))
