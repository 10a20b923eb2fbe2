"""Real models through real worker processes: the same bits as the whole model, at spread cuts and random assignments."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime
from runtime.deployment import ModelConfig
from runtime.types import Plan
from tests.models import ALL_MODELS
from tests.splitting import assignments, same_output

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

FAR_S = 600.0


@pytest.mark.parametrize("spec", ALL_MODELS)
def test_a_model_split_over_processes_gives_the_whole_models_bits(spec: str) -> None:
    model = runtime.load_model(spec)
    with torch.inference_mode():
        whole = model.module(model.example)
        other = model.module(torch.flip(model.example, (-1,)))
    assert not same_output(whole, other), "the output must depend on the input"
    with (
        runtime.Cluster(ModelConfig(spec=spec, input_kind="tensor"), edges=("edge0",)) as cluster,
        cluster.session(policy=runtime.load_policy("device-only")) as session,
    ):

        def check(plan: Plan) -> None:
            result = session.infer(model.example, plan=plan, deadline_s=FAR_S)
            assert result.outcome != "local", result.reason
            assert same_output(result.output, whole), plan.describe()

        n = session.graph.num_layers
        for k in range(12):
            i = round(k * n / 11)
            check(Plan.split(n, i, (i + n + 1) // 2, edge_nodes=("edge0",)))

        @settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], database=None, derandomize=True)
        @given(st.data())
        def random_assignments(data: st.DataObject) -> None:
            check(dataclasses.replace(data.draw(assignments(session.graph)), edge_nodes=("edge0",)))

        random_assignments()
