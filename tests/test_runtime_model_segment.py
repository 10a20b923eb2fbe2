"""runtime.model.segment: whatever the cut, the bits are the whole model's and nobody's buffer changes."""

import hashlib
import threading
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import InputError, PlanError, TensorMismatch
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import Admitted, admit, run_input_stage
from runtime.model.layout import ALIGNMENT_BYTES, copy_to, place
from runtime.model.observe import Seen
from runtime.model.samples import sample_file
from runtime.model.segment import (
    CACHED_SEGMENTS,
    Segment,
    SegmentCache,
    Stopped,
    run_local,
)
from runtime.model.zoo import Model, load_model
from runtime.planning.problem import make_stage
from runtime.types import Plan, Tier
from tests.splitting import all_values, assignments, cross, cut_plan, run_plan, same_bits, same_output

NAMES = ["chain", "chain_image", "residual", "branching", "views", "reordered"]


class Case:
    """A tiny model, traced once."""

    def __init__(self, name: str, batch_size: int) -> None:
        self.model: Model = load_model(f"tests.models:{name}", batch_size=batch_size)
        self.graph: LayerGraph = trace(self.model)
        self.segments = SegmentCache(self.graph)
        self.admitted: Admitted = admit(self.graph.spec, self.model.example)
        with torch.no_grad():
            self.whole = self.model.module(self.model.example.clone())
            self.other = self.model.module(self.model.example.flip(-1))


@cache
def get_case(name: str, batch_size: int = 1) -> Case:
    return Case(name, batch_size)


