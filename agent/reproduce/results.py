"""What an experiment measured: one line of JSON per finished cell, so that a run that was stopped goes on."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cell:
    """One network under one set of conditions: every rule meets the same."""

    model: str
    kind: str
    """Kind of input."""
    condition: tuple[tuple[str, str], ...]
    """Names and values, such as ("level", "90"), ("mbps", "8")."""

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        conditions = ", ".join(f"{name} {value}" for name, value in self.condition)
        return f"{self.model.partition(':')[2]}, {self.kind}, {conditions}"


class Run(msgspec.Struct, frozen=True):
    """One request that counts."""

    rule: str
    latency_s: float
    predicted_s: float
    outcome: str
    plan: str
    is_warm: bool  # its plan had been used before on these nodes
    is_late: bool  # its layers on the device took longer than what is emulated
    uplink_bytes: int  # payload that leaves the device
    backbone_bytes: int  # payload that enters or leaves the cloud
    compute_s: dict[str, float]
    transfer_s: dict[str, float]
    queueing_s: float
    codec_s: float
    decision_s: float

    @property
    def is_sound(self) -> bool:
        """Whether it shows the rule and what is emulated, not the building of segments or a busy machine."""
        return self.is_warm and not self.is_late


class CellResult(msgspec.Struct, frozen=True):
    """One line of `results.jsonl`."""

    grid: str  # fingerprint of the constants it was measured under
    model: str
    kind: str
    condition: dict[str, str]
    readings: dict[str, float]  # what was read of links and loads when measuring began
    is_settled: bool  # whether the readings were near what was emulated by then
    overruns: dict[str, int]  # segments of each node that this machine was too slow for
    num_warm_ups: int  # requests that did not count: the first with their plan
    num_late: int  # and those for which this machine was too slow
    seconds: float
    runs: list[Run]

    @property
    def cell(self) -> Cell:
        """Which one."""
        return Cell(self.model, self.kind, tuple(self.condition.items()))

    @property
    def is_sound(self) -> bool:
        """Whether every rule has a sound request; if not, the cell is to be measured again."""
        return {run.rule for run in self.runs} == {run.rule for run in self.runs if run.is_sound}


class Store:
    """`results.jsonl` of one experiment. A line that was cut off by a crash is dropped.

    Args:
        path: the file; it is made with the first result.
        grid: fingerprint of the constants in force.

    Raises:
        ConfigError: the file holds results of other constants, or is none of ours.
    """

    def __init__(self, path: Path, grid: str) -> None:
        self._path = path
        self._results: dict[Cell, CellResult] = {}
        for number, line in enumerate(self._whole_lines(), start=1):
            try:
                result = msgspec.json.decode(line, type=CellResult)
            except msgspec.MsgspecError as error:
                raise ConfigError(
                    f"{path}, line {number}: expected a result of this version, got {error}; take another --out"
                ) from error
            if result.grid != grid:
                raise ConfigError(
                    f"{path}, line {number}: expected results of the constants in force ({grid}), got some of others "
                    f"({result.grid}); take another --out, or move them away"
                )
            self._results[result.cell] = result

    def _whole_lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(self._path, end)
        return data[:end].splitlines()

    @property
    def results(self) -> list[CellResult]:
        """All that there are, in the order in which they were measured."""
        return list(self._results.values())

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that are still to be measured, or to be measured again."""
        return [cell for cell in cells if cell not in self._results or not self._results[cell].is_sound]

    def append(self, result: CellResult) -> None:
        """Keep a cell for good; it takes the place of an earlier result."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._results[result.cell] = result
