"""What measured requests look like: a timeline as PNG, TensorBoard logs side by side, one run per rule."""

import importlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from runtime.types import LatencyBreakdown


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of an experiment."""

    phase: str
    rule: str
    at_s: float  # on the experiment's clock
    latency: LatencyBreakdown
    outcome: str
    is_equal: bool  # to the whole model's output, to the bit
    is_right: bool  # equal; where tiles ran, within rounding
    is_in_time: bool
    plan: str


def load_pyplot() -> Any:
    """Matplotlib's pyplot, drawing into files: no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def load_drawing() -> None:
    """Load what pictures and logs are made with, which takes seconds, before they are needed."""
    load_pyplot()
    importlib.import_module("torch.utils.tensorboard")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay cells out as a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def plot_timeline(samples: Sequence[Sample], folder: Path, deadline_s: float) -> Path:
    """Draw the latency of every request over time, one colour per rule, the phases as bands.

    Returns:
        The PNG's path.
    """
    plt = load_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    for index, (phase, group) in enumerate(groupby(samples, key=lambda sample: sample.phase)):
        times = [sample.at_s for sample in group]
        following = [sample.at_s for sample in samples if sample.at_s > times[-1]]
        end_s = min(following, default=times[-1] + samples[-1].latency.total_s)
        axes.axvspan(times[0], end_s, color="0.93" if index % 2 else "0.98")
        axes.text(times[0], 1.01 + 0.04 * (index % 2), phase, transform=axes.get_xaxis_transform(), fontsize=9)
    for rule in dict.fromkeys(sample.rule for sample in samples):
        own = [sample for sample in samples if sample.rule == rule]
        (line,) = axes.plot([s.at_s for s in own], [s.latency.total_s for s in own], marker="o", label=rule)
        local = [s for s in own if s.outcome == "local"]
        axes.scatter(
            [s.at_s for s in local], [s.latency.total_s for s in local], marker="*", s=160, color=line.get_color()
        )
    axes.axhline(deadline_s, color="0.5", linestyle="--", linewidth=1, label="deadline")
    axes.set(xlabel="seconds", ylabel="latency, seconds (star: finished by the device itself)", yscale="log")
    axes.legend(loc="upper right", fontsize=8)
    path = folder / "timeline.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def write_tensorboard(samples: Sequence[Sample], folder: Path) -> Path:
    """Write one run per rule under `folder/tensorboard`, with the same tags in each; older runs there are replaced.

    Returns:
        The folder to give to `tensorboard --logdir`.
    """
    from torch.utils.tensorboard import SummaryWriter

    logs = folder / "tensorboard"
    shutil.rmtree(logs, ignore_errors=True)
    for rule in dict.fromkeys(sample.rule for sample in samples):
        with SummaryWriter(str(logs / rule.replace(" ", "-"))) as writer:
            for step, sample in enumerate(s for s in samples if s.rule == rule):
                for tag, value in _scalars(sample).items():
                    writer.add_scalar(tag, value, step)
    return logs


def _scalars(sample: Sample) -> dict[str, float]:
    latency = sample.latency
    return {
        "latency/total_s": latency.total_s,
        "latency/compute_s": sum(latency.compute_s.values()),
        "latency/transfer_s": sum(latency.transfer_s.values()),
        "latency/codec_s": latency.codec_s,
        "latency/queueing_s": latency.queueing_s,
        "outcome/finished_by_device": float(sample.outcome == "local"),
        "outcome/deadline_missed": float(not sample.is_in_time),
    }
