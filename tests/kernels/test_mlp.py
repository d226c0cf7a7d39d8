"""The MLP's linear layer with its activation: values, gradients, the choice of implementation, and the operators."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend, jit, mlp
from kernels.mlp import REFERENCES, linear_gelu, linear_relu_squared, linear_swiglu
from tests.kernels.attention.exactness import DEVICE, TRITON_DTYPES, poisoned_memory
from tests.kernels.gemm_checks import assert_as_exact_as_the_reference, assert_compiled_well, results

OPS = {"relu_squared": linear_relu_squared, "gelu": linear_gelu, "swiglu": linear_swiglu}
SHAPES = [(1, 16, 16), (63, 100, 40), (100, 24, 70), (1000, 16, 8), (33, 7, 5)]  # tokens, width, features
ACTIVATIONS = pytest.mark.parametrize("activation", OPS)
BACKENDS = pytest.mark.parametrize("name", ["triton", "torch"])
DESCRIPTORS_HERE = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


def random_inputs(activation: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, weight and bias, and a gradient of the output."""
    tokens, width, features = shape
    rows = features * (2 if activation == "swiglu" else 1)
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = [(tokens, width), (rows, width), (rows,), (tokens, features)]
    x, weight, bias, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    weight /= max(1, width) ** 0.5
    x, weight, bias, gradient = (tensor.to(DEVICE, dtype) for tensor in (x, weight, bias, gradient))
    return [x, weight, bias], gradient


def check(name: str, activation: str, inputs: list[Tensor], gradient: Tensor) -> None:
    with backend.use(name), poisoned_memory():
        found = results(OPS[activation], inputs, gradient)
    assert_as_exact_as_the_reference(found, REFERENCES[activation], inputs, gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@ACTIVATIONS
def test_values_and_gradients(activation, dtype, shape) -> None:
    check("triton", activation, *random_inputs(activation, shape, dtype))


@ACTIVATIONS
def test_without_bias(activation) -> None:
    (x, weight, _), gradient = random_inputs(activation, (33, 7, 5), torch.float32)
    check("triton", activation, [x, weight], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@ACTIVATIONS
def test_pytorch_takes_every_dtype(activation, dtype) -> None:
    check("torch", activation, *random_inputs(activation, (33, 7, 5), dtype))


@ACTIVATIONS
def test_pointers(activation, monkeypatch) -> None:
    monkeypatch.setattr(jit, "tma_reads", lambda *tensors: False)
    check("triton", activation, *random_inputs(activation, (63, 100, 40), torch.float32))


@pytest.mark.skipif(not DESCRIPTORS_HERE, reason="this GPU has no TMA")
def test_descriptors_read_what_models_have() -> None:
    tensor = torch.zeros(1, 33, 96, dtype=torch.float16, device=DEVICE)
    assert jit.tma_reads(tensor, tensor[..., :64])
    assert not jit.tma_reads(tensor[..., 1:])
    assert not jit.tma_reads(torch.zeros(1, 33, 7, device=DEVICE))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch.nn.functional.pad(x, (3, 2))[:, 3:-2],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["columns inside", "every other row", "every other column", "unaligned", "one row for all"],
)
@ACTIVATIONS
def test_views_that_are_not_contiguous(activation, layout) -> None:
    (x, weight, bias), gradient = random_inputs(activation, (35, 24, 20), torch.float32)
    bias = bias.repeat_interleave(2)[::2]
    check("triton", activation, [layout(x), layout(weight), bias], layout(gradient))


@BACKENDS
@ACTIVATIONS
def test_any_leading_dimensions(activation, name) -> None:
    (x, *parameters), gradient = random_inputs(activation, (12, 16, 20), torch.float32)
    check(name, activation, [x.view(2, 3, 2, 16).transpose(0, 1), *parameters], gradient.view(3, 2, 2, 20))
    check(name, activation, [x[0], *parameters], gradient[0])


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 16, 8), (9, 16, 0), (9, 0, 8)], ids=str)
@ACTIVATIONS
def test_nothing_to_multiply(activation, shape, name) -> None:
    check(name, activation, *random_inputs(activation, shape, torch.float32))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@ACTIVATIONS
def test_far_from_zero(activation, dtype) -> None:
    """Where erf and the sigmoid saturate, and around 0."""
    x = torch.cat([torch.linspace(-40, 40, 401), torch.linspace(-1e-3, 1e-3, 21)]).to(DEVICE, dtype)[:, None]
    weight = torch.ones(2 if activation == "swiglu" else 1, 1, device=DEVICE, dtype=dtype)
    check("triton", activation, [x, weight], torch.ones_like(x))


