"""Synthetic studies, written as the run folders that training leaves."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bench.gains.resampling import Resampling
from bench.gains.sources import Results
from bench.gains.sources.columns import normalise
from bench.gains.study import Study
from bench.gains.tuning import TunedVariant

BUDGETS = (1e12, 4e12, 16e12, 64e12)
FLOPS_PER_TOKEN = 1e6


def costs(flops: float) -> dict[str, Any]:
    """What a row says was spent by the time that so many model FLOPs were."""
    return {
        "tokens": int(flops / FLOPS_PER_TOKEN),
        "seconds": flops / 1e10,
        "joules": flops / 1e9,
        "dollars": flops / 1e13,
        "grams_co2e": flops / 1e11,
        "model_flops": int(flops),
        "flops_6nd": int(0.9 * flops),
        "flops_6nd_head": int(1.2 * flops),
        "flops_palm": int(1.3 * flops),
        "optimizer_flops": int(0.01 * flops),
    }


@dataclass
class StudyFolder:
    """Writes runs of one study below `path`."""

    path: Path
    written: int = field(default=0)

    def add(
        self,
        variant: str,
        losses: Sequence[float],
        *,
        seed: int = 0,
        scale: str = "tiny",
        lr: float = 1e-3,
        budgets: Sequence[float] = BUDGETS,
        state: str | None = "DONE",
        device: str = "cpu",
        parameters: int = 1000,
        change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        metrics: Iterable[dict[str, Any]] = (),
    ) -> Path:
        """One trajectory with a loss for each budget; `change` edits each of its results."""
        self.written += 1
        folder = self.path / scale / variant / f"seed={seed},lr={lr:g},{self.written:08x}"
        folder.mkdir(parents=True)
        run = {
            "study": self.path.name,
            "scale": scale,
            "variant": variant,
            "innovations": [] if variant == "baseline" else variant.split("+"),
            "seed": seed,
            "lr": lr,
            "git_commit": "0" * 40,
            "versions": {"torch": "2.13.0"},
            "device": device,
            "parameters": {"total": parameters},
            "flops_per_token": {"model_flops": FLOPS_PER_TOKEN},
            "data": {"name": "embedded"},
            "started": "2025-01-01T00:00:00+00:00",
        }
        (folder / "run.json").write_text(json.dumps(run))
        rows = [
            change(
                {
                    "budget": budget,
                    "step": int(budget / 1e10),
                    "train_loss": loss,
                    "val_loss": loss,
                    "val_loss_se": 0.01,
                    "val_tokens": 1000,
                    "bits_per_byte": None,
                    "lr": lr,
                    **costs(budget),
                }
            )
            for budget, loss in zip(budgets, losses, strict=True)
        ]
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        if state:
            (folder / state).write_text("")
        return folder


@pytest.fixture
def study_folder(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder(tmp_path / "synthetic")
    folder.path.mkdir()
    return folder


@pytest.fixture
def make_study() -> Callable[..., Study]:
    """A study in memory, of losses (seeds, K) and model FLOPs (K,) or (seeds, K) of the baseline and of `rope`."""

    def make(
        baseline: Any,
        variant: Any,
        *,
        budgets: Any = BUDGETS,
        variant_budgets: Any = None,
        first_seed: int = 0,
        loss_error: float = np.nan,
        replicates: int = 500,
    ) -> Study:
        tuned = {}
        both = np.broadcast_arrays(np.atleast_2d(baseline), np.atleast_2d(variant))
        spent = (budgets, budgets if variant_budgets is None else variant_budgets)
        for name, losses, costs, start in zip(("baseline", "rope"), both, spent, (0, first_seed), strict=True):
            count = losses.shape[1]
            tuned["tiny", name] = TunedVariant(
                scale="tiny",
                variant=name,
                innovations=() if name == "baseline" else (name,),
                scales=("tiny",) * count,
                seeds=tuple(range(start, start + len(losses))),
                budgets=np.asarray(costs, float).reshape(-1, count)[0],
                rates=np.full(count, 1e-3),
                losses=losses,
                loss_errors=np.full(count, loss_error),
                costs={"model_flops": np.broadcast_to(np.asarray(costs, float), losses.shape)},
                tuning="single",
            )
        return Study(
            name="memory",
            baseline="baseline",
            runs=[],
            curves=pl.DataFrame(),
            scales=["tiny"],
            tuned=tuned,
            axes=["model_flops"],
            resampling=Resampling(replicates, 0),
            warnings=[],
        )

    return make


@pytest.fixture
def make_results() -> Callable[..., Results]:
    """`Results` from a table: {variant: losses (seeds, K) or (K,)} at each scale, and what is spent at its budgets."""

    def make(
        scales: Mapping[str, Mapping[str, Any]],
        budgets: Any = BUDGETS,
        **columns: Callable[[str, str, float], float],
    ) -> Results:
        """`budgets`: (K,), or {scale: (K,)}; `columns`: more of them, from scale, variant and compute."""
        rows = []
        for scale, variants in scales.items():
            spent = budgets[scale] if isinstance(budgets, Mapping) else budgets
            for variant, losses in variants.items():
                for seed, line in enumerate(np.atleast_2d(losses)):
                    for compute, loss in zip(spent, line, strict=True):
                        place = {"scale": scale, "variant": variant, "seed": seed, "flops": compute, "loss": loss}
                        more = {name: column(scale, variant, compute) for name, column in columns.items()}
                        rows.append({**place, **more})
        return normalise("memory", pl.DataFrame(rows))

    return make
