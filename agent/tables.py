"""Latency breakdowns as table cells, the same in every command, and the line that says that something takes long."""

from contextlib import AbstractContextManager

from rich import box
from rich.console import Console
from rich.table import Table

from runtime.types import DEVICE_NODE, LatencyBreakdown

LATENCY_COLUMNS = ("total", "device", "edge", "cloud", "up", "down", "codec", "rest")
"""Milliseconds. `rest` is decision, queues and hand-overs between threads."""

CELL_CHARACTERS = 6

PREDICTED = "its layer times are predicted from other models on its machine; it is measuring this one now"


def make_latency_table(title: str, *columns: str) -> Table:
    """Make a table with columns of its own before those that `latency_cells` fills; fits 80 characters."""
    table = Table(title=f"{title}; milliseconds", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column)
    for column in LATENCY_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def latency_line(left: str, cells: tuple[str, ...] | list[str], marker: str = " ") -> str:
    """One row of latency cells as text, for rows that are printed one by one.

    Args:
        left: what stands before the cells.
        cells: one per latency column.
        marker: one character behind the total.
    """
    total, *parts = (cell.rjust(CELL_CHARACTERS) for cell in cells)
    return f"{left} {total}{marker}{' '.join(parts)}"


def latency_cells(latency: LatencyBreakdown, cloud: str = "cloud") -> list[str]:
    """One cell per latency column; `-` where nothing happened."""
    parts = latency.compute_s
    edge_s = sum(s for name, s in parts.items() if name not in (DEVICE_NODE, cloud))
    up_s = sum(s for link, s in latency.transfer_s.items() if _is_outward(link, cloud))
    down_s = sum(latency.transfer_s.values()) - up_s
    device_s, cloud_s = parts.get(DEVICE_NODE, 0.0), parts.get(cloud, 0.0)
    rest_s = latency.queueing_s + latency.decision_s + latency.other_s
    cells = (latency.total_s, device_s, edge_s, cloud_s, up_s, down_s, latency.codec_s, rest_s)
    return [f"{value * 1e3:.1f}" if value else "-" for value in cells]


def _is_outward(link: str, cloud: str) -> bool:
    source, _, target = link.partition(">")
    return source == DEVICE_NODE or target == cloud


def loading(what: str) -> AbstractContextManager[object]:
    """Say on a terminal what takes seconds now; standard output stays as it is, for pipes."""
    return Console(stderr=True, highlight=False).status(f"{what} ...")
