"""Each variant at its own best learning rate: what of a study's results is compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TunedVariant:
    """One variant at one scale: at each of K budgets the results of its best rate, for the n seeds that all K have.

    Attributes:
        seeds: n, ascending.
        budgets: (K,) model FLOPs asked for, ascending.
        rates: (K,) the best learning rate at each.
        losses: (n, K) nats per token.
        loss_errors: (K,) standard error from the evaluation's finite number of tokens, NaN where not measured.
        costs: axis -> (n, K), in the axis's unit.
        tuning: where the best rate lies at the largest budget: "interior" of the rates tried, at their "edge", or the
            "single" one.
    """

    scale: str
    variant: str
    innovations: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: NDArray[np.float64]
    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    loss_errors: NDArray[np.float64]
    costs: dict[str, NDArray[np.float64]]
    tuning: str

    @property
    def title(self) -> str:
        return f"{self.variant} at {self.scale}"

    def with_seeds(self, seeds: Sequence[int]) -> "TunedVariant":
        rows = [self.seeds.index(seed) for seed in seeds]
        costs = {axis: values[rows] for axis, values in self.costs.items()}
        return replace(self, seeds=tuple(seeds), losses=self.losses[rows], costs=costs)

    def rises_with_budget(self, axis: str) -> bool:
        """Whether more budget costs more on this axis, for every seed; otherwise it cannot be an x-axis."""
        return bool((np.diff(self.costs[axis]) > 0).all())


def tune_variant(rows: Sequence[dict[str, Any]], axes: Iterable[str], warnings: list[str]) -> TunedVariant | None:
    """Chooses the rates of one variant at one scale from its rows of the table of results.

    At each budget the best rate is the one with the lowest mean loss over the seeds that every rate tried there has. A
    rate with a loss that is not finite is out. None, with a warning, where no choice can be made.
    """
    title = f"{rows[0]['variant']} at {rows[0]['scale']}"
    chosen: dict[float, dict[int, dict[str, Any]]] = {}
    tuning = "single"
    for budget in sorted({row["budget"] for row in rows}):
        rates = _by_rate([row for row in rows if row["budget"] == budget])
        finite = {rate: runs for rate, runs in rates.items() if all(_is_finite(run) for run in runs.values())}
        for rate in rates.keys() - finite.keys():
            warnings.append(
                f"{title}: a loss at budget {budget:.3g} with lr {rate:g} is not finite; that rate is not used there."
            )
        if not finite:
            warnings.append(f"{title}: no rate has finite losses at budget {budget:.3g}; that budget is left out.")
            continue
        shared = set.intersection(*(set(runs) for runs in finite.values()))
        if not shared:
            warnings.append(
                f"{title}: no seed was trained at all of its learning rates (budget {budget:.3g}), so none can be "
                "called best; it is left out. Train the same seeds at every rate."
            )
            return None
        best = min(finite, key=lambda rate: np.mean([finite[rate][seed]["val_loss"] for seed in sorted(shared)]))
        chosen[budget] = finite[best]
        tuning = "single" if len(rates) == 1 else "edge" if best in (min(rates), max(rates)) else "interior"
    return _assemble(title, chosen, tuning, axes, warnings)


def _assemble(
    title: str,
    chosen: dict[float, dict[int, dict[str, Any]]],
    tuning: str,
    axes: Iterable[str],
    warnings: list[str],
) -> TunedVariant | None:
    if len(chosen) < 2:
        warnings.append(
            f"{title}: results at {len(chosen)} budget(s) make no curve; it is left out. Train at least three budgets."
        )
        return None
    if len(chosen) == 2:
        warnings.append(
            f"{title}: only two budgets; the loss is taken to be linear in log compute between them. Train three."
        )
    seeds = sorted(set.intersection(*(set(runs) for runs in chosen.values())))
    if not seeds:
        warnings.append(f"{title}: no seed has a result at every budget; it is left out.")
        return None
    lost = sorted(set.union(*(set(runs) for runs in chosen.values())) - set(seeds))
    if lost:
        listed = ", ".join(map(str, lost))
        warnings.append(f"{title}: seed(s) {listed} lack a result at the best rate of some budget and are not used.")
    table = [[runs[seed] for runs in chosen.values()] for seed in seeds]
    first = table[0][0]
    errors = np.array(
        [[np.nan if row["val_loss_se"] is None else row["val_loss_se"] for row in line] for line in table]
    )
    tuned = TunedVariant(
        scale=first["scale"],
        variant=first["variant"],
        innovations=tuple(first["innovations"]),
        seeds=tuple(seeds),
        budgets=np.array(list(chosen)),
        rates=np.array([row["lr"] for row in table[0]]),
        losses=np.array([[row["val_loss"] for row in line] for line in table]),
        loss_errors=errors.mean(axis=0),
        costs={axis: np.array([[row[axis] for row in line] for line in table]) for axis in axes},
        tuning=tuning,
    )
    mean = tuned.losses.mean(axis=0)
    if (np.diff(mean) > 0).any():
        rising = ", ".join(f"{budget:.3g}" for budget in tuned.budgets[1:][np.diff(mean) > 0])
        warnings.append(
            f"{title}: the loss is higher at budget {rising} than at the one before; the lowest so far is used there."
        )
    return tuned


def _by_rate(rows: Iterable[dict[str, Any]]) -> dict[float, dict[int, dict[str, Any]]]:
    """{rate: {seed: row}}, rates ascending."""
    rates: dict[float, dict[int, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["lr"]):
        rates.setdefault(row["lr"], {})[row["seed"]] = row
    return rates


def _is_finite(row: dict[str, Any]) -> bool:
    return row["val_loss"] is not None and bool(np.isfinite(row["val_loss"]))
