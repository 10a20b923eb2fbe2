"""`offcut measure`: what this machine and the nodes of a deployment need for a model, and how well its cuts pack.

Everything is kept in the cache that nodes and sessions read, by graph, machine and thread count: a run that was broken
off goes on where it stopped, and a worker that starts on the same machine uses what was measured here.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from agent import load_policy
from agent.config import MeasureConfig
from agent.node_times import NodeTimes, measure_nodes
from agent.photos import sample_photos
from runtime.deployment import Deployment, ModelConfig, load_deployment
from runtime.device.session import Session
from runtime.measure import THOROUGH, load_measurement
from runtime.model.graph import LayerGraph, trace
from runtime.model.inputs import admit
from runtime.model.segment import SegmentCache
from runtime.model.zoo import Model, load_model
from runtime.planning.predictors import MIN_MODELS, KindError, leave_models_out, leave_one_out
from runtime.profiles.cache import cache_folder, read_known
from runtime.profiles.record import MeasuredModel, list_cuts
from runtime.ratios import load_ratios
from runtime.types import DEVICE_NODE, GraphSpec, Tier
from runtime.wire.codec import AutoCodec

SLOWEST_KINDS = 2


def run_measure(config: MeasureConfig) -> None:
    """Measure models here, or a model on every machine of a deployment, and print what was found.

    Raises:
        OffcutError: the first thing that goes wrong.
    """
    console = Console()
    torch.set_num_threads(config.threads)
    deployment = None if config.deployment is None else load_deployment(config.deployment)
    models: list[MeasuredModel] = []
    nodes: tuple[NodeTimes, ...] = ()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=None)

        def show(text: str) -> None:
            progress.update(task, description=text)

        for wanted in list_models(config, deployment):
            models.append(measure_model(wanted, is_anew=config.reprofile, show=show))
        if deployment is not None:
            nodes = _measure_deployment(deployment, config, show)
    if models:
        console.print(make_model_table(models))
        for model in models:
            console.print(describe_ratios(model), markup=False)
    errors = find_prediction_errors(models)
    if errors is not None:
        console.print(make_error_table(errors))
    if nodes:
        console.print(make_node_table(nodes))
    if config.json is not None:
        config.json.write_bytes(encode_report(models, nodes))


def list_models(config: MeasureConfig, deployment: Deployment | None) -> list[ModelConfig]:
    """Models to measure on this machine: those named, or the deployment's where the device holds it."""
    if deployment is None:
        return [
            ModelConfig(spec=spec, weights=config.weights, seed=config.seed, batch_size=config.batch_size)
            for spec in config.model
        ]
    return [deployment.model] if deployment.constraints.device_has_model else []


def measure_model(
    config: ModelConfig,
    *,
    is_anew: bool = False,
    folder: Path | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> MeasuredModel:
    """Measure one model on this machine, or read from the cache what has been measured.

    Args:
        config: the model.
        is_anew: forget what is cached.
        folder: cache folder; None takes the user's.
        show: told what is being done.

    Raises:
        ModelError: when it cannot be loaded or traced.
    """
    show(f"{config.spec}: loading")
    model = load_model(config.spec, weights=config.weights, seed=config.seed, batch_size=config.batch_size)
    graph = trace(model)
    show(f"{config.spec}: {graph.num_layers} layers and a spread of segments")
    measurement = load_measurement(
        graph, SegmentCache(graph), model.example, AutoCodec(), folder=folder, effort=THOROUGH, is_anew=is_anew
    )
    inputs = _make_inputs(model, graph)
    ratios = load_ratios(
        graph,
        model.weights,
        inputs,
        has_pictures=graph.spec.preprocessing is not None,
        folder=folder,
        is_anew=is_anew,
        on_step=lambda done: show(f"{config.spec}: every value of {done} of {len(inputs)} pictures packed"),
    )
    return MeasuredModel(config.spec, graph.spec, measurement, ratios)


def _make_inputs(model: Model, graph: LayerGraph) -> list[Mapping[str, torch.Tensor]]:
    """One request per photograph; the example where the model takes no pictures."""
    if graph.spec.preprocessing is None:
        return [admit(graph.spec, model.example).values]
    return [admit(graph.spec, [photo] * graph.spec.batch_size).values for photo in sample_photos()]


def _measure_deployment(
    deployment: Deployment, config: MeasureConfig, show: Callable[[str], None]
) -> tuple[NodeTimes, ...]:
    show("connecting to the nodes")
    with Session(deployment, load_policy(_any_policy(deployment)), threads=config.threads) as session:
        show(f"running segments of {deployment.model.spec} on {len(deployment.nodes)} nodes")
        return measure_nodes(session, _make_request(session.graph))


def _any_policy(deployment: Deployment) -> str:
    """A rule that is legal here; every request brings its own plan."""
    limits = deployment.constraints
    if limits.device_has_model and Tier.DEVICE in limits.allowed_tiers:
        return "device-only"
    return "cloud-only" if deployment.cloud is not None and Tier.CLOUD in limits.allowed_tiers else "edge-only"


def _make_request(graph: GraphSpec) -> Any:
    if graph.preprocessing is not None:
        return [sample_photos()[0]] * graph.batch_size
    value = next(v for v in graph.values if v.producer < 0)
    return torch.zeros(value.tensor.shape, dtype=getattr(torch, value.tensor.dtype))


# --- what was found ---------------------------------------------------------------------------------------------------


def make_model_table(models: Sequence[MeasuredModel]) -> Table:
    """A row per model: seconds, where they go, the cut that packs best, how far the measurement can be trusted."""
    table = _make_table(
        "this machine, idle", "model", "ms", "layers", "slowest kinds", "best cut", "MB/s", "off", "busy"
    )
    for model in models:
        measurement, ratios = model.measurement, model.ratios
        errors = [abs(error) for error in measurement.errors()]
        table.add_row(
            model.spec.partition(":")[2],
            f"{measurement.whole_s * 1e3:.1f}",
            str(model.graph.num_layers),
            " ".join(f"{kind} {share:.0%}" for kind, share in sum_kinds(model)[:SLOWEST_KINDS]),
            _best_cut(model),
            f"{ratios.encode_bytes_per_s / 1e6:.0f}/{ratios.decode_bytes_per_s / 1e6:.0f}",
            f"{statistics.median(errors):.0%}/{max(errors):.0%}" if errors else "-",
            f"{measurement.spread_frac:.0%}",
        )
    table.caption = (
        "best cut: where the lossless codec saves most, and the first layer beyond it. MB/s: packing/unpacking. off: "
        "predicted against measured segments that the calibration did not see, median/worst. busy: median run over fastest"
    )
    return table


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column)
    return table


