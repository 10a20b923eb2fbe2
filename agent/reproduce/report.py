"""What came of an experiment: Markdown, CSV, PNG and TensorBoard, all from the same results."""

import csv
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from agent.bench.report import describe_machine
from agent.report import load_pyplot
from agent.reproduce.grids import LATE_FRAC, fingerprint
from agent.reproduce.papers import KIND, D3Paper, LoadpartPaper
from agent.reproduce.results import CellResult
from agent.reproduce.sections import d3_sections, loadpart_sections
from agent.reproduce.tables import CellMean, cell_means, conditions
from runtime.presets import PRESETS, NodeEmulation


def write_report(paper: LoadpartPaper | D3Paper, results: Sequence[CellResult], folder: Path) -> Path:
    """Write everything; what stood there of an earlier report is replaced.

    Returns:
        The path of the Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    means = cell_means(results)
    sections = [_header(paper, results)]
    for kind in dict.fromkeys(mean.cell.kind for mean in means):
        own = [mean for mean in means if mean.cell.kind == kind]
        sent = "the input tensor, as in the papers" if kind == KIND else "a photograph as its camera wrote it"
        sections.append(f"## Sent: {sent}")
        sections += loadpart_sections(own) if isinstance(paper, LoadpartPaper) else d3_sections(own)
    sections.append(_health(results))
    path = folder / "table.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    _write_csv(means, folder / "table.csv")
    _plot(paper, means, folder)
    _write_tensorboard(means, folder / "tensorboard")
    return path


def _header(paper: LoadpartPaper | D3Paper, results: Sequence[CellResult]) -> str:
    done, of = len(results), len(paper.cells())
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    lines = [
        f"# {paper.name}: on the live runtime, machines and links emulated",
        f"{done} of {of} cells, {paper.grid.repeat} requests per rule and cell. Constants {fingerprint(paper.grid)}, "
        f"pinned in `agent/reproduce/grids.py` before the first run. Measured on: {machine}.",
        "Real: processes, sockets, queues, decisions, readings. Emulated: the links' rates and delays, and the time that "
        "layers take. A node that is *replayed* is faster than this machine: it answers with the activations of a "
        "fixed sample after the time that its preset would need; an *emulated* one computes and waits.",
        "| node | preset | slow-down over one thread here | how | source |\n|---|---|---|---|---|",
    ]
    for name, preset in paper.machines.items():
        label = NodeEmulation(preset=preset).label
        lines[-1] += f"\n| {name} | {preset} | {PRESETS[preset].slow_down:.3g} | {label} | {PRESETS[preset].source} |"
    lines.append(
        "Tensors are sent as they are (codec raw) by every rule. Every rule sees the readings of the same session and "
        "takes turns with the others; the first use of a plan is no part of it. Networks, load levels and rates of the "
        "papers are as reconstructed; the presets' ratios hold for whole networks, and count for every layer here, "
        "the decoder of photographs included. Weights are seeded; no time depends on them."
    )
    if isinstance(paper, D3Paper):
        lines.append(
            f"`d3` is HPA with tiles (VSM) on up to {paper.grid.num_edges} edge nodes, `d3-hpa` HPA alone; edge nodes "
            f"reach each other at {paper.grid.edge_edge_bps / 1e6:g} Mbps. Backbone bytes: the payload that enters or "
            "leaves the cloud, worked out from each plan; no message headers."
        )
    return "\n\n".join(lines)


def _health(results: Sequence[CellResult]) -> str:
    outcomes = Counter(run.outcome for result in results for run in result.runs)
    unsettled = [result.cell.label for result in results if not result.is_settled]
    cold = sum(not run.is_warm for result in results for run in result.runs)
    overruns: Counter[str] = Counter()
    for result in results:
        overruns.update(result.overruns)
    late = sum(run.is_late for result in results for run in result.runs)
    told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
    lines = [
        "## What must hold",
        f"- Requests that count: {told}. None may be `local` or `failed`.",
        f"- Repeated: {sum(result.num_warm_ups for result in results)} first uses of a plan, "
        f"{sum(result.num_late for result in results)} for which this machine was too slow (device layers more than "
        f"{LATE_FRAC:.0%} over what is emulated). Among those that count: {cold} and {late}, "
        "left out of a mean where the rule has others in the cell.",
        f"- Cells to be measured again on a quieter machine, because a rule has no other requests: "
        f"{sum(not result.is_sound for result in results)} (the same command does so).",
        f"- Cells where readings had not settled in time: {len(unsettled)} of {len(results)}"
        + "".join(f"; {label}" for label in unsettled),
        f"- Segments of nodes that this machine was too slow for: {sum(overruns.values())} {dict(overruns)}.",
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _write_csv(means: Sequence[CellMean], path: Path) -> None:
    names = list(dict.fromkeys(name for mean in means for name, _ in mean.cell.condition))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("model", "input", *names, "rule", "requests", "latency_s", "uplink_bytes", "backbone_bytes", "plans")
        )
        for mean in means:
            values = dict(mean.cell.condition)
            writer.writerow(
                (
                    *(
                        mean.cell.model,
                        mean.cell.kind,
                        *(values.get(name, "") for name in names),
                        mean.rule,
                        mean.count,
                    ),
                    *(f"{mean.latency_s:.6f}", f"{mean.uplink_bytes:.0f}", f"{mean.backbone_bytes:.0f}"),
                    " | ".join(mean.plans),
                )
            )


def _plot(paper: LoadpartPaper | D3Paper, means: Sequence[CellMean], folder: Path) -> None:
    """One picture per kind of input and condition beside the axis: a panel per network, a line per rule."""
    pictures: dict[str, list[CellMean]] = {}
    for mean in means:
        others = "".join(f"-{name}-{value}" for name, value in mean.cell.condition if name != paper.axis)
        pictures.setdefault(f"{mean.cell.kind}{others}", []).append(mean)
    for name, own in pictures.items():
        _draw(own, paper.axis, "latency_s", "latency, seconds", folder / f"latency-{name}.png")
        if any(mean.backbone_bytes for mean in own):
            _draw(own, paper.axis, "backbone_bytes", "backbone bytes", folder / f"backbone-{name}.png")


def _draw(means: Sequence[CellMean], axis: str, field: str, label: str, path: Path) -> None:
    plt = load_pyplot()
    from matplotlib.lines import Line2D

    models = conditions(means, "model")
    colours = {rule: f"C{index}" for index, rule in enumerate(dict.fromkeys(mean.rule for mean in means))}
    columns = min(len(models), 3)
    rows = -(-len(models) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(models) :]:
        panel.set_visible(False)
    for model, panel in zip(models, panels.flat, strict=False):
        here = [mean for mean in means if mean.cell.model == model]
        for rule, colour in colours.items():
            own = [mean for mean in here if mean.rule == rule]
            places = [dict(mean.cell.condition)[axis] for mean in own]
            panel.plot(places, [getattr(mean, field) for mean in own], marker="o", markersize=3, color=colour)
        panel.set(title=model.partition(":")[2], xlabel=axis, ylabel=label)
        panel.set_ylim(bottom=0)
    lines = [Line2D([], [], color=colour, marker="o", markersize=3) for colour in colours.values()]
    figure.legend(lines, list(colours), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _write_tensorboard(means: Sequence[CellMean], logs: Path) -> None:
    """One run per rule, one tag per network, kind and metric; steps count the cells of a network."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(logs, ignore_errors=True)
    for rule in dict.fromkeys(mean.rule for mean in means):
        steps: Counter[str] = Counter()
        with SummaryWriter(str(logs / rule.replace("@", "-"))) as writer:
            for mean in (mean for mean in means if mean.rule == rule):
                tag = f"{mean.cell.model.partition(':')[2]}/{mean.cell.kind}"
                writer.add_scalar(f"latency_s/{tag}", mean.latency_s, steps[tag])
                writer.add_scalar(f"backbone_bytes/{tag}", mean.backbone_bytes, steps[tag])
                steps[tag] += 1
