"""Real networks in one process: the split model's output is the whole model's, bit for bit.

The three smallest at every split point, the others at twelve spread ones and with `make test-all` only.
"""

from functools import cached_property

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.model.graph import trace
from runtime.model.inputs import admit
from runtime.model.segment import SegmentCache
from runtime.model.zoo import load_model
from tests.models import ALL_MODELS, QUICK_MODELS
from tests.splitting import all_values, assignments, cut_plan, run_plan, same_output

SPECS = [
    pytest.param(spec, marks=() if spec in QUICK_MODELS else (pytest.mark.slow, pytest.mark.timeout(900)))
    for spec in ALL_MODELS
]

NUM_CUTS = 12


class Case:
    """A real model, traced once for all its tests."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.model = load_model(spec)
        self.graph = trace(self.model)
        self.segments = SegmentCache(self.graph)
        self.admitted = admit(self.graph.spec, self.model.example)
        with torch.no_grad():
            self.whole = self.model.module(self.model.example)
            self.other = self.model.module(self.model.example.flip(-1))

    @cached_property
    def reference(self) -> dict[str, torch.Tensor]:
        return all_values(self.graph, self.admitted)

    @property
    def cuts(self) -> list[int]:
        first, last = self.graph.spec.entry("tensor"), self.graph.num_layers
        if self.spec in QUICK_MODELS:
            return list(range(first, last + 1))
        return sorted({first + round(k * (last - first) / (NUM_CUTS - 1)) for k in range(NUM_CUTS)})


@pytest.fixture(scope="module", params=SPECS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)  # kept while its own tests run: all models together would not fit into memory


def test_the_output_depends_on_the_input(case: Case) -> None:
    assert not same_output(case.whole, case.other)


def test_every_cut_gives_the_bits_of_the_whole_model(case: Case) -> None:
    assert not same_output(case.whole, case.other)
    n = case.graph.num_layers
    for number, i in enumerate(case.cuts):
        # Both ways to cut in two, and addresses on the far side that torch would not choose.
        plan = cut_plan(n, i) if number % 2 else cut_plan(n, i, n)
        offset_bytes = 16 * (number % 4)
        made = run_plan(
            case.graph, case.segments, plan, case.admitted, reference=case.reference, offset_bytes=offset_bytes
        )
        assert same_output(made, case.whole), f"cut at {i}"


def test_monotone_assignments_give_the_bits_of_the_whole_model(case: Case) -> None:
    @settings(
        max_examples=8 if case.spec in QUICK_MODELS else 4,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        plan = data.draw(assignments(case.graph.spec))
        assert same_output(run_plan(case.graph, case.segments, plan, case.admitted), case.whole)

    check()


def test_the_layers_read_every_parameter_of_the_model(case: Case) -> None:
    assert case.graph.parameter_names == {name for name, _ in case.model.module.named_parameters()}