def sum_kinds(model: MeasuredModel) -> list[tuple[str, float]]:
    """Share of the time by layer kind, the largest first."""
    total_s = sum(model.profile.layer_s)
    shares: dict[str, float] = {}
    for layer, seconds in zip(model.graph.layers, model.profile.layer_s, strict=True):
        shares[layer.kind] = shares.get(layer.kind, 0.0) + seconds / total_s
    return sorted(shares.items(), key=lambda item: -item[1])


def _best_cut(model: MeasuredModel) -> str:
    cuts = list_cuts(model.graph, model.ratios.by_value)
    if not cuts:
        return "-"
    best = max(cuts, key=lambda cut: cut.ratio)
    return f"{best.ratio:.2f}x at {best.layer}"


def describe_ratios(model: MeasuredModel) -> str:
    """What the ratios of a model were measured on."""
    ratios = model.ratios
    source = f"{ratios.pictures} photographs" if ratios.pictures else "its example input"
    caution = "; trained weights may pack otherwise" if ratios.weights.startswith("seeded") else ""
    return f"{model.spec}: ratios on {source}, weights {ratios.weights}{caution}"


@dataclass(frozen=True, slots=True)
class PredictionErrors:
    """How well this machine's times of a model can be told from its other models, each left out in turn."""

    models: tuple[float, ...]  # predicted / measured - 1 of whole models
    kinds: tuple[KindError, ...]


def find_prediction_errors(models: Sequence[MeasuredModel], *, folder: Path | None = None) -> PredictionErrors | None:
    """Leave out one at a time of all models that this machine has measured; None where there are too few.

    Args:
        models: what was measured now; it says which machine this is.
        folder: cache folder; None takes the user's.
    """
    if not models:
        return None
    known = read_known(cache_folder() if folder is None else folder, models[0].measurement.machine)
    if len(known) <= MIN_MODELS:
        return None
    return PredictionErrors(leave_models_out(known, DEVICE_NODE), leave_one_out(known, DEVICE_NODE))


def make_error_table(errors: PredictionErrors) -> Table:
    """A row per layer kind, one for whole models."""
    title = f"predicting a model from the {len(errors.models) - 1} others measured on this machine"
    table = _make_table(title, "kind", "layers", "median error", "all seconds")
    for kind in errors.kinds:
        table.add_row(kind.kind, str(kind.num_layers), f"{kind.median_frac:.0%}", f"{kind.total_frac:+.0%}")
    median = statistics.median(abs(error) for error in errors.models)
    table.add_row("whole models", str(len(errors.models)), f"{median:.0%}", "")
    table.caption = "each model left out in turn; a node serves with such times until it has measured a new model"
    return table


def make_node_table(nodes: Sequence[NodeTimes]) -> Table:
    """A row per node: what it measured of itself, and how segments run over the session compare."""
    title = "nodes: their own profiles, and segments run on them now"
    table = _make_table(title, "node", "tier", "ms", "MB/s", "segments", "measured / predicted", "problem")
    for node in nodes:
        factors = sorted(s.measured_s / s.predicted_s for s in node.segments)
        cells = ("-", "-")
        if node.profile is not None:
            speeds = (node.profile.encode_bytes_per_s / 1e6, node.profile.decode_bytes_per_s / 1e6)
            cells = (f"{sum(node.profile.layer_s) * 1e3:.1f}", f"{speeds[0]:.0f}/{speeds[1]:.0f}")
        spread = f"{statistics.median(factors):.2f} ({factors[0]:.2f} to {factors[-1]:.2f})" if factors else "-"
        table.add_row(node.name, node.tier, *cells, str(len(factors)), spread, node.problem or "-")
    return table


def encode_report(models: Sequence[MeasuredModel], nodes: Sequence[NodeTimes]) -> bytes:
    """Everything that was measured, as JSON."""
    cuts = [
        [{**msgspec.to_builtins(cut), "ratio": cut.ratio} for cut in list_cuts(model.graph, model.ratios.by_value)]
        for model in models
    ]
    entries = [{**msgspec.to_builtins(model), "cuts": cut} for model, cut in zip(models, cuts, strict=True)]
    return msgspec.json.format(msgspec.json.encode({"models": entries, "nodes": nodes}))
