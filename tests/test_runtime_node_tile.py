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
    chain = TileRun.of(plan_of(model), TileRef(2, 1, 7), model).chain
    assert chain.first == 2
    head = TileState(model.graph, 0, {name: values[name] for name in chain.stage.needs})
    kept, made = None, dict[str, torch.Tensor]()
    for at, step in enumerate(chain.steps, chain.first):
        run = TileRun.of(plan_of(model), TileRef(at, 1, 7), model)
        assert (run.state is None) == (at > chain.first)
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


def test_what_is_kept_is_kept_once_for_one_client_until_its_deadline_and_up_to_a_number(model: HostedModel) -> None:
    clients = [Peer(name, "", is_client=True) for name in ("edge0", "edge2")]
    states = [TileState(model.graph, 1) for _ in range(4)]
    held = Held(capacity=3)
    held.put((clients[0], 1), states[0], 10.0)
    assert held.take((clients[1], 1)) is None
    assert held.take((clients[0], 1)) is states[0]
    assert held.take((clients[0], 1)) is None
    for number, state in enumerate(states):
        held.put((clients[number % 2], number), state, 10.0 + number)
    assert len(held) == 3
    assert held.take((clients[0], 0)) is None  # the oldest had to go
    held.drop_late(11.5)
    assert held.take((clients[1], 1)) is None
    held.drop_client(clients[1])
    assert len(held) == 1
    assert held.take((clients[0], 2)) is states[2]