@pytest.fixture(params=[(name, batch) for name in NAMES for batch in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    return get_case(*request.param)


@pytest.fixture
def graph() -> LayerGraph:
    return get_case("residual").graph


def whole_stage(graph: LayerGraph, kind: str = "tensor") -> Segment:
    return Segment(graph, make_stage(graph.spec, Tier.DEVICE, range(graph.spec.entry(kind), graph.num_layers)))


def test_the_output_depends_on_the_input(case: Case) -> None:
    assert not same_output(case.whole, case.other)


def test_every_cut_in_two_and_three_gives_the_bits_of_the_whole_model(case: Case) -> None:
    assert not same_output(case.whole, case.other)
    reference = all_values(case.graph, case.admitted)
    n = case.graph.num_layers
    for i in range(n + 1):
        for j in range(i, n + 1):
            made = run_plan(case.graph, case.segments, cut_plan(n, i, j), case.admitted, reference=reference)
            assert same_output(made, case.whole), f"cut at {i}, {j}"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_any_monotone_assignment_gives_the_bits_of_the_whole_model(case: Case, data: st.DataObject) -> None:
    plan = data.draw(assignments(case.graph.spec))
    assert same_output(run_plan(case.graph, case.segments, plan, case.admitted), case.whole)


def test_the_segments_of_a_plan_hold_every_parameter_once(case: Case) -> None:
    names = {name for name, _ in case.model.module.named_parameters()}
    assert case.graph.parameter_names == names
    n = case.graph.num_layers
    for i in range(n + 1):
        parts = [Segment(case.graph, make_stage(case.graph.spec, Tier.DEVICE, x)) for x in (range(i), range(i, n))]
        assert parts[0].parameter_names | parts[1].parameter_names == names
        assert not parts[0].parameter_names & parts[1].parameter_names


def test_a_buffer_that_is_being_sent_does_not_change_while_the_device_finishes_the_request(case: Case) -> None:
    spec, n = case.graph.spec, case.graph.num_layers
    entry = spec.entry("tensor")
    for i in range(entry, n):
        near, far = make_stage(spec, Tier.DEVICE, range(entry, i)), make_stage(spec, Tier.DEVICE, range(i, n))
        values = {**case.admitted.values, **case.segments.get(near).run(case.admitted.values)}
        crossing = {name: values[name] for name in far.needs}
        finish = partial(case.segments.get(far).run, crossing)
        assert len(watch(crossing, finish)) == 1, f"cut at {i}"


def watch(tensors: dict[str, torch.Tensor], work: Callable[[], object]) -> set[str]:
    """Read the tensors' memory again and again while `work` runs, as a socket would: every digest seen."""
    views = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy() for t in tensors.values()]
    digests: set[str] = set()
    done = threading.Event()

    def send() -> None:
        while True:
            is_last = done.is_set()
            digest = hashlib.sha256()
            for view in views:
                digest.update(view.data)
            digests.add(digest.hexdigest())
            if is_last:
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        for _ in range(3):
            work()
    finally:
        done.set()
        thread.join()
    return digests


def test_an_encoded_image_and_its_pixels_and_its_tensor_give_one_answer() -> None:
    case = get_case("chain_image")
    spec, n = case.graph.spec, case.graph.num_layers
    encoded = admit(spec, sample_file(seed=7))
    with torch.no_grad():
        whole = case.model.module(run_input_stage(spec, encoded))
    image = admit(spec, case.segments.get(make_stage(spec, Tier.DEVICE, [0])).run(encoded.values)["input.image"])
    assert (encoded.kind, image.kind) == ("encoded", "image")
    for admitted in (encoded, image):
        for i in range(n + 1):
            assert same_output(run_plan(case.graph, case.segments, cut_plan(n, i, min(i + 2, n)), admitted), whole)


def test_values_come_back_as_whole_runs_make_them_and_no_others(graph: LayerGraph) -> None:
    stage = make_stage(graph.spec, Tier.EDGE, [1, 2])
    values = all_values(graph, admit(graph.spec, torch.ones(1, 3, 32, 32)))
    made = Segment(graph, stage).run(values)
    assert set(made) == set(stage.makes)
    assert all(same_bits(made[name], values[name]) for name in made)


@pytest.mark.parametrize("offset_bytes", [4, 8, 32, 64])
def test_tensors_at_addresses_torch_would_not_choose_give_the_same_bits(case: Case, offset_bytes: int) -> None:
    n = case.graph.num_layers
    for i in range(0, n, 2):
        plan = cut_plan(n, i, min(i + 1, n))
        made = run_plan(case.graph, case.segments, plan, case.admitted, offset_bytes=offset_bytes)
        assert same_output(made, case.whole)


@st.composite
def laid_out(draw: st.DrawFn) -> torch.Tensor:
    """A tensor with permuted dimensions, gaps, an odd start, broadcast dimensions."""
    sizes = draw(st.lists(st.integers(1, 4), max_size=4))
    tensor = torch.randn([size + 2 for size in sizes]).permute(draw(st.permutations(range(len(sizes)))))
    for dim in range(tensor.dim()):
        start = draw(st.integers(0, 2))
        tensor = tensor.narrow(dim, start, draw(st.integers(1, tensor.shape[dim] - start)))
    for dim in range(tensor.dim()):
        if draw(st.integers(0, 4)) == 0:
            tensor = tensor.narrow(dim, 0, 1).expand(*(3 if d == dim else n for d, n in enumerate(tensor.shape)))
    return tensor


@given(tensor=laid_out(), offset_bytes=st.sampled_from([0, 4, 64]))
def test_what_crossed_is_put_back_into_the_layout_it_had(tensor: torch.Tensor, offset_bytes: int) -> None:
    seen = Seen(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, 0)
    assert place(tensor, seen) is tensor
    for placed in (place(cross(tensor, offset_bytes), seen), copy_to(tensor, seen)):
        assert same_bits(placed, tensor)
        assert placed.stride() == tensor.stride()
        assert (placed.data_ptr() - tensor.data_ptr()) % ALIGNMENT_BYTES == 0


def test_windows_that_overlap_are_copied_without_overlap() -> None:
    windows = torch.arange(10.0).unfold(0, 4, 2)
    seen = Seen(tuple(windows.shape), windows.stride(), 0, windows.dtype, 0)
    assert same_bits(copy_to(windows, seen), windows)


def test_a_run_stops_between_two_layers_when_asked(graph: LayerGraph) -> None:
    segment = whole_stage(graph)
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="layer 2"):
        segment.run({segment.needs[0]: torch.ones(1, 3, 32, 32)}, should_stop=lambda: next(asked))
    assert segment.first_run_s is None
    segment.run({segment.needs[0]: torch.ones(1, 3, 32, 32)}, should_stop=lambda: False)
    assert segment.first_run_s is not None


