"""The trajectories of a study: which there are, and how each of them stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.compose import compose_all, compose_config, override_key
from bench.config import Experiment, StudyConfig, settle, variant_name
from bench.errors import UserError
from bench.runs.folder import RunFolder, read_rows
from bench.training.schedule import Leg

SWEPT = ("scale", "innovation", "seed", "lr")


def plan_study(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each trajectory of the study that `overrides` name.

    Raises:
        UserError: no study is named, or the overrides choose what the study itself varies.
    """
    study = compose_config(overrides).study
    if not study.variants:
        raise UserError(f"study {study.name} lists no variants: name one, as in study=quickstart")
    for override in overrides:
        key = override_key(override)
        if key in SWEPT:
            plural = {"innovation": "variants"}.get(key, key + "s")
            raise UserError(f"study {study.name} varies {key} itself: use study.{plural}=[...] instead of {key}=")
    check_names(study)
    return [
        [f"scale={scale}", f"innovation=[{','.join(variant)}]", *budgets, f"seed={seed}", *lr]
        for scale in study.scales
        for variant in study.variants
        for budgets in [budget_override(study, scale, variant_name(variant))]
        for lr in rate_overrides(study, scale, variant_name(variant))
        for seed in study.seeds
    ]


def of_variant(values: Mapping[str, list[float]] | None, scale: str, variant: str) -> list[float]:
    """What a study says of a variant at a scale, from the most special entry to the default; else nothing."""
    for key in (f"{scale}/{variant}", variant, "default"):
        if values and key in values:
            return list(values[key])
    return []


def rate_overrides(study: StudyConfig, scale: str, variant: str) -> list[list[str]]:
    """One override a learning rate; none means the configuration's own."""
    return [[f"lr={rate!r}"] for rate in of_variant(study.lrs, scale, variant)] or [[]]


def budget_override(study: StudyConfig, scale: str, variant: str) -> list[str]:
    budgets = of_variant(study.budgets, scale, variant)
    return [f"budgets={budgets!r}"] if budgets else []


def check_names(study: StudyConfig) -> None:
    """Refuses settings for a variant that the study does not have: a slip of the pen."""
    variants = {variant_name(variant) for variant in study.variants}
    known = {"default"} | variants | {f"{scale}/{variant}" for scale in study.scales for variant in variants}
    for field in ("lrs", "budgets"):
        entries = study[field] or {}
        if not isinstance(entries, Mapping) or not all(is_list_of_numbers(values) for values in entries.values()):
            raise UserError(f"study.{field} must give each variant a list of numbers, as in {{rope:[1e-3,2e-3]}}")
        for key in entries:
            if key not in known:
                raise UserError(
                    f"study.{field} names {key}, which is no variant of study {study.name}: "
                    f"choose from {', '.join(sorted(variants))}"
                )


def is_list_of_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and bool(values) and all(isinstance(value, int | float) for value in values)


def study_experiments(overrides: Sequence[str]) -> list[Experiment]:
    """Every trajectory of a study, settled."""
    return settle_jobs(overrides, plan_study(overrides))


def settle_jobs(shared: Sequence[str], jobs: Sequence[Sequence[str]]) -> list[Experiment]:
    """The experiment of each job of a sweep, from the overrides that all share and its own."""
    return [settle(config) for config in compose_all([[*shared, *job] for job in jobs])]


@dataclass(frozen=True)
class Standing:
    """A trajectory's line in `status`. Costs are model FLOPs over all its legs."""

    experiment: Experiment
    state: str
    error: str
    spent: float
    left: float | None  # None where the data are not prepared, so that the size of the model is not known


def stand(experiment: Experiment) -> Standing:
    folder = RunFolder(experiment.folder)
    error = folder.failure if folder.state == "failed" else ""
    if not folder.described:
        return Standing(experiment, folder.state, error, 0.0, planned_flops(experiment))
    run = folder.run()
    per_step = run["flops_per_token"]["model_flops"] * run["tokens_per_step"]
    legs = [Leg(**leg) for leg in run["legs"]]
    total = sum(leg.steps for leg in legs)
    done = total if folder.state == "done" else steps_done(folder, legs)
    return Standing(experiment, folder.state, error, done * per_step, (total - done) * per_step)


def planned_flops(experiment: Experiment) -> float | None:
    """Model FLOPs that a trajectory will take; None where its data are not prepared.

    Raises:
        UserError: its model cannot be built, or a budget is too small.
    """
    from bench.data.preparation import prepared_folder, read_meta
    from bench.training.plan import plan_ahead

    prepared = prepared_folder(experiment.data, Path(experiment.paths.data))
    if not prepared.is_dir():
        return None
    return float(plan_ahead(experiment, read_meta(prepared)["vocabulary_size"]).model_flops)


def steps_done(folder: RunFolder, legs: Sequence[Leg]) -> int:
    """Steps over all legs up to the newest row of metrics.jsonl."""
    rows = read_rows(folder.metrics.path)
    if not rows:
        return 0
    newest, before = rows[-1], 0
    for leg in legs:
        if leg.budget == newest["branch"] and leg.start < newest["step"] <= leg.end:
            return before + newest["step"] - leg.start
        before += leg.steps
    return 0
