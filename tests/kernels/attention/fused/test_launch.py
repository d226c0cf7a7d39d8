"""The Triton kernels by every way in: tensor descriptors and pointers, sums in a fixed order and in any, and what lies
around their tensors in memory. Values by mask, heads and size are held in test_flash.py.
"""

import pytest
import torch
from torch import Tensor

from kernels import flash_attention
from kernels.attention.documents import document_bounds
from kernels.attention.fused import launch
from kernels.attention.options import AttentionOptions
from tests.kernels.attention.exactness import (
    DEVICE,
    TRITON_DTYPES,
    assert_as_exact_as_the_reference,
    assert_results_as_exact_as_the_reference,
    mask_options,
    random_inputs,
    results,
    running,
)

SHAPE = (1, 2, 1, 35, 24, 16)
SOME_MASKS = ["causal", "full", "window, full", "documents", "everything, full"]
DESCRIPTORS_HERE = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
SENTINEL = 77.0
MARGIN = 64


@pytest.fixture(params=["descriptors", "pointers"])
def reads(request, monkeypatch) -> str:
    """How the kernels read: through TMA, where there is any, or pointers."""
    if request.param == "pointers":
        monkeypatch.setattr(launch, "tma_reads", lambda *tensors: False)
    return request.param


def options_of(mask: str, shape: tuple[int, ...], *, deterministic: bool = True) -> AttentionOptions:
    arguments = {"causal": True, "window": None, "softcap": None, "dropout_p": 0.0, "scale": 0.2}
    arguments |= mask_options(mask, shape[0], shape[3])
    ids = arguments.pop("document_ids", None)
    starts, ends = (None, None) if ids is None else document_bounds(ids)
    seed = torch.tensor([5], device=DEVICE)
    return AttentionOptions(starts, ends, seed, **arguments, deterministic=deterministic)


class Guarded:
    """Tensors inside larger memory, and whether anyone wrote around them."""

    def __init__(self) -> None:
        self.memory: list[tuple[Tensor, Tensor]] = []

    def heads(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """(B, H, S, size) of NaN, whose rows, heads and batches lie apart from one another."""
        batch, heads, sequence, size = shape
        memory = torch.full((batch + 2, heads + 2, sequence + 40, size + 8), SENTINEL, dtype=dtype, device=DEVICE)
        return self._inside(memory, memory[1:-1, 1:-1, 8 : sequence + 8, :size])

    def rows(self, *shape: int) -> Tensor:
        """(B, H, S) of NaN in float32, one piece as the kernels take it."""
        elements = torch.Size(shape).numel()
        memory = torch.full((elements + 2 * MARGIN,), SENTINEL, device=DEVICE)
        return self._inside(memory, memory[MARGIN:-MARGIN].view(shape))

    def _inside(self, memory: Tensor, tensor: Tensor) -> Tensor:
        tensor.fill_(torch.nan)
        self.memory.append((memory, tensor))
        return tensor

    def assert_written_inside_alone(self) -> None:
        for memory, tensor in self.memory:
            assert not tensor.isnan().any()
            assert (memory == SENTINEL).sum() == memory.numel() - tensor.numel()


@pytest.mark.parametrize("mask", SOME_MASKS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_pointers(dtype, mask, monkeypatch) -> None:
    monkeypatch.setattr(launch, "tma_reads", lambda *tensors: False)
    inputs, gradient = random_inputs(SHAPE, dtype)
    assert_as_exact_as_the_reference("triton", inputs, gradient, **mask_options(mask, 1, 35))


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(2 * 3 * 8 * 16 + 1)[1:].view(2, 3, 8, 16), id="unaligned start"),
        pytest.param(torch.zeros(2, 3, 8, 18)[..., :16], id="unaligned stride"),
        pytest.param(torch.zeros(1, 3, 8, 16).expand(2, -1, -1, -1), id="one batch for all"),
        pytest.param(torch.zeros(2, 3, 8, 4, dtype=torch.float16), id="short rows"),
    ],
)
def test_what_descriptors_cannot_read(tensor) -> None:
    assert not launch.tma_reads(torch.zeros(2, 3, 8, 16), tensor)