def test_seconds_are_recorded_for_the_layers_that_ran_only(graph: LayerGraph) -> None:
    stage = make_stage(graph.spec, Tier.DEVICE, [0, 1])
    layer_s = [0.0] * graph.num_layers
    x = torch.ones(1, 3, 32, 32)
    _, seconds = Segment(graph, stage).run_timed({stage.needs[0]: x}, layer_s=layer_s)
    assert all(s > 0 for s in layer_s[:2])
    assert layer_s[2:] == [0.0] * (graph.num_layers - 2)
    assert sum(layer_s) <= seconds


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(1, 3, 32, 31), r"expected x to be float32 of shape \(1, 3, 32, 32\), got float32 .*31"),
        (torch.ones(1, 3, 32, 32, dtype=torch.float64), "got float64"),
    ],
)
def test_a_tensor_that_is_not_the_graphs_is_refused(graph: LayerGraph, x: torch.Tensor, message: str) -> None:
    with pytest.raises(TensorMismatch, match=message):
        whole_stage(graph).run({"x": x})


def test_a_missing_tensor_is_named(graph: LayerGraph) -> None:
    with pytest.raises(TensorMismatch, match="no x"):
        whole_stage(graph).run({"y": torch.ones(1)})


def test_a_file_that_breaks_off_is_an_input_error_where_it_is_decoded() -> None:
    graph = get_case("chain_image").graph
    with pytest.raises(InputError, match="broken or cut short"):
        run_local(graph, Plan.split(graph.num_layers, 0, 0), sample_file(seed=0)[:5000])


def test_the_cache_builds_a_segment_once_and_forgets_the_oldest(graph: LayerGraph) -> None:
    cache = SegmentCache(graph)
    stages = [make_stage(graph.spec, Tier.DEVICE, range(i)) for i in range(1, graph.num_layers + 1)]
    first = cache.get(stages[0])
    assert cache.get(stages[0]) is first
    other = make_stage(graph.spec, Tier.CLOUD, stages[0].layers)
    assert cache.get(other) is first, "the tier does not matter"
    kept = len(cache._segments)
    assert kept == 1
    for k in range(CACHED_SEGMENTS + 5):
        stage = stages[-1]
        cache.get(type(stage)(stage.tier, stage.layers, stage.needs, (*stage.makes,) * (k + 1)))
    assert len(cache._segments) == CACHED_SEGMENTS
    assert cache.get(stages[0]) is not first


def test_many_threads_get_one_segment_and_the_same_bits(graph: LayerGraph) -> None:
    cache = SegmentCache(graph)
    stage = make_stage(graph.spec, Tier.DEVICE, range(graph.num_layers))
    x = torch.randn(1, 3, 32, 32)
    results: list[tuple[Segment, torch.Tensor]] = []

    def work() -> None:
        segment = cache.get(stage)
        results.append((segment, segment.run({"x": x})[graph.spec.outputs[0]]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(segment) for segment, _ in results}) == 1
    assert all(same_bits(output, results[0][1]) for _, output in results)


def test_run_local_takes_plans_without_named_nodes_and_refuses_ones_that_flow_back(graph: LayerGraph) -> None:
    n = graph.num_layers
    x = torch.randn(1, 3, 32, 32)
    whole = run_local(graph, Plan.split(n, n, n), x)
    assert same_output(run_local(graph, Plan.split(n, 2, 4), x), whole)
    with pytest.raises(PlanError, match="reads its output"):
        run_local(graph, Plan((Tier.CLOUD,) + (Tier.DEVICE,) * (n - 1)), x)


def test_building_a_segment_is_recorded_and_takes_milliseconds_not_seconds(graph: LayerGraph) -> None:
    assert 0 < whole_stage(graph).build_s < 1
