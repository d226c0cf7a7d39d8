"""rotary_embedding, in Triton and in PyTorch, against multiplication by complex numbers in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, rope
from kernels.rope import rotary_embedding, rotary_embedding_reference
from tests.kernels.attention.exactness import DEVICE, poisoned_memory
from tests.kernels.compiled import SHARED_BYTES, run_compiled

BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [  # batch, query heads, key heads, sequence, head size
    (1, 1, 1, 1, 2),
    (2, 4, 2, 63, 16),
    (1, 3, 1, 100, 80),
    (2, 2, 2, 7, 6),
    (1, 2, 1, 5, 256),
    (1, 12, 4, 33, 64),
    (1, 1, 1, 1000, 64),
]
LAYOUTS = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other position": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "unaligned": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "one batch for all": lambda x: x[:1].expand_as(x),
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one value for all": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "every other channel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "sequence inside": lambda x: x.mT.contiguous().mT,
}
EACH_BACKEND = pytest.mark.parametrize("name", BACKENDS)
EACH_PAIRING = pytest.mark.parametrize("interleaved", [False, True])


def complex_products(q: Tensor, k: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool, positions=None):
    """A pair of channels is a complex number; its position turns it by multiplication with exp(i angle)."""
    positions = torch.arange(q.shape[2], device=DEVICE)[None] if positions is None else positions.long()
    turns = torch.complex(cosines, sines)[positions][:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        turned = torch.complex(first, second) * turns
        parts = turned.real, turned.imag
        return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)

    return turn(q), turn(k)


def tables(positions: int, size: int) -> tuple[Tensor, Tensor]:
    """cosines and sines (positions, size / 2) float32 of angles without order."""
    angles = torch.rand(positions, size // 2, generator=torch.Generator().manual_seed(positions), dtype=torch.float64)
    angles = angles.to(DEVICE) * 100
    return angles.cos().float(), angles.sin().float()


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """[q, k] and gradients of both."""
    batch, heads, key_heads, sequence, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = [
        torch.randn(batch, h, sequence, size, generator=generator).to(DEVICE, dtype) for h in (heads, key_heads) * 2
    ]
    return drawn[:2], drawn[2:]


def restarting_positions(batch: int, sequence: int) -> Tensor:
    """(B, S): counts from 0 anew after every fifth, in the second sequence after every seventh, and so on."""
    steps = torch.arange(sequence, device=DEVICE)
    return torch.stack([steps % (5 + 2 * number) for number in range(batch)])


def results(function, inputs: list[Tensor], gradients: list[Tensor], *arguments, **options) -> list[Tensor]:
    """Both outputs and both gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs, *arguments, **options)
    found = torch.autograd.grad(outputs, inputs, gradients)
    for x, one in zip(inputs * 2, (*outputs, *found), strict=True):
        assert (one.dtype, one.shape) == (x.dtype, x.shape)
    return [x.detach() for x in (*outputs, *found)]


def assert_as_exact_as_the_reference(name: str, inputs, gradients, cosines, sines, **options) -> None:
    """Against float64, the error is at most twice that of the reference in the same dtypes, plus a few ulp."""
    doubles = ([x.double() for x in tensors] for tensors in (inputs, gradients))
    exact = results(complex_products, *doubles, cosines.double(), sines.double(), **options)
    plain = results(rotary_embedding_reference, inputs, gradients, cosines, sines, **options)
    with backend.use(name), poisoned_memory():
        found = results(rotary_embedding, inputs, gradients, cosines, sines, **options)
    for which, truth, expected, result in zip(("q", "k", "dq", "dk"), exact, plain, found, strict=True):
        if truth.numel() == 0:
            continue
        error, of_reference = (result.double() - truth).abs().max(), (expected.double() - truth).abs().max()
        allowed = 2 * of_reference + 4 * torch.finfo(result.dtype).eps * truth.abs().max()
        assert error <= allowed, f"{which}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("restarting", [False, True])
