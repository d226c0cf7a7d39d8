import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report import format_gain
from bench.report.format import (
    SIGNIFICANCE,
    as_gain,
    axes_of,
    axis_label,
    format_bound,
    format_compute,
    format_convergence,
    format_error,
    format_estimate,
    format_interval,
    format_number,
    format_p,
    format_reading,
    format_seeds_needed,
    format_slope,
    format_time,
    format_tuning,
    is_bound,
    is_extrapolated,
    printable,
    reading,
    scale_title,
)


@pytest.mark.parametrize(
    ("changes", "text", "typographic", "read"),
    [
        ({"seeds": 3}, "2.31 [1.80, 2.96]", "2.31 [1.80, 2.96]", "gain"),
        ({"interval": [0.4, 0.9], "ceg": 0.515}, "0.52 [0.40, 0.90]", "0.52 [0.40, 0.90]", "loss"),
        ({"interval": [0.9, 1.1], "ceg": 1.0}, "1.00 [0.90, 1.10]", "1.00 [0.90, 1.10]", "contains 1"),
        ({"interval": [1.0, 1.1], "ceg": 1.05}, "1.05 [1.00, 1.10]", "1.05 [1.00, 1.10]", "contains 1"),
        ({"interval": [1.8, None]}, "2.31 [1.80, inf)", "2.31 [1.80, \u221e)", "gain"),
        ({"interval": [None, 2.96]}, "2.31 (0, 2.96]", "2.31 (0, 2.96]", "contains 1"),
        ({"interval": [None, 0.8], "ceg": 0.6}, "0.60 (0, 0.80]", "0.60 (0, 0.80]", "loss"),
        ({"interval": [None, None]}, "2.31 (0, inf)", "2.31 (0, \u221e)", "contains 1"),
        ({"interval": None, "ceg": 1.02, "seeds": 1}, "1.02 (one seed)", "1.02 (one seed)", "no interval"),
        ({"interval": None, "ceg": 1.02, "seeds": 4}, "1.02 (no interval)", "1.02 (no interval)", "no interval"),
        ({"interval": None, "ceg": 1.02}, "1.02", "1.02", "no interval"),
        ({"interval": None, "ceg": None, "lower_bound": 4.0, "seeds": 3}, ">= 4.0", "\u2265 4.0", "bound only"),
        ({"interval": None, "ceg": None, "upper_bound": 0.5, "seeds": 3}, "<= 0.5", "\u2264 0.5", "bound only"),
        (
            {"interval": None, "ceg": None, "lower_bound": 4.0, "seeds": 1},
            ">= 4.0 (one seed)",
            "\u2265 4.0 (one seed)",
            "bound only",
        ),
        (
            {"interval": None, "ceg": None, "lower_bound": 1.26, "upper_bound": 4.03},
            ">= 1.2, <= 4.1",
            "\u2265 1.2, \u2264 4.1",
            "bound only",
        ),
        (
            {"interval": [None, 1.159], "ceg": None, "upper_bound": 1.0, "seeds": 3},
            "<= 1.0 (0, 1.16]",
            "\u2264 1.0 (0, 1.16]",
            "contains 1, a bound",
        ),
        (
            {"interval": [64.0, None], "ceg": None, "lower_bound": 64.00000000000003, "seeds": 3},
            ">= 64 [64.0, inf)",
            "\u2265 64 [64.0, \u221e)",
            "gain, a bound",
        ),
        (
            {"interval": [None, 0.4], "ceg": None, "upper_bound": 0.3, "seeds": 3},
            "<= 0.3 (0, 0.40]",
            "\u2264 0.3 (0, 0.40]",
            "loss, a bound",
        ),
        ({"interval": None, "ceg": None, "seeds": 1}, "-", "\u2014", "unknown"),
        ({"extrapolated": True}, "~2.31 [1.80, 2.96]", "~2.31 [1.80, 2.96]", "gain, extrapolated"),
        ({"extrapolated": True, "interval": None}, "~2.31", "~2.31", "no interval, extrapolated"),
        (
            {"extrapolated": True, "interval": None, "ceg": None, "lower_bound": 4.0},
            ">= 4.0",
            "\u2265 4.0",
            "bound only",
        ),
    ],
)
def test_a_gain_in_words(make_gain, changes, text, typographic, read):
    gain = make_gain(**changes)
    assert format_gain(gain) == text
    assert format_gain(gain).isascii()
    assert format_gain(gain, typographic=True) == typographic
    assert format_reading(gain) == read
    assert read.startswith(reading(gain))
    assert is_bound(gain) == ("bound" in read)
    assert is_extrapolated(gain) == ("extrapolated" in read)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.3149, "2.31"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12346"),
        (99999.7, "1.00e5"),
        (0.0012345, "0.00123"),
        (0.00012, "1.20e-4"),
        (2.5e18, "2.50e18"),
        (0, "0"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


@given(st.floats(1e-6, 1e9), st.booleans())
def test_a_bound_stays_true_and_close_when_rounded(value, lower):
    shown = float(format_bound(value, lower=lower))
    slack = 1 + 1e-8
    assert shown <= value * slack if lower else shown >= value / slack
    assert math.isclose(shown, value, rel_tol=0.101)


@pytest.mark.parametrize(("value", "lower", "upper"), [(3.96, "3.9", "4.0"), (3.9999999999, "4.0", "4.0")])
def test_a_bound_is_rounded_to_its_safe_side(value, lower, upper):
    assert format_bound(value, lower=True) == lower
    assert format_bound(value, lower=False) == upper


def test_an_end_close_to_one_shows_on_which_side_it_lies():
    assert format_interval([0.9996, 1.0004]) == "[0.9996, 1.0004]"
    assert format_interval([1 - 1e-9, 1 + 1e-9]) == "[1.00, 1.00]"
    assert format_interval([0.994, 1.006]) == "[0.99, 1.01]"
    assert format_interval([0.04567, 23.456]) == "[0.046, 23.5]"
    assert format_interval([0.0, 2.0]) == "[0, 2.00]"
    assert format_interval(None) == ""


def test_slopes():
    slope = {"value": -0.123, "interval": [-0.34, 0.091]}
    assert format_slope(slope) == "-0.12 [-0.34, +0.09]"
    assert format_slope(slope, typographic=True) == "\u22120.12 [\u22120.34, +0.09]"
    assert format_slope({"value": 0.5, "interval": [None, None]}) == "+0.50 (-inf, inf)"
    assert format_slope({"value": 0.5, "interval": None}) == "+0.50"
    assert format_slope({"value": None, "interval": None}) == "-"


def test_computes():
    assert format_compute(2.5e18) == "2.50e18"
    assert format_compute(2.5e18, typographic=True) == "2.50 \u00d7 10\u00b9\u2078"
    assert format_compute(1.5e-7, typographic=True) == "1.50 \u00d7 10\u207b\u2077"
    assert format_compute(61.23) == "61.2"
    assert (format_compute(None), format_compute(None, typographic=True)) == ("-", "\u2014")


def test_times():
    assert format_time("2026-01-02T04:04:05+01:00") == "2026-01-02 03:04 UTC"
    assert format_time("a while\nago") == "a while\\nago"
    assert format_time(None) == "\u2014"


@pytest.mark.parametrize(
    ("tuning", "untuned", "text"),
    [
        ("interior", False, "tuned"),
        ("edge", True, "untuned: edge of grid"),
        ("single", True, "untuned: one rate"),
        ("other", True, "untuned"),
    ],
)
def test_tuning(tuning, untuned, text):
    assert format_tuning({"tuning": tuning, "untuned": untuned}) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "<0.001"),
        (0.00099, "<0.001"),
        (0.001, "0.001"),
        (0.0123, "0.012"),
        (0.0996, "0.10"),
        (0.3456, "0.35"),
        (1.0, "1.00"),
        (0.0499, "0.0499"),
        (0.05, "0.050"),
        (0.0501, "0.0501"),
        (None, "-"),
    ],
)
def test_p_values(value, text):
    assert format_p(value) == text
    assert format_p(value, typographic=True) == text.replace("-", "\u2014")


