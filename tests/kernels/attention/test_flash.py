"""flash_attention, in Triton and in PyTorch, against the reference in float64."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, flash_attention, materialised_attention
from tests.kernels.attention.exactness import (
    DEVICE,
    IMPLEMENTATIONS,
    MASKS,
    RUNS,
    TRITON_DTYPES,
    assert_as_exact_as_the_reference,
    mask_options,
    poisoned_memory,
    random_inputs,
    results,
    running,
)

HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}
SIZES = [  # batch, sequence, head size, value head size
    (1, 63, 80, 32),
    (2, 33, 24, 24),
    (1, 48, 256, 256),
    (1, 100, 64, 64),
    (1, 17, 100, 24),
    (1, 40, 16, 16),
]
KINDS = ["causal", "full", "window", "documents", "softcap"]
PAIRS = [*itertools.product(HEADS, KINDS), *(("GQA", mask) for mask in MASKS if mask not in KINDS)]
CASES = [(*pair, size) for pair, size in zip(PAIRS, itertools.cycle(SIZES), strict=False)]
LAYOUTS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other position": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "unaligned": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "one batch for all": lambda x: x[:1].expand_as(x),
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "every other channel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "sequence inside": lambda x: x.mT.contiguous().mT,
}
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.parametrize(("heads", "mask", "size"), CASES)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_values_and_gradients(implementation, dtype, heads, mask, size) -> None:
    batch, sequence, head_size, value_size = size
    # The tiles of a GPU are larger than the interpreter's.
    for length in (sequence,) if DEVICE == "cpu" else (sequence, 6 * sequence + 1):
        inputs, gradient = random_inputs((batch, *HEADS[heads], length, head_size, value_size), dtype)
        options = mask_options(mask, batch, length)
        assert_as_exact_as_the_reference(implementation, inputs, gradient, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_one_position(implementation, dtype, mask) -> None:
    inputs, gradient = random_inputs((1, 2, 1, 1, 16, 16), dtype)
    assert_as_exact_as_the_reference(implementation, inputs, gradient, **mask_options(mask, 1, 1))


@EACH
@pytest.mark.parametrize("mask", [mask for mask in MASKS if "softcap" not in mask])
def test_many_tiles(implementation, mask) -> None:
    inputs, gradient = random_inputs((1, 1, 1, 300, 16, 16), torch.float32)
    assert_as_exact_as_the_reference(implementation, inputs, gradient, **mask_options(mask, 1, 300))


@pytest.mark.parametrize("mask", ["causal", "window, documents"])
@pytest.mark.parametrize("layout", LAYOUTS)
@EACH
def test_views_that_are_not_contiguous(implementation, layout, mask) -> None:
    inputs, gradient = random_inputs((2, 2, 1, 35, 16, 24), torch.float32)
    views = [LAYOUTS[layout](tensor) for tensor in inputs]
    options = mask_options(mask, 2, 35)
    assert_as_exact_as_the_reference(implementation, views, LAYOUTS[layout](gradient), **options)


@EACH
def test_gradient_of_a_sum(implementation) -> None:
    """Autograd hands such a gradient over as one element, expanded."""
    inputs, gradient = random_inputs((2, 4, 2, 35, 16, 16), torch.float32)
    assert_as_exact_as_the_reference(implementation, inputs, gradient[:1, :1, :1, :1].expand_as(gradient), window=9)


@pytest.mark.parametrize("implementation", ["triton", "blocked"])
def test_heads_stay_inside_where_they_are(implementation) -> None:
    q, k, v = (torch.randn(2, 9, h, 16, device=DEVICE).transpose(1, 2).requires_grad_() for h in (4, 2, 2))
    with running(implementation):
        out = flash_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert all(x.transpose(1, 2).is_contiguous() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("mask", ["causal", "everything, full"])
@EACH
def test_repeated_runs_are_bit_identical(implementation, mask) -> None:
    inputs, gradient = random_inputs((1, 2, 1, 63, 32, 32), torch.float32)
    options = mask_options(mask, 1, 63)
    with running(implementation):
        first = results(flash_attention, inputs, gradient, **options)
        for _ in range(100 if DEVICE == "cuda" else 2):
            again = results(flash_attention, inputs, gradient, **options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@EACH
@pytest.mark.parametrize("shape", [(2, 4, 2, 0, 16, 16), (0, 4, 2, 9, 16, 16), (0, 2, 2, 0, 16, 8)])
def test_nothing_gives_nothing(implementation, shape) -> None:
    inputs, gradient = random_inputs(shape, torch.float32)
    for mask in MASKS:
        with running(implementation):
            found = results(flash_attention, inputs, gradient, **mask_options(mask, shape[0], shape[3]))
        assert all(tensor.numel() == 0 for tensor in found)


@EACH
@pytest.mark.parametrize("scale", [0.0, -0.3, 0.4])
@pytest.mark.parametrize("mask", ["causal", "softcap"])
def test_any_finite_scale(implementation, scale, mask) -> None:
    inputs, gradient = random_inputs((1, 2, 1, 40, 16, 16), torch.float32)
    assert_as_exact_as_the_reference(implementation, inputs, gradient, scale=scale, **MASKS[mask])


@EACH
def test_window_of_zero_sees_itself_alone(implementation) -> None:
    (q, k, v), _ = random_inputs((1, 2, 2, 40, 16, 16), torch.float32)
    with running(implementation), poisoned_memory():
        torch.testing.assert_close(flash_attention(q, k, v, window=0), v)


@EACH
@pytest.mark.parametrize("causal", [True, False])
def test_window_of_the_whole_sequence_is_none(implementation, causal) -> None:
    (q, k, v), _ = random_inputs((1, 2, 2, 40, 16, 16), torch.float32)
    with running(implementation):
        whole = flash_attention(q, k, v, causal=causal)
        for window in (39, 40, 2**40):
            assert torch.equal(flash_attention(q, k, v, causal=causal, window=window), whole)
        assert not torch.allclose(flash_attention(q, k, v, causal=causal, window=38), whole)


@EACH
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the soft-cap's polynomial, unused there
def test_large_scores_do_not_overflow(implementation) -> None:
    q = torch.full((1, 1, 40, 16), 1e4, device=DEVICE)
    v = torch.randn(1, 1, 40, 16, device=DEVICE)
    mean = v.cumsum(2) / torch.arange(1, 41, device=DEVICE)[:, None]
    with running(implementation):
        torch.testing.assert_close(flash_attention(q, q, v), mean, atol=1e-5, rtol=1e-5)
        last = flash_attention(q, -q, v, softcap=50.0, window=3)[:, :, -1]
    torch.testing.assert_close(last, v[:, :, -4:].mean(2), atol=1e-5, rtol=1e-5)


@EACH
def test_inputs_are_left_alone(implementation) -> None:
    inputs, gradient = random_inputs((2, 4, 2, 20, 16, 16), torch.float32)
    before = [tensor.clone() for tensor in (*inputs, gradient)]
    with running(implementation):
        results(flash_attention, inputs, gradient, scale=-0.5, softcap=2.0)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, gradient), before, strict=True))


@pytest.mark.parametrize("kernel", [materialised_attention, flash_attention])
def test_dropout_drops_weights_and_keeps_their_mean(kernel) -> None:
    torch.manual_seed(0)
    # Equal scores and values of one: the output is the kept share of the weights, whose mean dropout preserves.
    q, v = torch.zeros(4, 4, 256, 8, device=DEVICE), torch.ones(4, 4, 256, 8, device=DEVICE)
    kept = kernel(q, q, v, causal=False, dropout_p=0.25)
    assert kept.std() > 0.01
    assert abs(kept.mean() - 1.0) < 0.003
    # A query that sees itself alone keeps all or nothing of it, scaled by 1 / (1 - p).
    first = kernel(q, q, v, causal=True, dropout_p=0.25)[:, :, 0]
    assert {round(value, 4) for value in first.flatten().tolist()} == {0.0, round(1 / 0.75, 4)}


@pytest.mark.parametrize("mask", ["causal", "window, documents"])
def test_autocast_takes_mixed_dtypes(mask) -> None:
    """As PyTorch's own attention does."""
    (q, k, v), gradient = random_inputs((2, 4, 2, 20, 16, 16), torch.float32)
    inputs = [q.requires_grad_(), k.half().requires_grad_(), v.bfloat16().requires_grad_()]
    options = mask_options(mask, 2, 20)
    name = "torch" if DEVICE == "cpu" else "auto"
    with backend.use(name):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = flash_attention(*inputs, **options)
        plain = flash_attention(*(x.bfloat16() for x in inputs), **options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain)
    gradients = torch.autograd.grad(out, inputs, gradient.bfloat16())
    assert [x.dtype for x in gradients] == [torch.float32, torch.float16, torch.bfloat16]


