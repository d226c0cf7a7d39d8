"""The logarithmic axis on which gains are drawn, for the marks in the table and the panels of CEG against compute."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# An interval that reaches further than this factor beyond every value is cut with an arrow, or it would
# squeeze all others together.
REACH = 3.0
MARGIN = 1.12
# Beyond a bound there is room for the arrow that says the value lies there.
ROOM = 1.4
LEAST_SPAN = 1.25


def log_ticks(low: float, high: float) -> list[float]:
    """About three to eight round values within [low, high] (0 < low < high), for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, stride in (((1,), max(1, len(decades) // 6)), ((1, 2, 5), 1)):
        candidates = [digit * 10.0**power for power in decades[::stride] for digit in digits]
        ticks = [tick for tick in candidates if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return _even_ticks(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class RatioAxis:
    """A logarithmic axis from `low` to `high` that always shows 1."""

    low: float
    high: float

    @classmethod
    def around(cls, gains: Iterable[Mapping]) -> "RatioAxis":
        """The axis that shows every value and bound of `gains`, and their intervals as far as is reasonable."""
        values, ends = [1 / LEAST_SPAN, LEAST_SPAN], []
        for gain in gains:
            values += [gain[key] for key in ("ceg", "lower_bound", "upper_bound") if gain[key] is not None]
            if gain["lower_bound"] is not None:
                values.append(gain["lower_bound"] * ROOM)
            if gain["upper_bound"] is not None:
                values.append(gain["upper_bound"] / ROOM)
            ends += [end for end in gain["interval"] or () if end is not None and end > 0]
        low = max(min(values + ends), min(values) / REACH)
        high = min(max(values + ends), max(values) * REACH)
        return cls(low / MARGIN, high * MARGIN)

    @property
    def ticks(self) -> list[float]:
        """Round values on the axis, 1 among them: powers of two where they fit, as gains are told in doublings."""
        for base in (10, 4, 2):
            powers = range(math.ceil(math.log(self.low, base)), math.floor(math.log(self.high, base)) + 1)
            if len(powers) >= (3 if base == 2 else 5):
                return [float(base) ** power for power in powers]
        return sorted({*(round(tick, 9) for tick in _even_ticks(self.low, self.high)), 1.0})

    def position(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high end; beyond an end it is that end."""
        if value <= self.low:
            return 0.0
        return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))

    def span(self, gain: Mapping) -> tuple[float, float] | None:
        """Positions of the ends of what is known of a gain: its interval, or for a bound all that lies beyond it.

        An open side reaches the axis's end. None where there is neither an interval nor a bound.
        """
        if gain["interval"] is not None:
            low, high = gain["interval"]
        elif gain["ceg"] is None and (gain["lower_bound"] is not None or gain["upper_bound"] is not None):
            low, high = gain["lower_bound"], gain["upper_bound"]
        else:
            return None
        return 0.0 if low is None else self.position(low), 1.0 if high is None else self.position(high)
