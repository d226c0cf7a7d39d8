"""flash_attention against the reference in float64: its error is at most twice the reference's own, plus a few ulp."""

import pytest
import torch
from torch import Tensor

from kernels import flash_attention, materialised_attention

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [  # batch, heads, key heads, sequence, head size, value head size
    (2, 4, 4, 1, 16, 16),
    (1, 4, 2, 1, 64, 64),
    (2, 4, 4, 63, 32, 32),
    (2, 4, 1, 63, 64, 64),
    (1, 6, 2, 100, 16, 16),
    (1, 2, 1, 100, 256, 256),
    (1, 2, 2, 63, 24, 24),
    (1, 4, 2, 63, 16, 32),
    (1, 1, 1, 1000, 16, 16),
]
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "heads inside": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda tensor: tensor.repeat_interleave(2, dim=2)[:, :, ::2],
    "offset": lambda tensor: torch.nn.functional.pad(tensor, (3, 2))[..., 3:-2],
}


def results(kernel, inputs: list[Tensor], gradient: Tensor, **options) -> list[Tensor]:
    """Output and the gradients of q, k and v, in float64."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = kernel(*inputs, **options)
    assert out.dtype == inputs[0].dtype
    assert out.shape == (*inputs[0].shape[:3], inputs[2].shape[3])
    return [tensor.detach().double() for tensor in (out, *torch.autograd.grad(out, inputs, gradient.to(out.dtype)))]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    batch, heads, key_heads, sequence, size, value_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size)]
    drawn = [torch.randn(batch, h, sequence, d, generator=generator).to(device, dtype) for h, d in shapes]
    return drawn[:3], drawn[3]


def assert_as_exact_as_the_reference(inputs: list[Tensor], gradient: Tensor, **options) -> None:
    exact = results(materialised_attention, [tensor.double() for tensor in inputs], gradient.double(), **options)
    plain = results(materialised_attention, inputs, gradient, **options)
    fused = results(flash_attention, inputs, gradient, **options)
    epsilon = torch.finfo(inputs[0].dtype).eps
    # A fused backward pass subtracts two float32 numbers of this size, which cancel where a query sees one key.
    values = inputs[2].double().repeat_interleave(inputs[0].shape[1] // inputs[2].shape[1], 1)
    cancelled = (gradient.double() @ values.mT).abs().max() * torch.finfo(torch.float32).eps
    for name, truth, reference, result in zip(("out", "dq", "dk", "dv"), exact, plain, fused, strict=True):
        allowed = 2 * (reference - truth).abs().max() + 4 * epsilon * truth.abs().max().clamp(min=1.0)
        assert (result - truth).abs().max() <= allowed + cancelled, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, causal, dtype, device) -> None:
    assert_as_exact_as_the_reference(*random_inputs(shape, dtype, device), causal=causal)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_views_that_are_not_contiguous(shape, layout) -> None:
    inputs, gradient = random_inputs(shape, torch.float32, "cpu")
    views = [LAYOUTS[layout](tensor) for tensor in inputs]
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, inputs, strict=True))
    assert_as_exact_as_the_reference(views, gradient, scale=0.2)


@pytest.mark.parametrize("kernel", [materialised_attention, flash_attention])
def test_repeated_runs_are_bit_identical(kernel) -> None:
    inputs, gradient = random_inputs((2, 4, 2, 100, 32, 32), torch.float32, "cpu")
    first, second = (results(kernel, inputs, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", [materialised_attention, flash_attention])
def test_dropout_drops_weights_and_keeps_their_mean(kernel) -> None:
    torch.manual_seed(0)
    sequence = 512
    # Equal scores and values of one: the output is the kept share of the weights, whose mean dropout preserves.
    q, v = torch.zeros(8, 4, sequence, 8), torch.ones(8, 4, sequence, 8)
    kept = kernel(q, q, v, causal=False, dropout_p=0.25)
    assert kept.std() > 0.01
    assert abs(kept.mean() - 1.0) < 0.002
    # A query that sees itself alone keeps all or nothing of it, scaled by 1 / (1 - p).
    first = kernel(q, q, v, causal=True, dropout_p=0.25)[:, :, 0]
    assert {round(value, 4) for value in first.flatten().tolist()} == {0.0, round(1 / 0.75, 4)}


@pytest.mark.parametrize("kernel", [materialised_attention, flash_attention])
def test_compiles_in_one_graph(kernel) -> None:
    inputs, gradient = random_inputs((2, 4, 2, 63, 16, 16), torch.float32, "cpu")
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    for eager, traced in zip(results(kernel, inputs, gradient), results(compiled, inputs, gradient), strict=True):
        torch.testing.assert_close(traced, eager)
