"""The papers' experiments: their constants, what is kept of a run, the arithmetic of their tables; slow: quick runs."""

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import ReproduceConfig
from agent.reproduce.bed import PlainCodec, crossing_bytes
from agent.reproduce.grids import D3, LOADPART, QUICK_D3, QUICK_LOADPART, fingerprint
from agent.reproduce.papers import D3Paper, LoadpartPaper
from agent.reproduce.report import write_report
from agent.reproduce.results import Cell, CellResult, Run, Store
from agent.reproduce.tables import cell_means, pair, reduction, speedup, traffic, where
from runtime.errors import ConfigError
from runtime.planning.policies.registry import load_policy
from runtime.planning.problem import Policy
from runtime.profiles.shipped import load_shipped_profile, shipped_specs
from runtime.types import Plan, SystemState

PAPERS = (LoadpartPaper(LOADPART), D3Paper(D3), LoadpartPaper(QUICK_LOADPART), D3Paper(QUICK_D3))


def make_run(rule: str, latency_s: float, backbone_bytes: int = 0) -> Run:
    plan = f"the plan of {rule}"
    return Run(rule, latency_s, latency_s, "remote", plan, True, False, 7, backbone_bytes, {}, {}, 0.0, 0.0, 0.0)


def make_result(cell: Cell, runs: list[Run], grid: str = "g") -> CellResult:
    return CellResult(grid, cell.model, cell.kind, dict(cell.condition), {}, True, {"edge0": 1}, 2, 3, 1.5, runs)


def load_cell(model: str, level: str, mbps: str = "8") -> Cell:
    return Cell(f"torchvision:{model}", "tensor", (("level", level), ("mbps", mbps)))


# --- constants ----------------------------------------------------------------------------------------------------------


def test_background_requests_never_fill_the_queue_of_a_loaded_server() -> None:
    assert all(level.contention * level.rate_frac < 0.5 for level in LOADPART.levels)
    assert [level.contention for level in LOADPART.levels] == sorted(level.contention for level in LOADPART.levels)


def test_every_cell_is_there_once_and_only_networks_whose_profile_ships_are_used() -> None:
    assert len(PAPERS[0].cells()) == 6 * (7 * 4 + 3)
    assert len(PAPERS[1].cells()) == 5 * (4 + 1)
    for paper in PAPERS:
        cells = paper.cells()
        assert len(set(cells)) == len(cells)
        assert {cell.model for cell in cells} <= set(shipped_specs())
        assert all(paper.request_s(cell) > 0 for cell in cells)


def test_every_rule_exists_and_neurosurgeon_meets_d3_on_chains_alone() -> None:
    for paper in PAPERS:
        for cell in paper.cells():
            rules = paper.rules(cell.model)
            assert [load_policy(rule).name for rule in rules] == list(rules)
    assert "neurosurgeon@cloud" in PAPERS[1].rules("torchvision:vgg16")
    assert "neurosurgeon@cloud" not in PAPERS[1].rules("torchvision:resnet18")


def test_other_constants_have_another_fingerprint() -> None:
    assert fingerprint(LOADPART) != fingerprint(QUICK_LOADPART)
    assert fingerprint(LOADPART) != fingerprint(replace(LOADPART, repeat=LOADPART.repeat + 1))


