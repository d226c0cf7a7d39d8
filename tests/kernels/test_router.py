"""Routing against loops over tokens and experts, and a mixture of experts with the grouped GEMM against a dense one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import backend
from kernels.grouped_gemm import grouped_gemm
from kernels.router import balancing_loss, inverse_order, route, sort_by_expert, update_bias
from tests.kernels.attention.exactness import DEVICE

TOKENS, EXPERTS, WIDTH, FEATURES = 37, 5, 16, 24


def random_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0), dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [1, 2, EXPERTS])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_route(activation, k, biased) -> None:
    logits = random_logits()
    bias = torch.tensor([3.0, 0.0, -3.0, 0.1, 0.0], dtype=torch.float64, device=DEVICE) if biased else None
    weights, experts = route(logits, k, activation=activation, bias=bias)
    assert weights.shape == experts.shape == (TOKENS, k)
    for row, row_weights, row_experts in zip(logits.tolist(), weights.tolist(), experts.tolist(), strict=True):
        powers = [torch.tensor(one).exp().item() for one in row]
        scores = [p / sum(powers) if activation == "softmax" else p / (1 + p) for p in powers]
        ranks = [score + (bias[index].item() if biased else 0.0) for index, score in enumerate(scores)]
        assert row_experts == sorted(range(EXPERTS), key=lambda index: -ranks[index])[:k]
        assert row_weights == pytest.approx([scores[index] for index in row_experts], rel=1e-6)


def test_gradients_reach_the_logits_and_not_the_bias() -> None:
    logits, bias = random_logits().requires_grad_(), torch.zeros(EXPERTS, device=DEVICE, requires_grad=True)
    weights, experts = route(logits, 2, bias=bias)
    (found,) = torch.autograd.grad(weights[:, 1].sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(logits.softmax(-1).gather(1, experts[:, 1:]).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_in_float32(dtype) -> None:
    logits = random_logits(dtype)
    for activation in ("softmax", "sigmoid"):
        weights, experts = route(logits, 2, activation=activation)
        exact, same = route(logits.double(), 2, activation=activation)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0.0)
        assert torch.equal(experts, same)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(5)}, r"^logits must have the shape \(tokens, experts\) .* got \(5,\)"),
        ({"logits": torch.zeros(3, 5).int()}, r"^logits must have .* floating dtype, got \(3, 5\) torch.int32"),
        ({"k": 0}, r"^k must lie between 1 and the 5 experts, got 0"),
        ({"k": 6}, r"^k must lie between 1 and the 5 experts, got 6"),
        ({"activation": "relu"}, r"^activation must be one of softmax, sigmoid, got 'relu'"),
        ({"bias": torch.zeros(4)}, r"^bias must have the shape \(5,\), got \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit(change, said) -> None:
    with pytest.raises(ValueError, match=said):
        route(**({"logits": torch.zeros(3, 5), "k": 2} | change))


def test_balancing_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], device=DEVICE, requires_grad=True)
    loss = balancing_loss(probabilities, torch.tensor([[0], [0]], device=DEVICE))
    assert loss.item() == pytest.approx(3 * 1.0 * 0.6)
    (gradient,) = torch.autograd.grad(loss, probabilities)
    torch.testing.assert_close(gradient, torch.tensor([[1.5, 0.0, 0.0]] * 2, device=DEVICE))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_balanced_experts_lose_one_and_all_to_one_lose_their_number(k) -> None:
    even = (torch.arange(20 * k, device=DEVICE) % EXPERTS).view(20, k)
    uniform = torch.full((20, EXPERTS), 1 / EXPERTS, device=DEVICE)
    assert balancing_loss(uniform, even).item() == pytest.approx(1.0)
    one_hot = functional.one_hot(torch.zeros(20, dtype=torch.long), EXPERTS).float().to(DEVICE)
    assert balancing_loss(one_hot, torch.zeros(20, 1, dtype=torch.long, device=DEVICE)).item() == EXPERTS


def test_bias_rises_for_idle_experts() -> None:
    experts = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]], device=DEVICE)  # 4, 2, 1 and 1 choices, 2 on average
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    found = update_bias(bias, experts, 0.125)
    assert found.tolist() == [0.875, 2.0, 3.125, 4.125]
    assert bias.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_bias_balances() -> None:
    """Experts that all tokens prefer end up with their share."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 4, generator=generator) + torch.tensor([2.0, 1.0, 0.0, -1.0])
    bias = torch.zeros(4)
    for _ in range(300):
        _, experts = route(logits, 1, activation="sigmoid", bias=bias)
        bias = update_bias(bias, experts, 0.005)
    assert (experts.flatten().bincount(minlength=4) - 100).abs().max() < 25
    assert route(logits, 1, activation="sigmoid")[1].flatten().bincount(minlength=4).max() > 200


