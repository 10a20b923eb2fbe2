"""A comparison in TensorBoard: a run per policy with the same tags, and one for the figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from agent.compare.figures import Figure
from agent.compare.play import Episode
from agent.compare.tables import ALL, BEST, Row

_QUANTILES = np.linspace(0.0, 1.0, 101)


def write_board(episodes: Sequence[Episode], rows: Sequence[Row], figures: Mapping[str, Figure], folder: Path) -> Path:
    """Write the logs; older ones there are replaced.

    Returns:
        The folder to give to `tensorboard --logdir`.
    """
    from torch.utils.tensorboard import SummaryWriter

    logs = folder / "tensorboard"
    shutil.rmtree(logs, ignore_errors=True)
    for policy in dict.fromkeys(row.policy for row in rows):
        with SummaryWriter(str(logs / policy.replace("/", "-").replace(":", "-"))) as writer:
            own = [row for row in rows if row.policy == policy and row.models == ALL]
            for row in own:
                here = [e for e in episodes if e.policy == policy and e.scenario == row.scenario]
                _write_scenario(writer, row, here)
            metrics = {f"hparam/{name}": value for row in own for name, value in _metrics(row).items()}
            writer.add_hparams({"policy": policy}, metrics, run_name=".")
    with SummaryWriter(str(logs / "figures")) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure, close=False)
    return logs


def _write_scenario(writer: object, row: Row, episodes: Sequence[Episode]) -> None:
    add = writer.add_scalar  # type: ignore[attr-defined]
    values = np.concatenate([episode.relative for episode in episodes])
    for step, value in enumerate(np.quantile(values, _QUANTILES)):
        add(f"latency_percentile/{row.scenario}", value, step)
    for step, episode in enumerate(episodes):
        add(f"episode_mean/{row.scenario}", episode.relative.mean(), step)
    for name, value in _metrics(row).items():
        add(name, value, 0)


def _metrics(row: Row) -> dict[str, float]:
    found = {
        "mean": row.mean.value,
        "geo_mean": row.geo_mean.value,
        "p95": row.p95.value,
        "missed_frac": row.missed_frac,
        "backbone_bytes": row.backbone_bytes,
    }
    if BEST in row.mean_over:
        found |= {"mean_over_best": row.mean_over[BEST].value, "p95_over_best": row.p95_over[BEST].value}
    return {f"{name}/{row.scenario}": value for name, value in found.items()}
