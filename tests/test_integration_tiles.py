"""Tiles on several edge nodes at once, as a session sees them: right answers, whatever becomes of the other nodes."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import runtime
from runtime.deployment import ModelConfig
from runtime.device.session import InferenceResult, Session
from runtime.device.telemetry import EVENTS_FILE
from runtime.presets import NodeEmulation
from runtime.testbed.cluster import Cluster
from runtime.types import Plan, Tier, TileSpan
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

MODEL = "tests.models:gated"
FAR_S = 60.0
TOLERANCE = 1e-5
"""Largest error behind tiles in float32, relative to the largest output: kernels sum in another order."""

SLOW_DOWN = 200.0
"""Makes a tile of this tiny model take some 50 ms, so that there is a time in which its node can be lost."""

ROWS = (TileSpan(0, 2, (15,), ()), TileSpan(3, 6, (8,), ()))
CHAINED = (
    *(TileSpan(start, start + 1, (15,), ()) for start in (0, 1)),
    *(TileSpan(start, start + 1, (8,), ()) for start in (3, 4, 5)),
)
"""The same layers, span by span: only borders cross between them."""

GRIDS = (
    ROWS,
    CHAINED,
    (TileSpan(0, 2, (), (16,)),),
    (TileSpan(1, 2, (20,), ()), TileSpan(3, 5, (), (3,)), TileSpan(5, 6, (8,), ())),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    emulate = {name: NodeEmulation(slow_down=SLOW_DOWN, mode="compute") for name in ("edge0", "edge1")}
    model = ModelConfig(spec=MODEL, input_kind="tensor")
    with Cluster(model, edges=("edge0", "edge1"), relays=(("edge0", "edge1"),), emulate=emulate) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def all_well(cluster: Cluster) -> Iterator[None]:
    """Leave the next test a cluster on which everything works, however this one ended."""
    yield
    cluster.link("edge0", "edge1").set_black_hole(False)
    for node in cluster.deployment.nodes:
        cluster.resume(node.name)
    cluster.heal()


@pytest.fixture
def session(cluster: Cluster, tmp_path: Path) -> Iterator[Session]:
    with Session(cluster.deployment, runtime.load_policy("edge-only"), log_folder=tmp_path) as session:
        yield session


@pytest.fixture(scope="module")
def model() -> runtime.Model:
    return runtime.load_model(MODEL)


@pytest.fixture(scope="module")
def frames(model: runtime.Model) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn_like(model.example) for _ in range(4)]


@pytest.fixture(scope="module")
def whole(model: runtime.Model, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        outputs = [model.module(x) for x in frames]
    assert all(error(a, b) > 100 * TOLERANCE for a, b in itertools.combinations(outputs, 2))
    return outputs


def error(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made - expected).abs().max() / expected.abs().max())


def check(result: InferenceResult, expected: torch.Tensor) -> None:
    assert error(result.output, expected) <= TOLERANCE
    assert result.output.argmax() == expected.argmax()


def plan_tiled(
    session: Session, tiles: tuple[TileSpan, ...], codec: str = "raw", cloud_from: int | None = None
) -> Plan:
    n = session.graph.num_layers
    stop = n if cloud_from is None else cloud_from
    tiers = (Tier.EDGE,) * stop + (Tier.CLOUD,) * (n - stop)
    return Plan(tiers, ("edge0", "edge1"), tiles, codec)


def wait_for_peer(session: Session, plan: Plan, x: torch.Tensor) -> None:
    """Ask until the head has found its peer again."""
    wait_for(lambda: not session.infer(x, plan=plan, deadline_s=FAR_S).reason)


def test_tiled_plans_give_the_output_of_the_whole_model(
    session: Session, frames: list[torch.Tensor], whole: list[torch.Tensor]
) -> None:
    wait_for_peer(session, plan_tiled(session, ROWS), frames[0])
    for tiles, codec, cloud_from in itertools.product(GRIDS, ("raw", "lossless", "auto"), (None, 6)):
        plan = plan_tiled(session, tiles, codec, cloud_from)
        for x, expected in zip(frames[:2], whole, strict=False):
            result = session.infer(x, plan=plan, deadline_s=FAR_S)
            check(result, expected)
            assert (result.outcome, result.reason) == ("remote", ""), plan.describe()


def test_two_halves_take_less_time_than_one_tile_that_is_nearly_everything(
    session: Session, frames: list[torch.Tensor]
) -> None:
    halves = plan_tiled(session, ROWS)
    lopsided = plan_tiled(session, (TileSpan(0, 2, (1,), ()), TileSpan(3, 6, (1,), ())))
    seconds = {}
    for plan in (halves, lopsided):
        wait_for_peer(session, plan, frames[0])
        results = [session.infer(frames[0], plan=plan, deadline_s=FAR_S) for _ in range(5)]
        seconds[plan] = min(r.latency.compute_s["edge0"] for r in results if r.latency is not None)
    assert seconds[halves] < seconds[lopsided]  # emulated: both nodes wait out their tiles side by side


def test_tiles_of_requests_that_overlap_do_not_mix(
    session: Session, frames: list[torch.Tensor], whole: list[torch.Tensor]
) -> None:
    """Both nodes are heads of one half of the requests and peers in the other."""
    n = session.graph.num_layers
    names = ("edge0", "edge1")
    plans = [Plan((Tier.EDGE,) * n, each, tiles) for tiles in (ROWS, CHAINED) for each in (names, names[::-1])]
    for plan in plans:
        wait_for_peer(session, plan, frames[0])
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(session.infer, frames[i % 4], plan=plans[i // 4 % 4], deadline_s=FAR_S) for i in range(32)
        ]
        for i, future in enumerate(futures):
            check(future.result(), whole[i % 4])


def kill_during_requests(
    cluster: Cluster,
    session: Session,
    frames: list[torch.Tensor],
    whole: list[torch.Tensor],
    tiles: tuple[TileSpan, ...],
    times: int,
) -> None:
    plan, deadline_s = plan_tiled(session, tiles), 5.0
    wait_for_peer(session, plan, frames[0])
    took_s = session.infer(frames[0], plan=plan, deadline_s=FAR_S).latency
    assert took_s is not None
    reasons = []
    for turn in range(times):
        killer = threading.Timer(took_s.total_s * (turn + 0.5) / times, cluster.kill, ("edge1",))
        killer.start()
        for i in range(4):
            result = session.infer(frames[i], plan=plan, deadline_s=deadline_s)
            check(result, whole[i])
            assert result.deadline_met
            reasons.append(result.reason)
        killer.join()
        cluster.restart("edge1")
        wait_for_peer(session, plan, frames[0])
    assert any("edge0 ran" in reason for reason in reasons)


@pytest.mark.parametrize("tiles", [ROWS, CHAINED], ids=["rows", "chained"])
def test_a_peer_that_is_killed_costs_no_answer(
    tiles: tuple[TileSpan, ...],
    cluster: Cluster,
    session: Session,
    frames: list[torch.Tensor],
    whole: list[torch.Tensor],
) -> None:
    kill_during_requests(cluster, session, frames, whole, tiles, times=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tiles", [ROWS, CHAINED], ids=["rows", "chained"])
def test_fifty_kills_of_a_peer_cost_no_answer(
    tiles: tuple[TileSpan, ...],
    cluster: Cluster,
    session: Session,
    frames: list[torch.Tensor],
    whole: list[torch.Tensor],
) -> None:
    kill_during_requests(cluster, session, frames, whole, tiles, times=50)


@pytest.mark.parametrize("tiles", [ROWS, CHAINED], ids=["rows", "chained"])
@pytest.mark.parametrize("how", ["hangs", "link"])
def test_a_peer_that_falls_silent_costs_no_answer(
    how: str,
    tiles: tuple[TileSpan, ...],
    cluster: Cluster,
    session: Session,
    frames: list[torch.Tensor],
    whole: list[torch.Tensor],
) -> None:
    plan = plan_tiled(session, tiles)
    wait_for_peer(session, plan, frames[0])
    if how == "hangs":
        cluster.suspend("edge1")
    else:
        cluster.link("edge0", "edge1").set_black_hole(True)
    for x, expected in zip(frames, whole, strict=True):
        result = session.infer(x, plan=plan, deadline_s=5.0)
        check(result, expected)
        assert result.deadline_met
        assert result.outcome == "local" or "edge0 ran" in result.reason
    cluster.resume("edge1")
    cluster.link("edge0", "edge1").set_black_hole(False)
    wait_for_peer(session, plan, frames[0])


def test_what_a_tiled_request_left_behind_says_so(session: Session, tmp_path: Path, frames: list[torch.Tensor]) -> None:
    plan = plan_tiled(session, ROWS)
    began_s = time.monotonic()
    result = session.infer(frames[0], plan=plan, deadline_s=FAR_S)
    assert result.latency is not None
    assert result.latency.total_s <= time.monotonic() - began_s
    parts = sum(result.latency.compute_s.values()) + sum(result.latency.transfer_s.values())
    parts += result.latency.codec_s + result.latency.queueing_s + result.latency.decision_s + result.latency.other_s
    assert parts == pytest.approx(result.latency.total_s)
    event = json.loads((tmp_path / EVENTS_FILE).read_text().splitlines()[-1])
    assert event["edge_nodes"] == ["edge0", "edge1"]
    assert event["tiles"][0] == {"start": 0, "stop": 2, "row_lines": [15], "col_lines": []}
    assert event["plan"].endswith("tiles [0:2) 2x1 [3:6) 2x1 on edge0+edge1")


def test_the_head_tells_how_its_peers_are(session: Session) -> None:
    wait_for(
        lambda: (link := session.state("tensor", 0, 1.0).link("edge0", "edge1")) is not None and bool(link.samples)
    )
    state = session.state("tensor", 0, 1.0).node("edge1")
    assert state is not None
    assert state.load_factor >= 1.0