def test_sort_by_expert() -> None:
    experts = torch.tensor([[2, 0], [0, 4], [2, 0]], device=DEVICE)
    order, offsets = sort_by_expert(experts, 6)
    assert order.tolist() == [1, 2, 5, 0, 4, 3]
    assert offsets.tolist() == [3, 3, 5, 5, 6, 6]
    assert offsets.dtype == torch.int32
    assert order[inverse_order(order)].tolist() == inverse_order(order)[order].tolist() == list(range(6))


def mixture(x: Tensor, router: Tensor, up: Tensor, down: Tensor, *, activation: str, k: int) -> Tensor:
    """A mixture of experts with two grouped GEMMs, down(relu(up(x))^2)."""
    weights, experts = route(x @ router, k, activation=activation)
    order, offsets = sort_by_expert(experts, EXPERTS)
    hidden = grouped_gemm(x[order // k], up, offsets).relu().square()
    y = grouped_gemm(hidden, down, offsets)[inverse_order(order)]
    return (y.view(len(x), k, -1) * weights[..., None].to(y.dtype)).sum(1)


def dense_mixture(x: Tensor, router: Tensor, up: Tensor, down: Tensor, *, activation: str, k: int) -> Tensor:
    """Every token through every expert, with weight 0 for those not chosen."""
    scores = (x @ router).softmax(-1) if activation == "softmax" else (x @ router).sigmoid()
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(k, -1).indices, 1.0)
    hidden = torch.einsum("td,edf->etf", x, up).relu().square()
    return torch.einsum("etf,efd,te->td", hidden, down, scores * chosen)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize(("activation", "k"), [("softmax", 1), ("sigmoid", 2)])
def test_mixture_of_experts(activation, k, name, dtype, compiled) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(TOKENS, WIDTH), (WIDTH, EXPERTS), (EXPERTS, WIDTH, FEATURES), (EXPERTS, FEATURES, WIDTH)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) / 4 for shape in shapes]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    layer = torch.compile(mixture, backend="aot_eager", fullgraph=True) if compiled else mixture
    truth = dense_mixture(*exact, activation=activation, k=k)
    with backend.use(name):
        out = layer(*inputs, activation=activation, k=k)
    gradient = torch.randn(truth.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    found = [out, *torch.autograd.grad(out, inputs, gradient.to(dtype))]
    expected = [truth, *torch.autograd.grad(truth, exact, gradient)]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=10 * tolerance)


def test_functions_compile_in_one_graph() -> None:
    def everything(logits: Tensor, bias: Tensor):
        weights, experts = route(logits, 2, bias=bias)
        order, offsets = sort_by_expert(experts, EXPERTS)
        loss = balancing_loss(logits.softmax(-1), experts)
        return weights, loss, update_bias(bias, experts, 0.1), order, offsets, inverse_order(order)

    logits, bias = random_logits(), torch.zeros(EXPERTS, device=DEVICE, dtype=torch.float64)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for expected, found in zip(everything(logits, bias), compiled(logits, bias), strict=True):
        assert torch.equal(found, expected)
