"""The peer computes the same function; nothing here depends on time."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.compose import compose_config
from bench.config import settle
from bench.data import open_dataset
from bench.runs.folder import RunFolder
from bench.speed import training_step
from bench.speed.training_step import check_same_function, copy_to_peer, measure_training_step
from bench.training.device import open_device
from bench.training.trainer import Trainer

PEERS = ["innovation=[flash_attention,layer_norm]"]


@pytest.fixture
def trainer(overrides, data_folder, tmp_path) -> Trainer:
    experiment = settle(compose_config([*overrides, *PEERS]))
    dataset = open_dataset(experiment.data, data_folder)
    return Trainer(experiment, dataset, open_device(experiment.device), RunFolder(tmp_path))


def test_the_peer_is_the_same_function_with_the_same_gradients(trainer):
    peer = copy_to_peer(trainer)
    check_same_function(trainer, peer)
    inputs, targets = trainer.batch()
    trainer.model(inputs, targets).mean().backward()
    peer(inputs, targets).backward()
    ours = dict(trainer.model.named_parameters())
    torch.testing.assert_close(peer.tokens.weight.grad, ours["token_embedding.weight"].grad)
    torch.testing.assert_close(peer.blocks[0].up.weight.grad, ours["blocks.0.mlp.up.weight"].grad)


def test_another_function_is_not_timed(trainer):
    peer = copy_to_peer(trainer)
    with torch.no_grad():
        peer.tokens.weight *= 2
    with pytest.raises(AssertionError, match="not the same function"):
        check_same_function(trainer, peer)


def test_a_time_is_that_of_several_steps(monkeypatch):
    monkeypatch.setattr(training_step, "STEPS", 3)
    calls = []
    training_step.repeat(lambda: calls.append("step"))()
    assert calls == ["step"] * 3


def test_the_figures_are_ratios_beside_peers(overrides, monkeypatch):
    monkeypatch.setattr(training_step, "ROUNDS", 1)
    monkeypatch.setattr(training_step, "STEPS", 1)
    figures = measure_training_step(settle(compose_config([*overrides, *PEERS])))
    assert set(figures["tokens_per_second"]) == {"ours", "plain_loop", "plain_loop_fused_adamw"}
    for peer, ratio in figures["ratio_to_peer"].items():
        assert ratio == pytest.approx(figures["tokens_per_second"]["ours"] / figures["tokens_per_second"][peer])


def test_the_command_prints_a_table_and_json(overrides, monkeypatch, capsys):
    monkeypatch.setattr(training_step, "ROUNDS", 1)
    monkeypatch.setattr(training_step, "STEPS", 1)
    assert main(["speed", *overrides, "op=training_step"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert json.loads(last)["op"] == "training_step"
