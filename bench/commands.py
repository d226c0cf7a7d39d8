"""The commands of the command line, one function each. What a command needs is imported when it runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from bench.compose import GAINS_FOLDER, choices, compose_config, launch, override_key, split_sweep
from bench.config import Experiment, variant_name
from bench.errors import UserError

if TYPE_CHECKING:
    from bench.gains.sources import Results


def prepare(overrides: list[str]) -> int:
    from bench.data import prepare as prepare_data

    config = compose_config(overrides)
    print(prepare_data(OmegaConf.to_object(config.data), Path(config.paths.data), progress=print))
    return 0


def train(overrides: list[str]) -> int:
    without_flag = [override for override in overrides if override not in ("-m", "--multirun")]
    if len(without_flag) < len(overrides):
        return train_many(without_flag)
    from bench.training.train import train as train_trajectory

    print(train_trajectory(compose_config(with_study_settings(overrides))))
    return 0


def with_study_settings(overrides: list[str]) -> list[str]:
    """Adds the learning rate and the budgets a named study gives this variant, where the command line names none."""
    from bench.runs.study import budget_override, rate_overrides

    config = compose_config(overrides)
    variant = variant_name(config.innovation)
    rates = rate_overrides(config.study, config.scale, variant) if config.lr is None else [[]]
    if len(rates) > 1:
        choices = ", ".join(rate for (rate,) in rates)
        raise UserError(f"study {config.study.name} tries several learning rates here: choose one of {choices}")
    named = any(override_key(override) == "budgets" for override in overrides)
    budgets = [] if named else budget_override(config.study, config.scale, variant)
    return [*overrides, *budgets, *rates[0]]


def train_many(overrides: list[str]) -> int:
    """Every trajectory of a study, or of a plain sweep; those that failed are listed last."""
    from bench.data import open_dataset
    from bench.runs.folder import RunFolder
    from bench.runs.study import plan_study, settle_jobs
    from bench.training.plan import plan_ahead
    from bench.training.train import train_in_turn

    if any(override_key(override) == "study" for override in overrides):
        shared, jobs = overrides, plan_study(overrides)
    else:
        shared, jobs = split_sweep(overrides)
    experiments = settle_jobs(shared, jobs)
    waiting = [n for n, experiment in enumerate(experiments) if RunFolder(experiment.folder).state != "done"]
    print(f"{len(jobs)} trajectories, {len(jobs) - len(waiting)} of them done", flush=True)
    if not waiting:
        return 0
    for n in waiting:
        # Data are prepared here, and not in every worker; a mistake in the settings ends the sweep before it begins.
        dataset = open_dataset(experiments[n].data, Path(experiments[n].paths.data), progress=print)
        plan_ahead(experiments[n], dataset.vocabulary_size)
    launch(shared, [[*jobs[n], f"logging.label={n + 1}/{len(jobs)}"] for n in waiting], train_in_turn)
    return report_failures([experiments[n] for n in waiting])


def report_failures(experiments: list[Experiment]) -> int:
    """Lists the trajectories that are not done; the exit status is 1 where there are any."""
    from bench.runs.folder import RunFolder

    failed = [folder for folder in (RunFolder(e.folder) for e in experiments) if folder.state != "done"]
    for folder in failed:
        why = folder.failure if folder.state == "failed" else folder.state
        print(f"failed: {folder.path}: {why}", file=sys.stderr)
    return 1 if failed else 0


def status(overrides: list[str]) -> int:
    from bench.report.status import print_status
    from bench.runs.study import stand, study_experiments

    print_status([stand(experiment) for experiment in study_experiments(overrides)])
    return 0


def gains(overrides: list[str]) -> int:
    """Measures the gains of a study, or of results that were trained elsewhere."""
    from bench.gains import compute_gains
    from bench.report import print_gains

    settings, baseline, results, folder = others_results(overrides) or own_results(overrides)
    found = compute_gains(
        results,
        baseline=baseline,
        estimator=settings.estimator,
        replicates=settings.replicates,
        targets=list(settings.targets),
        power_width=settings.power_width if settings.power else None,
        forecast=list(settings.forecast),
        forecast_far=settings.forecast_far,
    )
    files = write_gains(found, folder)
    print_gains(found)
    for what, file in files.items():
        print(f"{what}: {file.resolve()}")
    return 0


def own_results(overrides: list[str]) -> tuple[DictConfig, str, "Results", Path]:
    """A study's settings, baseline, results and folder; trajectories of other settings beside its own are left out."""
    from bench.gains.estimators import find_estimator
    from bench.gains.sources.runs import read_study
    from bench.runs.study import study_experiments

    config = compose_config(overrides)
    folder = Path(config.paths.runs) / config.study.name
    planned = [experiment.folder for experiment in study_experiments(overrides)] if config.study.variants else None
    results = read_study(folder, planned, with_curves=find_estimator(config.estimator).reads_curves)
    return config, variant_name(config.study.baseline), results, Path(config.output or folder)


def others_results(overrides: list[str]) -> tuple[DictConfig, str, "Results", Path] | None:
    """The same of results that were trained elsewhere; None where the overrides name no source of such results.

    Raises:
        UserError: something is missing, or a word is no source and no corpus either.
    """
    from bench.gains.sources import find_source

    chosen = {override_key(override): override.partition("=")[2] for override in overrides}
    data, sources = chosen.get("data"), choices("data", GAINS_FOLDER)
    if data not in sources:
        if "study" in chosen or ("path" not in chosen and data in (None, *choices("data"))):
            return None
        slip = f"data={data} is no source of results: choose from" if data else "say what it holds: choose data= from"
        raise UserError(f"{slip} {', '.join(sources)}")
    config = compose_config(overrides, GAINS_FOLDER)
    for key, example in (("path", "results.csv"), ("output", "gains")):
        if OmegaConf.is_missing(config, key) or config[key] is None:
            raise UserError(f"{key} is missing: say {key}={example} or the like")
    path = Path(config.path).expanduser()
    source = OmegaConf.to_object(config.data)
    name = config.name or Path(next(part for part in reversed(path.absolute().parts) if "*" not in part)).stem
    return config, config.baseline, find_source(source.source).read(path, source, name), Path(config.output)


def write_gains(found: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Writes a study's gains as JSON, as tables and as a page; returns the files."""
    from bench.report import write_report
    from bench.report.spreadsheet import write_fits_table, write_gains_table
    from bench.runs.folder import write_whole

    files = {"gains": folder / "gains.json", "table": folder / "gains.csv", "report": folder / "report.html"}
    if found["fits"]:
        files["fits"] = folder / "fits.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(files["gains"], json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_gains_table(found, files["table"])
        if found["fits"]:
            write_fits_table(found, files["fits"])
        write_report(found, files["report"])
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another output") from None
    return files


def speed(overrides: list[str]) -> int:
    from bench.speed import measure

    return measure(overrides)
