import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.testbed.rate import FLOOR_BPS, RateSchedule


@st.composite
def schedules(draw: st.DrawFn) -> RateSchedule:
    widths = draw(st.lists(st.floats(0.05, 2.0), min_size=1, max_size=8))
    rates = draw(st.lists(st.floats(0.0, 1e8), min_size=len(widths), max_size=len(widths)))
    starts = [math.fsum(widths[:i]) for i in range(len(widths))]
    return RateSchedule(tuple(starts), tuple(rates), math.fsum(widths))


def test_a_constant_rate_is_plain_arithmetic() -> None:
    assert RateSchedule.constant(8e6).finish_s(3.0, 8e6) == pytest.approx(4.0)


def test_a_rate_that_changes_each_fifth_of_a_second_is_integrated() -> None:
    schedule = RateSchedule((0.0, 0.2), (8e6, 2e6), 0.4)  # 1.6 Mbit + 0.4 Mbit each 0.4 s
    assert schedule.finish_s(0.0, 2e6) == pytest.approx(0.4)
    assert schedule.finish_s(0.0, 8e6) == pytest.approx(1.6)
    assert schedule.finish_s(0.1, 0.8e6 + 0.2e6) == pytest.approx(0.3)


@given(schedules(), st.floats(0.0, 20.0), st.floats(1.0, 1e7), st.floats(1.0, 1e7))
def test_two_parts_one_after_the_other_take_as_long_as_the_whole(
    schedule: RateSchedule, start_s: float, first: float, second: float
) -> None:
    between = schedule.finish_s(start_s, first)
    assert between > start_s
    assert schedule.finish_s(between, second) == pytest.approx(schedule.finish_s(start_s, first + second), rel=1e-6)


@given(schedules(), st.floats(0.0, 20.0), st.floats(1.0, 1e6))
def test_bits_never_leave_faster_than_the_highest_rate_or_slower_than_the_lowest(
    schedule: RateSchedule, start_s: float, bits: float
) -> None:
    took_s = schedule.finish_s(start_s, bits) - start_s
    assert bits / max(schedule.rates_bps) * (1 - 1e-6) - 1e-6 <= took_s
    assert took_s <= bits / min(schedule.rates_bps) * (1 + 1e-6) + 1e-6


def test_an_outage_is_a_floor_and_time_goes_on() -> None:
    schedule = RateSchedule((0.0, 1.0), (1e6, 0.0), 2.0)
    assert schedule.rate_bps(1.5) == FLOOR_BPS
    assert schedule.rate_bps(2.5) == 1e6
    assert schedule.finish_s(1.0, 1e6) == pytest.approx(2.999)  # 1000 bits in the outage, the rest in the next second


@pytest.mark.parametrize(
    ("starts", "rates", "period"),
    [
        ((), (), 1.0),
        ((0.5,), (1.0,), 1.0),
        ((0.0, 0.0), (1.0, 1.0), 1.0),
        ((0.0,), (-1.0,), 1.0),
        ((0.0,), (1.0,), 0.0),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(
    starts: tuple[float, ...], rates: tuple[float, ...], period: float
) -> None:
    with pytest.raises(ConfigError, match="expected"):
        RateSchedule(starts, rates, period)
