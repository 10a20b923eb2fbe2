"""What a benchmark says: rows, bars, the machine; as a table and as JSON."""

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value."""

    case: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One value with the bound it is held to."""

    name: str
    value: float
    bound: float
    better: Literal["lower", "higher"]

    @property
    def holds(self) -> bool:
        """Whether the value is on the right side of the bound; NaN is not."""
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound


@dataclass(slots=True)
class Report:
    """All of one benchmark."""

    bench: str
    note: str
    """What is emulated, and what the rows must not be read as."""
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def add(self, case: str, metric: str, value: float, unit: str) -> None:
        """Add a row."""
        self.rows.append(Row(case, metric, value, unit))

    def show(self, console: Console) -> None:
        """Print rows as a table of cases by metrics, then the bars."""
        metrics = list(dict.fromkeys(f"{row.metric}\n{row.unit}" for row in self.rows))
        table = Table(title=f"{self.bench}: {self.note}")
        for column in ("case", *metrics):
            table.add_column(column, justify="left" if column == "case" else "right")
        values = {(row.case, f"{row.metric}\n{row.unit}"): row.value for row in self.rows}
        for case in dict.fromkeys(row.case for row in self.rows):
            table.add_row(case, *(f"{values[case, m]:.4g}" if (case, m) in values else "" for m in metrics))
        console.print(table)
        for bar in self.bars:
            sign = "<=" if bar.better == "lower" else ">="
            verdict = "[green]holds[/green]" if bar.holds else "[red]missed[/red]"
            console.print(f"{bar.name}: {bar.value:.3g} ({sign} {bar.bound:g}) {verdict}")

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        bars = [{**msgspec.to_builtins(bar), "holds": bar.holds} for bar in self.bars]
        document = {
            "bench": self.bench,
            "note": self.note,
            "machine": describe_machine(),
            "rows": self.rows,
            "bars": bars,
        }
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document)))


def describe_machine() -> dict[str, str | int | None]:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