@ACTIVATIONS
def test_garbage_around_the_inputs_stays_out(activation) -> None:
    inputs, gradient = random_inputs(activation, (35, 24, 20), torch.float32)
    views = []
    for tensor in (*inputs[:2], gradient):
        memory = torch.full((tensor.shape[0] + 40, 40), torch.nan, device=DEVICE)
        views.append(memory[: tensor.shape[0], : tensor.shape[1]].copy_(tensor))
    with backend.use("triton"):
        found = results(OPS[activation], [*views[:2], inputs[2]], views[2])
    assert_as_exact_as_the_reference(found, REFERENCES[activation], inputs, gradient)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@ACTIVATIONS
def test_nothing_is_written_around_the_results(activation, direction) -> None:
    (x, weight, bias), gradient = random_inputs(activation, (35, 24, 20), torch.float32)
    shape = (35, 20 if direction == "forward" else weight.shape[0])
    memory = torch.full((256 + shape[0] * shape[1],), 77.0, device=DEVICE)
    out = memory[128:-128].view(shape).fill_(torch.nan)
    mlp._launch(x, weight, bias, None if direction == "forward" else gradient, out, activation)
    assert not memory.isnan().any()
    assert (memory[:128] == 77.0).all()
    assert (memory[-128:] == 77.0).all()


@ACTIVATIONS
def test_not_a_number_stays_one(activation) -> None:
    (x, weight, bias), _ = random_inputs(activation, (35, 24, 20), torch.float32)
    x[3, 5] = torch.nan
    with backend.use("triton"):
        out = OPS[activation](x, weight, bias)
    assert out[3].isnan().all()
    assert out.isnan().sum() == 20


@ACTIVATIONS
def test_repeated_runs_are_bit_identical(activation) -> None:
    inputs, gradient = random_inputs(activation, (63, 32, 40), torch.float32)
    with backend.use("triton"):
        first = results(OPS[activation], inputs, gradient)
        for _ in range(100 if DEVICE == "cuda" else 2):
            again = results(OPS[activation], inputs, gradient)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradient_of_one_input(needed) -> None:
    inputs, gradient = random_inputs("gelu", (33, 16, 20), torch.float32)
    expected = results(REFERENCES["gelu"], inputs, gradient)[1 + needed]
    inputs[needed].requires_grad_()
    with backend.use("triton"):
        (found,) = torch.autograd.grad(linear_gelu(*inputs), inputs[needed], gradient)
    torch.testing.assert_close(found, expected)


@BACKENDS
@ACTIVATIONS
def test_autocast(activation, name) -> None:
    inputs, gradient = random_inputs(activation, (20, 16, 24), torch.float32)
    for tensor in inputs:
        tensor.requires_grad_()
    with backend.use(name):
        expected = OPS[activation](*(tensor.half() for tensor in inputs))
        with torch.autocast(DEVICE, dtype=torch.float16):
            found = OPS[activation](*inputs)
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found, inputs, gradient.half())
    assert all(one.dtype == torch.float32 and one.isfinite().all() for one in gradients)


@ACTIVATIONS
@settings(max_examples=6)
@given(data=st.data())
def test_any_shape_and_strides(activation, data) -> None:
    tokens, width, features = (data.draw(st.integers(1, 50), label=label) for label in ("tokens", "width", "features"))
    inputs, gradient = random_inputs(activation, (tokens, width, features), torch.float32)
    views = []
    for tensor in (*inputs[:2], gradient):
        before, after, step = (data.draw(st.integers(low, 5), label="stride") for low in (0, 0, 1))
        padded = torch.nn.functional.pad(tensor.repeat_interleave(step, 0), (before, after))[::step]
        view = padded[:, before : before + tensor.shape[1]]
        views.append(view.mT.contiguous().mT if data.draw(st.booleans(), label="columns inside") else view)
    check("triton", activation, [*views[:2], inputs[2]], views[2])


@pytest.mark.parametrize("with_bias", [True, False])
@ACTIVATIONS
def test_operators_keep_their_contracts(activation, with_bias) -> None:
    (x, weight, bias), gradient = random_inputs(activation, (17, 16, 24), torch.float32)
    bias = bias if with_bias else None
    torch.library.opcheck(mlp.linear_activation_backward, (gradient, x, weight, bias, activation))
    if bias is not None:
        bias.requires_grad_()
    arguments = (x.mT.contiguous().mT.requires_grad_(), weight.requires_grad_(), bias, activation)
    torch.library.opcheck(mlp.linear_activation, arguments)


@BACKENDS
@ACTIVATIONS
def test_compiles_in_one_graph(activation, name) -> None:
    inputs, gradient = random_inputs(activation, (33, 16, 24), torch.float32)
    compiled = torch.compile(OPS[activation], backend="aot_eager", fullgraph=True)
    with backend.use(name):
        eager = results(OPS[activation], inputs, gradient)
        traced = results(compiled, inputs, gradient)
    for expected, found in zip(eager, traced, strict=True):
        torch.testing.assert_close(found, expected)


