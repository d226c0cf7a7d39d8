"""The training step beside a plain PyTorch loop of the same GPT: same weights, batch, context and threads.

The check comes first: both models give the same loss from the same weights. Then both train, in turns, and the figure
is the ratio of their median times, because absolute times on shared machines mean little.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.config import Experiment
from bench.data import open_dataset
from bench.runs.folder import RunFolder
from bench.speed.plain_loop import PlainGPT, PlainLoop
from bench.speed.timing import Step, host_seconds, interleave
from bench.training.device import open_device
from bench.training.trainer import Trainer

INNOVATIONS = ("flash_attention", "layer_norm")  # the variant that the peer is
ROUNDS, STEPS = 9, 8


def measure_training_step(experiment: Experiment) -> dict[str, Any]:
    """Times the step of `experiment` (which must be the peer's variant) and of the peer.

    Returns:
        tokens_per_second of ours and of each peer (medians), the ratios ours / peer, and the setting.
    """
    assert experiment.innovations == INNOVATIONS
    device = open_device(experiment.device)
    dataset = open_dataset(experiment.data, Path(experiment.paths.data))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(experiment, dataset, device, RunFolder(Path(scratch)))
    config = trainer.model.config
    tokens = torch.from_numpy(trainer.loader.batch(0, 1000)[0].reshape(-1))
    loops = {
        name: PlainLoop(
            copy_to_peer(trainer), tokens, sequences=experiment.training.sequences, context=config.context, fused=fused
        )
        for name, fused in (("plain_loop", False), ("plain_loop_fused_adamw", True))
    }
    for loop in loops.values():
        check_same_function(trainer, loop.model)
    steps = {"ours": ours(trainer), **{name: loop.step for name, loop in loops.items()}}
    times = interleave({name: repeat(step) for name, step in steps.items()}, host_seconds, rounds=ROUNDS)
    rates = {name: STEPS * trainer.costs.tokens / statistics.median(values) for name, values in times.items()}
    return {
        "op": "training_step",
        "device": device.description,
        "torch": torch.__version__,
        "sequences": experiment.training.sequences,
        "context": config.context,
        "layers": config.layers,
        "width": config.width,
        "tokens_per_second": rates,
        "ratio_to_peer": {name: rates["ours"] / rates[name] for name in loops},
    }


def ours(trainer: Trainer) -> Callable[[], float]:
    """One step of the trainer as it trains, its data and its clock included."""

    def step() -> float:
        loss, _ = trainer.train_step(1e-3)
        trainer.progress.step += 1
        return loss

    return step


def repeat(step: Step) -> Step:
    """Several steps as one, so that what a single step happens to wait for counts less."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def copy_to_peer(trainer: Trainer) -> PlainGPT:
    """The peer model with our weights."""
    config = trainer.model.config
    peer = PlainGPT(
        vocabulary_size=config.vocabulary_size,
        context=config.context,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
    )
    weights = dict(trainer.model.named_parameters())
    names = {"tokens.weight": "token_embedding.weight", "positions.weight": "position.embedding.weight"}
    names["norm.weight"] = "final_norm.weight"
    parts = {"norm_1": "attention_norm", "qkv": "attention.qkv", "out": "attention.projection"}
    parts |= {"norm_2": "mlp_norm", "up": "mlp.up", "down": "mlp.down"}
    for layer in range(config.layers):
        for theirs, mine in parts.items():
            names[f"blocks.{layer}.{theirs}.weight"] = f"blocks.{layer}.{mine}.weight"
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(weights[names[name]])
    return peer


def check_same_function(trainer: Trainer, peer: PlainGPT) -> None:
    """Refuses to time two things that are not the same."""
    inputs, targets = (part.cpu() for part in trainer.batch())
    with torch.no_grad():
        mine = trainer.model(inputs, targets).mean().item()
        theirs = peer(inputs, targets).item()
    if abs(mine - theirs) > 1e-5:
        raise AssertionError(f"the peer's loss is {theirs}, ours {mine}: not the same function")
