import pytest
import torch

from models.config import ModelConfig
from models.layers import Embedding, Linear

CONFIG = ModelConfig(vocabulary_size=11, context=8, layers=8, width=12, heads=3, initial_std=0.5)


class Recorder:
    """A draw that writes down what it was asked for, and fills with the number of the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...], float]] = []

    def __call__(self, tensor: torch.Tensor, name: str, standard_deviation: float) -> None:
        self.calls.append((name, tuple(tensor.shape), standard_deviation))
        tensor.fill_(len(self.calls))


def test_rows_are_drawn_under_their_own_names() -> None:
    layer, draw = Linear(12, {"query": 3, "key": 1, "value": 2}, CONFIG, bias=True), Recorder()
    layer.initialise(draw)
    assert draw.calls == [("query", (3, 12), 0.5), ("key", (1, 12), 0.5), ("value", (2, 12), 0.5)]
    assert layer.weight[:, 0].tolist() == [1, 1, 1, 2, 3, 3]
    assert layer.bias.tolist() == [0] * 6


def test_a_residual_layer_starts_smaller() -> None:
    layer, draw = Linear(12, 5, CONFIG, bias=False, residual=True), Recorder()
    layer.initialise(draw)
    assert draw.calls == [("weight", (5, 12), 0.5 / 4)]
    assert layer.bias is None


def test_embedding() -> None:
    table, draw = Embedding(7, CONFIG), Recorder()
    table.initialise(draw)
    assert draw.calls == [("weight", (7, 12), 0.5)]
    assert table.flops(8) == 0


@pytest.mark.parametrize("bias", [True, False])
def test_linear_flops_count_the_weights_only(bias) -> None:
    assert Linear(12, {"a": 3, "b": 4}, CONFIG, bias=bias).flops(5) == 2 * 12 * 7 * 5