def test_autocast_leaves_float64_alone() -> None:
    inputs, _ = random_inputs((1, 2, 2, 20, 16, 16), torch.float64)
    with backend.use("torch"), torch.autocast(DEVICE, torch.bfloat16):
        assert flash_attention(*inputs, window=3).dtype == torch.float64


@st.composite
def calls(draw, dtypes: list[torch.dtype]) -> tuple[list[Tensor], Tensor, dict]:
    """Inputs of any small shape in any order of dimensions, a gradient, and options."""
    batch, key_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3)]))
    sequence, size, value_size = draw(st.integers(1, 40)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    shape = (batch, key_heads * group, key_heads, sequence, size, value_size)
    inputs, gradient = random_inputs(shape, draw(st.sampled_from(dtypes)))
    views = []
    for x in (*inputs, gradient):
        order = draw(st.permutations(range(4)))
        views.append(x.permute(order).contiguous().permute([order.index(dimension) for dimension in range(4)]))
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(0, 45)),
        "softcap": draw(st.none() | st.floats(0.5, 20.0)),
        "dropout_p": draw(st.just(0.0) | st.floats(0.1, 0.9)),
        "scale": draw(st.none() | st.floats(-0.3, 0.3)),
    }
    if draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, 1), min_size=batch * sequence, max_size=batch * sequence))
        dtype = draw(st.sampled_from([torch.int32, torch.int64, torch.uint8]))
        options["document_ids"] = torch.tensor(ids, dtype=dtype, device=DEVICE).view(batch, sequence)
    return views, gradient, options


@given(st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@EACH
def test_whatever_the_call(implementation, data) -> None:
    dtypes = TRITON_DTYPES if implementation == "triton" else [torch.float32, torch.float64]
    (*inputs, gradient), _, options = data.draw(calls(dtypes))
    if implementation == "torch" and DEVICE == "cuda":
        options["dropout_p"] = 0.0  # PyTorch's fused attention has a mask of its own
    assert_as_exact_as_the_reference(implementation, inputs, gradient, **options)
