import json
import math
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.testbed.rate import LinkShape
from runtime.testbed.workload import read_load, read_network


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_our_csv_gives_decimal_megabits_and_the_median_round_trip(tmp_path: Path) -> None:
    trace = read_network(write(tmp_path, "time_s,bandwidth_mbps,rtt_ms\n0,8,20\n0.2,0,\n0.4,4.5,40\n"))
    assert trace.rates_bps == pytest.approx((8e6, 0.0, 4.5e6))
    assert (trace.starts_s, trace.period_s) == ((0.0, 0.2, 0.4), pytest.approx(0.6))
    assert trace.rtt_s == pytest.approx(0.04)


def test_mahimahi_counts_packets_of_1500_bytes(tmp_path: Path) -> None:
    # one packet each millisecond of the first tenth of a second, one each tenth millisecond of the second
    stamps = [*range(1, 101), *range(110, 201, 10)]
    trace = read_network(write(tmp_path, "\n".join(map(str, stamps)) + "\n"))
    assert trace.rates_bps == pytest.approx((12e6, 1.2e6))
    assert trace.period_s == pytest.approx(0.2)
    assert math.isnan(trace.rtt_s)


def test_sabre_gives_pieces_of_any_length(tmp_path: Path) -> None:
    entries = [
        {"duration_ms": 500, "bandwidth_kbps": 800, "latency_ms": 30},
        {"duration_ms": 1500, "bandwidth_kbps": 100, "latency_ms": 30},
    ]
    trace = read_network(write(tmp_path, json.dumps(entries)))
    assert trace.starts_s == (0.0, 0.5)
    assert trace.rates_bps == (8e5, 1e5)
    assert (trace.period_s, trace.rtt_s) == (2.0, 0.03)


def test_a_trace_becomes_a_direction_of_a_link_scaled_and_delayed(tmp_path: Path) -> None:
    trace = read_network(write(tmp_path, "time_s,bandwidth_mbps,rtt_ms\n0,8,20\n1,4,20\n"))
    shape = trace.shape(scale=0.25, jitter_s=0.001)
    assert shape == LinkShape(rates_bps=(2e6, 1e6), starts_s=(0.0, 1.0), period_s=2.0, delay_s=0.01, jitter_s=0.001)
    assert trace.shape(delay_s=0.5).delay_s == 0.5


@pytest.mark.parametrize("kind", ["requests_per_s", "utilization"])
def test_load_traces_keep_their_kind(tmp_path: Path, kind: str) -> None:
    trace = read_load(write(tmp_path, f"time_s,{kind}\n0,0.5\n300,1.0\n"))
    assert (trace.kind, trace.values, trace.period_s) == (kind, (0.5, 1.0), 600.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1"),
        ("time,mbps\n0,1\n", "expected time_s and bandwidth_mbps"),
        ("time_s,bandwidth_mbps\n0,1\n1,x\n", "line 3: expected numbers"),
        ("time_s,bandwidth_mbps\n0,1\n1\n", "line 3"),
        ("time_s,bandwidth_mbps\n0,1\n0,1\n", "ascends"),
        ("time_s,bandwidth_mbps\n", "ascends"),
        ("5\n3\n", "do not descend"),
        ("5\nx\n", "whole number"),
        ('[{"duration_ms": 0, "bandwidth_kbps": 1}]', "duration_ms > 0"),
        ('[{"kbps": 1}]', "duration_ms"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_its_name_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_network(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_load(tmp_path / "nowhere.csv")
