"""A device session against real worker processes: same output, right story, nothing left behind."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime.deployment import ModelConfig
from runtime.device.session import DEADLINE_FLOOR_S, InferenceResult, Session
from runtime.device.telemetry import EVENTS_FILE, read_status
from runtime.errors import (
    ConfigError,
    DeadlineExceeded,
    HandshakeError,
    InputError,
    ModelError,
    OffcutError,
    PeerTimeout,
    PlanError,
)
from runtime.presets import NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.types import Constraints, Plan, Tier
from tests.graphs import make_deployment
from tests.splitting import assignments
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

MODEL = "tests.models:residual"
FAR_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ModelConfig(spec=MODEL, input_kind="tensor"), edges=("edge0", "edge1"), relays=("edge1",)) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def all_well(cluster: Cluster) -> Iterator[None]:
    """Leave the next test a cluster on which everything works, however this one ended."""
    yield
    for relay in cluster.relays.values():
        relay.set_black_hole(False)
    for node in cluster.deployment.nodes:
        cluster.resume(node.name)
    cluster.heal()


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load_model(MODEL)


@pytest.fixture(scope="module")
def whole(model: runtime.Model) -> torch.Tensor:
    with torch.inference_mode():
        return model.module(model.example)


@pytest.fixture
def session(cluster: Cluster, tmp_path: Path) -> Iterator[Session]:
    with Session(cluster.deployment, runtime.load_policy("device-only"), log_folder=tmp_path) as session:
        yield session


def check_in_time(result: InferenceResult, deadline_s: float) -> None:
    """The answer came when it had to; a shared machine may stop a process for a while at the worst moment."""
    assert result.latency is not None
    assert result.latency.total_s < deadline_s + 0.5


def cut_plans(num_layers: int) -> list[Plan]:
    n = num_layers
    two = [Plan.split(n, i, n, edge_nodes=("edge0",)) for i in range(n + 1)]
    direct = [Plan.split(n, i, i) for i in range(n + 1)]
    three = [Plan.split(n, i, (i + n + 1) // 2, edge_nodes=("edge0",)) for i in range(n + 1)]
    through = [Plan.split(n, i, i, edge_nodes=("edge0",)) for i in range(n + 1)]
    return [*two, *direct, *three, *through]


def test_every_cut_gives_the_whole_models_output_bit_for_bit(
    session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    with torch.inference_mode():
        assert not torch.equal(model.module(torch.randn_like(model.example)), whole), (
            "the output must depend on the input"
        )
    for plan in cut_plans(session.graph.num_layers):
        for codec in ("raw", "lossless", "auto"):
            coded = Plan(plan.tiers, plan.edge_nodes, codec=codec)
            result = session.infer(model.example, plan=coded, deadline_s=FAR_S)
            assert torch.equal(result.output, whole), plan.describe()
            assert result.outcome == ("remote" if plan.tiers[-1] is not Tier.DEVICE else "device"), result.reason


def test_random_assignments_give_the_whole_models_output(
    session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    @settings(max_examples=40, database=None, derandomize=True)
    @given(assignments(session.graph), st.sampled_from(["edge0", "edge1"]))
    def check(plan: Plan, edge: str) -> None:
        plan = dataclasses.replace(plan, edge_nodes=(edge,))
        assert torch.equal(session.infer(model.example, plan=plan, deadline_s=FAR_S).output, whole), plan.describe()

    check()


def test_the_parts_of_a_breakdown_add_up_and_name_every_node_and_link(session: Session, model: runtime.Model) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 1, n - 1, edge_nodes=("edge0",))
    latency = session.infer(model.example, plan=plan, deadline_s=FAR_S).latency
    assert latency is not None
    assert set(latency.compute_s) == {"device", "edge0", "cloud"}
    assert set(latency.transfer_s) == {"device>edge0", "edge0>cloud", "cloud>edge0", "edge0>device"}
    parts = sum(latency.compute_s.values()) + sum(latency.transfer_s.values())
    parts += latency.codec_s + latency.queueing_s + latency.decision_s + latency.other_s
    assert parts == pytest.approx(latency.total_s)
    assert all(value > 0 for value in latency.compute_s.values())
    assert latency.source == "measured"


def test_a_stream_keeps_its_order_and_overlaps(session: Session, model: runtime.Model) -> None:
    frames = [torch.randn_like(model.example) for _ in range(30)]
    with torch.inference_mode():
        expected = [model.module(frame) for frame in frames]
    n = session.graph.num_layers
    plan = Plan.split(n, 1, n, edge_nodes=("edge0",))
    results = list(session.stream(frames, in_flight=3, plan=plan, deadline_s=FAR_S))
    assert len(results) == len(frames)
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result.output, want)


def test_a_bad_frame_in_a_stream_is_an_error_of_its_own_and_nothing_is_lost(
    session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    frames = [model.example, torch.zeros(1, 3, 5, 5), model.example]
    results = list(session.stream(frames))
    assert [r.error is None for r in results] == [True, False, True]
    with pytest.raises(InputError, match="expected"):
        _ = results[1].output
    assert torch.equal(results[2].output, whole)


def test_threads_may_share_a_session(session: Session, model: runtime.Model, whole: torch.Tensor) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 1, 1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: session.infer(model.example, plan=plan, deadline_s=FAR_S), range(20)))
    assert all(torch.equal(r.output, whole) for r in results)


def test_every_request_leaves_one_event_and_the_session_a_status(
    cluster: Cluster, model: runtime.Model, tmp_path: Path
) -> None:
    with Session(cluster.deployment, runtime.load_policy("cloud-only"), log_folder=tmp_path) as session:
        for _ in range(3):
            session.infer(model.example, deadline_s=FAR_S)
        wait_for(lambda: (tmp_path / "status.json").exists() and read_status(tmp_path)["outcomes"] == {"remote": 3})
        status = read_status(tmp_path)
    events = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert [event["request"] for event in events] == [1, 2, 3]
    for event in events:
        assert event["version"] == 1
        assert event["outcome"] == "remote"
        assert event["deadline_met"]
        assert event["measured"]["total_s"] > 0
        assert {node["name"] for node in event["state"]["nodes"]} == {"edge0", "edge1", "cloud"}
    assert status["policy"] == "cloud-only"
    assert status["breakers"] == {"edge0": "closed", "edge1": "closed", "cloud": "closed"}


def test_state_shows_bandwidth_load_and_links_of_nodes_behind_the_head(session: Session, model: runtime.Model) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 0, n // 2, edge_nodes=("edge0",))
    session.infer(model.example, plan=plan, deadline_s=FAR_S)

    def has_all() -> bool:
        state = session.state("tensor", 100, 1.0)
        ends = {(link.source, link.target) for link in state.links}
        wanted = {
            ("device", "edge0"),
            ("edge0", "device"),
            ("edge0", "cloud"),
            ("device", "cloud"),
            ("cloud", "device"),
            ("cloud", "edge0"),
        }
        return wanted <= ends and all(node.is_up and node.load_factor >= 1.0 for node in state.nodes)

    wait_for(has_all)


# --- things that go wrong -------------------------------------------------------------------------------------------


def test_a_killed_edge_costs_no_answer_and_is_used_again_after_its_restart(
    cluster: Cluster, session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 1, n, edge_nodes=("edge0",))
    session.infer(model.example, plan=plan, deadline_s=FAR_S)
    cluster.suspend("edge0")  # it holds the request and cannot answer: what a kill in the middle looks like, each time
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(session.infer, model.example, plan=plan, deadline_s=FAR_S)
        wait_for(lambda: session.uplink_backlog_bytes > 0)
        cluster.kill("edge0")
        result = pending.result(timeout=10.0)
    assert torch.equal(result.output, whole)
    assert result.outcome == "local"
    assert "edge0" in result.reason
    second = session.infer(model.example, plan=plan, deadline_s=FAR_S)
    assert torch.equal(second.output, whole)
    assert second.outcome == "local"  # without waiting for the dead node
    assert "down" in second.reason
    assert cluster.heal() == ("edge0",)
    wait_for(lambda: session.infer(model.example, plan=plan, deadline_s=FAR_S).outcome == "remote")


def test_a_killed_cloud_behind_the_head_costs_no_answer(
    cluster: Cluster, session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 1, n - 1, edge_nodes=("edge0",))
    cluster.kill("cloud")
    result = session.infer(model.example, plan=plan, deadline_s=FAR_S)
    assert torch.equal(result.output, whole)
    assert result.outcome == "local"
    cluster.heal()
    wait_for(lambda: session.infer(model.example, plan=plan, deadline_s=FAR_S).outcome == "remote")


def test_a_link_that_swallows_everything_costs_no_answer_and_is_used_again(
    cluster: Cluster, session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 1, n, edge_nodes=("edge1",))
    assert session.infer(model.example, plan=plan, deadline_s=FAR_S).outcome == "remote"
    relay = cluster.relays["edge1"]
    relay.set_black_hole(True)
    result = session.infer(model.example, plan=plan, deadline_s=1.0)
    assert torch.equal(result.output, whole)
    assert result.outcome == "local"
    assert result.protected
    check_in_time(result, 1.0)
    wait_for(lambda: "down" in session.infer(model.example, plan=plan, deadline_s=1.0).reason)
    relay.set_black_hole(False)
    wait_for(lambda: session.infer(model.example, plan=plan, deadline_s=FAR_S).outcome == "remote")


def test_a_node_that_hangs_is_answered_for_in_time_and_left_alone(
    cluster: Cluster, session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    n = session.graph.num_layers
    plan = Plan.split(n, 0, n, edge_nodes=("edge0",))
    cluster.suspend("edge0")
    for _ in range(3):
        result = session.infer(model.example, plan=plan, deadline_s=0.5)
        assert torch.equal(result.output, whole)
        assert result.outcome == "local"
        check_in_time(result, 0.5)
    cluster.resume("edge0")
    wait_for(lambda: session.infer(model.example, plan=plan, deadline_s=FAR_S).outcome == "remote")


def test_a_busy_node_is_answered_for_at_once(model: runtime.Model, whole: torch.Tensor) -> None:
    config = ModelConfig(spec=MODEL, input_kind="tensor")
    with (
        Cluster(
            config,
            edges=("edge0",),
            has_cloud=False,
            worker_options=("--queue", "1"),
            emulate={"edge0": NodeEmulation(slow_down=200.0, mode="compute")},  # so that requests must queue
        ) as cluster,
        cluster.session(policy=runtime.load_policy("edge-only")) as session,
        ThreadPoolExecutor(12) as pool,
    ):
        pending = [pool.submit(session.infer, model.example, deadline_s=FAR_S) for _ in range(12)]
        results = [future.result(timeout=FAR_S) for future in pending]
    assert all(torch.equal(r.output, whole) for r in results)
    assert {r.outcome for r in results} == {"remote", "local"}
    assert all(r.reason.startswith("busy") for r in results if r.outcome == "local")


def test_local_completion_beside_a_running_upload_gives_the_right_output_at_every_cut(
    cluster: Cluster, session: Session, model: runtime.Model, whole: torch.Tensor
) -> None:
    n = session.graph.num_layers
    relay = cluster.relays["edge1"]
    for i in range(n):
        plan = Plan.split(n, i, n, edge_nodes=("edge1",))
        wait_for(lambda plan=plan: session.infer(model.example, plan=plan, deadline_s=FAR_S).outcome == "remote")
        relay.set_black_hole(True)
        result = session.infer(model.example, plan=plan, deadline_s=0.3)
        relay.set_black_hole(False)
        assert torch.equal(result.output, whole), plan.describe()
        assert (result.outcome, result.reason) == ("local", "deadline")


def test_a_deadline_nobody_can_hold_is_said_so(session: Session, model: runtime.Model, whole: torch.Tensor) -> None:
    result = session.infer(model.example, deadline_s=1e-6)
    assert torch.equal(result.output, whole)
    assert not result.protected
    assert not result.deadline_met


# --- a device without the model -------------------------------------------------------------------------------------


def without_model(cluster: Cluster, policy: str) -> Session:
    limits = Constraints(device_has_model=False, deadline_s=FAR_S)
    return runtime.connect(cluster.deployment, policy=runtime.load_policy(policy), constraints=limits)


def test_a_device_without_the_model_gets_the_same_output(
    cluster: Cluster, model: runtime.Model, whole: torch.Tensor
) -> None:
    with without_model(cluster, "cloud-only") as session:
        assert torch.equal(session.infer(model.example).output, whole)


def test_a_device_without_the_model_goes_to_another_node(
    cluster: Cluster, model: runtime.Model, whole: torch.Tensor
) -> None:
    with without_model(cluster, "edge-only") as session:
        session.infer(model.example)
        cluster.suspend("edge0")
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(session.infer, model.example)
            wait_for(lambda: session.uplink_backlog_bytes > 0)
            cluster.kill("edge0")
            result = pending.result(timeout=20.0)
        assert torch.equal(result.output, whole)
        assert result.outcome == "remote"


def test_a_device_without_the_model_says_in_time_that_nobody_answered(cluster: Cluster, model: runtime.Model) -> None:
    with without_model(cluster, "cloud-only") as session:
        session.infer(model.example)
        cluster.suspend("cloud")
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="no node answered"):
            session.infer(model.example, deadline_s=0.3)
        assert time.monotonic() - began_s < FAR_S / 10


def test_a_device_without_the_model_and_without_nodes_does_not_start() -> None:
    limits = Constraints(device_has_model=False, deadline_s=1.0)
    with pytest.raises(PeerTimeout, match="offcut worker"):
        Session(make_deployment(constraints=limits), runtime.load_policy("cloud-only"), connect_timeout_s=0.5)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_other_weights_are_refused_by_fingerprint(cluster: Cluster) -> None:
    other = runtime.Deployment(
        model=ModelConfig(spec=MODEL, seed=7, input_kind="tensor"), nodes=cluster.deployment.nodes
    )
    with pytest.raises(HandshakeError, match="same model, weights, seed"):
        Session(other, runtime.load_policy("cloud-only"))


def test_an_illegal_plan_is_refused_before_anything_is_sent(session: Session, model: runtime.Model) -> None:
    n = session.graph.num_layers
    with pytest.raises(PlanError, match="data flows device -> edge -> cloud only"):
        session.infer(model.example, plan=Plan((Tier.CLOUD,) + (Tier.EDGE,) * (n - 1), ("edge0",)))
    with pytest.raises(PlanError, match="among"):
        session.infer(model.example, plan=Plan.split(n, 1, n, edge_nodes=("edge9",)))


def test_a_deadline_must_be_positive(session: Session, model: runtime.Model) -> None:
    with pytest.raises(ConfigError, match="deadline_s > 0"):
        session.infer(model.example, deadline_s=0.0)


def test_requests_that_are_open_when_the_session_closes_fail_by_name(cluster: Cluster, model: runtime.Model) -> None:
    session = without_model(cluster, "cloud-only")
    cluster.suspend("cloud")
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(session.infer, model.example)
        wait_for(lambda: session.uplink_backlog_bytes > 0)
        session.close()
        with pytest.raises(OffcutError, match="closed"):
            pending.result(timeout=10.0)


def test_a_cluster_leaves_nothing_behind_and_its_nodes_end_on_sigterm(model: runtime.Model) -> None:
    cluster = Cluster.local(MODEL, edges=1, has_cloud=False)
    folder = cluster.folder
    assert folder.exists()
    cluster.stop()
    assert not folder.exists()


def test_a_log_folder_that_is_gone_costs_no_answer(
    cluster: Cluster, model: runtime.Model, whole: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "log"
    with Session(cluster.deployment, runtime.load_policy("cloud-only"), log_folder=folder) as session:
        wait_for((folder / "status.json").exists)
        shutil.rmtree(folder)
        session._write_status()  # what the loop does each second
        assert torch.equal(session.infer(model.example, deadline_s=FAR_S).output, whole)


def test_a_device_without_the_model_refuses_nodes_with_different_weights(cluster: Cluster) -> None:
    with Cluster(ModelConfig(spec=MODEL, seed=7, input_kind="tensor"), edges=("other",), has_cloud=False) as second:
        mixed = runtime.Deployment(
            model=cluster.deployment.model,
            nodes=(cluster.deployment.node("cloud"), second.deployment.node("other")),
            constraints=Constraints(device_has_model=False, deadline_s=FAR_S),
        )
        with pytest.raises(HandshakeError, match="weights and seed of the others"):
            Session(mixed, runtime.load_policy("cloud-only"))


def test_nodes_with_another_number_of_threads_are_named(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    try:
        with Session(cluster.deployment, runtime.load_policy("cloud-only"), threads=2):
            assert "cloud runs 1 torch threads, this device 2" in caplog.text
    finally:
        torch.set_num_threads(1)


def test_an_error_of_the_loop_itself_fails_what_is_open_and_what_comes_by_its_name(
    cluster: Cluster, model: runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> int:
        raise RuntimeError("no such thing")

    with Session(cluster.deployment, runtime.load_policy("cloud-only")) as session:
        cluster.suspend("cloud")
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(session.infer, model.example, deadline_s=FAR_S)
            wait_for(lambda: session.uplink_backlog_bytes > 0)
            monkeypatch.setattr(session._client.contacts, "uplink_backlog_bytes", broken)
            for _ in range(2):
                with pytest.raises(OffcutError, match="RuntimeError: no such thing"):
                    pending.result(timeout=10.0)
                pending = pool.submit(session.infer, model.example)


def test_a_refused_frame_is_a_line_of_the_log_too(session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        session.infer(tmp_path / "missing.jpg")
    event = json.loads((tmp_path / EVENTS_FILE).read_text())
    assert (event["outcome"], event["state"]) == ("failed", None)
    assert event["reason"].startswith("InputError: ")


def test_a_node_that_cannot_be_used_says_why(model: runtime.Model) -> None:
    with Session(make_deployment(model=MODEL), runtime.load_policy("cloud-only"), connect_timeout_s=0.1) as session:
        assert session.infer(model.example, deadline_s=FAR_S).reason == "cloud is down: not connected"


def test_small_models_get_a_default_deadline_that_a_node_can_hold(
    session: Session, model: runtime.Model, tmp_path: Path
) -> None:
    session.infer(model.example)
    event = json.loads((tmp_path / EVENTS_FILE).read_text())
    assert event["state"]["deadline_s"] >= DEADLINE_FLOOR_S


def test_wrong_types_get_named_errors(session: Session, model: runtime.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use infer"):
        session.stream("frame.jpg")
    with pytest.raises(ConfigError, match="in_flight >= 1"):
        session.stream([model.example], in_flight=0)
    with pytest.raises(ConfigError, match="input kind among"):
        session.state("jpeg", 0, 1.0)
    with pytest.raises(PlanError, match=r"runtime\.trace"):
        runtime.run_local(session.graph, Plan.split(3, 1, 2), model.example)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="load_model first"):
        runtime.trace(MODEL)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="move what is there"):
        Session(session.deployment, session.policy_spec, log_folder=tmp_path / "file")


def test_a_session_changes_its_rule_between_two_requests(session: Session, model: runtime.Model) -> None:
    assert session.infer(model.example, deadline_s=FAR_S).outcome == "device"
    session.use(runtime.load_policy("cloud-only"))
    assert session.infer(model.example, deadline_s=FAR_S).outcome == "remote"
    with pytest.raises(PlanError):
        session.use(runtime.load_policy("fixed:99,99"))
    assert session.infer(model.example, deadline_s=FAR_S).outcome == "remote"
