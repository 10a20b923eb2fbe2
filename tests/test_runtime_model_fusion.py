"""runtime.model.fusion: what tiles' convolutions take in, and that nothing else changes."""

import pytest
import torch
from torch import nn

from runtime.model.fusion import find_fusions
from runtime.model.graph import LayerGraph, trace
from runtime.model.halo import run_tiled
from runtime.model.inputs import admit
from runtime.model.tile_graph import make_tile_graph
from runtime.model.zoo import Model
from runtime.planning.tiling import find_spans, plan_tiles
from runtime.types import TileSpan
from tests.splitting import all_values

TOLERANCE = 2e-5


class Block(nn.Module):
    """A convolution, what follows it, and a last convolution."""

    def __init__(self, *behind: nn.Module, bias: bool = True, reads_twice: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=bias)
        self.behind = nn.ModuleList(behind)
        self.last = nn.Conv2d(8, 4, 1)
        self.reads_twice = reads_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = first = self.conv(x)
        for part in self.behind:
            y = part(y)
        made: torch.Tensor = self.last(y + first if self.reads_twice else y)
        return made.mean((2, 3))


def norm(*, affine: bool = True) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(8, affine=affine)
    with torch.no_grad():
        made.running_mean.normal_()  # type: ignore[union-attr]
        made.running_var.uniform_(0.2, 3.0)  # type: ignore[union-attr]
        for parameter in made.parameters():
            parameter.normal_()
    return made


def make_graph(module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[LayerGraph, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    example = torch.randn(1, 3, 20, 24, dtype=dtype)
    graph = trace(Model("block", module.eval().to(dtype), example, None, 1, "factory"))
    return graph, all_values(graph, admit(graph.spec, example))


def num_ops(graph: LayerGraph) -> int:
    """Operations of a tile, padding not counted."""
    tiling = plan_tiles(graph.spec, TileSpan(0, find_spans(graph.spec)[0].stop, (5,), ()))
    layers = make_tile_graph(graph, tiling, tiling.tiles[0]).layers
    return sum(not op.name.endswith(".padded") for index in tiling.stage.layers for op in layers[index].ops)


@pytest.mark.parametrize(
    ("module", "left"),
    [
        (Block(norm(), nn.LeakyReLU(0.2, inplace=True), bias=False), 2),
        (Block(norm(affine=False), nn.ReLU()), 2),
        (Block(nn.ReLU(inplace=True)), 2),
        (Block(norm(), norm()), 3),  # one batch norm is taken in
        (Block(nn.LeakyReLU(), norm()), 3),  # a batch norm behind an activation is not the convolution's
        (Block(norm(), nn.SiLU()), 3),
        (Block(norm(), reads_twice=True), 4),  # another one reads what it would swallow
    ],
    ids=["norm-leaky", "norm-relu", "relu", "norm-norm", "leaky-norm", "norm-silu", "read-twice"],
)
def test_a_tile_s_convolution_takes_in_what_follows_it(module: Block, left: int) -> None:
    graph, values = make_graph(module)
    assert num_ops(graph) == left
    stop = find_spans(graph.spec)[0].stop
    for span in (TileSpan(0, 1, (4,), (5,)), TileSpan(0, stop, (3, 7), ())):
        for name, made in run_tiled(graph, [span], values).items():
            assert float((made - values[name]).abs().max() / values[name].abs().max()) <= TOLERANCE


def test_what_others_read_is_left_alone() -> None:
    graph, _ = make_graph(Block(norm(), nn.ReLU()))
    layer = graph.layers[0]
    first, second, _ = (op.name for op in layer.ops)
    assert find_fusions(layer.ops, (first,), graph.constants) == {}
    assert find_fusions(layer.ops, (second,), graph.constants)[first].followers == (second,)


def test_in_double_precision_every_operation_stays() -> None:
    graph, _ = make_graph(Block(norm(), nn.ReLU()), torch.float64)
    assert num_ops(graph) == 4