@given(st.floats(0, 1))
def test_a_p_value_is_short_close_and_on_its_side_of_the_threshold(value):
    text = format_p(value)
    assert len(text) <= 6
    shown = 0.0 if text == "<0.001" else float(text)
    assert math.isclose(shown, value, abs_tol=0.001 if value < 0.0995 else 0.0051)
    if abs(value - SIGNIFICANCE) > 5e-5:
        assert (shown < SIGNIFICANCE) == (value < SIGNIFICANCE)


def test_errors():
    assert (format_error(0.0642), format_error(0.5), format_error(0.0)) == ("0.064", "0.50", "0")
    assert (format_error(None), format_error(None, typographic=True)) == ("-", "\u2014")


def test_parameters_of_a_law_with_and_without_an_interval():
    assert format_estimate(1.81724) == "1.817"
    assert format_estimate(0.36582, [0.3, 0.41236]) == "0.3658 [0.3000, 0.4124]"
    assert format_estimate(2085.43, [0.0, 123456.0]) == "2085 [0, 1.235e5]"


def test_an_interaction_and_a_forecast_read_like_gains(make_gains):
    gains = make_gains(combinations=True, forecasts=True)
    assert format_gain(as_gain(gains["interactions"][0])) == "0.82 [0.71, 0.95]"
    assert reading(as_gain(gains["interactions"][0])) == "loss"
    assert format_gain(as_gain(gains["forecasts"][0])) == "~2.20 [1.30, 3.90]"
    censored = {"joint": None, "product": 4.2, "ratio": None, "lower_bound": 1.26, "upper_bound": None}
    assert format_gain(as_gain({**censored, "interval": [1.1, None]})) == ">= 1.2 [1.10, inf)"


