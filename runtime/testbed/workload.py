"""Recorded bandwidth and load: the one place that reads trace files.

Three forms of network trace, told apart by their content:

- our CSV, `time_s,bandwidth_mbps[,rtt_ms]`, uniform steps from 0 on;
- Mahimahi: one integer a line, the millisecond in which one more packet of 1500 bytes may leave;
- Sabre: JSON, `[{"duration_ms": 1000, "bandwidth_kbps": 800, "latency_ms": 20}, ...]`.

Load traces are CSV, `time_s,requests_per_s` or `time_s,utilization`. Mbit and kbit are decimal.
"""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from runtime.errors import ConfigError
from runtime.presets import LinkEmulation
from runtime.testbed.arrivals import LoadShape
from runtime.testbed.rate import LinkShape

MAHIMAHI_PACKET_BITS = 1500 * 8
MAHIMAHI_STEP_S = 0.1
"""Packets are counted over steps of this length: single milliseconds are bursts, not rates."""


@dataclass(frozen=True, slots=True)
class NetworkTrace:
    """Bandwidth over time, and the round trip where it was recorded."""

    starts_s: tuple[float, ...]
    rates_bps: tuple[float, ...]
    period_s: float
    rtt_s: float  # median of what was recorded; NaN where nothing was

    def shape(self, *, scale: float = 1.0, delay_s: float | None = None, jitter_s: float = 0.0) -> LinkShape:
        """One direction of a link that behaves like this trace and starts over at its end.

        Args:
            scale: factor on the bandwidth; uplinks are commonly 0.1 to 0.5 of the downlinks that were recorded.
            delay_s: one way; None takes half the recorded round trip, or none.
            jitter_s: added to the delay at random.
        """
        if delay_s is None:
            delay_s = 0.0 if math.isnan(self.rtt_s) else self.rtt_s / 2.0
        return LinkShape(
            rates_bps=tuple(scale * rate for rate in self.rates_bps),
            starts_s=self.starts_s,
            period_s=self.period_s,
            delay_s=delay_s,
            jitter_s=jitter_s,
        )


@dataclass(frozen=True, slots=True)
class LoadTrace:
    """Requests per second, or utilisation from 0 to 1, over time."""

    kind: str  # requests_per_s or utilization
    starts_s: tuple[float, ...]
    values: tuple[float, ...]
    period_s: float

    def shape(
        self, *, service_s: float, arrivals: Literal["poisson", "periodic"] = "poisson", seed: int = 0
    ) -> LoadShape:
        """Background requests that load a node like this trace and start over at its end.

        Args:
            service_s: seconds that one of them keeps the node busy; turns utilisation into a rate.
            arrivals: how they come.
            seed: of Poisson arrivals.
        """
        factor = 1.0 / service_s if self.kind == "utilization" else 1.0
        return LoadShape(
            rates_hz=tuple(factor * value for value in self.values),
            starts_s=self.starts_s,
            period_s=self.period_s,
            arrivals=arrivals,
            seed=seed,
        )


def shape_link(emulation: LinkEmulation) -> LinkShape:
    """What a relay is told about one direction of a link.

    Raises:
        ConfigError: when the trace cannot be read.
    """
    if emulation.trace is not None:
        trace = read_network(Path(emulation.trace))
        return trace.shape(scale=emulation.scale, delay_s=emulation.delay_s, jitter_s=emulation.jitter_s)
    rates = () if emulation.rate_bps is None else (float(emulation.rate_bps),)
    return LinkShape(rates_bps=rates, delay_s=emulation.delay_s or 0.0, jitter_s=emulation.jitter_s)


class _SabreEntry(msgspec.Struct):
    duration_ms: float
    bandwidth_kbps: float
    latency_ms: float = math.nan


