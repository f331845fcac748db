"""Schedules: where they start, peak and end, and that converging groups meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovlm.config.schema import OptimSettings
from fovlm.train.schedule import rate, rates

PEAK = 2e-4


def optim(**changes) -> OptimSettings:
    return OptimSettings(**{"warmup": 0.1, "final": 0.1, "lr_common": 3e-5, **changes})


@pytest.mark.parametrize(
    ("schedule", "end"), [("constant", PEAK), ("cosine", 0.1 * PEAK), ("converging", 3e-5)]
)  # fmt: skip
def test_starts_at_zero_peaks_after_warmup_ends_where_it_should(schedule, end):
    o = optim(schedule=schedule)
    assert rate(o, PEAK, 0.0) == 0.0
    assert rate(o, PEAK, 0.05) == pytest.approx(PEAK / 2)
    assert rate(o, PEAK, 0.1) == pytest.approx(PEAK)
    assert rate(o, PEAK, 1.0) == pytest.approx(end)
    assert rate(o, PEAK, 7.0) == rate(o, PEAK, 1.0)


def test_without_warmup_the_first_step_has_the_full_rate():
    assert rate(optim(warmup=0.0, schedule="cosine"), PEAK, 0.0) == pytest.approx(PEAK)


def test_cosine_is_half_way_down_in_the_middle():
    assert rate(optim(warmup=0.0, final=0.0), PEAK, 0.5) == pytest.approx(PEAK / 2)


@given(st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_cosine_never_rises_after_the_warmup(a, b):
    low, high = sorted((a, b))
    assert rate(optim(), PEAK, high) <= rate(optim(), PEAK, low) * (1 + 1e-12)


def test_groups_converge_to_one_rate_from_above_and_below():
    o = optim(schedule="converging", lr_connector=1e-3, lr_encoder=1e-5, lr_llm=1e-5)
    ratios = [rates(o, p)["connector"] / rates(o, p)["llm"] for p in (0.1, 0.4, 0.7, 1.0)]
    assert ratios[0] == pytest.approx(100)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(1)


def test_frozen_groups_have_no_rate():
    assert set(rates(optim(freeze=["encoder"]), 0.5)) == {"connector", "llm"}
