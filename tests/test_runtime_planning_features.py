import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.planning.arrays import encode_states
from runtime.planning.candidates import NUM_CANDIDATES
from runtime.planning.features import (
    CANDIDATE_COLUMNS,
    CANDIDATE_FEATURES,
    CANDIDATE_HIGH,
    CANDIDATE_LOW,
    CONTEXT_COLUMNS,
    CONTEXT_FEATURES,
    CONTEXT_HIGH,
    CONTEXT_LOW,
    FEATURES_VERSION,
    FeatureEncoder,
    Features,
    table_markdown,
)
from runtime.planning.problem import PlanningProblem
from runtime.types import LinkSample, LinkState, NodeState, SystemState
from tests.graphs import make_state, varied

PROBLEM = varied(1, edges=2)
ENCODER = FeatureEncoder(PROBLEM)
LARGE = (0.0, 1e-9, 0.1, 1e12)
MAYBE = (math.nan, 0.0, 1e-9, 1.0, 1e12)


def wild_state(seed: int) -> SystemState:
    """A state with readings that no sane node would send."""
    draw = np.random.default_rng(seed)

    def pick(values: tuple[float, ...]) -> float:
        return float(values[draw.integers(len(values))])

    links = tuple(
        LinkState(
            a,
            b,
            tuple(LinkSample(pick(LARGE), pick(LARGE)) for _ in range(draw.integers(9))),
            pick(MAYBE),
            pick(MAYBE),
            int(pick(LARGE)),
            int(pick(LARGE)),
            pick(MAYBE),
        )
        for a, b in itertools.permutations(("device", "edge0", "edge1", "cloud"), 2)
        if draw.random() < 0.7
    )
    nodes = tuple(
        NodeState(
            node.name,
            node.tier,
            bool(draw.random() < 0.7),
            pick(MAYBE),
            pick(MAYBE),
            int(pick(LARGE)),
            pick(MAYBE),
            pick((0.0, 5.0, math.inf)),
        )
        for node in PROBLEM.deployment.nodes
    )
    return make_state(
        PROBLEM,
        links=links,
        nodes=nodes,
        device_backlog_s=pick(LARGE),
        uplink_backlog_bytes=int(pick(LARGE)),
        request_rate_hz=pick(MAYBE),
        recent_errors=tuple(pick((-1.0, 0.0, 1e9)) for _ in range(draw.integers(9))),
        input_bytes=int(pick(LARGE)),
        deadline_s=pick((math.inf, 0.0, 1.0)),
        plan_in_force=None if draw.random() < 0.3 else ENCODER.candidates.plans[draw.integers(NUM_CANDIDATES)],
    )


def check(features: Features) -> None:
    assert features.candidates.shape[1:] == (NUM_CANDIDATES, len(CANDIDATE_COLUMNS))
    assert features.context.shape[1:] == (len(CONTEXT_COLUMNS),)
    assert (features.candidates >= CANDIDATE_LOW.astype(np.float32)).all()
    assert (features.candidates <= CANDIDATE_HIGH.astype(np.float32)).all()
    assert (features.context >= CONTEXT_LOW.astype(np.float32)).all()
    assert (features.context <= CONTEXT_HIGH.astype(np.float32)).all()
    assert features.mask.any(axis=1).all()


@given(st.integers(0, 2**32))
def test_whatever_the_readings_the_features_are_finite_and_within_bounds(seed: int) -> None:
    check(ENCODER.encode_state(wild_state(seed)))


def test_a_batch_encodes_as_each_state_alone() -> None:
    batch = [wild_state(seed) for seed in range(20)]
    together = ENCODER.encode(encode_states(ENCODER.layout, batch))
    for row, state in enumerate(batch):
        alone = ENCODER.encode_state(dataclasses.replace(state, plan_in_force=None))
        np.testing.assert_allclose(together.candidates[row], alone.candidates[0], atol=1e-5)
        np.testing.assert_allclose(together.context[row], alone.context[0], atol=1e-5)
        assert (together.mask[row] == alone.mask[0]).all()


def measured(problem: PlanningProblem) -> SystemState:
    names = ["device", *(node.name for node in problem.deployment.nodes)]
    links = tuple(LinkState(a, b, (LinkSample(0.5, 1e7),), 2e7, 0.01, 5000) for a in names for b in names if a != b)
    nodes = tuple(NodeState(n.name, n.tier, True, 2.0, 0.01, 1, 0.5, 0.1) for n in problem.deployment.nodes)
    return make_state(problem, links=links, nodes=nodes, device_backlog_s=0.02, request_rate_hz=3.0, deadline_s=1.0)


def columns(features: Features, name: str) -> list[float]:
    rows = [column for column, full in enumerate(CONTEXT_COLUMNS) if full.startswith(f"{name}:")]
    return features.context[0, rows].tolist()


def test_columns_hold_what_the_table_says() -> None:
    features = ENCODER.encode_state(measured(PROBLEM))
    assert columns(features, "node_present") == [1, 1, 1, 0, 1]  # device, two edges, no third, cloud
    assert columns(features, "load_factor")[1] == pytest.approx(math.log10(2.001))
    assert columns(features, "load_factor")[3] == pytest.approx(-3.0)
    assert columns(features, "queue_delay")[1] == pytest.approx(math.log10(0.01 / ENCODER.reference_s + 1e-3), rel=1e-4)
    assert columns(features, "sample")[0] == pytest.approx(
        math.log10(ENCODER.reference_bytes * 8 / 1e7 / ENCODER.reference_s + 1e-3), rel=1e-4
    )
    assert columns(features, "sample_age")[:3] == pytest.approx([math.log10(0.501), 3.0, 3.0], rel=1e-4)
    assert columns(features, "errors") == pytest.approx([math.log10(1.001)] * 8, abs=1e-6)


def test_the_best_candidate_has_ratio_one_and_the_plan_in_force_is_marked() -> None:
    plan = ENCODER.candidates.plans[2]
    state = dataclasses.replace(measured(PROBLEM), plan_in_force=plan)
    features = ENCODER.encode_state(state)
    over_best = features.candidates[0, :, CANDIDATE_COLUMNS.index("over_best:over_best")]
    assert over_best[features.mask[0]].min() == pytest.approx(math.log10(1.001), abs=1e-6)
    marked = features.candidates[0, :, CANDIDATE_COLUMNS.index("is_current:is_current")]
    assert np.flatnonzero(marked).tolist() == [2]
    assert (features.candidates[0, :, CANDIDATE_COLUMNS.index("is_warm:is_warm")] == 0.5).all()


def test_every_row_of_the_table_is_in_the_documentation_and_every_column_has_a_name_of_its_own() -> None:
    text = table_markdown()
    for row in CANDIDATE_FEATURES + CONTEXT_FEATURES:
        assert f"| {row.name} | {len(row.columns)} |" in text
    assert len(set(CANDIDATE_COLUMNS)) == len(CANDIDATE_COLUMNS)
    assert len(set(CONTEXT_COLUMNS)) == len(CONTEXT_COLUMNS)
    logs = [row.is_log for row in CONTEXT_FEATURES]
    assert logs == sorted(logs, reverse=True)  # the encoder takes all logarithms in one call
    assert len(FEATURES_VERSION) == 12
