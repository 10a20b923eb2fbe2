"""`offcut calibrate`: from a log, and on real processes."""

from pathlib import Path

import msgspec
import pytest

from agent.cli import parse, run
from env.correction import read_correction
from runtime.errors import ConfigError
from tests.logged import EDGE_FACTOR, MODEL, logged_site, write_log

pytestmark = pytest.mark.timeout(600)  # the first use after a change of the dynamics compiles them


def test_a_log_gives_a_correction_without_any_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path, logged_site())
    out = tmp_path / "correction.json"
    run(parse(["calibrate", "--from-logs", str(tmp_path), "--model", MODEL.spec, "--out", str(out)]))
    assert read_correction(out).compute["edge"] == pytest.approx(EDGE_FACTOR, rel=0.01)
    printed = capsys.readouterr().out
    assert "40 requests" in printed
    assert f"edge x{read_correction(out).compute['edge']:.3f}" in " ".join(printed.split())


def test_what_cannot_be_calibrated_is_refused_before_anything_starts() -> None:
    for arguments in (["--requests", "0"], ["--slow-down", "1", "1", "0"], ["--from-logs", "x", "--model", "a", "b"]):
        with pytest.raises(SystemExit):
            parse(["calibrate", *arguments])
    with pytest.raises(ConfigError, match="expected a scenario among"):
        run(parse(["calibrate", "--scenario", "weather"]))


@pytest.mark.slow
@pytest.mark.integration
def test_live_and_twin_are_compared_by_component_and_by_scenario(tmp_path: Path) -> None:
    report, out = tmp_path / "report.json", tmp_path / "correction.json"
    sizes = ["--probes", "16", "--requests", "10", "--seeds", "1", "--scenario", "static"]
    nodes = ["--model", "tests.models:chain", "--slow-down", "300", "60", "60"]
    run(parse(["calibrate", *nodes, *sizes, "--out", str(out), "--json", str(report)]))
    found = msgspec.json.decode(report.read_bytes())
    assert read_correction(out).samples > 0
    rows = {row["component"]: row for row in found["components"]["tests.models:chain"]}
    assert rows["edge"]["count"] > 0
    # How near the two are is a matter of a quiet machine, and reported; that they speak of the same thing is not.
    assert 0.5 < rows["edge"]["worked_s"] / rows["edge"]["measured_s"] < 1.5
    (check,) = found["checks"]
    assert (check["scenario"], check["count"], check["is_replayed"]) == ("static", 10, False)
