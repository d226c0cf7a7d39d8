"""rms_norm and layer_norm, in Triton and in PyTorch, against their formulas in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels import backend, norm
from kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.attention.exactness import DEVICE, poisoned_memory
from tests.kernels.compiled import SHARED_BYTES, run_compiled

EPSILON = 1e-5
KINDS = ("rms", "rms without weight", "layer", "layer with bias")
BACKENDS = ("triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1,), (3, 1), (1, 63), (2, 5, 100), (70, 768), (3, 1000), (300, 33), (1500, 5), (3, 8192)]
LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "every other value": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "unaligned": lambda x: nn.functional.pad(x, (3, 2))[..., 3:-2],
    "one row for all": lambda x: x[:1, :1].expand_as(x),
    "one value for all": lambda x: x[:1, :1, :1].expand_as(x),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_BACKEND = pytest.mark.parametrize("name", BACKENDS)
EACH_RESIDUAL = pytest.mark.parametrize("with_residual", [False, True])


def formula(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None):
    """The published formulas, step by step."""
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True) if kind.startswith("layer") else h
    y = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if residual is None else (y, h)


def op(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None):
    if kind.startswith("layer"):
        return layer_norm(x, weight, bias, residual=residual, epsilon=EPSILON)
    return rms_norm(x, weight, residual=residual, epsilon=EPSILON)


def reference(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None):
    if kind.startswith("layer"):
        return layer_norm_reference(x, weight, bias, residual=residual, epsilon=EPSILON)
    return rms_norm_reference(x, weight, residual=residual, epsilon=EPSILON)


def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype, with_residual: bool) -> tuple[list, list[Tensor]]:
    """[x, weight, bias, residual] with float32 parameters, and gradients of the results."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    inputs = [
        normal(*shape, dtype=dtype),
        None if kind == "rms without weight" else normal(shape[-1]),
        normal(shape[-1]) if kind == "layer with bias" else None,
        normal(*shape, dtype=dtype) if with_residual else None,
    ]
    return inputs, [normal(*shape, dtype=dtype) for _ in range(1 + with_residual)]