def read_network(path: Path) -> NetworkTrace:
    """Read a network trace in any of the three forms.

    Raises:
        ConfigError: when the file cannot be read or has none of these forms, naming the file and the line.
    """
    text = _read(path)
    if text.lstrip().startswith("["):
        return _read_sabre(path, text)
    if text.split("\n", 1)[0].strip().isdigit():
        return _read_mahimahi(path, text)
    starts, columns = _read_csv(path, text, ("bandwidth_mbps",))
    rates = tuple(1e6 * value for value in columns["bandwidth_mbps"])
    rtts = sorted(value / 1e3 for value in columns.get("rtt_ms", ()) if not math.isnan(value))
    return NetworkTrace(starts, rates, _period_s(starts), rtts[len(rtts) // 2] if rtts else math.nan)


def read_load(path: Path) -> LoadTrace:
    """Read a load trace.

    Raises:
        ConfigError: when the file cannot be read or is not of this form, naming the file and the line.
    """
    starts, columns = _read_csv(path, _read(path), ("requests_per_s", "utilization"))
    kind = "requests_per_s" if "requests_per_s" in columns else "utilization"
    return LoadTrace(kind, starts, columns[kind], _period_s(starts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error


def _read_csv(path: Path, text: str, wanted: Sequence[str]) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """Columns of numbers by name; an empty cell is NaN."""
    rows = list(csv.reader(text.splitlines()))
    header = rows[0] if rows else []
    if not header or header[0] != "time_s" or not any(name in header for name in wanted):
        raise ConfigError(f"{path}, line 1: expected time_s and {' or '.join(wanted)}, got {','.join(header)[:80]!r}")
    numbers = []
    for line, row in enumerate(rows[1:], start=2):
        try:
            numbers.append([float(cell) if cell else math.nan for cell in row])
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: expected numbers, got {','.join(row)[:80]!r}") from error
        if len(row) != len(header) or not math.isfinite(numbers[-1][0]) or not math.isfinite(numbers[-1][1]):
            raise ConfigError(f"{path}, line {line}: expected {len(header)} numbers, got {','.join(row)[:80]!r}")
    columns = list(zip(*numbers, strict=True))
    if not columns or any(b <= a for a, b in zip(columns[0], columns[0][1:], strict=False)):
        raise ConfigError(f"{path}: expected rows whose time_s ascends")
    return columns[0], dict(zip(header[1:], columns[1:], strict=True))


def _period_s(starts: tuple[float, ...]) -> float:
    """The last step is as long as the one before it."""
    return starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 1.0)


def _read_mahimahi(path: Path, text: str) -> NetworkTrace:
    try:
        stamps_ms = [int(line) for line in text.split()]
    except ValueError as error:
        raise ConfigError(f"{path}: expected one whole number of milliseconds a line: {error}") from error
    if stamps_ms != sorted(stamps_ms) or stamps_ms[-1] <= 0:
        raise ConfigError(f"{path}: expected milliseconds that do not descend and end above 0")
    num_steps = max(math.ceil(stamps_ms[-1] / 1e3 / MAHIMAHI_STEP_S - 1e-9), 1)
    # A stamp is the end of its millisecond: 1 to 100 belong to the first tenth of a second.
    counts = Counter(min(max(stamp - 1, 0) // round(MAHIMAHI_STEP_S * 1e3), num_steps - 1) for stamp in stamps_ms)
    rates = tuple(counts[step] * MAHIMAHI_PACKET_BITS / MAHIMAHI_STEP_S for step in range(num_steps))
    starts = tuple(step * MAHIMAHI_STEP_S for step in range(num_steps))
    return NetworkTrace(starts, rates, num_steps * MAHIMAHI_STEP_S, math.nan)


def _read_sabre(path: Path, text: str) -> NetworkTrace:
    try:
        entries = msgspec.json.decode(text, type=list[_SabreEntry])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: expected a list of duration_ms and bandwidth_kbps: {error}") from error
    if not entries or any(not entry.duration_ms > 0 for entry in entries):
        raise ConfigError(f"{path}: expected entries with duration_ms > 0")
    ends_s = [math.fsum(entry.duration_ms for entry in entries[: i + 1]) / 1e3 for i in range(len(entries))]
    rtts = sorted(entry.latency_ms / 1e3 for entry in entries if not math.isnan(entry.latency_ms))
    return NetworkTrace(
        (0.0, *ends_s[:-1]),
        tuple(1e3 * entry.bandwidth_kbps for entry in entries),
        ends_s[-1],
        rtts[len(rtts) // 2] if rtts else math.nan,
    )
