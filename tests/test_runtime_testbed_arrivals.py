"""When background requests come."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.testbed.arrivals import Arrivals, LoadShape
from runtime.testbed.workload import LoadTrace


def until(shape: LoadShape, end_s: float) -> list[float]:
    arrivals = Arrivals(shape)
    return list(itertools.takewhile(lambda at_s: at_s < end_s, iter(arrivals.next_s, None)))


@given(st.floats(0.1, 1000.0), st.integers(1, 100))
def test_periodic_requests_come_one_period_apart(rate_hz: float, count: int) -> None:
    arrivals = Arrivals(LoadShape(rates_hz=(rate_hz,), arrivals="periodic"))
    for i in range(1, count + 1):
        assert arrivals.next_s() == pytest.approx(i / rate_hz, rel=1e-9)


@given(st.lists(st.tuples(st.floats(0.5, 5.0), st.floats(0.0, 20.0)), min_size=1, max_size=5))
def test_periodic_requests_follow_a_rate_that_changes(steps: list[tuple[float, float]]) -> None:
    lengths, rates = zip(*steps, strict=True)
    starts = (0.0, *itertools.accumulate(lengths))
    shape = LoadShape(rates_hz=rates, starts_s=starts[:-1], period_s=starts[-1], arrivals="periodic")
    expected = sum(length * rate for length, rate in steps)
    assert abs(len(until(shape, starts[-1])) - expected) <= 1


def test_poisson_requests_have_the_mean_and_the_spread_of_their_kind() -> None:
    at_s = until(LoadShape(rates_hz=(10.0,), seed=3), 2000.0)
    gaps = [b - a for a, b in itertools.pairwise(at_s)]
    mean_s = sum(gaps) / len(gaps)
    variance = sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps)
    assert mean_s == pytest.approx(0.1, rel=0.03)  # five standard errors of 20 000 gaps
    assert math.sqrt(variance) == pytest.approx(0.1, rel=0.05)


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    one, same, other = (until(LoadShape(rates_hz=(5.0,), seed=seed), 20.0) for seed in (1, 1, 2))
    assert one == same != other


def test_named_instants_come_as_they_are_and_over_again() -> None:
    assert until(LoadShape(instants_s=(0.5, 0.5, 2.0), period_s=3.0), 7.0) == [0.5, 0.5, 2.0, 3.5, 3.5, 5.0, 6.5, 6.5]
    once = Arrivals(LoadShape(instants_s=(0.0, 1.0)))
    assert [once.next_s() for _ in range(3)] == [0.0, 1.0, math.inf]


def test_no_rate_is_no_request() -> None:
    assert until(LoadShape(), 1e5) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"rates_hz": (-1.0,)},
        {"rates_hz": ()},
        {"arrivals": "bursts"},
        {"starts_s": (1.0,)},
        {"period_s": 0.0},
        {"instants_s": (-1.0,)},
        {"instants_s": (2.0, 1.0)},
        {"instants_s": (2.0,), "period_s": 1.0},
    ],
)
def test_a_load_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        LoadShape(**fields)  # type: ignore[arg-type]


def test_a_load_trace_becomes_a_rate_directly_or_by_the_time_of_a_request() -> None:
    rates = LoadTrace("requests_per_s", (0.0, 1.0), (4.0, 8.0), 2.0).shape(service_s=0.1)
    assert (rates.rates_hz, rates.starts_s, rates.period_s) == ((4.0, 8.0), (0.0, 1.0), 2.0)
    used = LoadTrace("utilization", (0.0, 1.0), (0.5, 0.8), 2.0).shape(service_s=0.1, arrivals="periodic")
    assert used.rates_hz == pytest.approx((5.0, 8.0))
    assert used.arrivals == "periodic"