def results(function, kind: str, inputs: list[Tensor | None], gradients: list[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of the inputs that there are."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(kind, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    there = [x for x in inputs if x is not None]
    found = torch.autograd.grad(outputs, there, gradients)
    assert all(one.dtype == x.dtype and one.shape == x.shape for one, x in zip(found, there, strict=True))
    assert [out.dtype for out in outputs] == [gradient.dtype for gradient in gradients]
    return [x.detach() for x in (*outputs, *found)]


def assert_as_exact_as_the_reference(name: str, kind: str, inputs: list[Tensor | None], gradients) -> None:
    """Against float64, the error is at most twice that of the reference in the same dtypes, plus a few ulp."""
    doubles = [None if x is None else x.double() for x in inputs]
    exact = results(formula, kind, doubles, [gradient.double() for gradient in gradients])
    plain = results(reference, kind, inputs, gradients)
    with backend.use(name), poisoned_memory():
        found = results(op, kind, inputs, gradients)
    x, weight, _, residual = doubles
    h = x if residual is None else x + residual
    variance = h.var(-1, correction=0) if kind.startswith("layer") else h.square().mean(-1)
    # d_x is a difference of two numbers of this size; nothing is left of them where a row has one value.
    cancelled = (gradients[0] * (1.0 if weight is None else weight)).abs().max() / (variance + EPSILON).sqrt().min()
    for position, (truth, expected, result) in enumerate(zip(exact, plain, found, strict=True)):
        # A residual is added in the dtype of x: what follows has its rounding errors, float32 weights included.
        rounded = result.dtype if residual is None else inputs[0].dtype
        error, of_reference = (result.double() - truth).abs().max(), (expected.double() - truth).abs().max()
        allowed = 2 * of_reference + 4 * torch.finfo(rounded).eps * truth.abs().max().clamp(min=1.0)
        allowed += cancelled * torch.finfo(torch.float32).eps
        assert error <= allowed, f"result {position}: error {error:.3g}, allowed {allowed:.3g}"


@EACH_RESIDUAL
@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@EACH_BACKEND
def test_values_and_gradients(name, dtype, kind, with_residual) -> None:
    for shape in SHAPES:
        assert_as_exact_as_the_reference(name, kind, *draw(kind, shape, dtype, with_residual))


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_BACKEND
def test_views_that_are_not_contiguous(name, layout) -> None:
    change = LAYOUTS[layout]
    inputs, gradients = draw("layer with bias", (4, 7, 48), torch.float32, True)
    x, weight, bias, residual = inputs
    every_other = [parameter.repeat_interleave(2)[::2] for parameter in (weight, bias)]
    views = [change(x), *every_other, change(residual)]
    assert_as_exact_as_the_reference(name, "layer with bias", views, [change(gradient) for gradient in gradients])


@EACH_KIND
@EACH_BACKEND
def test_statistics_are_of_float32(name, kind) -> None:
    """Squares beyond the range of float16, and a mean that would swamp the deviation."""
    inputs, gradients = draw(kind, (3, 100), torch.float16, False)
    inputs[0] = inputs[0] * 20 + 3000
    assert_as_exact_as_the_reference(name, kind, inputs, gradients)


@EACH_BACKEND
def test_what_autocast_brings_together(name) -> None:
    """A 16-bit branch on a float32 residual stream, with float32 weights: the sum stays float32."""
    (x, weight, bias, residual), _ = draw("layer with bias", (5, 100), torch.float16, True)
    inputs, gradients = [x, weight, bias, residual.float()], [torch.randn_like(x), torch.randn_like(x).float()]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_as_exact_as_the_reference(name, "layer with bias", inputs, gradients)


@pytest.mark.parametrize("used", [0, 1])
@EACH_BACKEND
def test_one_of_two_results_may_be_unused(name, used) -> None:
    (x, weight, _, residual), gradients = draw("rms", (5, 100), torch.float32, True)
    zeros = [gradient if index == used else torch.zeros_like(gradient) for index, gradient in enumerate(gradients)]
    with backend.use(name):
        both = results(op, "rms", [x, weight, None, residual], zeros)[2:]
        leaves = [tensor.requires_grad_() for tensor in (x, weight, residual)]
        out = rms_norm(x, weight, residual=residual, epsilon=EPSILON)[used]
        one = torch.autograd.grad(out, leaves, gradients[used], allow_unused=True)
    for expected, found in zip(both, one, strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if found is None else found, expected)


@EACH_RESIDUAL
@EACH_BACKEND
def test_frozen_parameters(name, with_residual) -> None:
    inputs, gradients = draw("layer with bias", (5, 100), torch.float32, with_residual)
    with backend.use(name):
        expected = results(op, "layer with bias", inputs, gradients)[1 + with_residual]
        inputs[0].requires_grad_()
        found = torch.autograd.grad(op("layer with bias", *inputs), inputs[0], gradients)[0]
    assert torch.equal(found, expected)


def test_every_share_of_the_weights_gradient_counts() -> None:
    """Programs that take several tiles, one or none, all the way to a last tile that is not full."""
    for rows in (1, 64, 65, 3 * 64, 4 * 64 + 1, 9 * 64 + 7):
        inputs, gradients = draw("layer with bias", (rows, 60), torch.float32, False)
        assert_as_exact_as_the_reference("triton", "layer with bias", inputs, gradients)


@EACH_BACKEND
def test_repeated_runs_are_bit_identical(name) -> None:
    inputs, gradients = draw("layer with bias", (500, 100), torch.float32, True)
    with backend.use(name):
        first = results(op, "layer with bias", inputs, gradients)
        for _ in range(100 if DEVICE == "cuda" else 2):
            again = results(op, "layer with bias", inputs, gradients)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_is_written_outside() -> None:
    rows, width, margin = 70, 60, 4096
    (x, weight, bias, residual), _ = draw("layer with bias", (rows, width), torch.float32, True)
    whole = [torch.full((rows * width + 2 * margin,), 7.0, device=DEVICE) for _ in range(3)]
    y, h, d_x = (one[margin:-margin].view(rows, width) for one in whole)
    statistics = torch.full((2 * rows + 2 * margin,), 7.0, device=DEVICE)
    inside = statistics[margin:-margin].view(2, rows)
    norm.launch_forward(x, weight, bias, residual, y, h, inside, EPSILON, True)
    norm.launch_backward(y, h, h, weight, inside, d_x, True)
    for one in (*whole, statistics):
        assert (one[:margin] == 7.0).all()
        assert (one[-margin:] == 7.0).all()


@EACH_KIND
@EACH_RESIDUAL
@EACH_BACKEND
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(name, shape, with_residual, kind) -> None:
    inputs, gradients = draw(kind, shape, torch.float32, with_residual)
    with backend.use(name), poisoned_memory():
        found = results(op, kind, inputs, gradients)
    assert all((tensor == 0.0).all() for tensor in found)


def test_pytorch_gives_the_bits_of_its_modules() -> None:
    (x, weight, bias, _), (gradient,) = draw("layer with bias", (5, 100), torch.float32, False)
    modules = {
        "layer with bias": nn.LayerNorm(100, EPSILON, device=DEVICE),
        "layer": nn.LayerNorm(100, EPSILON, bias=False, device=DEVICE),
        "rms": nn.RMSNorm(100, EPSILON, device=DEVICE),
    }
    for kind, module in modules.items():
        parameters = {"weight": weight} | ({"bias": bias} if kind == "layer with bias" else {})
        module.load_state_dict(parameters)
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        expected = [out, *torch.autograd.grad(out, [inputs, *module.parameters()], gradient)]
        with backend.use("torch"):
            found = results(op, kind, [x, weight, parameters.get("bias"), None], [gradient])
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@EACH_KIND
@EACH_RESIDUAL
def test_operators_keep_their_contract(kind, with_residual) -> None:
    inputs, gradients = draw(kind, (2, 5, 20), torch.float32, with_residual)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    centred = kind.startswith("layer")
    with_gradients = [None if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.cegbench.norm.default, (*with_gradients, EPSILON, centred))
    x, weight, bias, residual = (None if x is None else x.detach() for x in inputs)
    _, h, statistics = torch.ops.cegbench.norm(x, weight, bias, residual, EPSILON, centred)
    d_h, h = (gradients[1], h) if with_residual else (None, x)
    arguments = (gradients[0], d_h, h, weight, statistics, bias is not None)
    torch.library.opcheck(torch.ops.cegbench.norm_backward.default, arguments)


@EACH_RESIDUAL
@pytest.mark.parametrize("kind", ["rms", "layer with bias"])
@EACH_BACKEND
def test_compiles_in_one_graph(name, kind, with_residual) -> None:
    inputs, gradients = draw(kind, (3, 50), torch.float32, with_residual)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    with backend.use(name):
        eager = results(op, kind, inputs, gradients)
        traced = results(compiled, kind, inputs, gradients)
    for expected, found in zip(eager, traced, strict=True):
        torch.testing.assert_close(found, expected)


@EACH_KIND
def test_the_backend_decides(kind) -> None:
    inputs, gradients = draw(kind, (3, 50), torch.float32, True)
    with (
        mock.patch.object(norm, "launch_forward", side_effect=norm.launch_forward) as forward,
        mock.patch.object(norm, "launch_backward", side_effect=norm.launch_backward) as backward,
    ):
        for name in BACKENDS:
            with backend.use(name):
                results(op, kind, inputs, gradients)
    assert (forward.call_count, backward.call_count) == (1, 1)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 8193), "rms_norm cannot run its Triton kernel: its rows end at 8192 values, got 8193"),
        (torch.zeros(2, 8, dtype=torch.float64), "has no kernel for torch.float64"),
    ],
)
def test_what_has_no_kernel(x, said) -> None:
    x = x.to(DEVICE)
    with backend.use("triton"), pytest.raises(ValueError, match=said):
        rms_norm(x)
    with backend.use("torch"):
        assert rms_norm(x).dtype == x.dtype


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x": torch.zeros(())}, "x must have rows of at least one value"),
        ({"x": torch.zeros(3, 0)}, "x must have rows of at least one value"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "x must have a floating dtype"),
        ({"weight": torch.zeros(7)}, r"weight must have the shape \(8,\), got \(7,\)"),
        ({"weight": torch.zeros(1, 8)}, "weight must have the shape"),
        ({"weight": torch.zeros(8, dtype=torch.int64)}, "weight must have a floating dtype"),
        ({"weight": torch.zeros(8, device="meta")}, "weight must be on the device of x"),
        ({"bias": torch.zeros(9)}, "bias must have the shape"),
        ({"residual": torch.zeros(1, 8)}, r"residual must have the shape \(3, 8\), got \(1, 8\)"),
        ({"epsilon": -1e-5}, "epsilon must be a finite number, 0 or more, got -1e-05"),
        ({"epsilon": float("nan")}, "epsilon must be"),
    ],
)
@pytest.mark.parametrize("function", [layer_norm, layer_norm_reference, rms_norm, rms_norm_reference])
def test_wrong_arguments(function, wrong, said) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(8), **wrong}
    if "bias" in wrong and "rms" in function.__name__:
        return
    with pytest.raises(ValueError, match=said):
        function(**arguments)


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_resources_and_instructions(architecture: int) -> None:
    compiled = run_compiled("tests.kernels.compile_norm", architecture)
    assert [one["name"] for one in compiled] == ["norm_forward_kernel", "norm_backward_kernel"] * 3
    for one in compiled:
        what = f"{one['name']} sm_{architecture} D={one['width']} {one['bits']} bits"
        assert not one["spills"], what
        assert one["shared_bytes"] <= SHARED_BYTES[architecture] // 2, what  # two programs on a multiprocessor
        # A thread has 16 values of each of y and h or of d_x; a 16-bit or 32-bit word at a time, this would be more.
        assert one["instructions"]["STG"] <= 16, what
        if one["name"] == "norm_backward_kernel":
            assert one["instructions"]["LDGSTS"] > 0, what  # cp.async: rows that come while others are summed


@st.composite
def calls(draw_one) -> tuple[str, list[Tensor | None], list[Tensor]]:
    """A norm of any small shape, its dimensions in any order in memory."""
    kind = draw_one(st.sampled_from(KINDS))
    shape = (*draw_one(st.lists(st.integers(1, 12), max_size=2)), draw_one(st.integers(1, 70)))
    inputs, gradients = draw(kind, shape, draw_one(st.sampled_from(DTYPES[:2])), draw_one(st.booleans()))

    def permuted(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        order = draw_one(st.permutations(range(len(shape))))
        return x.permute(order).contiguous().permute([order.index(dimension) for dimension in range(len(shape))])

    x, weight, bias, residual = inputs
    return kind, [permuted(x), weight, bias, permuted(residual)], [permuted(gradient) for gradient in gradients]


@given(call=calls())
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@EACH_BACKEND
def test_whatever_the_call(name, call) -> None:
    assert_as_exact_as_the_reference(name, *call)
