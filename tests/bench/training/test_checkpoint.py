import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as distributed
from torch import nn

from bench.training.checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from bench.training.generators import seed_generators


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.1, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def progress(leg: int = 0, at: int = 0) -> Progress:
    return Progress(leg=leg, step=at, seconds=1.5, joules=None, rows=7, metrics_size=10, results_size=20)


def test_training_goes_on_with_the_same_bits(tmp_path):
    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    path = save_checkpoint(tmp_path, progress(2, 3), model, optimizer)
    for _ in range(3):
        step(model, optimizer)
    other, other_optimizer = make(seed=1)
    assert load_checkpoint(path, other, other_optimizer) == progress(2, 3)
    for _ in range(3):
        step(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, entries in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][key]) for key, value in entries.items())


@pytest.mark.parametrize("draws", [0, 1])  # a normal number drawn by itself leaves another one waiting
def test_every_generator_goes_on_where_it_was(tmp_path, draws):
    model, optimizer = make()
    seed_generators(5, rank=0)
    for _ in range(draws):
        draw()
    path = save_checkpoint(tmp_path, progress(), model, optimizer)
    drawn = [draw(), draw()]
    seed_generators(6, rank=0)
    load_checkpoint(path, model, optimizer)
    assert [draw(), draw()] == drawn


def draw() -> tuple[float, ...]:
    normal = np.random.standard_normal()  # noqa: NPY002
    return torch.rand(()).item(), random.random(), random.gauss(), np.random.random(), normal  # noqa: NPY002


def test_every_process_draws_its_own():
    drawn = []
    for seed, rank in ((1, 0), (1, 1), (2, 0)):
        seed_generators(seed, rank)
        drawn.append(draw())
    assert all(len(set(column)) == 3 for column in zip(*drawn, strict=True))
    seed_generators(1, rank=0)
    torch_alone = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == torch_alone  # what one process draws is known by its seed alone


def test_nothing_needs_unpickling(tmp_path):
    path = save_checkpoint(tmp_path, progress(), *make())
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_the_newest_comes_first_whatever_the_number_of_digits(tmp_path):
    model, optimizer = make()
    order = [(0, 0), (0, 99_999_999), (0, 100_000_000), (1, 5), (999, 1), (1000, 0)]
    for leg, at in order:
        save_checkpoint(tmp_path, progress(leg, at), model, optimizer)
    assert [path.name for path in list_checkpoints(tmp_path)] == [progress(*place).name for place in order]
    assert newest_checkpoint(tmp_path) == (tmp_path / progress(1000, 0).name, [])


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "account cut", "account changed", "earlier layout"])
def test_damage_is_noticed_and_passed_over(tmp_path, damage):
    model, optimizer = make()
    good = save_checkpoint(tmp_path, progress(0, 1), model, optimizer)
    bad = save_checkpoint(tmp_path, progress(0, 2), model, optimizer)
    (file,) = (bad / "training").iterdir()
    account = bad / "progress.json"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "account cut":
        account.write_text(account.read_text()[:-9])
    elif damage == "account changed":
        account.write_text(account.read_text().replace('"step": 2', '"step": 3'))
    else:
        account.write_text('{"leg": 0, "step": 2, "seconds": 1.5, "joules": null, "hashes": {}}')
    assert newest_checkpoint(tmp_path) == (good, [bad])


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_interrupted_write_is_no_checkpoint(tmp_path, monkeypatch):
    model, optimizer = make()
    good = save_checkpoint(tmp_path, progress(0, 1), model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, progress(0, 2), model, optimizer)
    assert newest_checkpoint(tmp_path) == (good, [])
    room, save = [], distributed.save
    with monkeypatch.context() as patch:  # a disk that is full needs the room before anything more is written
        patch.setattr(distributed, "save", lambda *_, **__: room.append(list_names(tmp_path)) or save(*_, **__))
        newer = save_checkpoint(tmp_path, progress(0, 3), model, optimizer)
    assert room[0] == [good.name, f"{newer.name}.partial"]
    assert list_names(tmp_path) == [good.name, newer.name]


def test_no_checkpoint_at_all(tmp_path):
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_pruning_keeps_the_newest_and_what_is_needed(tmp_path):
    model, optimizer = make()
    paths = [save_checkpoint(tmp_path, progress(0, at), model, optimizer) for at in range(5)]
    prune_checkpoints(tmp_path, keep={paths[1]})
    assert list_checkpoints(tmp_path) == [paths[1], *paths[-2:]]
