"""cross_entropy and linear_cross_entropy, in Triton and in PyTorch, against their references in float64."""

import itertools
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from kernels import backend
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.gemm import TileSize
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.attention.exactness import DEVICE, poisoned_memory
from tests.kernels.compiled import MATRIX_PRODUCT, SHARED_BYTES, run_compiled

# Of ignored tokens, in the interpreter, whose results are not used.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")

BACKENDS = pytest.mark.parametrize("name", ["triton", "torch"])
BOTH = pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "z-loss": {"z_loss": 0.02},
    "smoothing": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 3},
    "everything": {"softcap": 2.0, "z_loss": 0.01, "label_smoothing": 0.3, "ignore_index": 3},
}
SHAPES = [  # tokens, width, vocabulary
    (1, 1, 1),
    (5, 16, 17),
    (63, 24, 100),
    (100, 33, 63),
    (17, 40, 1000),
]
# Triton's interpreter multiplies bfloat16 wrongly.
RUNS = [
    *(
        ("triton", linear, dtype)
        for linear in (False, True)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if not (linear and dtype == torch.bfloat16 and DEVICE == "cpu")
    ),
    *(("torch", True, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
]


def random_case(
    linear: bool, tokens: tuple[int, ...], width: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    """[x, weight] or [logits], targets of which some are 3, and a gradient that differs from token to token."""
    generator = torch.Generator().manual_seed(math.prod(tokens) + 7 * width + vocabulary)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    inputs = [draw(*tokens, width), draw(vocabulary, width)] if linear else [3 * draw(*tokens, vocabulary)]
    targets = torch.randint(vocabulary, tokens, generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.2] = min(3, vocabulary - 1)
    return inputs, targets.to(DEVICE), torch.randn(tokens, generator=generator).to(DEVICE)


def results(function: Callable[..., Tensor], inputs: list[Tensor], targets: Tensor, gradient: Tensor, **options: Any):
    """Losses and the gradients of the inputs, in float64."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    losses = function(*inputs, targets, **options)
    assert losses.dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    assert losses.shape == targets.shape
    gradients = torch.autograd.grad(losses, inputs, gradient.to(losses.dtype))
    assert all(one.dtype == x.dtype and one.shape == x.shape for one, x in zip(gradients, inputs, strict=True))
    return [tensor.detach().double() for tensor in (losses, *gradients)]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty is full of NaN, so that whatever a kernel forgets to write shows."""
    with poisoned_memory():
        yield


@pytest.fixture
def large_tiles(monkeypatch) -> None:
    """The interpreter's time goes by the number of tiles."""
    monkeypatch.setattr(sys.modules["kernels.linear_cross_entropy"], "SMALL", TileSize(64, 8192, 16, 4, 1))


def functions(linear: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The function, and its reference."""
    return (
        (linear_cross_entropy, linear_cross_entropy_reference) if linear else (cross_entropy, cross_entropy_reference)
    )


def assert_as_exact_as_the_reference(
    name: str, inputs: list[Tensor], targets: Tensor, gradient: Tensor, **options: Any
) -> None:
    """Against float64, the error is at most twice that of the reference in the dtype of the inputs, plus a few ulp."""
    function, reference = functions(len(inputs) == 2)
    with backend.use(name):
        found = results(function, inputs, targets, gradient, **options)
    exact = results(reference, [x.double() for x in inputs], targets, gradient, **options)
    plain = results(reference, inputs, targets, gradient, **options)
    # The log-sum-exp is rounded to float32 between the passes, and weights are exponentials of differences from it.
    logits = inputs[0] if len(inputs) == 1 else inputs[0].double() @ inputs[1].double().T
    rounded = logits.double().logsumexp(-1).abs().max() * torch.finfo(torch.float32).eps * gradient.abs().max()
    sizes = (
        [1.0] if len(inputs) == 1 else [inputs[1].abs().max(), inputs[0].abs().sum(tuple(range(targets.dim()))).max()]
    )
    epsilons = [torch.finfo(torch.float32).eps, *[torch.finfo(inputs[0].dtype).eps] * len(inputs)]
    for index, (truth, other, result) in enumerate(zip(exact, plain, found, strict=True)):
        allowed = 2 * (other - truth).abs().max() + 4 * epsilons[index] * truth.abs().max().clamp(min=1.0)
        allowed += rounded * sizes[index - 1] if index else 0.0
        error = (result - truth).abs().max()
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "linear", "dtype"), RUNS)
def test_values_and_gradients(name, linear, dtype, shape, options) -> None:
    tokens, width, vocabulary = shape
    case = random_case(linear, (tokens,), width, vocabulary, dtype)
    assert_as_exact_as_the_reference(name, *case, **OPTIONS[options])


@pytest.mark.parametrize("vocabulary", [50257, 50304, 131072])
@BACKENDS
@BOTH
def test_large_vocabularies(name, linear, vocabulary, large_tiles) -> None:
    assert_as_exact_as_the_reference(name, *random_case(linear, (3,), 8, vocabulary), **OPTIONS["everything"])


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_many_chunks(options) -> None:
    """More tokens than go together, and a last chunk of one."""
    assert_as_exact_as_the_reference("torch", *random_case(True, (2049,), 8, 17), **OPTIONS[options])
    assert_as_exact_as_the_reference("triton", *random_case(True, (1025,), 8, 17), **OPTIONS[options])


def test_reference_is_pytorch() -> None:
    (logits,), targets, _ = random_case(False, (2, 9), 0, 17)
    expected = functional.cross_entropy(logits.mT, targets, reduction="none", ignore_index=3, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy_reference(logits, targets, ignore_index=3, label_smoothing=0.1), expected)
    torch.testing.assert_close(
        linear_cross_entropy_reference(logits, torch.eye(17, device=DEVICE), targets, softcap=2.0, z_loss=0.5),
        functional.cross_entropy((2 * torch.tanh(logits / 2)).mT, targets, reduction="none")
        + 0.5 * (2 * torch.tanh(logits / 2)).exp().sum(-1).log().square(),
    )


@pytest.mark.parametrize("tokens", [(), (7,), (2, 5), (2, 3, 4)], ids=str)
@BACKENDS
@BOTH
def test_any_number_of_dimensions(name, linear, tokens) -> None:
    assert_as_exact_as_the_reference(name, *random_case(linear, tokens, 8, 17))


@pytest.mark.parametrize("tokens", [(0,), (2, 0), (0, 3)], ids=str)
@BACKENDS
@BOTH
def test_no_tokens(name, linear, tokens) -> None:
    inputs, targets, gradient = random_case(linear, tokens, 8, 17)
    with backend.use(name):
        found = results(functions(linear)[0], inputs, targets, gradient)
    assert not any(tensor.any() for tensor in found)


LAYOUTS = {
    "shifted": lambda x: functional.pad(x, (0, 0, 0, 1))[..., :-1, :],
    "columns outside": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "unaligned": lambda x: functional.pad(x, (3, 2))[..., 3:-2],
    "one row for all": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@BACKENDS
@BOTH
def test_views_that_are_not_contiguous(name, linear, layout) -> None:
    inputs, targets, gradient = random_case(linear, (2, 19), 24, 40)
    views = [LAYOUTS[layout](x) for x in inputs]
    assert_as_exact_as_the_reference(name, views, targets.T.contiguous().T, gradient.T.contiguous().T)


@BACKENDS
@BOTH
def test_gradient_of_a_mean(name, linear) -> None:
    """Autograd hands such a gradient over as one element, expanded."""
    inputs, targets, gradient = random_case(linear, (2, 19), 24, 40)
    assert_as_exact_as_the_reference(name, inputs, targets, gradient[:1, :1].expand_as(gradient))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@BACKENDS
@BOTH
def test_any_integer_targets(name, linear, dtype) -> None:
    inputs, targets, gradient = random_case(linear, (9,), 8, 17)
    assert_as_exact_as_the_reference(name, inputs, targets.to(dtype), gradient, ignore_index=3)


@BACKENDS
@BOTH
def test_ignored_tokens_have_no_loss_and_no_gradient(name, linear) -> None:
    """Whatever their logits and upstream gradients are."""
    inputs, targets, gradient = random_case(linear, (9,), 8, 17)
    targets[[0, 4]] = -100
    gradient[4] = math.inf
    if not linear:
        inputs[0][4] = math.nan
    with backend.use(name):
        losses, d_input, *_ = results(functions(linear)[0], inputs, targets, gradient, z_loss=0.1, label_smoothing=0.1)
    assert not losses[[0, 4]].any()
    assert not d_input[0].any()
    if name == "triton" or linear:  # PyTorch's own multiplies these by 0
        assert not d_input[4].any()
    assert losses[[1, 2, 3]].all()
    assert d_input[[1, 2, 3]].isfinite().all()


@BACKENDS
@BOTH
def test_nothing_but_ignored_tokens(name, linear) -> None:
    inputs, targets, gradient = random_case(linear, (9,), 8, 17)
    with backend.use(name):
        found = results(functions(linear)[0], inputs, torch.full_like(targets, -100), gradient)
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("softcap", [None, 20.0])
@BACKENDS
def test_logits_of_minus_infinity_have_no_weight(name, softcap) -> None:
    """As a caller masks a part of the vocabulary; a whole tile of it too."""
    (logits,), targets, gradient = random_case(False, (3,), 0, 9000)
    logits[:, :5000], logits[:, 8000] = -math.inf, -math.inf
    targets += 5000 - targets.clamp(max=5000)
    targets[targets == 8000] += 1
    with backend.use(name):
        found = results(cross_entropy, [logits], targets, gradient, softcap=softcap)
    exact = results(cross_entropy_reference, [logits.double()], targets, gradient, softcap=softcap)
    for truth, result in zip(exact, found, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)


@BOTH
@BACKENDS
def test_large_logits_do_not_overflow(name, linear) -> None:
    inputs, targets, gradient = random_case(linear, (9,), 8, 300)
    inputs[0] *= 1e4
    assert_as_exact_as_the_reference(name, inputs, targets, gradient)


@BOTH
def test_targets_outside_the_vocabulary(linear) -> None:
    inputs, targets, _ = random_case(linear, (5,), 8, 17)
    targets[2] = 17
    function, _ = functions(linear)
    with backend.use("triton"):
        for outside in (17, -1, 2**32):
            targets[2] = outside
            assert function(*inputs, targets).isnan().tolist() == [False, False, True, False, False]
    if DEVICE == "cpu":
        with backend.use("torch"), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            function(*inputs, targets)


@BACKENDS
@BOTH
def test_repeated_runs_are_bit_identical(name, linear) -> None:
    case = random_case(linear, (40,), 24, 300)
    with backend.use(name):
        first = results(functions(linear)[0], *case, **OPTIONS["everything"])
        for _ in range(100 if DEVICE == "cuda" else 2):
            again = results(functions(linear)[0], *case, **OPTIONS["everything"])
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@BACKENDS
@BOTH
def test_inputs_are_left_as_they_are(name, linear) -> None:
    case = random_case(linear, (9,), 8, 17)
    before = [tensor.clone() for tensor in (*case[0], *case[1:])]
    with backend.use(name):
        results(functions(linear)[0], *case, **OPTIONS["everything"])
    assert all(torch.equal(a, b) for a, b in zip(before, (*case[0], *case[1:]), strict=True))


def peak_bytes(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> int:
    """The most memory that a forward and a backward pass hold at once besides their inputs, by the allocator's word."""
    with torch.profiler.profile(profile_memory=True) as profile:
        results(function, *arguments, **options)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


@pytest.mark.parametrize("options", OPTIONS)
def test_memory_is_at_most_a_quarter_of_that_with_logits(options) -> None:
    case, options = random_case(True, (4096,), 8, 5000), OPTIONS[options]
    with backend.use("torch"):
        chunked, whole = (peak_bytes(function, *case, **options) for function in functions(True))
    assert chunked <= whole / 4


@BACKENDS
def test_no_matrix_of_tokens_and_vocabulary(name, large_tiles) -> None:
    """Of 1025 tokens or more, 1024 go together."""
    tokens, vocabulary = 1600, 5000
    case = random_case(True, (tokens,), 1, vocabulary)
    with backend.use(name), torch.profiler.profile(profile_memory=True) as profile:
        results(linear_cross_entropy, *case, **OPTIONS["everything"])
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert 4 * 1024 * vocabulary <= largest < 4 * tokens * vocabulary


@pytest.mark.parametrize(("name", "dtype"), [("torch", torch.bfloat16), ("triton", torch.float16)])
def test_weight_gradient_is_summed_in_float32(name, dtype, large_tiles) -> None:
    """Over more than one chunk. All numbers here are exact in float32, and their sums in no dtype of 16 bits."""
    tokens, vocabulary = 1500, 64
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 100, (tokens, 8), generator=generator).to(DEVICE, dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    weight = torch.zeros(vocabulary, 8, device=DEVICE, requires_grad=True)
    with backend.use(name), torch.autocast(DEVICE, dtype):
        losses = linear_cross_entropy(x, weight, targets)
    (found,) = torch.autograd.grad(losses.sum(), weight)
    d_logits = 1 / vocabulary - functional.one_hot(targets, vocabulary).double()
    exact = d_logits.T @ x.double()
    assert torch.equal(found, exact.float())
    assert not torch.equal(found, exact.to(dtype).float())


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"), [("torch", torch.bfloat16), ("torch", torch.float16), ("triton", torch.float16)]
)
def test_autocast(name, dtype, backward_too) -> None:
    (x, weight), targets, gradient = random_case(True, (40,), 24, 100)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    outcome = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        with backend.use(name), torch.autocast(DEVICE, dtype):
            losses = function(*inputs, targets, **OPTIONS["everything"])
            with nullcontext() if backward_too else torch.autocast(DEVICE, enabled=False):
                outcome.append((losses, *torch.autograd.grad(losses, inputs, gradient)))
    for found, expected in zip(*outcome, strict=True):
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_logits_under_autocast_stay_exact() -> None:
    inputs, targets, gradient = random_case(False, (9,), 0, 100)
    with torch.autocast(DEVICE, torch.bfloat16):
        for name in ("triton", "torch"):
            assert_as_exact_as_the_reference(name, inputs, targets, gradient, **OPTIONS["everything"])


def op_arguments(name: str, linear: bool, gradient: bool) -> tuple:
    inputs, targets, _ = random_case(linear, (6,) if linear else (2, 3), 8, 17)
    options = (3, 2.0, 0.1, 0.2)
    return (*(x.requires_grad_(gradient) for x in inputs), targets, *options, *([name] if linear else []))


@pytest.mark.parametrize(("name", "linear"), [("triton", False), ("triton", True), ("torch", True)])
def test_operators_keep_their_contracts(name, linear) -> None:
    op = "linear_cross_entropy" if linear else "cross_entropy"
    forward, backward = (getattr(torch.ops.cegbench, op + end).default for end in ("", "_backward"))
    torch.library.opcheck(forward, op_arguments(name, linear, True))
    *inputs, targets, a, b, c, d = op_arguments(name, linear, False)[: 7 if linear else 6]
    rest = (name,) if linear else ()
    losses, lse = forward(*inputs, targets, a, b, c, d, *rest)
    torch.library.opcheck(backward, (losses, *inputs, targets, lse, a, b, c, d, *rest))


@BACKENDS
@BOTH
def test_compiles_in_one_graph(name, linear) -> None:
    function, _ = functions(linear)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for tokens in ((2, 5), (3, 7)):
        case = random_case(linear, tokens, 8, 17)
        with backend.use(name):
            eager = results(function, *case, **OPTIONS["everything"])
            traced = results(compiled, *case, **OPTIONS["everything"])
        for expected, found in zip(eager, traced, strict=True):
            torch.testing.assert_close(found, expected)


@BACKENDS
def test_flops(name) -> None:
    inputs, targets, gradient = random_case(True, (2, 5), 8, 17)
    inputs = [x.requires_grad_() for x in inputs]
    with backend.use(name):
        with FlopCounterMode(display=False) as forward:
            losses = linear_cross_entropy(*inputs, targets)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(losses, inputs, gradient)
    assert forward.get_total_flops() == 2 * 10 * 8 * 17
    assert backward.get_total_flops() == 3 * 2 * 10 * 8 * 17


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's limit")
def test_triton_refuses_bfloat16_products_on_a_cpu() -> None:
    inputs, targets, _ = random_case(True, (5,), 8, 17, torch.bfloat16)
    with backend.use("triton"), pytest.raises(ValueError, match=r"linear_cross_entropy cannot run .* bfloat16"):
        linear_cross_entropy(*inputs, targets)


X, WEIGHT, TARGETS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD_OPTIONS = {
    "softcap": [0.0, -1.0, math.inf, math.nan],
    "z_loss": [-1.0, math.inf, math.nan],
    "label_smoothing": [-0.1, 1.1, math.nan],
}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": X.long()}),
        ("x", {"x": torch.zeros(()), "targets": torch.zeros((), dtype=torch.int64)}),
        ("weight", {"weight": WEIGHT[0]}),
        ("weight", {"weight": WEIGHT[:, :3]}),
        ("weight", {"weight": WEIGHT[:0]}),
        ("weight", {"weight": WEIGHT.half()}),
        ("weight", {"weight": WEIGHT.to("meta")}),
        ("targets", {"targets": TARGETS[0]}),
        ("targets", {"targets": TARGETS.float()}),
        ("targets", {"targets": TARGETS.bool()}),
        ("targets", {"targets": TARGETS.to("meta")}),
        *((name, {name: value}) for name, values in BAD_OPTIONS.items() for value in values),
    ],
)
def test_errors_name_the_argument(argument, change) -> None:
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        with pytest.raises(ValueError, match=f"^{argument} must"):
            function(**{"x": X, "weight": WEIGHT, "targets": TARGETS} | change)
    if "weight" in change:
        return
    change = {"logits" if key == "x" else key: value for key, value in change.items()}
    for function in (cross_entropy, cross_entropy_reference):
        with pytest.raises(ValueError, match=f"^{'logits' if argument == 'x' else argument} must"):
            function(**{"logits": X, "targets": TARGETS} | change)


@settings(max_examples=25)
@given(
    name=st.sampled_from(["triton", "torch"]),
    linear=st.booleans(),
    tokens=st.lists(st.integers(1, 6), max_size=3).map(tuple),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 600),
    layout=st.sampled_from(["as it is", *LAYOUTS]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    label_smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    ignore_index=st.sampled_from([-100, 0, 3]),
)
def test_any_shape_and_strides(name, linear, tokens, width, vocabulary, layout, **options) -> None:
    inputs, targets, gradient = random_case(linear, tokens, width, vocabulary)
    views = [LAYOUTS[layout](x) if layout != "as it is" and x.dim() > 1 else x for x in inputs]
    assert_as_exact_as_the_reference(name, views, targets, gradient, **options)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiled_ahead_of_time(architecture) -> None:
    """No spills, within shared memory, on the instructions that are fast."""
    compiled = run_compiled("tests.kernels.compile_cross_entropy", architecture)
    assert len(compiled) == 16
    for one in compiled:
        what = f"{one['name']} sm_{architecture} {one['dtype']} {one['width']} {one['every_option']}"
        instructions = one["instructions"]
        print(f"{what}: {one['registers']} registers, {one['shared_bytes']} bytes shared")
        assert not one["spills"], what
        assert one["shared_bytes"] <= SHARED_BYTES[architecture], what
        assert not one["wgmma_serialised"], what
        if one["name"].startswith("linear") and one["dtype"] != "torch.float32":
            assert MATRIX_PRODUCT[architecture] in instructions, what
            if one["width"] % 8 == 0:
                assert ("LDGSTS" if architecture == 80 else "UTMALDG") in instructions, what
