"""runtime.node.tile: which tile a message is about, what is kept of it from span to span, and for how long."""

import pytest
import torch

from runtime.errors import PlanError, TensorMismatch
from runtime.model.halo import TileState
from runtime.model.inputs import admit
from runtime.model.tiles import TileSegment
from runtime.node.hosted import HostedModel
from runtime.node.tile import Held, TileRun
from runtime.planning.chains import MAX_TILES
from runtime.types import Plan, Tier, TileSpan
from runtime.wire.codec import AutoCodec
from runtime.wire.events import Peer
from runtime.wire.messages import TileRef
from tests.splitting import all_values
from tests.test_integration_tiles import CHAINED, MODEL, TOLERANCE, error


@pytest.fixture(scope="module")
def model() -> HostedModel:
    return HostedModel.load(MODEL, weights=None, seed=0, batch_size=1, device="cpu", auto=AutoCodec())


@pytest.fixture(scope="module")
def values(model: HostedModel) -> dict[str, torch.Tensor]:
    return all_values(model.graph, admit(model.graph.spec, model.example))


def plan_of(model: HostedModel, spans: tuple[TileSpan, ...] = CHAINED, num_nodes: int = 2) -> Plan:
    names = tuple(f"edge{i}" for i in range(num_nodes))
    return Plan((Tier.EDGE,) * model.graph.num_layers, names, spans, "raw")


def never() -> bool:
    return False


def test_a_tile_goes_on_from_what_was_kept_of_it(model: HostedModel, values: dict[str, torch.Tensor]) -> None:
    begun = TileRun.of(plan_of(model), TileRef(2, 1, 7), model)
    chain, first = begun.chain, begun.first
    assert (first, begun.is_first) == (2, True)
    head = TileState(model.graph, 0, {name: values[name] for name in chain.stage.needs})
    kept, made = None, dict[str, torch.Tensor]()
    for at, step in enumerate(chain.steps, first):
        run = TileRun.of(plan_of(model), TileRef(at, 1, 7), model)
        assert (run.state is None) == (at > first)
        run.state = run.state or kept
        pieces = head.give(step.takes[1])
        assert tuple(pieces) == run.takes
        given = head.take(step, made)
        made, seconds = run.run(model, pieces, never)
        assert seconds > 0.0
        assert tuple(made) == run.gives
        head.keep(step, TileSegment(model.graph, step.tiling, 0).run(given))
        assert run.is_last == (step is chain.steps[-1])
        kept = run.state
    for piece in chain.steps[-1].gives[1]:
        whole = values[piece.name][:, :, slice(*piece.region.rows), slice(*piece.region.cols)]
        assert error(made[piece.label], whole) <= TOLERANCE


def test_a_tile_of_which_nothing_was_kept_is_refused(model: HostedModel, values: dict[str, torch.Tensor]) -> None:
    run = TileRun.of(plan_of(model), TileRef(1, 1, 7), model)
    with pytest.raises(PlanError, match="nothing was kept of it here; submit its chain from the start"):
        run.run(model, {}, never)
    first = TileRun.of(plan_of(model), TileRef(0, 1, 7), model)
    with pytest.raises(TensorMismatch, match="got nothing"):
        first.run(model, {}, never)


@pytest.mark.parametrize("ref", [TileRef(-1, 1, 7), TileRef(5, 1, 7), TileRef(0, 2, 7), TileRef(0, -1, 7)])
def test_a_tile_that_the_plan_has_not_is_refused(ref: TileRef, model: HostedModel) -> None:
    with pytest.raises(PlanError, match="expected one of the tiles of"):
        TileRun.of(plan_of(model), ref, model)


def test_grids_of_absurd_size_are_refused_before_they_are_worked_out(model: HostedModel) -> None:
    many = tuple(range(1, MAX_TILES + 1))
    for spans, num_nodes in (((TileSpan(0, 1, many, many),), 10_000), ((TileSpan(0, 1, (4, 8), ()),), 2)):
        with pytest.raises(PlanError, match=f"an edge node for each tile, and at most {MAX_TILES}, got"):
            TileRun.of(plan_of(model, spans, num_nodes), TileRef(0, 1, 7), model)


def keys() -> list[tuple[Peer, int]]:
    return [(Peer(name, "", is_client=True), 7) for name in ("edge0", "edge2")]


def test_what_is_kept_is_kept_for_one_chain_of_one_client_and_taken_once(model: HostedModel) -> None:
    held, (key, other) = Held(), keys()
    runs = [TileRun.of(plan_of(model), TileRef(at, 1, 7), model) for at in (2, 3, 4)]
    held.enter(key, runs[0], 10.0)
    held.enter(key, runs[1], 10.0)  # the head need not wait for the first
    state = runs[0].state
    assert state is not None
    assert held.take(key) is None
    held.put(key, state)
    assert held.take(other) is None
    assert held.take(key) is state
    assert held.take(key) is None
    held.drop(key)
    held.put(key, state)  # given up meanwhile
    assert held.take(key) is None
    assert len(held) == 0


def test_spans_that_do_not_follow_are_refused(model: HostedModel) -> None:
    held, (key, other) = Held(), keys()
    plan, moved = plan_of(model), plan_of(model, (*CHAINED[:3], TileSpan(4, 5, (9,), ()), CHAINED[4]))
    held.enter(key, TileRun.of(plan, TileRef(2, 1, 7), model), 10.0)
    for wrong_key, wrong_plan, ref in (
        (key, plan, TileRef(4, 1, 7)),
        (key, plan, TileRef(3, 0, 7)),
        (key, moved, TileRef(3, 1, 7)),
        (other, plan, TileRef(3, 1, 7)),
    ):
        with pytest.raises(PlanError, match="from its start on, one by one"):
            held.enter(wrong_key, TileRun.of(wrong_plan, ref, model), 10.0)
    held.enter(key, TileRun.of(plan, TileRef(3, 1, 7), model), 10.0)
    with pytest.raises(PlanError, match="one by one"):
        held.enter(key, TileRun.of(plan, TileRef(3, 1, 7), model), 10.0)


def test_chains_are_forgotten_at_their_deadlines_and_with_their_clients(model: HostedModel) -> None:
    held, (key, other) = Held(), keys()
    for at, each in enumerate((key, (key[0], 8), other)):
        held.enter(each, TileRun.of(plan_of(model), TileRef(0, 1, each[1]), model), 10.0 + at)
    assert len(held) == 3
    held.drop_late(10.5)
    assert len(held) == 2
    held.drop_client(key[0])
    assert len(held) == 1
    held.enter(other, TileRun.of(plan_of(model), TileRef(1, 1, 7), model), 12.0)