@ACTIVATIONS
def test_flops(activation) -> None:
    """Those of the products, and backward those of the first anew."""
    inputs, gradient = random_inputs(activation, (20, 16, 24), torch.float32)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with backend.use("triton"):
        with FlopCounterMode(display=False) as forward:
            out = OPS[activation](*inputs)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out, inputs, gradient)
    product = 2 * 20 * 16 * inputs[1].shape[0]
    assert (forward.get_total_flops(), backward.get_total_flops()) == (product, 3 * product)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.tensor(1.0)}, r"^x must have dimensions \(..., width\)"),
        ({"x": torch.zeros(3, 16, dtype=torch.int64)}, r"^x must have .* floating dtype, got \(3, 16\) torch.int64"),
        ({"weight": torch.zeros(8, 15)}, r"^weight must have the shape \(features, 16\), got \(8, 15\)"),
        ({"weight": torch.zeros(16)}, r"^weight must have the shape \(features, 16\), got \(16,\)"),
        ({"weight": torch.zeros(7, 16)}, r"^weight must have an even number of rows, gate and up, got 7"),
        ({"weight": torch.zeros(8, 16).half()}, r"^weight must have the dtype .* torch.float32 .* got torch.float16"),
        ({"weight": torch.zeros(8, 16, device="meta")}, r"^weight must have .* device of x, .* on meta"),
        ({"bias": torch.zeros(4)}, r"^bias must have the shape \(8,\), got \(4,\)"),
        ({"bias": torch.zeros(8).double()}, r"^bias must have the dtype .* got torch.float64"),
    ],
)
@BACKENDS
def test_arguments_that_do_not_fit(name, change, said) -> None:
    arguments = {"x": torch.zeros(3, 16), "weight": torch.zeros(8, 16), "bias": torch.zeros(8)} | change
    with backend.use(name), pytest.raises(ValueError, match=said):
        linear_swiglu(**arguments)


def test_dtypes_without_a_kernel() -> None:
    for dtype, said in (
        (torch.float64, "no kernel for torch.float64"),
        (torch.bfloat16, "bfloat16 products are wrong"),
    ):
        x = torch.zeros(3, 16, dtype=dtype)
        with backend.use("triton"), pytest.raises(ValueError, match=f"^linear_gelu cannot run its Triton .*{said}"):
            linear_gelu(x, x)


class TestChoice:
    """Under `auto` the kernel runs only where the table says that it was measured faster."""

    @pytest.fixture(autouse=True)
    def _table(self, tmp_path, monkeypatch):
        measured = {"A GPU": {"linear_gelu": {"768": 1.2, "1024": 1.04}, "linear_swiglu": {"1024": 1.05}}}
        table = tmp_path / "measured.json"
        table.write_text(json.dumps(measured))
        monkeypatch.setattr(mlp, "MEASURED", table)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("A GPU", "Another")[index])
        monkeypatch.setattr(backend, "why_not_triton", lambda *args, **options: "")
        for function in (mlp._read_ratio, backend._settle):
            function.cache_clear()
        yield
        for function in (mlp._read_ratio, backend._settle):
            function.cache_clear()

    def choose(self, op: str, width: int, device: int = 0, dtype: torch.dtype = torch.bfloat16) -> str:
        x = SimpleNamespace(
            device=torch.device("cuda", device), dtype=dtype, shape=(8, width), element_size=lambda: dtype.itemsize
        )
        return mlp._choose(op, x)

    def test_where_it_was_measured_faster(self) -> None:
        assert self.choose("linear_gelu", 768) == "triton"
        assert self.choose("linear_gelu", 768, dtype=torch.float16) == "triton"
        assert self.choose("linear_swiglu", 1024) == "triton"

    def test_elsewhere(self) -> None:
        assert self.choose("linear_gelu", 1024) == "torch"
        assert self.choose("linear_gelu", 512) == "torch"
        assert self.choose("linear_swiglu", 768) == "torch"
        assert self.choose("linear_relu_squared", 768) == "torch"
        assert self.choose("linear_gelu", 768, device=1) == "torch"
        assert self.choose("linear_gelu", 768, dtype=torch.float32) == "torch"

    def test_the_switch_overrules_the_table(self) -> None:
        with backend.use("triton"):
            assert self.choose("linear_gelu", 512) == "triton"
        with backend.use("torch"):
            assert self.choose("linear_gelu", 768) == "torch"

    def test_a_cpu_is_not_asked_for_its_name(self) -> None:
        x = torch.randn(3, 16)
        assert torch.equal(linear_gelu(x, x), REFERENCES["gelu"](x, x))


def test_the_table_names_devices_ops_and_widths() -> None:
    ops = {f"linear_{activation}" for activation in OPS}
    for rows in json.loads(mlp.MEASURED.read_text()).values():
        assert set(rows) <= ops
        for widths in rows.values():
            assert all(int(width) > 0 and ratio > 0.0 for width, ratio in widths.items())


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiled_ahead_of_time(architecture) -> None:
    pytest.importorskip("triton")
    assert_compiled_well("tests.kernels.compile_mlp", architecture, cases=8)
