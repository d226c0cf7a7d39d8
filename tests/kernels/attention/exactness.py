"""What the attention tests share: inputs, masks, implementations, and the comparison with the reference in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from kernels import backend, flash_attention, materialised_attention
from kernels.attention import blocked, flash
from kernels.attention.dropout import kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("triton", "torch", "blocked")
# Triton's interpreter multiplies bfloat16 wrongly.
TRITON_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
RUNS = [
    *(("triton", dtype) for dtype in TRITON_DTYPES),
    *(("torch", dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(("blocked", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)),
]
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 7},
    "window, full": {"window": 20, "causal": False},
    "documents": {"documents": True},
    "documents, full": {"documents": True, "causal": False},
    "softcap": {"softcap": 1.5},
    "window, documents": {"window": 20, "documents": True},
    "window, softcap": {"window": 33, "softcap": 1.5},
    "softcap, documents, dropout": {"softcap": 1.5, "documents": True, "dropout_p": 0.3},
    "everything, full": {"window": 20, "documents": True, "softcap": 1.5, "dropout_p": 0.2, "causal": False},
}
SEED = 3


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k and v, and a gradient of the output, for (batch, heads, key heads, sequence, head size, value head size)."""
    batch, heads, key_heads, sequence, size, value_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size)]
    drawn = [torch.randn(batch, h, sequence, d, generator=generator).to(DEVICE, dtype) for h, d in shapes]
    return drawn[:3], drawn[3]


def random_documents(batch: int, sequence: int) -> Tensor:
    """(B, S) ids, each of which comes back later as another document."""
    generator = torch.Generator().manual_seed(batch * sequence)
    return ((torch.rand(batch, sequence, generator=generator) < 0.07).cumsum(1) % 3).to(DEVICE)


def mask_options(mask: str, batch: int, sequence: int) -> dict[str, Any]:
    """The arguments of one of MASKS."""
    options = dict(MASKS[mask])
    if options.pop("documents", False):
        options["document_ids"] = random_documents(batch, sequence)
    return options


@contextmanager
def running(implementation: str, *, deterministic: bool = True) -> Iterator[None]:
    """The backend of that name, or `blocked`: PyTorch without its own fused attention, several blocks to a sequence."""
    if implementation != "blocked":
        with backend.use(implementation, deterministic=deterministic):
            yield
        return
    with (
        backend.use("torch"),
        mock.patch.object(blocked, "ROWS", 32),
        mock.patch.object(flash, "_sdpa_is_fused", return_value=False),
    ):
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, so that whatever a kernel forgets to write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kept_weights(batch: int, heads: int, sequence: int, dropout_p: float) -> Tensor:
    """(B, H, S, S): which weights the kernels keep in the first call after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    seed = torch.randint(2**62, (1,), device=DEVICE)
    positions = torch.arange(sequence, device=DEVICE)
    numbers = torch.arange(batch * heads, device=DEVICE).view(batch, heads, 1, 1)
    return kept(seed, numbers, positions[:, None], positions, dropout_p)


def drop_as_the_kernels(weights_BHSS: Tensor, dropout_p: float) -> Tensor:
    return weights_BHSS * kept_weights(*weights_BHSS.shape[:3], dropout_p) / (1.0 - dropout_p)


def results(kernel, inputs: list[Tensor], gradient: Tensor, **options) -> list[Tensor]:
    """Output and the gradients of q, k and v, in float64."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    torch.manual_seed(SEED)
    out = kernel(*inputs, **options)
    assert out.dtype == inputs[0].dtype
    assert out.shape == (*inputs[0].shape[:3], inputs[2].shape[3])
    gradients = torch.autograd.grad(out, inputs, gradient)
    assert all(one.dtype == x.dtype and one.shape == x.shape for one, x in zip(gradients, inputs, strict=True))
    return [tensor.detach().double() for tensor in (out, *gradients)]


def reference_results(inputs: list[Tensor], gradient: Tensor, **options) -> list[Tensor]:
    """Those of the reference, with the kernels' dropout."""
    with mock.patch.object(functional, "dropout", drop_as_the_kernels):
        return results(materialised_attention, inputs, gradient, **options)


def assert_as_exact_as_the_reference(
    implementation: str, inputs: list[Tensor], gradient: Tensor, *, deterministic: bool = True, **options
) -> None:
    """Against float64, the error is at most twice that of the reference in the dtype of the inputs, plus a few ulp."""
    with running(implementation, deterministic=deterministic), poisoned_memory():
        fused = results(flash_attention, inputs, gradient, **options)
    assert_results_as_exact_as_the_reference(fused, inputs, gradient, **options)


def assert_results_as_exact_as_the_reference(
    fused: list[Tensor], inputs: list[Tensor], gradient: Tensor, **options
) -> None:
    exact = reference_results([tensor.double() for tensor in inputs], gradient.double(), **options)
    plain = reference_results(inputs, gradient, **options)
    epsilon = torch.finfo(inputs[0].dtype).eps
    # A fused backward pass subtracts two numbers of this size, which cancel where a query sees one key.
    values = inputs[2].double().repeat_interleave(inputs[0].shape[1] // inputs[2].shape[1], 1)
    widest = torch.promote_types(inputs[0].dtype, torch.float32)
    cancelled = (gradient.double() @ values.mT).abs().max() * torch.finfo(widest).eps
    for name, truth, reference, result in zip(("out", "dq", "dk", "dv"), exact, plain, fused, strict=True):
        allowed = 2 * (reference - truth).abs().max() + 4 * epsilon * truth.abs().max().clamp(min=1.0)
        error = (result - truth).abs().max()
        assert error <= allowed + cancelled, f"{name}: error {error:.3g}, allowed {allowed + cancelled:.3g}"
