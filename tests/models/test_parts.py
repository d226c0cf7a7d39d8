"""A part is a file; adding one is adding a file."""

import sys
from pathlib import Path

import pytest
import torch

import models.norm
from kernels import flash_attention, materialised_attention
from models.config import PART_KINDS, ModelConfig
from models.gpt import GPT
from models.mlp.gelu_tanh import GeluTanhMlp
from models.parts import build_part, find_attention_kernel, find_part, part_names, part_options

SCALED = """
from torch import nn

class Scaled(nn.Module):
    def __init__(self, config, *, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x_BTD):
        return self.factor * x_BTD

    def flops(self, sequence_length):
        return 0
"""


@pytest.fixture
def norm_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are parts of kind norm."""
    monkeypatch.setattr(models.norm, "__path__", [*models.norm.__path__, str(tmp_path)])
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(f"models.norm.{file.stem}", None)


def config(**changed: object) -> ModelConfig:
    return ModelConfig(vocabulary_size=11, context=8, layers=2, width=12, heads=3, **changed)


def test_a_new_file_is_a_new_part(norm_folder) -> None:
    (norm_folder / "scaled.py").write_text(SCALED)
    assert "scaled" in part_names("norm")
    assert part_options("norm", "scaled") == {"factor": 1.0}
    tokens = torch.randint(11, (2, 8))
    baseline = GPT(config())(tokens)
    assert torch.equal(GPT(config(norm="scaled"))(tokens), baseline)
    assert not torch.equal(GPT(config(norm={"name": "scaled", "factor": 2.0}))(tokens), baseline)


@pytest.mark.parametrize(("source", "count"), [("x = 1", 0), (SCALED + SCALED.replace("Scaled", "Again"), 2)])
def test_a_file_defines_one_module(norm_folder, source, count) -> None:
    (norm_folder / "odd.py").write_text(source)
    with pytest.raises(TypeError, match=f"models/norm/odd.py must define one torch module, it defines {count}"):
        find_part("norm", "odd")


def test_an_imported_base_class_is_not_the_part() -> None:
    assert find_part("mlp", "gelu_tanh") is GeluTanhMlp


def test_options_reach_the_part() -> None:
    assert not build_part("attention", config(attention={"name": "softmax", "causal": False})).causal
    assert build_part("attention", config()).causal


@pytest.mark.parametrize("kind", PART_KINDS)
def test_every_part_is_one_and_every_option_has_a_default(kind) -> None:
    for name in part_names(kind):
        assert all(isinstance(default, bool | int | float | str) for default in part_options(kind, name).values())
        assert build_part(kind, config(**{kind: name})).flops(8) >= 0


def test_attention_kernels() -> None:
    assert find_attention_kernel("flash") is flash_attention
    assert find_attention_kernel("materialised") is materialised_attention