@pytest.mark.skipif(not DESCRIPTORS_HERE, reason="this GPU has no TMA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_descriptors_read_what_models_have(dtype) -> None:
    tensor = torch.zeros(2, 8, 3, 64, dtype=dtype, device=DEVICE)
    assert launch.tma_reads(tensor, tensor.transpose(1, 2))


@pytest.mark.parametrize("mask", SOME_MASKS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_sums_of_dq_in_any_order(reads, dtype, mask) -> None:
    inputs, gradient = random_inputs(SHAPE, dtype)
    options = mask_options(mask, 1, 35)
    assert_as_exact_as_the_reference("triton", inputs, gradient, deterministic=False, **options)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_switch_chooses_the_backward_kernels(deterministic, monkeypatch) -> None:
    ran = []
    for name in ("backward_query", "backward_delta"):
        kernel = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *args, name=name, kernel=kernel: (ran.append(name), kernel(*args)))
    inputs, gradient = random_inputs((1, 2, 1, 20, 16, 16), torch.float32)
    with running("triton", deterministic=deterministic):
        results(flash_attention, inputs, gradient)
    assert ran == (["backward_query"] if deterministic else ["backward_delta"])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mask", ["causal", "everything, full"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 35, 24, 16), (2, 2, 2, 1, 16, 20), (1, 2, 1, 32, 16, 16)], ids=str)
def test_nothing_is_written_around_the_results(reads, shape, mask, deterministic) -> None:
    (q, k, v), d_out = random_inputs(shape, torch.float32)
    options, guarded = options_of(mask, shape, deterministic=deterministic), Guarded()
    out, lse = guarded.heads(*d_out.shape, dtype=q.dtype), guarded.rows(*q.shape[:3])
    launch.forward(q, k, v, out, lse, options)
    guarded.assert_written_inside_alone()
    gradients = [guarded.heads(*x.shape, dtype=x.dtype) for x in (q, k, v)]
    launch.backward(d_out, q, k, v, out, lse, *gradients, options)
    guarded.assert_written_inside_alone()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [40, 27])  # head sizes of 24 and 16 in rows that descriptors read, and not
@pytest.mark.parametrize("mask", ["causal", "everything, full"])
def test_garbage_around_the_inputs_stays_out(mask, columns, garbage) -> None:
    inputs, gradient = random_inputs(SHAPE, torch.float32)
    views = []
    for tensor in (*inputs, gradient):
        batch, heads, sequence, size = tensor.shape
        memory = torch.full((batch, heads, sequence + 61, columns), garbage, device=DEVICE)
        views.append(memory[:, :, 4 : sequence + 4, :size].copy_(tensor))
    assert launch.tma_reads(*views) == (columns == 40 and DESCRIPTORS_HERE)
    options = mask_options(mask, 1, 35)
    with running("triton"):
        found = results(flash_attention, views[:3], views[3], **options)
    assert_results_as_exact_as_the_reference(found, inputs, gradient, **options)


@pytest.mark.parametrize("mask", ["causal", "everything, full"])
def test_log_sum_exp_of_the_scores(reads, mask) -> None:
    """In base 2, of what is visible, before dropout."""
    (q, k, v), d_out = random_inputs(SHAPE, torch.float32)
    options = options_of(mask, SHAPE)
    out, lse = torch.empty_like(d_out), torch.empty(q.shape[:3], device=DEVICE)
    launch.forward(q, k, v, out, lse, options)
    scores = q.double() @ k.double().mT * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    positions = torch.arange(35, device=DEVICE)
    seen = positions <= positions[:, None]
    if mask == "everything, full":
        seen = positions >= positions[:, None] - options.window
        seen = seen & (positions >= options.starts[0, :, None]) & (positions <= options.ends[0, :, None])
    expected = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), -1) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)


def test_one_call_spans_many_groups_of_heads(monkeypatch) -> None:
    """Heads whose keys do not fit into the cache together run one group after another."""
    monkeypatch.setattr(launch, "CACHE_BYTES", 2 * 70 * (16 + 16) * 4)
    inputs, gradient = random_inputs((3, 2, 1, 70, 16, 16), torch.float32)
    assert_as_exact_as_the_reference("triton", inputs, gradient)
