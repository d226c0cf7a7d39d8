"""How a gain, an interval and a compute are written, in the terminal and in the HTML report alike.

A "gain" here is any mapping with `ceg`, `interval`, `lower_bound`, `upper_bound` and, where known, `seeds`: an entry of
`gains` in gains.json or a point of its curve.
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
HIDDEN = ("Cc", "Cf", "Cs")
SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")


def axis_label(axis: str) -> str:
    """The words for a cost axis; an axis not known here is written by its own name."""
    return AXIS_LABELS.get(axis, axis)


def axes_of(gains: Mapping) -> list[str]:
    """The cost axes that occur in a gains dict: known ones in their usual order, then others as they come."""
    found = dict.fromkeys(entry["axis"] for entry in [*gains["gains"], *gains["frontiers"]])
    return [axis for axis in AXIS_LABELS if axis in found] + [axis for axis in found if axis not in AXIS_LABELS]


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


def gain_parts(gain: Mapping, *, typographic: bool = False) -> tuple[str, str]:
    """The value of a gain and what qualifies it: ("2.31", "[1.80, 2.96]"), (">= 4.0", ""), ("1.02", "(one seed)")."""
    at_least, at_most, nothing = ("\u2265", "\u2264", "\u2014") if typographic else (">=", "<=", "-")
    if gain["ceg"] is not None:
        value = format_ratio(gain["ceg"])
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
    """The reading in words, with "a bound" where that is all that is known: `gain`, `gain, a bound`, `bound only`."""
    words = reading(gain)
    return f"{words}, a bound" if is_bound(gain) and words != "bound only" else words


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