@EACH_PAIRING
@pytest.mark.parametrize("dtype", DTYPES)
@EACH_BACKEND
def test_values_and_gradients(name, dtype, interleaved, restarting) -> None:
    for shape in SHAPES:
        inputs, gradients = draw(shape, dtype)
        positions = restarting_positions(shape[0], shape[3]) if restarting else None
        table = tables(shape[3] + 3, shape[4])
        assert_as_exact_as_the_reference(name, inputs, gradients, *table, interleaved=interleaved, positions=positions)


@EACH_PAIRING
@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_BACKEND
def test_views_that_are_not_contiguous(name, layout, interleaved) -> None:
    inputs, gradients = draw((2, 4, 2, 35, 16), torch.float32)
    inputs, gradients = ([LAYOUTS[layout](x) for x in tensors] for tensors in (inputs, gradients))
    every_other = [table.repeat_interleave(2, dim=1)[:, ::2] for table in tables(35, 16)]
    positions = restarting_positions(2, 70)[:, ::2]
    assert_as_exact_as_the_reference(
        name, inputs, gradients, *every_other, interleaved=interleaved, positions=positions
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@EACH_BACKEND
def test_positions_of_any_integer_dtype(name, dtype) -> None:
    inputs, gradients = draw((2, 2, 1, 40, 8), torch.float32)
    positions = restarting_positions(2, 40).to(dtype)
    assert_as_exact_as_the_reference(name, inputs, gradients, *tables(40, 8), interleaved=False, positions=positions)


@EACH_BACKEND
def test_a_document_does_not_know_where_it_stands(name) -> None:
    (q, k), _ = draw((1, 4, 2, 40, 16), torch.float32)
    table = tables(40, 16)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None].to(DEVICE)
    with backend.use(name):
        packed = rotary_embedding(q, k, *table, positions=positions)
        parts = [rotary_embedding(q[:, :, part], k[:, :, part], *table) for part in (slice(0, 15), slice(15, 40))]
    for together, first, second in zip(packed, *parts, strict=True):
        assert torch.equal(together, torch.cat([first, second], dim=2))


@EACH_PAIRING
def test_positions_outside_the_tables_are_turned_by_nan(interleaved) -> None:
    (q, k), _ = draw((1, 2, 1, 4, 8), torch.float32)
    positions = torch.tensor([[0, -1, 6, 5]], device=DEVICE)
    with backend.use("triton"):
        for out in rotary_embedding(q, k, *tables(6, 8), interleaved=interleaved, positions=positions):
            assert out[:, :, 1:3].isnan().all()
            assert out[:, :, [0, 3]].isfinite().all()


@EACH_BACKEND
def test_dtypes_of_queries_and_keys_may_differ(name) -> None:
    (q, k), (d_q, d_k) = draw((2, 4, 2, 9, 16), torch.float32)
    inputs, gradients = [q, k.bfloat16()], [d_q, d_k.bfloat16()]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_as_exact_as_the_reference(name, inputs, gradients, *tables(9, 16), interleaved=False)


def test_heads_stay_inside_where_they_are() -> None:
    qkv = torch.randn(2, 9, 8, 16, device=DEVICE, requires_grad=True)
    inputs = [qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:6].transpose(1, 2)]
    with backend.use("triton"):
        out = rotary_embedding(*inputs, *tables(9, 16))
        gradients = torch.autograd.grad(out, inputs, [x.clone() for x in out])
    assert all(x.transpose(1, 2).is_contiguous() for x in (*out, *gradients))


def test_one_launch_for_queries_and_keys() -> None:
    inputs, gradients = draw((2, 4, 2, 9, 16), torch.float32)
    with mock.patch.object(rope, "launch", side_effect=rope.launch) as launch:
        for name, launches in (("triton", 2), ("torch", 2)):
            with backend.use(name):
                results(rotary_embedding, inputs, gradients, *tables(9, 16))
            assert launch.call_count == launches  # one forward, one backward


