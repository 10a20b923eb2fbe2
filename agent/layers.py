"""`offcut layers`: where a model can be cut, and what would cross the network there."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from agent.config import LayersConfig
from agent.tables import loading
from runtime.model.graph import trace
from runtime.model.zoo import load_model
from runtime.planning.problem import find_route
from runtime.types import INPUT_KINDS, GraphSpec, Plan

GUESSED = " (a typical camera's; --encoded-bytes takes yours)"

LEGEND = """makes: bytes of the layer's outputs. cut sends: bytes that cross when this layer and all after it run elsewhere,
before any codec; where a value skips over layers, it crosses too. less than: the smallest input that is larger.
To cut before layer i: offcut infer ... --policy fixed:i,i"""


@dataclass(frozen=True, slots=True)
class Cut:
    """The place before one layer."""

    layer: int
    sends_bytes: int  # what crosses when this layer and all after it run elsewhere
    smaller_than: str  # the smallest input kind that is larger; empty: none


def run_layers(config: LayersConfig) -> None:
    """Print a row per layer, and which cuts send less than the input.

    Raises:
        ModelError: when the model cannot be found, built or traced.
    """
    console = Console(highlight=False, soft_wrap=True)
    with loading(f"loading and tracing {config.model}"):
        graph = trace(load_model(config.model, batch_size=config.batch_size)).spec
    inputs = input_bytes(graph, config.encoded_bytes)
    cuts = find_cuts(graph, inputs)
    console.print(_table(config.model, graph, cuts), soft_wrap=False)
    for kind, nbytes in inputs.items():
        guessed = GUESSED if kind == "encoded" and config.encoded_bytes is None else ""
        console.print(
            f"{kind} enters at layer {graph.entry(kind)}, {nbytes:,} bytes{guessed}; {_smaller(graph, nbytes, cuts)}"
        )
    console.print(LEGEND)


def input_bytes(graph: GraphSpec, encoded_bytes: int | None = None) -> dict[str, int]:
    """Bytes of one request, by input kind that the model takes.

    Args:
        graph: the model's graph.
        encoded_bytes: of one encoded image; None takes the graph's typical ones.
    """
    kinds = INPUT_KINDS if graph.num_stage_layers else ("tensor",)
    sizes = {kind: _cut_bytes(graph, kind, graph.entry(kind)) for kind in kinds}
    if encoded_bytes is not None and "encoded" in sizes:
        sizes["encoded"] = encoded_bytes * graph.batch_size
    return sizes


def find_cuts(graph: GraphSpec, inputs: dict[str, int]) -> list[Cut]:
    """Find what crosses before each layer; at the entry of an input kind, that input."""
    entries = {graph.entry(kind): kind for kind in inputs}
    by_size = sorted(inputs, key=lambda kind: inputs[kind])
    cuts = []
    for layer in range(graph.num_layers):
        kind = entries.get(layer)
        nbytes = inputs[kind] if kind else _cut_bytes(graph, INPUT_KINDS[0], layer)
        smaller_than = next((k for k in by_size if nbytes < inputs[k]), "")
        cuts.append(Cut(layer, nbytes, "" if kind else smaller_than))
    return cuts


def _cut_bytes(graph: GraphSpec, kind: str, layer: int) -> int:
    route = find_route(graph, Plan.split(graph.num_layers, layer, layer), kind)
    crossing = set(route.up[0]) if route.up else set()
    return sum(value.tensor.nbytes for value in graph.values if value.name in crossing)


def _table(title: str, graph: GraphSpec, cuts: list[Cut]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("i", justify="right")
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for column in ("MFLOP", "makes", "cut sends"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("less than")
    sizes = {value.name: value.tensor.nbytes for value in graph.values}
    for cut, layer in zip(cuts, graph.layers, strict=True):
        made = sum(sizes[name] for name in layer.outputs)
        cells = (str(cut.layer), layer.name, layer.kind, f"{layer.flops / 1e6:,.1f}", f"{made:,}")
        table.add_row(*cells, f"{cut.sends_bytes:,}", cut.smaller_than)
    return table


def _smaller(graph: GraphSpec, nbytes: int, cuts: list[Cut]) -> str:
    """The cuts of the model proper that send less than so many bytes."""
    smaller = [cut.layer for cut in cuts if cut.layer > graph.entry("tensor") and cut.sends_bytes < nbytes]
    return f"cuts that send less: {f'before layer {_ranges(smaller)}' if smaller else 'none'}"


def _ranges(numbers: list[int]) -> str:
    """`1-3, 7` for 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
