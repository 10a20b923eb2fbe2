import json
import math
from pathlib import Path

import pytest

from runtime.device import telemetry
from runtime.device.request import Request, local_breakdown, remote_breakdown
from runtime.device.telemetry import Event, EventLog, read_status, write_status
from runtime.planning.cost import estimate
from runtime.planning.problem import find_route
from runtime.types import NodeState, Plan, Tier
from runtime.wire.messages import Hop
from tests.graphs import chain, make_problem, make_state

PROBLEM = make_problem(chain(4))
PLAN = Plan.split(4, 1, 3, edge_nodes=("edge0",))


def make_event(number: int) -> Event:
    state = make_state(PROBLEM)
    predicted = estimate(PROBLEM, PLAN, state)
    return Event(
        request=number,
        arrived_after_s=0.5,
        model_id="id",
        policy="fixed",
        plan=PLAN.describe(),
        tiers="0112",
        edge_nodes=("edge0",),
        codec="auto",
        state=state,
        predicted=predicted,
        reason="%s",
        is_protected=True,
    )


def make_request() -> Request:
    state = make_state(PROBLEM)
    request = Request(
        number=1,
        input_kind="tensor",
        values={},
        plan=PLAN,
        route=find_route(PROBLEM.graph, PLAN, "tensor"),
        state=state,
        predicted=estimate(PROBLEM, PLAN, state),
        policy="fixed",
        arrived_at_s=100.0,
        deadline_at_s=101.0,
        is_protected=True,
        decision_s=0.001,
    )
    request.device_compute_s, request.device_queue_s, request.codec_s = 0.010, 0.002, 0.003
    request.sent_at_s, request.upload_s, request.upload_wait_s = 100.016, 0.040, 0.005
    return request


def make_hop(name: str, residence_s: float, upload_s: float = 0.0) -> Hop:
    state = NodeState(name, Tier.EDGE, True)
    return Hop(name, 0.020, 0.004, 0.001, residence_s, state, upload_s, "", 0.02)


def test_an_event_is_one_line_of_json_with_a_version_and_unknown_readings_as_null(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(make_event(1))
    log.write(make_event(2))
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / telemetry.EVENTS_FILE).read_text().splitlines())
    assert (first["version"], first["request"], second["request"]) == (1, 1, 2)
    assert first["state"]["request_rate_hz"] is None
    assert first["measured"] is None
    assert first["reason"] == "%s"
    assert first["state"]["nodes"][0]["name"] == "edge0"


def test_the_event_file_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "EVENT_FILE_BYTES", 4000)
    log = EventLog(tmp_path)
    for number in range(40):
        log.write(make_event(number))
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == telemetry.EVENT_FILES + 1
    assert all(path.stat().st_size <= 4000 for path in tmp_path.iterdir())


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    for number in range(3):
        write_status(tmp_path, {"number": number, "rate": math.nan})
    assert read_status(tmp_path) == {"number": 2, "rate": None}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_remote_breakdown_is_measured_without_any_clock_of_another_machine() -> None:
    hops = (make_hop("a", residence_s=0.100, upload_s=0.030), make_hop("b", residence_s=0.030))
    latency = remote_breakdown(make_request(), hops, ("edge0", "cloud"), received_at_s=100.171, now_s=100.172)
    assert latency.compute_s == pytest.approx({"device": 0.010, "edge0": 0.020, "cloud": 0.020})
    # 155 ms from sending to receiving, 5 of them queued, 100 on the edge: 50 both ways, 40 of them up
    assert latency.transfer_s["device>edge0"] == pytest.approx(0.040)
    assert latency.transfer_s["edge0>device"] == pytest.approx(0.010)
    # of the edge's 100 ms 25 are its own and 30 the cloud's: 45 both ways, 30 of them up
    assert latency.transfer_s["edge0>cloud"] == pytest.approx(0.030)
    assert latency.transfer_s["cloud>edge0"] == pytest.approx(0.015)
    assert latency.queueing_s == pytest.approx(0.002 + 0.005 + 0.004 + 0.004)
    assert latency.codec_s == pytest.approx(0.003 + 0.001 + 0.001 + 0.001)
    assert latency.total_s == pytest.approx(0.172)
    parts = sum(latency.compute_s.values()) + sum(latency.transfer_s.values())
    parts += latency.queueing_s + latency.codec_s + latency.decision_s + latency.other_s
    assert parts == pytest.approx(latency.total_s)


def test_an_acknowledgement_slower_than_the_answer_makes_no_negative_time() -> None:
    request = make_request()
    request.upload_s = 0.5
    latency = remote_breakdown(request, (make_hop("a", 0.1),), ("edge0",), received_at_s=100.171, now_s=100.172)
    assert latency.transfer_s["device>edge0"] == pytest.approx(0.05)
    assert latency.transfer_s["edge0>device"] == 0.0


def test_a_local_breakdown_adds_up() -> None:
    latency = local_breakdown(make_request(), 100.5)
    assert latency.total_s == pytest.approx(0.5)
    assert latency.other_s == pytest.approx(0.5 - 0.016)


def test_local_completion_starts_before_the_deadline_by_remainder_backlog_and_hand_over() -> None:
    assert make_request().protect_at_s(remainder_s=0.2, backlog_s=0.1) == pytest.approx(101.0 - 0.3 - 0.1 - 0.01)