@EACH_PAIRING
@EACH_BACKEND
def test_inputs_and_gradients_are_left_alone(name, interleaved) -> None:
    inputs, gradients = draw((2, 4, 2, 9, 16), torch.float32)
    table = tables(9, 16)
    before = [x.clone() for x in (*inputs, *gradients, *table)]
    with backend.use(name):
        results(rotary_embedding, inputs, gradients, *table, interleaved=interleaved)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, *gradients, *table), before, strict=True))


@EACH_PAIRING
def test_nothing_is_written_outside(interleaved) -> None:
    inputs, _ = draw((2, 4, 2, 35, 12), torch.float32)
    whole = [torch.full([size + 2 for size in x.shape], 7.0, device=DEVICE) for x in inputs]
    q_out, k_out = (x[1:-1, 1:-1, 1:-1, 1:-1] for x in whole)
    rope.launch(*inputs, *tables(35, 12), None, q_out, k_out, interleaved, False)
    for x, out in zip(whole, (q_out, k_out), strict=True):
        assert (out != 7.0).all()
        out.fill_(7.0)
        assert (x == 7.0).all()


@pytest.mark.parametrize("shape", [(0, 2, 1, 9, 4), (2, 2, 1, 0, 4), (2, 2, 1, 9, 0), (2, 2, 0, 9, 4)])
@EACH_BACKEND
def test_nothing_to_turn(name, shape) -> None:
    inputs, gradients = draw(shape, torch.float32)
    assert_as_exact_as_the_reference(name, inputs, gradients, *tables(9, shape[4]), interleaved=False)


def test_tables_that_learn() -> None:
    (q, k), _ = draw((1, 2, 1, 9, 4), torch.float32)
    cosines, sines = tables(9, 4)
    cosines.requires_grad_()
    with backend.use("torch"):
        rotary_embedding(q, k, cosines, sines)[0].sum().backward()
    torch.testing.assert_close(cosines.grad, q.unflatten(-1, (2, 2)).sum((0, 1, 3)))
    with backend.use("triton"), pytest.raises(ValueError, match="gives no gradients of the tables"):
        rotary_embedding(q, k, cosines, sines)


def test_float64_has_no_kernel() -> None:
    inputs, _ = draw((1, 2, 1, 9, 4), torch.float64)
    with backend.use("triton"), pytest.raises(ValueError, match="has no kernel for"):
        rotary_embedding(*inputs, *tables(9, 4))


@pytest.mark.parametrize(("interleaved", "restarting", "layout"), [(False, False, "heads inside"), (True, True, None)])
def test_operator_keeps_its_contract(interleaved, restarting, layout) -> None:
    inputs, _ = draw((2, 4, 2, 9, 8), torch.float32)
    inputs = [(LAYOUTS[layout](x) if layout else x).requires_grad_() for x in inputs]
    positions = restarting_positions(2, 9) if restarting else None
    arguments = (*inputs, *tables(9, 8), positions, interleaved, False)
    torch.library.opcheck(torch.ops.cegbench.rotate.default, arguments)


