"""From command-line overrides to configurations, with Hydra."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bench.config import one_line, register_configs
from bench.errors import UserError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"
GAINS_FOLDER = CONFIG_FOLDER / "gains"  # the root for results that were not trained here
LAUNCHERS = ("basic", "joblib", "submitit_local", "submitit_slurm", "ray")


@contextmanager
def hydra_session(folder: Path = CONFIG_FOLDER) -> Iterator[None]:
    """Hydra initialised on a folder of configurations; its errors leave as a UserError of one line."""
    register_configs()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="bench"):
            name_plugins_launchers()
            yield
    except MissingConfigException as error:
        raise UserError(missing_choice(error, folder)) from None
    except OverrideParseException as error:
        raise UserError(f"cannot read {error.override}: {one_line(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from None


def name_plugins_launchers() -> None:
    """Renames a plugin's launcher to NAME_plugin, so that conf/hydra/launcher/NAME.yaml can build on it."""
    plugins = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in choices("hydra/launcher"):
        if f"{name}.yaml" in plugins:
            ConfigStore.instance().store(f"{name}_plugin", plugins.pop(f"{name}.yaml").node, group="hydra/launcher")


def missing_choice(error: MissingConfigException, folder: Path) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if group == "hydra/launcher":
        launcher = choice.removesuffix("_plugin")
        if launcher in LAUNCHERS:
            return f"hydra/launcher={launcher} needs packages that are not installed: pip install -e .[cluster]"
        return f"hydra/launcher={choice} is unknown: choose from {', '.join(LAUNCHERS)}"
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
        for override in parsed:
            if override.is_sweep_override() and override.key_or_group.startswith(("hydra/", "hydra.")):
                raise UserError(f"{override.input_line} cannot be swept: it holds for the whole sweep, so choose one")
        shared = [override.input_line for override in parsed if not override.is_sweep_override()]
        choices = [
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            for override in parsed
            if override.is_sweep_override()
        ]
    return shared, [list(job) for job in itertools.product(*choices)]
