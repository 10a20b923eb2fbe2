import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.planning.estimators import (
    NOMINAL_BANDWIDTH_BPS,
    NOMINAL_RTT_S,
    Readings,
    TunedSettings,
    last_value,
    tuned,
)
from runtime.types import LinkSample, LinkState, NodeState, SystemState, Tier
from tests.graphs import chain, make_problem, make_state

LINK = ("device", "edge0")


def state_of(*samples: tuple[float, float], mean: float = math.nan, **changes: object) -> SystemState:
    """A state whose one link has the samples (age, rate), newest first."""
    link = LinkState(*LINK, tuple(LinkSample(age, rate) for age, rate in samples), mean, 0.01, **changes)  # type: ignore[arg-type]
    return make_state(make_problem(chain(2)), links=(link,))


def node_of(k: float, q: float, age_s: float) -> SystemState:
    return make_state(make_problem(chain(2)), nodes=(NodeState("edge0", Tier.EDGE, True, k, q, age_s=age_s),))


def test_last_value_believes_the_newest_sample_however_old() -> None:
    assert last_value(state_of((99.0, 1e6), (100.0, 5e6), mean=9e6)).bandwidth_bps[LINK] == 1e6
    assert last_value(state_of(mean=9e6)).bandwidth_bps[LINK] == 9e6


def test_tuned_is_a_mean_of_logs_weighted_by_age() -> None:
    weight = math.exp(-1.0)
    expected = math.exp((math.log(1e6) + weight * math.log(4e6)) / (1 + weight))
    assert tuned(state_of((0.0, 1e6), (2.0, 4e6))).bandwidth_bps[LINK] == pytest.approx(expected)


def test_tuned_falls_back_to_the_long_run_mean_as_samples_age() -> None:
    rates = [tuned(state_of((age, 1e6), mean=1e8)).bandwidth_bps[LINK] for age in (0.0, 2.0, 5.0, 20.0, 1e8)]
    assert rates == sorted(rates)
    assert rates[0] < 2e6
    assert rates[-1] == pytest.approx(1e8)
    assert tuned(state_of((1e8, 1e6))).bandwidth_bps[LINK] == pytest.approx(1e6)  # no mean: an old sample is better


def test_a_transfer_in_flight_that_takes_too_long_caps_the_rate() -> None:
    state = state_of((1.0, 1e8), mean=1e8, in_flight_bytes=10_000, in_flight_s=0.8)
    assert tuned(state).bandwidth_bps[LINK] == pytest.approx(1e5)
    assert tuned(state_of((1.0, 1e8), mean=1e8, in_flight_bytes=10_000, in_flight_s=1e-4)).bandwidth_bps[
        LINK
    ] == pytest.approx(1e8)


@pytest.mark.parametrize("estimator", [last_value, tuned])
def test_what_was_never_measured_is_nan_and_still_has_an_answer(estimator) -> None:  # type: ignore[no-untyped-def]
    readings: Readings = estimator(state_of())
    assert math.isnan(readings.bandwidth_bps[LINK])
    assert readings.rate_bps("cloud", "device") == NOMINAL_BANDWIDTH_BPS
    assert readings.round_trip_s("device", "cloud") == NOMINAL_RTT_S
    assert readings.round_trip_s("edge0", "device") == 0.01  # as measured from the other end
    idle: Readings = estimator(node_of(math.nan, math.nan, math.inf))
    assert (idle.k("edge0"), idle.q("edge0"), idle.k("edge9"), idle.q("edge9")) == (1.0, 0.0, 1.0, 0.0)


def test_tuned_forgets_a_load_that_is_stale_and_last_value_does_not() -> None:
    fresh, stale = node_of(5.0, 0.2, 1.0), node_of(5.0, 0.2, 60.0)
    assert (tuned(fresh).k("edge0"), tuned(fresh).q("edge0")) == (5.0, 0.2)
    assert (tuned(stale).k("edge0"), tuned(stale).q("edge0")) == pytest.approx((1.0, 0.0), abs=1e-3)
    assert last_value(stale).k("edge0") == 5.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e3, 1e12)), max_size=8), st.floats(1e3, 1e12))
def test_tuned_stays_between_what_was_measured(samples: list[tuple[float, float]], mean: float) -> None:
    samples.sort()
    rate = tuned(state_of(*samples, mean=mean), TunedSettings(mean_weight=0.5)).bandwidth_bps[LINK]
    measured = [mean, *(rate for _, rate in samples)]
    assert min(measured) * 0.999 <= rate <= max(measured) * 1.001
