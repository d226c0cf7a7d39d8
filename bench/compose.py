"""From command-line overrides to configurations, and from a sweep to jobs, with Hydra."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bench.config import one_line, register_configs
from bench.errors import UserError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"
GAINS_FOLDER = CONFIG_FOLDER / "gains"  # the root for results that were not trained here


@contextmanager
def hydra_session(folder: Path = CONFIG_FOLDER) -> Iterator[None]:
    """Hydra initialised on a folder of configurations; its errors leave as a UserError of one line."""
    register_configs()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="bench"):
            yield
    except MissingConfigException as error:
        raise UserError(missing_choice(error, folder)) from None
    except OverrideParseException as error:
        raise UserError(f"cannot read {error.override}: {one_line(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from None


def missing_choice(error: MissingConfigException, folder: Path) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    offered = choices(group, folder)
    if not group or not offered:
        return one_line(error)
    return f"{group}={choice} is unknown: choose from {', '.join(offered)}"


def choices(group: str, folder: Path = CONFIG_FOLDER) -> list[str]:
    """What a group of the configuration offers."""
    return sorted(path.stem for path in (folder / group).glob("*.yaml"))


def override_key(override: str) -> str:
    """What an override sets: `seed` in `seed=1` and `+seed=1`."""
    return override.lstrip("+~").split("=", 1)[0]


def compose_config(overrides: Sequence[str], folder: Path = CONFIG_FOLDER) -> DictConfig:
    """The configuration that the overrides choose, without Hydra's own node."""
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override} is not of the form key=value")
    with hydra_session(folder):
        return compose("config", overrides=list(overrides))


def compose_all(jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """One configuration a job."""
    with hydra_session():
        return [compose("config", overrides=list(overrides)) for overrides in jobs]


def split_sweep(overrides: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """What all jobs of a plain sweep share, and each job's own overrides: the product of all key=a,b."""
    with hydra_session():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        shared = [override.input_line for override in parsed if not override.is_sweep_override()]
        choices = [
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            for override in parsed
            if override.is_sweep_override()
        ]
    return shared, [list(job) for job in itertools.product(*choices)]


def launch(overrides: Sequence[str], jobs: Sequence[Sequence[str]], task: Callable[[DictConfig], Any]) -> list[Any]:
    """Runs `task` once a job through the chosen `hydra/launcher`.

    A study's trajectories are no product of lists (each variant has its own learning rates), so the jobs go to the
    launcher as they are instead of through a sweeper.

    Args:
        overrides: what all jobs share.
        jobs: the overrides of each job.
        task: a function that can be pickled.
    Returns:
        Hydra's JobReturn for each job.
    """
    with hydra_session():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=_callbacks(config))
        launcher = Plugins.instance().instantiate_launcher(config=config, hydra_context=context, task_function=task)
        shared = list(config.hydra.overrides.task)  # the launcher itself passes on only those of `hydra`
        return list(launcher.launch([[*shared, *job] for job in jobs], initial_job_idx=0))


def _callbacks(config: DictConfig) -> Any:
    from hydra._internal.callbacks import Callbacks  # a launcher cannot be made without one

    return Callbacks(config)
