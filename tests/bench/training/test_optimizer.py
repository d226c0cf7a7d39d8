import torch
from torch import nn

from bench.config import OptimizerConfig
from bench.training.optimizer import build_optimizer


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)


def test_only_matrices_and_embeddings_decay():
    model = Toy()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert {name for name, value in found.items() if value == 0.3} == {"embedding.weight", "linear.weight"}
    assert {name for name, value in found.items() if value == 0.0} == {"linear.bias", "norm.weight", "norm.bias"}


def test_a_step_is_adamws():
    """The update of Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2, written out in float64."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    config = OptimizerConfig(lr=0.1, beta1=0.8, beta2=0.9, epsilon=1e-8, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    weight = model.weight.detach().double()
    m = v = torch.zeros_like(weight)
    for step in range(1, 4):
        gradient = torch.randn(3, 4)
        model.weight.grad = gradient.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient.double()
        v = 0.9 * v + 0.1 * gradient.double() ** 2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        weight = weight - 0.1 * (update + 0.5 * weight)
    torch.testing.assert_close(model.weight.double(), weight, rtol=1e-5, atol=1e-6)


def test_a_model_of_matrices_only():
    assert len(build_optimizer(nn.Linear(2, 2, bias=False), OptimizerConfig()).param_groups) == 1
