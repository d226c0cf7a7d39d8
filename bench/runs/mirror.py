"""The mirror of a run's rows in Weights & Biases. The files on disk are the truth; this only copies them."""

from typing import Any, Protocol

from bench.config import Experiment, one_line
from bench.errors import UserError


class Mirror(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...
    def finish(self, exit_code: int) -> None: ...


class NoMirror:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        pass


class WandbMirror:
    """Copies rows to a W&B run whose default x-axis is model FLOPs."""

    def __init__(self, experiment: Experiment, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=experiment.wandb.project,
            entity=experiment.wandb.entity,
            group=experiment.study,
            job_type="train",
            name=f"{experiment.scale}/{experiment.variant}/seed={experiment.seed},lr={experiment.optimizer.lr:g}",
            tags=list(experiment.innovations),
            config=config,
            dir=str(experiment.folder),
            mode=experiment.wandb.mode,  # type: ignore[arg-type]
            id=experiment.digest + "-" + experiment.study,
            resume="allow" if experiment.wandb.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
            reinit="finish_previous",
        )
        self.run.define_metric("model_flops")
        self.run.define_metric("*", step_metric="model_flops")
        self.run.define_metric("val_loss", step_metric="model_flops", summary="min")

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in row.items() if value is not None})

    def finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


def open_mirror(experiment: Experiment, config: dict[str, Any]) -> Mirror:
    """A mirror as `wandb.mode` asks; disabled does not even import the library.

    Raises:
        UserError: W&B refuses, for want of a key or a connection.
    """
    if experiment.wandb.mode == "disabled":
        return NoMirror()
    import wandb

    try:
        return WandbMirror(experiment, config)
    except wandb.errors.Error as error:
        raise UserError(f"W&B: {one_line(error)}; or use wandb=offline") from None
