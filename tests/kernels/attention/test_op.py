"""The PyTorch operator: its contract, torch.compile, and FLOPs."""

import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kernels import backend, flash_attention
from kernels.attention import blocked
from kernels.attention.documents import document_bounds
from kernels.attention.fused import launch
from tests.kernels.attention.exactness import DEVICE, MASKS, mask_options, random_documents, random_inputs, results

BACKENDS = pytest.mark.parametrize("name", ["triton", "torch"])


def op_arguments(name: str, mask: str, *, heads_inside: bool) -> tuple:
    """Positional arguments of cegbench::attention."""
    inputs, _ = random_inputs((2, 2, 1, 17, 16, 24), torch.float32)
    if heads_inside:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    options = {"causal": True, "window": None, "softcap": None, "dropout_p": 0.0} | MASKS[mask]
    starts, ends = document_bounds(random_documents(2, 17)) if options.pop("documents", False) else (None, None)
    seed = torch.tensor([5], device=DEVICE) if options["dropout_p"] else None
    order = [options[key] for key in ("causal", "window", "softcap", "dropout_p")]
    return (*(x.requires_grad_() for x in inputs), starts, ends, seed, *order, 0.25, True, name)


@BACKENDS
@pytest.mark.parametrize(("mask", "heads_inside"), [("causal", True), ("everything, full", False)])
def test_operator_keeps_its_contract(name, mask, heads_inside) -> None:
    arguments = op_arguments(name, mask, heads_inside=heads_inside)
    torch.library.opcheck(torch.ops.cegbench.attention.default, arguments)


@BACKENDS
def test_backward_operator_keeps_its_contract(name) -> None:
    q, k, v, *rest = op_arguments(name, "everything, full", heads_inside=True)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.cegbench.attention(q, k, v, *rest)
    arguments = (torch.randn_like(out), q, k, v, out, lse, *rest)
    torch.library.opcheck(torch.ops.cegbench.attention_backward.default, arguments)


@BACKENDS
@pytest.mark.parametrize("mask", ["window, documents", "everything, full"])
def test_compiles_in_one_graph(name, mask) -> None:
    inputs, gradient = random_inputs((2, 2, 1, 33, 16, 16), torch.float32)
    options = mask_options(mask, 2, 33)
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    with backend.use(name):
        eager = results(flash_attention, inputs, gradient, **options)
        traced = results(compiled, inputs, gradient, **options)
    for expected, found in zip(eager, traced, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_choice_is_made_outside_the_graph(monkeypatch) -> None:
    """On a GPU it asks drivers and programs, which torch.compile cannot trace."""
    monkeypatch.setattr(backend, "why_not_triton", lambda *args, **options: Path(os.devnull).read_text() or "a test")
    inputs, _ = random_inputs((1, 2, 2, 20, 16, 16), torch.float32)
    backend._settle.cache_clear()
    torch.compiler.reset()
    with backend.use("auto"):
        compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs, window=3), flash_attention(*inputs, window=3))
    backend._settle.cache_clear()


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Which passes ran, such as `torch forward`, in their order."""
    passes = []
    for name, implementation in (("triton", launch), ("torch", blocked)):
        for direction in ("forward", "backward"):
            function = getattr(implementation, direction)

            def counted(*args, said=f"{name} {direction}", function=function) -> None:
                passes.append(said)
                function(*args)

            monkeypatch.setattr(implementation, direction, counted)
    return passes


def test_a_compiled_call_follows_the_switch(ran) -> None:
    inputs, _ = random_inputs((1, 2, 2, 20, 16, 16), torch.float32)
    compiled = torch.compile(flash_attention, backend="aot_eager", fullgraph=True)
    names = ["torch", "triton", "triton", "torch", "triton"]
    for name in names:
        with backend.use(name):
            compiled(*inputs, window=3)
    assert ran == [f"{name} forward" for name in names]


@BACKENDS
def test_a_backward_pass_takes_the_implementation_of_its_forward_pass(name, ran) -> None:
    inputs, gradient = random_inputs((1, 2, 2, 20, 16, 16), torch.float32)
    with backend.use(name):
        out = flash_attention(*(x.requires_grad_() for x in inputs), window=3)
    with backend.use("torch" if name == "triton" else "triton"):
        out.backward(gradient)
    assert ran == [f"{name} forward", f"{name} backward"]


def test_one_graph_for_all_sequences() -> None:
    """After the second length, no third compilation."""
    counter = CompileCounter()
    compiled = torch.compile(flash_attention, backend=counter, fullgraph=True)
    with backend.use("torch"):
        for sequence in (20, 33, 47, 61):
            inputs, _ = random_inputs((1, 2, 1, sequence, 16, 16), torch.float32)
            compiled(*inputs, window=3)
    assert counter.frame_count <= 2


@BACKENDS
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_flops_as_pytorch_counts_its_own(name, heads, key_heads) -> None:
    inputs, gradient = random_inputs((2, heads, key_heads, 20, 16, 24), torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    q_shape, out_shape = (2, heads, 20, 16), (2, heads, 20, 24)
    with backend.use(name):
        with FlopCounterMode(display=False) as forward:
            out = flash_attention(*inputs, window=5)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out, inputs, gradient)
    assert forward.get_total_flops() == sdpa_flop_count(q_shape, q_shape, out_shape)
    assert backward.get_total_flops() == sdpa_backward_flop_count(out_shape, q_shape, q_shape, out_shape)
    assert forward.get_total_flops() == 2 * 2 * heads * 20 * 20 * (16 + 24)
    assert backward.get_total_flops() == 2 * 2 * heads * 20 * 20 * (3 * 16 + 2 * 24)
