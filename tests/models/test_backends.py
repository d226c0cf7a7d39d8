"""A model on all-Triton against the same model on all-PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend
from models.config import ModelConfig
from models.gpt import GPT

pytest.importorskip("triton", reason="Triton is on Linux only")

from triton.runtime.jit import KernelInterface

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, CONTEXT, STEPS = 37, 16, 200
VARIANTS = {
    "layer_norm, gelu": {"norm": "layer_norm", "mlp": "gelu"},
    "rms_norm, relu_squared": {"norm": "rms_norm", "mlp": "relu_squared", "queries_per_kv_head": 2},
    "biases, swiglu": {"norm": "layer_norm", "mlp": "swiglu", "bias": True, "tied_head": False},
}
KERNELS = {
    "norm_forward_kernel",
    "norm_backward_kernel",
    "rotary_kernel",
    "forward_kernel",  # of attention
    "backward_query_kernel",
    "backward_key_kernel",
    "linear_activation_kernel",
    "linear_forward_kernel",  # of the loss
    "linear_backward_kernel",
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """The names of the Triton kernels that are launched in a test."""
    names, launch = set(), KernelInterface.__getitem__

    def record(kernel: Any, grid: Any) -> Any:
        names.add(kernel.fn.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", record)
    return names


def build(**variant: Any) -> GPT:
    sizes = {"vocabulary_size": VOCABULARY, "context": CONTEXT, "layers": 1, "width": 16, "heads": 2}
    return GPT(ModelConfig(**sizes, position="rope", attention_kernel="flash", **variant)).to(DEVICE)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and as targets successors that can be learned."""
    tokens = torch.randint(VOCABULARY, (2, CONTEXT), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return tokens, (3 * tokens + 1) % VOCABULARY


def losses_and_gradients(name: str, variant: dict[str, Any], compiled: bool = False) -> tuple[Tensor, list[Tensor]]:
    model = build(**variant)
    with backend.use(name):
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses = run(*batch())
        losses.mean().backward()
    return losses.detach(), [parameter.grad for parameter in model.parameters()]


@EACH_VARIANT
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_they_start_alike(variant, compiled, launched) -> None:
    torch.compiler.reset()  # a function is compiled for so many models only
    expected = losses_and_gradients("torch", variant)
    assert not launched
    found = losses_and_gradients("triton", variant, compiled)
    assert launched == KERNELS
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)


def curve(name: str) -> Tensor:
    """The loss of each step, (STEPS,)."""
    model, losses = build(norm="layer_norm"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with backend.use(name):
        for step in range(STEPS):
            loss = model(*batch(step)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
def test_they_learn_alike() -> None:
    """To change initial weights by a rounding error, 1e-7 of each, moves this curve by up to 5e-7."""
    expected = curve("torch")
    assert expected[-1] < 0.05 < 3.0 < expected[0]
    torch.testing.assert_close(curve("triton"), expected, atol=1e-5, rtol=0)