def test_whether_a_fit_converged():
    fit = {"converged": True, "best_starts": 17, "starts": 20, "replicates_converged": None}
    assert format_convergence(fit) == "converged, 17 of 20 starts agree"
    fit |= {"replicates_converged": 1.0}
    assert format_convergence(fit).endswith("agree; 100 % of the bootstrap replicates converged")
    fit |= {"replicates_converged": 0.99996}
    assert format_convergence(fit).endswith("agree; 99.9 % of the bootstrap replicates converged")
    fit |= {"converged": False, "best_starts": 1, "replicates_converged": None}
    assert format_convergence(fit) == "did not converge (1 of 20 starts agree); do not rely on it"


def test_seeds_needed():
    assert format_seeds_needed({"seeds_needed": 5, "seeds_cautious": 11}) == "5 (11)"
    assert format_seeds_needed({"seeds_needed": 5, "seeds_cautious": None}) == "5"
    unknown = {"seeds_needed": None, "seeds_cautious": None}
    assert (format_seeds_needed(unknown), format_seeds_needed(unknown, typographic=True)) == ("-", "\u2014")


def test_the_scale_that_pools_all_others_says_so():
    assert scale_title("compact") == "compact"
    assert scale_title("all scales") == "all scales (the frontier over every scale)"


def test_nothing_that_moves_a_cursor_or_turns_a_line_round_is_printed():
    assert printable("a\x1b[2J\r\n\u202eb\udc80c") == "a\\x1b[2J\\r\\n\\u202eb\\udc80c"
    assert printable("\u03bb-norm \u65e5\u672c\u8a9e 3.5") == "\u03bb-norm \u65e5\u672c\u8a9e 3.5"
    assert printable(0.001) == "0.001"


def test_axes_come_in_their_usual_order_and_unknown_ones_last(make_gains):
    gains = make_gains(axes={"evaluations": 1, "seconds": 1, "model_flops": 1})
    assert axes_of(gains) == ["model_flops", "seconds", "evaluations"]
    assert axis_label("flops_6nd") == "6ND"
    assert axis_label("grams_co2e") == "grams CO2e"
    assert axis_label("evaluations") == "evaluations"
