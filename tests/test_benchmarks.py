"""Every benchmark runs, writes its report, and states the bars it is known by. What they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.bench.regret import make_shipped_problem, measure_regret

ROOT = Path(__file__).parent.parent

BARS = {
    "echo": {"echo_400KB_plain_over_pyzmq", "echo_400KB_curve_over_pyzmq_curve", "echo_400KB_plain_over_grpc"},
    "env": {"env_steps_per_s"},
    "plan": {
        "plan_loadpart_500_us",
        "plan_d3_500_ms",
        "plan_d3_update_ms",
        "plan_optimal_500_ms",
        "plan_planner_us",
        "plan_ppo_us",
    },
    "predict": {"predict_measured_median_frac", "predict_left_out_median_frac"},
    "recovery": {"recovery_right_answers_frac", "recovery_next_answer_s"},
    "split": {"split_over_parts"},
    "tiles": {"tiles_vgg16_two_nodes_speedup", "tiles_darknet53_two_nodes_speedup"},
    "testbed": {"testbed_link_error_frac", "testbed_service_error_frac", "testbed_k_error_frac"},
}


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", BARS)
def test_a_benchmark_runs_and_states_its_bars(name: str, tmp_path: Path) -> None:
    if name == "echo":
        pytest.importorskip("grpc", reason="the `bench` extra has the peers")
    path = tmp_path / "report.json"
    command = [sys.executable, "scripts/bench.py", name, "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1480, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bar is missed
    report = json.loads(path.read_text())
    assert report["bench"] == name
    assert {bar["name"] for bar in report["bars"]} == BARS[name]
    assert all(isinstance(bar["holds"], bool) and bar["value"] >= 0 for bar in report["bars"])
    assert report["rows"]
    assert report["machine"]["cores"]


def test_the_planner_is_never_below_the_optimum_and_near_it_on_a_shipped_profile() -> None:
    regret = measure_regret(make_shipped_problem("torchvision:alexnet"), 8)
    assert min(regret) >= -1e-6
    assert max(regret) < 1.0
