"""Each variant at its own best learning rate: what of a study's results is compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP_ROUNDING = 0.01  # budgets end on whole steps, so that equal budgets differ by less than this
STEP_ROUNDING = 0.01  # budgets end on whole steps, so that equal budgets differ by less than this
TUNING = ("single", "edge", "interior")  # least to be trusted first


@dataclass(frozen=True)
class TunedVariant:
    """One variant at one scale: at each of K budgets the results of its best rate, for the n seeds that all K have.

    Pooled over scales it is the same with the budgets of all of them.

    Attributes:
        scales: (K,) the scale of each budget, all the same unless pooled.
        seeds: n, ascending.
        budgets: (K,) model FLOPs asked for, ascending within a scale.
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
    scales: tuple[str, ...]
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

    def with_columns(self, columns: NDArray[np.intp]) -> "TunedVariant":
        """Only some of the budgets, in the order of `columns`."""
        return replace(
            self,
            scales=tuple(self.scales[column] for column in columns),
            budgets=self.budgets[columns],
            rates=self.rates[columns],
            losses=self.losses[:, columns],
            loss_errors=self.loss_errors[columns],
            costs={axis: values[:, columns] for axis, values in self.costs.items()},
        )

    def best_for_cost(self, axis: str) -> "TunedVariant":
        """The budgets whose mean loss nothing cheaper on `axis` reaches, ascending in cost: the frontier's.

        Of budgets that cost the same but for the rounding of steps, the best.
        """
        cost, order = self.costs[axis].mean(axis=0), np.argsort(self.costs[axis].mean(axis=0), kind="stable")
        lowest = np.minimum.accumulate(self.losses.mean(axis=0)[order])
        best = order[np.diff(lowest, prepend=np.inf) < 0]
        return self.with_columns(best[np.append(cost[best[1:]] > (1 + STEP_ROUNDING) * cost[best[:-1]], True)])

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
    if not chosen:
        return None
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
    return TunedVariant(
        scale=first["scale"],
        variant=first["variant"],
        innovations=tuple(first["innovations"]),
        scales=(first["scale"],) * len(chosen),
        seeds=tuple(seeds),
        budgets=np.array(list(chosen)),
        rates=np.array([row["lr"] for row in table[0]]),
        losses=np.array([[row["val_loss"] for row in line] for line in table]),
        loss_errors=errors.mean(axis=0),
        costs={axis: np.array([[row[axis] for row in line] for line in table]) for axis in axes},
        tuning=tuning,
    )


def pool(parts: Sequence[TunedVariant], name: str) -> TunedVariant | None:
    """One variant's budgets at all its scales together, at the pseudo-scale `name`; None where no seed is at all.

    Args:
        parts: at least one, in the order of the scales.
    """
    seeds = sorted(set.intersection(*(set(part.seeds) for part in parts)))
    if not seeds:
        return None
    same = [part.with_seeds(seeds) for part in parts]
    return replace(
        same[0],
        scale=name,
        scales=sum((part.scales for part in same), ()),
        seeds=tuple(seeds),
        budgets=np.concatenate([part.budgets for part in same]),
        rates=np.concatenate([part.rates for part in same]),
        losses=np.concatenate([part.losses for part in same], axis=1),
        loss_errors=np.concatenate([part.loss_errors for part in same]),
        costs={axis: np.concatenate([part.costs[axis] for part in same], axis=1) for axis in same[0].costs},
        tuning=min((part.tuning for part in same), key=TUNING.index),
    )


def _by_rate(rows: Iterable[dict[str, Any]]) -> dict[float, dict[int, dict[str, Any]]]:
    """{rate: {seed: row}}, rates ascending."""
    rates: dict[float, dict[int, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["lr"]):
        rates.setdefault(row["lr"], {})[row["seed"]] = row
    return rates


def _is_finite(row: dict[str, Any]) -> bool:
    return row["val_loss"] is not None and bool(np.isfinite(row["val_loss"]))
