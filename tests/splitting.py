"""Running a plan in one process as if a wire lay between the tiers, and checking what no cut may break."""

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from runtime.model.graph import LayerGraph, unflatten_outputs
from runtime.model.inputs import Admitted
from runtime.model.segment import SegmentCache
from runtime.planning.problem import Stage, check_monotone, find_route
from runtime.types import GraphSpec, Plan, Tier


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN and the sign of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    # A copy, since contiguous() leaves one element its stride, whatever that is.
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_output(a: object, b: object) -> bool:
    """Equal containers, plain values and bits."""
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(
        same_bits(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in zip(first, second, strict=True)
    )


def run_plan(
    graph: LayerGraph,
    segments: SegmentCache,
    plan: Plan,
    admitted: Admitted,
    *,
    reference: Mapping[str, torch.Tensor] | None = None,
    offset_bytes: int = 0,
) -> object:
    """Run a plan; every tensor that crosses is copied as the wire would, and none may change under a segment.

    With `reference`, the true bits of every value, each crossing tensor is compared with it.
    """
    check_monotone(graph.spec, plan, graph.spec.entry(admitted.kind))
    route = find_route(graph.spec, plan, admitted.kind)
    at_hand = dict(admitted.values)
    outputs: dict[str, torch.Tensor] = {}
    for tier, crossing in zip(route.tiers, (*route.up, ()), strict=True):
        stage = route.stage(tier)
        given = {name: at_hand[name] for name in stage.needs}
        before = {name: tensor.clone() for name, tensor in given.items()}
        at_hand |= segments.get(stage).run(given)
        for name, tensor in before.items():
            assert same_bits(given[name], tensor), f"{tier.label} changed its input {name} under {plan.describe()}"
        outputs |= {name: at_hand[name] for name in stage.makes if name in graph.spec.outputs}
        for name in crossing:
            assert reference is None or same_bits(at_hand[name], reference[name]), f"{name} differs"
        at_hand = {name: cross(at_hand[name], offset_bytes) for name in crossing}
    return unflatten_outputs(graph.spec, outputs)


def dim_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from outermost to innermost in memory, as the wire's header has it."""
    strides, sizes = tensor.stride(), tensor.shape
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], -sizes[dim])))


def cross(tensor: torch.Tensor, offset_bytes: int = 0) -> torch.Tensor:
    """What arrives of a tensor: no gaps, dimensions in the same memory order, at any address."""
    order = dim_order(tensor)
    memory = torch.empty(tensor.nbytes + offset_bytes, dtype=torch.uint8)
    dense = memory[offset_bytes:].view(tensor.dtype).view([tensor.shape[dim] for dim in order])
    dense.copy_(tensor.permute(order))
    return dense.permute(sorted(range(tensor.dim()), key=order.__getitem__))


def all_values(graph: LayerGraph, admitted: Admitted) -> dict[str, torch.Tensor]:
    """The bits of every value of the graph, from one run that keeps them all."""
    spec = graph.spec
    entry = spec.entry(admitted.kind)
    made = tuple(value.name for value in spec.values if value.producer >= entry)
    stage = Stage(Tier.DEVICE, tuple(range(entry, spec.num_layers)), tuple(admitted.values), made)
    return {**admitted.values, **SegmentCache(graph).get(stage).run(admitted.values)}


def cut_plan(num_layers: int, i: int, j: int | None = None) -> Plan:
    """Layers [0, i) on the device, [i, j) on the edge, the rest in the cloud."""
    return Plan.split(num_layers, i, i if j is None else j, edge_nodes=("edge",))


def lift(graph: GraphSpec, wanted: Sequence[int]) -> Plan:
    """The least monotone assignment that gives each layer the wanted tier or one further out."""
    tiers: list[int] = []
    producers: dict[str, int] = {value.name: value.producer for value in graph.values}
    for layer, tier in zip(graph.layers, wanted, strict=True):
        before = [tiers[producers[name]] for name in layer.inputs if producers[name] >= 0]
        tiers.append(max(tier, *before) if before else tier)
    return Plan(tuple(Tier(tier) for tier in tiers), edge_nodes=("edge",))


def assignments(graph: GraphSpec) -> st.SearchStrategy[Plan]:
    """Random monotone plans: two cuts, blurred layer by layer, so that tiers interleave where the graph branches."""
    n = graph.num_layers

    @st.composite
    def draw(pick: st.DrawFn) -> Plan:
        low, high = sorted((pick(st.integers(0, n)), pick(st.integers(0, n))))
        blur = pick(st.integers(0, max(n // 4, 2)))
        shifts = pick(st.lists(st.integers(-blur, blur), min_size=n, max_size=n))
        places = [index + shift for index, shift in enumerate(shifts)]
        return lift(graph, [(place >= low) + (place >= high) for place in places])

    return draw()
