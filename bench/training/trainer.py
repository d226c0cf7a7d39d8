"""Trains one trajectory, leg by leg, and writes its rows; killed anywhere, it goes on from its newest checkpoint."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from bench.config import Experiment
from bench.data import Dataset, Loader, evaluation_batch
from bench.errors import TrajectoryFailed, UserError
from bench.runs.folder import RunFolder
from bench.runs.mirror import Mirror
from bench.training.checkpoint import (
    Progress,
    checkpoint_name,
    is_sound,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from bench.training.device import Device
from bench.training.evaluation import Evaluation, Evaluator
from bench.training.optimizer import build_optimizer
from bench.training.plan import build_model, plan_trajectory
from bench.training.progress import ProgressDisplay, open_progress
from bench.training.schedule import Leg


class Diverged(TrajectoryFailed):
    """A loss or gradient that is not finite; the weights are those from before the step."""


class Trainer:
    """One trajectory: its model, optimizer and data, the legs it is trained in, and where it stands.

    Raises:
        UserError: the settings do not fit the data, or a budget is too small for one step.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, device: Device, folder: RunFolder) -> None:
        self.experiment, self.device, self.folder = experiment, device, folder
        self.model = build_model(experiment, dataset.vocabulary_size).to(device.torch_device)
        context = self.model.config.context
        self.parameters = list(self.model.parameters())
        self.forward = torch.compile(self.model) if experiment.device.compile else self.model
        self.optimizer = build_optimizer(self.model, experiment.optimizer)
        self.loader = Loader(dataset.train, context, experiment.seed)
        sequences = experiment.training.sequences
        self.micro_batch = min(experiment.device.micro_batch or sequences, sequences)
        self.evaluator = Evaluator(
            *evaluation_batch(dataset.validation, context, math.ceil(experiment.evaluation.tokens / context)),
            token_bytes=dataset.token_bytes,
            micro_batch=self.micro_batch,
            device=device,
        )
        plan = plan_trajectory(experiment, self.model)
        self.costs, self.schedule, self.legs = plan.costs, plan.schedule, plan.legs
        self.progress = Progress(leg=0, step=0, seconds=0.0, joules=None, metrics_size=0, results_size=0)
        self.train_loss = math.nan

    @property
    def total_steps(self) -> int:
        return sum(leg.steps for leg in self.legs)

    @property
    def steps_done(self) -> int:
        before = sum(leg.steps for leg in self.legs[: self.progress.leg])
        return before + self.progress.step - self.legs[self.progress.leg].start

    @property
    def leg_start(self) -> Path:
        """The checkpoint of where the current leg began."""
        number = self.progress.leg
        return self.folder.checkpoints / checkpoint_name(number, self.legs[number].start)

    @property
    def title(self) -> str:
        experiment = self.experiment
        name = f"{experiment.scale}/{experiment.variant} seed={experiment.seed} lr={experiment.optimizer.lr:g}"
        return f"{experiment.logging.label} {name}".strip()

    def run(self, mirror: Mirror) -> None:
        """Trains from wherever the folder's checkpoints stand to the last result.

        Raises:
            Diverged: naming step and cause.
        """
        self.warm_up()
        passed_over = self.resume()
        display = open_progress(self.experiment.logging.progress, self.title, self.total_steps, self.steps_done)
        try:
            for path in passed_over:
                display.say(f"checkpoint {path.name} is damaged; going on from the one before")
            if self.progress.step or self.progress.leg:
                display.say(f"resumed at step {self.steps_done} of {self.total_steps}")
            while self.progress.step < self.legs[self.progress.leg].end:
                self.train_leg(display, mirror)
                if self.progress.leg + 1 < len(self.legs):
                    self.begin_next_leg()
            self.save()
            prune_checkpoints(self.folder.checkpoints, keep=set(), newest=1)
        finally:
            display.close()

    def warm_up(self) -> None:
        """Compiles before the clock runs. Leaves weights and gradients as they were; `resume` sets the generators."""
        if not self.experiment.device.compile:
            return
        inputs, targets = (part[: self.micro_batch] for part in self.batch())
        with self.device.autocast():
            losses = self.forward(inputs, targets)
        losses.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.evaluate()

    def resume(self) -> list[Path]:
        """Goes back to the newest sound checkpoint, or to the start; returns damaged ones that were passed over."""
        found, damaged = newest_checkpoint(self.folder.checkpoints)
        if found is not None:
            self.progress = load_checkpoint(found, self.model, self.optimizer)
        else:
            torch.manual_seed(self.experiment.seed)
        self.folder.metrics.truncate(self.progress.metrics_size)
        self.folder.results.truncate(self.progress.results_size)
        if found is None:
            self.save()
        return damaged

    def begin_next_leg(self) -> None:
        """Goes to the start of the next leg: after a branch, back to the trunk's state at its fork."""
        finished = self.legs[self.progress.leg]
        if finished.budget is not None:
            if not is_sound(self.leg_start):
                raise UserError(f"{self.leg_start}, which the trunk goes on from, is damaged: delete the run's folder")
            state = load_checkpoint(self.leg_start, self.model, self.optimizer)
            self.progress.step, self.progress.seconds, self.progress.joules = state.step, state.seconds, state.joules
        self.progress.leg += 1
        self.save()

    def save(self) -> None:
        self.progress.metrics_size = self.folder.metrics.size
        self.progress.results_size = self.folder.results.size
        save_checkpoint(self.folder.checkpoints, self.progress, self.model, self.optimizer)
        prune_checkpoints(self.folder.checkpoints, keep={self.leg_start})

    def train_leg(self, display: ProgressDisplay, mirror: Mirror) -> None:
        """Trains to the end of the current leg; a branch ends in a row of results.jsonl."""
        leg = self.legs[self.progress.leg]
        logging = self.experiment.logging
        saved_at = window_start = time.monotonic()
        window_step = self.progress.step
        while self.progress.step < leg.end:
            rate = self.experiment.optimizer.lr * leg.rate(self.schedule, self.progress.step)
            started = time.perf_counter()
            self.train_loss, grad_norm = self.train_step(rate)
            self.progress.step += 1
            self.progress.seconds += time.perf_counter() - started
            every = self.experiment.evaluation.every
            evaluated = self.evaluate() if every and self.progress.step % every == 0 else None
            if self.progress.step % logging.every == 0 or self.progress.step == leg.end or evaluated:
                row = self.metrics_row(leg, rate, grad_norm, evaluated)
                self.folder.metrics.append(row)
                mirror.log(row)
            now = time.monotonic()
            if now - window_start > 0.5 or self.progress.step == leg.end:
                display.update(self.steps_done, self.speed(self.progress.step - window_step, now - window_start))
                window_start, window_step = now, self.progress.step
            if now - saved_at > logging.checkpoint_seconds and self.progress.step < leg.end:
                self.save()
                saved_at = time.monotonic()
        if leg.budget is not None:
            row = self.results_row(leg, self.evaluate())
            self.folder.results.append(row)
            mirror.log(row)
            display.say(f"budget {leg.budget:.3g} FLOPs: validation loss {row['val_loss']:.4f}")

    def train_step(self, rate: float) -> tuple[float, float]:
        """One optimizer step at learning rate `rate`; returns the batch's mean loss (nats) and gradient norm.

        Micro-batches add up to the same loss however the batch is split.
        """
        inputs, targets = self.batch()
        total = torch.zeros((), device=self.device.torch_device)
        for micro_inputs, micro_targets in zip(
            inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True
        ):
            with self.device.autocast():
                losses = self.forward(micro_inputs, micro_targets)
            loss = losses.sum() / targets.numel()
            loss.backward()
            total += loss.detach()
        norm = get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        train_loss, grad_norm = torch.stack([total, norm.to(total.dtype)]).tolist()
        if not math.isfinite(train_loss) or not math.isfinite(grad_norm):
            cause = f"loss {train_loss}" if not math.isfinite(train_loss) else f"gradient norm {grad_norm}"
            raise Diverged(f"step {self.progress.step}: {cause} at learning rate {rate:.3g}; no update was made")
        clip = self.experiment.optimizer.clip
        if clip and grad_norm > clip:
            clip_grads_with_norm_(self.parameters, clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.device.synchronize()
        return train_loss, grad_norm

    def batch(self) -> tuple[Tensor, Tensor]:
        """The batch that belongs to the current step: (sequences, context) inputs and targets."""
        position = self.progress.step * self.costs.tokens
        arrays = self.loader.batch(position, self.experiment.training.sequences)
        inputs, targets = (torch.from_numpy(array).to(self.device.torch_device) for array in arrays)
        return inputs, targets

    def evaluate(self) -> Evaluation:
        return self.evaluator(self.forward)

    def metrics_row(self, leg: Leg, rate: float, grad_norm: float, evaluated: Evaluation | None) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "branch": leg.budget,
            "train_loss": self.train_loss,
            "val_loss": evaluated.loss if evaluated else None,
            "lr": rate,
            "grad_norm": grad_norm,
            **self.cost_columns(),
        }

    def results_row(self, leg: Leg, evaluated: Evaluation) -> dict[str, Any]:
        return {
            "budget": leg.budget,
            "step": self.progress.step,
            "train_loss": self.train_loss,
            "val_loss": evaluated.loss,
            "val_loss_se": evaluated.standard_error,
            "val_tokens": evaluated.tokens,
            "bits_per_byte": evaluated.bits_per_byte,
            "lr": self.experiment.optimizer.lr,
            **self.cost_columns(),
        }

    def cost_columns(self) -> dict[str, Any]:
        measured = {"seconds": self.progress.seconds, "joules": self.progress.joules, "dollars": None}
        return {**self.costs.after(self.progress.step), **measured}

    def speed(self, steps: int, seconds: float) -> dict[str, float | None]:
        per_second = steps / max(seconds, 1e-9)
        flops = per_second * self.costs.flops["model_flops"]
        return {
            "loss": self.train_loss,
            "tokens_per_second": per_second * self.costs.tokens,
            "flops_per_second": flops,
            "mfu": flops / self.device.peak_flops if self.device.peak_flops else None,
        }