@EACH_PAIRING
@EACH_BACKEND
def test_compiles_in_one_graph(name, interleaved) -> None:
    inputs, gradients = draw((2, 4, 2, 9, 16), torch.float32)
    options = {"interleaved": interleaved, "positions": restarting_positions(2, 9)}
    compiled = torch.compile(rotary_embedding, backend="aot_eager", fullgraph=True)
    with backend.use(name):
        eager = results(rotary_embedding, inputs, gradients, *tables(9, 16), **options)
        traced = results(compiled, inputs, gradients, *tables(9, 16), **options)
    for expected, found in zip(eager, traced, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"q": torch.zeros(2, 9, 8)}, "q must have 4 dimensions"),
        ({"k": torch.zeros(2, 9, 8)}, "k must have 4 dimensions"),
        ({"q": torch.zeros(2, 4, 9, 7), "k": torch.zeros(2, 4, 9, 7)}, "q must have an even head size, got 7"),
        ({"k": torch.zeros(2, 4, 8, 8)}, "k must have the batch, sequence and head size of q"),
        ({"k": torch.zeros(1, 4, 9, 8)}, "k must have the batch, sequence and head size of q"),
        ({"k": torch.zeros(2, 4, 9, 6)}, "k must have the batch, sequence and head size of q"),
        ({"q": torch.zeros(2, 4, 9, 8, dtype=torch.int32)}, "q must have a floating dtype"),
        ({"k": torch.zeros(2, 4, 9, 8, device="meta")}, "k must be on the device of q"),
        ({"cosines": torch.zeros(9, 8)}, r"cosines must have the shape \(positions, 4\), got \(9, 8\)"),
        ({"cosines": torch.zeros(4)}, "cosines must have the shape"),
        ({"sines": torch.zeros(10, 4)}, "sines must have the shape of cosines"),
        ({"sines": torch.zeros(9, 4, dtype=torch.int64)}, "sines must have a floating dtype"),
        ({"cosines": torch.zeros(8, 4), "sines": torch.zeros(8, 4)}, "a row for each of 9 positions"),
        ({"positions": torch.zeros(9, dtype=torch.int64)}, r"positions must have the shape \(2, 9\), got \(9,\)"),
        ({"positions": torch.zeros(2, 9)}, "positions must have an integer dtype"),
        ({"positions": torch.zeros(2, 9, dtype=torch.bool)}, "positions must have an integer dtype"),
        ({"positions": torch.zeros(2, 9, dtype=torch.int64, device="meta")}, "positions must be on the device of q"),
    ],
)
@pytest.mark.parametrize("function", [rotary_embedding, rotary_embedding_reference])
def test_wrong_arguments(function, wrong, said) -> None:
    right = {"q": torch.zeros(2, 4, 9, 8), "k": torch.zeros(2, 2, 9, 8)}
    table = {"cosines": torch.zeros(9, 4), "sines": torch.zeros(9, 4)}
    with pytest.raises(ValueError, match=said):
        function(**{**right, **table, **wrong})


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_resources_and_instructions(architecture: int) -> None:
    compiled = run_compiled("tests.kernels.compile_rope", architecture)
    assert len(compiled) == 3
    for one in compiled:
        what = f"sm_{architecture} C={one['size']} {one['bits']} bits, {one['registers']} registers"
        assert one["name"] == "rotary_kernel", what
        assert not one["spills"], what
        assert one["shared_bytes"] <= SHARED_BYTES[architecture] // 8, what
        # A thread turns 16 pairs of q or of k: the code has both, and writes 16 bytes at a time.
        assert one["instructions"]["STG"] == 2 * 32 * one["bits"] // 128, what


@st.composite
def calls(draw_one) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Inputs of any small shape, their dimensions in any order in memory, gradients, and positions or none."""
    size = 2 * draw_one(st.integers(1, 20))
    shape = (*(draw_one(st.integers(1, largest)) for largest in (3, 5, 3, 30)), size)
    inputs, gradients = draw(shape, draw_one(st.sampled_from(DTYPES[:2])))

    def permuted(x: Tensor) -> Tensor:
        order = draw_one(st.permutations(range(4)))
        return x.permute(order).contiguous().permute([order.index(dimension) for dimension in range(4)])

    count = shape[0] * shape[3]
    drawn = draw_one(st.none() | st.lists(st.integers(0, 29), min_size=count, max_size=count))
    positions = None if drawn is None else torch.tensor(drawn, device=DEVICE).view(shape[0], shape[3])
    return [permuted(x) for x in inputs], [permuted(x) for x in gradients], positions


@given(call=calls(), interleaved=st.booleans())
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@EACH_BACKEND
def test_whatever_the_call(name, call, interleaved) -> None:
    inputs, gradients, positions = call
    table = tables(30, inputs[0].shape[3])
    assert_as_exact_as_the_reference(name, inputs, gradients, *table, interleaved=interleaved, positions=positions)
