"""How a gain, an interval and a compute are written, in the terminal and in the HTML report alike.

A "gain" here is any mapping with `ceg`, `interval`, `lower_bound`, `upper_bound` and, where known, `seeds` and
`extrapolated`: an entry of `gains` in gains.json, a point of its curve, or what `as_gain` makes of another entry.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

AXIS_LABELS = {
    "model_flops": "model FLOPs",
    "flops_6nd": "6ND",
    "flops_6nd_head": "6ND with head",
    "flops_palm": "PaLM FLOPs",
    "model_flops_with_optimizer": "model + optimizer FLOPs",
    "seconds": "seconds",
    "joules": "joules",
    "dollars": "dollars",
    "grams_co2e": "grams CO2e",
    "tokens": "tokens",
}
READINGS = {
    "gain": "The whole interval lies above 1.",
    "loss": "The whole interval lies below 1.",
    "contains 1": "The interval contains 1: gain and loss cannot be told apart.",
    "bound only": "The losses measured do not bracket the target, and how far the bound would move is not known.",
    "no interval": "How far the value would move with other seeds is not known.",
    "unknown": "Nothing could be computed.",
}
POOLED_SCALE = "all scales"
SIGNIFICANCE = 0.05
METHODS = {"shapley": "Shapley", "leave_one_out": "leave one out"}
HIDDEN = ("Cc", "Cf", "Cs")
SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")


def axis_label(axis: str) -> str:
    """The words for a cost axis; an axis not known here is written by its own name."""
    return AXIS_LABELS.get(axis, axis)


def axes_of(gains: Mapping) -> list[str]:
    """The cost axes that occur in a gains dict, those that something is told on first, then in their usual order."""
    told = dict.fromkeys(entry["axis"] for entry in [*gains["gains"], *gains["fits"]])
    usual = list(AXIS_LABELS)
    found = dict.fromkeys([*told, *(entry["axis"] for entry in gains["frontiers"])])
    return sorted(found, key=lambda axis: (axis not in told, usual.index(axis) if axis in usual else len(usual)))


def scale_title(scale: str) -> str:
    """The heading of a scale: its name, with a word on what the pseudo-scale `all scales` is."""
    return f"{scale} (the frontier over every scale)" if scale == POOLED_SCALE else scale


def printable(text: object) -> str:
    """`text` with control, direction-changing and surrogate characters written as escapes.

    Names come from folders and configs; none may move a terminal's cursor or turn a line of the report round.
    """
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in HIDDEN else character
        for character in str(text)
    )


def format_number(value: float, digits: int = 3) -> str:
    """`value` > 0 with `digits` significant digits, no exponent between 0.001 and 100,000, trailing zeros kept."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if not -3 <= exponent < 5:
        return f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def format_ratio(value: float) -> str:
    """A CEG or an end of its interval: 23.1, 2.31, 0.52; three significant digits above 1, two below."""
    return f"{value:.2f}" if 0.1 <= value < 1 else format_number(value, 3 if value >= 1 else 2)


def format_bound(value: float, *, lower: bool) -> str:
    """A bound with two significant digits, rounded so that it stays true: a lower bound down, an upper bound up."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    steps = value / step
    nearest = round(steps)
    # A bound such as 3.9999999999 is a division's rounding error away from 4.0; it is not 3.9.
    if not math.isclose(steps, nearest, rel_tol=1e-9):
        nearest = math.floor(steps) if lower else math.ceil(steps)
    text = format_number(nearest * step, digits=2)
    return text.rstrip("0") if text.startswith("0.") else text


def format_interval(interval: Sequence[float | None] | None, *, typographic: bool = False) -> str:
    """`[1.80, 2.96]`; an open side (None) reads `(0` or `inf)`; an interval that is None reads as an empty string.

    An end that would be rounded to 1 shows up to four decimals, because whether an interval contains 1 is what is read.
    """
    if interval is None:
        return ""
    low, high = interval
    left = "(0" if low is None else f"[{_interval_end(low)}"
    right = ("\u221e)" if typographic else "inf)") if high is None else f"{_interval_end(high)}]"
    return f"{left}, {right}"


def _interval_end(value: float) -> str:
    text = format_ratio(value)
    return f"{value:.4f}" if text == "1.00" and f"{value:.4f}" != "1.0000" else text


def format_slope(slope: Mapping, *, typographic: bool = False) -> str:
    """A slope d ln CEG / d ln C with its interval, two decimals: `-0.12 [-0.20, -0.04]`; `-` where it is not known."""
    if slope["value"] is None:
        return "\u2014" if typographic else "-"
    text = f"{slope['value']:+.2f}"
    if slope["interval"] is not None:
        low, high = slope["interval"]
        left = "(-inf" if low is None else f"[{low:+.2f}"
        right = "inf)" if high is None else f"{high:+.2f}]"
        text += f" {left}, {right}"
    return text.replace("-", "\u2212").replace("inf", "\u221e") if typographic else text


def as_gain(entry: Mapping) -> dict:
    """An interaction, its ratio taken for the CEG, or a forecast, which is never a bound, as a gain."""
    return {"ceg": entry.get("ratio"), "lower_bound": None, "upper_bound": None, **entry}


def gain_parts(gain: Mapping, *, typographic: bool = False) -> tuple[str, str]:
    """The value of a gain and what qualifies it: ("2.31", "[1.80, 2.96]"), (">= 4.0", ""), ("1.02", "(one seed)").

    An extrapolated value is marked: ("~2.31", "[1.80, 2.96]").
    """
    at_least, at_most, nothing = ("\u2265", "\u2264", "\u2014") if typographic else (">=", "<=", "-")
    if gain["ceg"] is not None:
        value = ("~" if is_extrapolated(gain) else "") + format_ratio(gain["ceg"])
    else:
        bounds = [(at_least, gain["lower_bound"], True), (at_most, gain["upper_bound"], False)]
        value = ", ".join(f"{sign} {format_bound(b, lower=low)}" for sign, b, low in bounds if b is not None) or nothing
    if gain["interval"] is not None:
        return value, format_interval(gain["interval"], typographic=typographic)
    if gain.get("seeds") == 1 and value != nothing:
        return value, "(one seed)"
    return value, "(no interval)" if gain["ceg"] is not None and "seeds" in gain else ""


def format_gain(gain: Mapping, *, typographic: bool = False) -> str:
    """One line for a gain: `2.31 [1.80, 2.96]`, `>= 4.0`, `<= 0.5`, `1.02 (one seed)`, or `-` where nothing is known.

    `typographic` writes the signs as in print; otherwise the text is ASCII.
    """
    return " ".join(part for part in gain_parts(gain, typographic=typographic) if part)


def is_bound(gain: Mapping) -> bool:
    """Whether a gain is known only as a bound."""
    return gain["ceg"] is None and not (gain["lower_bound"] is None and gain["upper_bound"] is None)


def is_extrapolated(gain: Mapping) -> bool:
    """Whether a gain's value comes from a law outside the budgets that were trained; a bound is no such value."""
    return gain["ceg"] is not None and gain.get("extrapolated", False)


