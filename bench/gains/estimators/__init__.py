"""Ways to turn a variant's results into its gain over the baseline: each is the class `Estimator` of a file here.

An estimator is made from a `Study`, has a `name` (its file's), `caveats` (sentences printed with its numbers) and
`axes` (what it can count compute in), and answers `estimate(baseline, variant, axis)` with a list of `Point`, the last
of which is the gain.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.errors import UserError
from bench.gains.study import Study
from bench.gains.tuning import TunedVariant


@dataclass(frozen=True)
class Point:
    """The CEG at one loss.

    Attributes:
        baseline_compute: what the baseline needs for `target_loss`, in the axis's unit.
        ceg: None where censored; then one of the bounds is set.
        lower_bound: the CEG is at least this: the variant's smallest budget already passed the loss.
        upper_bound: the CEG is below this: the variant's largest budget did not reach the loss.
        interval: None where unknown (one seed); a side that the data leave open is None.
        deviations: (replicates,) ln CEG less its point value; None where unknown.
    """

    baseline_compute: float
    target_loss: float
    ceg: float | None
    lower_bound: float | None
    upper_bound: float | None
    interval: tuple[float | None, float | None] | None
    deviations: NDArray[np.float64] | None


class GainEstimator(Protocol):
    name: str
    caveats: tuple[str, ...]
    axes: list[str]

    def __init__(self, study: Study) -> None: ...

    def estimate(self, baseline: TunedVariant, variant: TunedVariant, axis: str) -> list[Point]: ...


def find_estimator(name: str) -> type[GainEstimator]:
    """The estimator in the file of that name here.

    Raises:
        UserError: there is none; lists those there are.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in names:
        raise UserError(f"estimator={name} is unknown: choose one of {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}").Estimator
