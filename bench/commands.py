"""The commands of the command line, one function each. What a command needs is imported when it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from bench.compose import GAINS_FOLDER, choices, compose_config, override_key
from bench.config import one_line, variant_name
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
        from bench.sweep import train_sweep

        return train_sweep(without_flag)
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


def status(overrides: list[str]) -> int:
    """How each trajectory of a study stands, once or every `watch` seconds."""
    from bench.report.status import print_status, watch_status
    from bench.runs.study import stand, study_experiments

    seconds = compose_config(overrides).watch
    if not 0 <= seconds <= 86400:
        raise UserError("watch must be 0 (look once) or the seconds between two looks, a day's at most")
    experiments = study_experiments(overrides)
    if seconds:
        watch_status(experiments, seconds)
    else:
        print_status([stand(experiment) for experiment in experiments])
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


def report(overrides: list[str]) -> int:
    """Writes a study's tables and page again from its gains.json; with --wandb also to W&B."""
    settings = [override for override in overrides if override != "--wandb"]
    config = compose_config(settings)
    to_wandb = len(settings) < len(overrides)
    if to_wandb and config.wandb.mode == "disabled":
        raise UserError("--wandb needs to know where to: add wandb=online or wandb=offline")
    folder = Path(config.output or Path(config.paths.runs) / config.study.name)
    found = read_gains(folder / "gains.json", config.study.name)
    files = write_gains(found, folder)
    for what, file in files.items():
        print(f"{what}: {file.resolve()}")
    if to_wandb:
        from bench.report.wandb import publish

        print(f"W&B: {publish(found, files, OmegaConf.to_object(config.wandb), config.study.name)}")
    return 0


def read_gains(file: Path, study: str) -> dict[str, Any]:
    """The contents of a study's gains.json.

    Raises:
        UserError: it is not there, is damaged, or another version of this project wrote it.
    """
    from bench.gains.compute import SCHEMA

    again = f"run `python -m bench gains study={study}` first"
    try:
        gains = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no {file}: {again}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}; {again}") from None
    if not isinstance(gains, dict) or gains.get("schema") != SCHEMA:
        raise UserError(f"{file} was written by another version of this project: {again}")
    return gains


def wandb_sync(overrides: list[str]) -> int:
    """Uploads to W&B the rows of every trajectory of a study that it lacks."""
    from bench.runs.folder import RunFolder
    from bench.runs.study import study_experiments
    from bench.runs.upload import Incomplete, upload

    begun = [experiment for experiment in study_experiments(overrides) if RunFolder(experiment.folder).described]
    if not begun:
        raise UserError("no trajectory of this study has been trained here yet: train it, or name its paths.runs=")
    incomplete = False
    for number, experiment in enumerate(begun, start=1):
        try:
            told = upload(experiment)
        except Incomplete as error:
            told, incomplete = str(error), True
        print(f"{number}/{len(begun)} {experiment.folder}: {told}", flush=True)
    return 1 if incomplete else 0


def speed(overrides: list[str]) -> int:
    from bench.speed import measure

    return measure(overrides)