def reading(gain: Mapping) -> str:
    """What may be concluded from a gain, bound or value: a key of READINGS. A bound can have an interval as well."""
    if gain["ceg"] is None and not is_bound(gain):
        return "unknown"
    if gain["interval"] is None:
        return "bound only" if is_bound(gain) else "no interval"
    low, high = gain["interval"]
    if low is not None and low > 1:
        return "gain"
    return "loss" if high is not None and high < 1 else "contains 1"


def format_reading(gain: Mapping) -> str:
    """The reading in words, with what limits it: `gain`, `gain, a bound`, `bound only`, `gain, extrapolated`."""
    words = reading(gain)
    if is_bound(gain):
        return words if words == "bound only" else f"{words}, a bound"
    return f"{words}, extrapolated" if is_extrapolated(gain) else words


def format_p(value: float | None, *, typographic: bool = False) -> str:
    """A p-value: `0.012`, `0.35`, `<0.001`; one that would be rounded to 0.05 shows on which side of it it lies."""
    if value is None:
        return "\u2014" if typographic else "-"
    if value < 0.001:
        return "<0.001"
    text = f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"
    return f"{value:.4f}" if float(text) == SIGNIFICANCE != value else text


def format_error(value: float | None, *, typographic: bool = False) -> str:
    """A standard error or deviation, two significant digits: `0.064`; a dash where it is not known."""
    if value is None:
        return "\u2014" if typographic else "-"
    return format_number(value, digits=2)


def format_estimate(value: float, interval: Sequence[float] | None = None) -> str:
    """A parameter of a fitted law, four significant digits, with its interval where there is one."""
    text = format_number(value, digits=4)
    if interval is None:
        return text
    low, high = (format_number(end, digits=4) for end in interval)
    return f"{text} [{low}, {high}]"


def format_convergence(fit: Mapping) -> str:
    """Whether a fit may be relied on, in words, and on how many of its starts and bootstrap replicates that rests."""
    starts = f"{fit['best_starts']} of {fit['starts']} starts agree"
    words = f"converged, {starts}" if fit["converged"] else f"did not converge ({starts}); do not rely on it"
    share = fit["replicates_converged"]
    if share is None:
        return words
    # Rounded down: all of them only where all of them did.
    return f"{words}; {math.floor(1000 * share) / 10:g} % of the bootstrap replicates converged"


def format_seeds_needed(entry: Mapping, *, typographic: bool = False) -> str:
    """Seeds needed, and in brackets by the cautious reading of the noise: `5 (11)`; a dash where it is not known."""
    if entry["seeds_needed"] is None:
        return "\u2014" if typographic else "-"
    cautious = entry["seeds_cautious"]
    return f"{entry['seeds_needed']}" if cautious is None else f"{entry['seeds_needed']} ({cautious})"


def format_compute(value: float | None, *, typographic: bool = False) -> str:
    """An amount on a cost axis, three significant digits: `2.50e18`, in print `2.50 x 10^18` with a raised exponent."""
    if value is None:
        return "\u2014" if typographic else "-"
    mantissa, _, exponent = format_number(value).partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa} \u00d7 10{exponent.translate(SUPERSCRIPTS)}" if typographic else f"{mantissa}e{exponent}"


def format_time(text: str | None) -> str:
    """An ISO 8601 time as `2026-01-02 03:04 UTC`; what is not one is written as it is, None as a dash."""
    if text is None:
        return "\u2014"
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return printable(text)


def format_tuning(gain: Mapping) -> str:
    """Why a variant's learning rate is to be trusted or not: `tuned`, `untuned: edge of grid`, `untuned: one rate`."""
    if not gain["untuned"]:
        return "tuned"
    return {"edge": "untuned: edge of grid", "single": "untuned: one rate"}.get(gain["tuning"], "untuned")