# --- what is kept -------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_behind_the_last_whole_cell(tmp_path: Path) -> None:
    cells = [load_cell("alexnet", level) for level in ("0", "30", "50")]
    path = tmp_path / "results.jsonl"
    store = Store(path, "g")
    for cell in cells[:2]:
        store.append(make_result(cell, [make_run("loadpart", 0.1)]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the machine lost power while the second line was written

    again = Store(path, "g")
    assert again.missing(cells) == cells[1:]
    again.append(make_result(cells[1], [make_run("loadpart", 0.1)]))
    assert path.read_bytes() == whole
    assert Store(path, "g").missing(cells) == cells[2:]


def test_results_of_other_constants_are_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Store(path, "g").append(make_result(load_cell("alexnet", "0"), []))
    with pytest.raises(ConfigError, match="line 1: expected results of the constants in force"):
        Store(path, "h")


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="line 1"):
        Store(path, "g")
    assert path.read_text() == '{"step": 1}\n'


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def test_reductions_are_of_cell_means() -> None:
    results = [
        make_result(load_cell("alexnet", "0"), [make_run("loadpart", 1.0), make_run("neurosurgeon", 1.0)]),
        make_result(
            load_cell("alexnet", "90"),
            [make_run("loadpart", 1.0), make_run("loadpart", 2.0), make_run("neurosurgeon", 3.0)],
        ),
        make_result(load_cell("vgg16", "90"), [make_run("loadpart", 5.0), make_run("neurosurgeon", 4.0)]),
        make_result(load_cell("vgg16", "100h"), [make_run("loadpart", 5.0)]),
    ]
    pairs = pair(cell_means(results), "loadpart", "neurosurgeon")
    saved = reduction(pairs)
    assert (saved.count, saved.best_frac, saved.worst_frac) == (3, 0.5, -0.25)
    assert saved.mean_frac == pytest.approx((0.0 + 0.5 - 0.25) / 3)
    assert reduction(where(pairs, level="90")).mean_frac == pytest.approx(0.125)
    assert reduction(where(pairs, model="torchvision:alexnet", level="0")).best_frac == 0.0
    assert math.isnan(reduction(where(pairs, level="30")).mean_frac)


def test_late_requests_count_only_where_a_rule_has_no_others() -> None:
    late = msgspec.structs.replace(make_run("loadpart", 9.0), is_late=True)
    cell = load_cell("alexnet", "0")
    (mean,) = cell_means([make_result(cell, [late, make_run("loadpart", 1.0)])])
    assert (mean.latency_s, mean.count) == (1.0, 1)
    (mean,) = cell_means([make_result(cell, [late, late])])
    assert (mean.latency_s, mean.count) == (9.0, 2)


def test_a_cell_where_a_rule_was_only_late_is_measured_again(tmp_path: Path) -> None:
    late = msgspec.structs.replace(make_run("loadpart", 9.0), is_late=True)
    cell, path = load_cell("alexnet", "0"), tmp_path / "results.jsonl"
    store = Store(path, "g")
    store.append(make_result(cell, [late, make_run("neurosurgeon", 1.0)]))
    assert store.missing([cell]) == Store(path, "g").missing([cell]) == [cell]
    store.append(make_result(cell, [late, make_run("loadpart", 1.0), make_run("neurosurgeon", 1.0)]))
    for each in (store, Store(path, "g")):
        assert not each.missing([cell])
        assert len(each.results) == 1


@given(st.lists(st.tuples(st.floats(0.01, 100.0), st.floats(0.01, 100.0)), min_size=1, max_size=20))
def test_speedups_and_reductions_tell_the_same(latencies: list[tuple[float, float]]) -> None:
    results = [
        make_result(load_cell("alexnet", str(i)), [make_run("d3", ours), make_run("dads", theirs)])
        for i, (ours, theirs) in enumerate(latencies)
    ]
    pairs = pair(cell_means(results), "d3", "dads")
    ratio, saved = speedup(pairs), reduction(pairs)
    assert ratio.count == len(latencies)
    assert ratio.worst * (1 - 1e-9) <= ratio.mean <= ratio.best * (1 + 1e-9)
    assert saved.best_frac == pytest.approx(1.0 - 1.0 / ratio.best)
    assert saved.worst_frac == pytest.approx(1.0 - 1.0 / ratio.worst)


def test_backbone_ratios_leave_out_cells_without_one_and_count_them() -> None:
    sent = {"a": (400, 100), "b": (100, 100), "c": (50, 0), "d": (0, 10), "e": (0, 0)}
    results = [
        make_result(load_cell("alexnet", level), [make_run("d3", 1.0, ours), make_run("dads", 1.0, theirs)])
        for level, (theirs, ours) in sent.items()
    ]
    found = traffic(pair(cell_means(results), "d3", "dads"))
    assert (found.best, found.count, found.only_baseline, found.only_rule) == (4.0, 2, 1, 1)
    assert found.mean == pytest.approx(2.0)
    assert found.total == pytest.approx(550 / 210)


# --- plans --------------------------------------------------------------------------------------------------------------


def test_what_enters_and_leaves_the_cloud_is_counted() -> None:
    graph = load_shipped_profile("torchvision:alexnet").graph
    n, first = graph.num_layers, graph.entry("tensor")
    tensor, answer = 4 * 3 * 224 * 224, 4 * 1000

    def count(i: int, j: int, kind: str = "tensor", *edge: str) -> tuple[int, int]:
        return crossing_bytes(graph, Plan.split(n, i, j, edge_nodes=edge), kind, 5000)

    assert count(n, n) == (0, 0)
    assert count(first, first) == (tensor, tensor + answer)
    assert count(first, n, "tensor", "edge0") == (tensor, 0)
    assert count(first, first, "tensor", "edge0") == (tensor, tensor + answer)
    assert count(0, 0, "encoded") == (5000, 5000 + answer)
    uplink, backbone = count(first, n - 1, "tensor", "edge0")
    assert uplink == tensor
    assert answer < backbone < tensor


def test_no_rule_compresses_here() -> None:
    class Always:
        is_stateful = False

        def plan(self, state: SystemState) -> Plan:
            del state
            return Plan.split(4, 1, 2, edge_nodes=("edge0",))

        def reset(self) -> None:
            pass

    rule: Policy = Always()
    state = SystemState((), (), 0.0, 0, math.nan, (), None, "tensor", 0, 1.0)
    assert PlainCodec(rule).plan(state) == replace(rule.plan(state), codec="raw")


# --- reports ------------------------------------------------------------------------------------------------------------


def test_loadparts_tables_say_what_was_measured_and_what_is_replayed(tmp_path: Path) -> None:
    paper = LoadpartPaper(QUICK_LOADPART)
    results = [
        make_result(cell, [make_run(rule, 0.3 if rule == "loadpart" else 0.4) for rule in paper.rules(cell.model)])
        for cell in paper.cells()
    ]
    text = write_report(paper, results, tmp_path).read_text()
    assert "| neurosurgeon | 4 | 25.0 % | 25.0 % | 25.0 % |" in text
    assert "6 of 6 cells" in text
    assert "| edge0 | gpu |" in text
    assert "replayed" in text
    assert "remote 36" in text
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + 36
    assert (tmp_path / "latency-tensor-mbps-16.png").stat().st_size > 1000
    assert {folder.name for folder in (tmp_path / "tensorboard").iterdir()} == set(QUICK_LOADPART.rules)


def test_d3s_tables_survive_a_rule_that_sends_nothing(tmp_path: Path) -> None:
    paper = D3Paper(QUICK_D3)
    results = [
        make_result(cell, [make_run(rule, 0.2, 100 * (rule != "d3")) for rule in paper.rules(cell.model)])
        for cell in paper.cells()
    ]
    text = write_report(paper, results[:3], tmp_path).read_text()
    assert "3 of 6 cells" in text
    assert "HPA with tiles (VSM) on up to 2 edge nodes, `d3-hpa` HPA alone" in text
    assert "| d3-hpa | 2 | 1.00x | 1.00x | 1.00x |" in text
    assert "| cloud-only | 2 | 1.00x | 1.00x | 1.00x |" in text
    assert "| cloud-only | 0 |  |  | 2 | 0 | D3 sends nothing |" in text


def test_d3s_gap_to_the_optimum_is_told_as_predicted_and_as_measured(tmp_path: Path) -> None:
    paper = D3Paper(QUICK_D3)
    hpa = msgspec.structs.replace(make_run("d3-hpa", 0.24), predicted_s=0.22)
    results = [make_result(cell, [hpa, make_run("d3", 0.19), make_run("optimal", 0.2)]) for cell in paper.cells()]
    text = write_report(paper, results, tmp_path).read_text()
    assert "| d3-hpa | alexnet | 2 | 10.0 % | 10.0 % | 20.0 % | 20.0 % |" in text
    assert "| d3 | all | 4 | -5.0 % | -5.0 % | -5.0 % | -5.0 % |" in text


# --- whole --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["loadpart", "d3"])
def test_a_quick_run_is_whole_and_a_second_one_adds_nothing(name: str, tmp_path: Path) -> None:
    from agent.cli import parse
    from agent.reproduce.run import run_reproduce

    config = parse(["reproduce", name, "--quick", "--out", str(tmp_path)])
    assert isinstance(config, ReproduceConfig)
    run_reproduce(config)
    data = (tmp_path / "results.jsonl").read_bytes()
    paper = LoadpartPaper(QUICK_LOADPART) if name == "loadpart" else D3Paper(QUICK_D3)
    store = Store(tmp_path / "results.jsonl", fingerprint(paper.grid))
    assert [result.cell for result in store.results] == list(paper.cells())
    for result in store.results:
        assert {run.rule for run in result.runs} == set(paper.rules(result.model))
        assert {run.outcome for run in result.runs} <= {"device", "remote"}
    if not store.missing(paper.cells()):  # on a busy machine some cells are measured again
        run_reproduce(config)
        assert (tmp_path / "results.jsonl").read_bytes() == data
