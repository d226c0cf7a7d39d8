"""Every contestant that a CPU can run computes attention; who cannot run says so."""

import sys
from types import ModuleType

import pytest
import torch

from bench.config import DeviceConfig
from bench.speed.attention_check import Shape, draw, first_key_head, results
from bench.speed.attention_contestants import CONTESTANTS, flash_attention_4
from bench.speed.contest import NotHere
from bench.speed.figures import is_ours
from bench.training.device import open_device
from kernels import backend, materialised_attention

CPU = torch.device("cpu")
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


def test_names_and_titles_are_different_and_titles_fit_a_column() -> None:
    assert len(BY_NAME) == len(CONTESTANTS) == len({contestant.title for contestant in CONTESTANTS})
    assert max(len(contestant.title) for contestant in CONTESTANTS) <= 10
    assert [name for name in BY_NAME if is_ours(name)] == ["ours", "ours_any_order"]


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("name", ["ours", "sdpa_flash", "sdpa_math"])
def test_causal_attention_on_a_cpu(name, key_heads) -> None:
    inputs = draw(Shape(1, 4, key_heads, 40, 16), open_device(DeviceConfig(name="cpu")))
    found = results(BY_NAME[name].make(40, CPU), inputs)
    for part, exact in zip(found, first_key_head(inputs), strict=True):
        torch.testing.assert_close(part[:1, : exact.shape[1]], exact, atol=1e-5, rtol=1e-5)


def test_sums_in_any_order_are_for_triton_only(monkeypatch) -> None:
    with pytest.raises(NotHere, match="only our Triton kernels"):
        BY_NAME["ours_any_order"].make(40, CPU)
    orders = []
    monkeypatch.setattr(backend, "choose", lambda op, device: "triton")
    monkeypatch.setattr("kernels.flash_attention", lambda q, k, v: orders.append(backend.deterministic()) or q)
    q = torch.zeros(1)
    BY_NAME["ours_any_order"].make(40, CPU)(q, q, q)
    BY_NAME["ours"].make(40, CPU)(q, q, q)
    assert orders == [False, True]


@pytest.mark.parametrize("returns_lse", [True, False])
def test_flash_attention_4_takes_heads_inside(monkeypatch, returns_lse) -> None:
    def flash_attn_func(q, k, v, causal):
        assert causal
        assert all(x.is_contiguous() for x in (q, k, v))
        out = materialised_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if returns_lse else out

    module = ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    inputs = draw(Shape(1, 4, 2, 40, 16), open_device(DeviceConfig(name="cpu")))
    found = results(flash_attention_4(40, CPU), inputs)
    for part, exact in zip(found, first_key_head(inputs), strict=True):
        torch.testing.assert_close(part[:1, : exact.shape[1]], exact, atol=1e-5, rtol=1e-5)


def test_flash_attention_4_that_is_not_installed_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(NotHere, match="flash-attn-4"):
        flash_attention_4(40, CPU)


def test_flex_attention_is_compiled_anew_for_any_number_of_shapes(monkeypatch) -> None:
    # Neither its backward pass nor its code generation runs on a CPU; the graph that it would be made of does.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, backend="aot_eager", **options))
    for sequence in range(8, 18):  # torch.compile gives up after eight
        q, k, v, d_out = draw(Shape(1, 2, 1, sequence, 16), open_device(DeviceConfig(name="cpu")))
        out = BY_NAME["flex_attention"].make(sequence, CPU)(q, k, v)
        torch.testing.assert_close(out, materialised_attention(q, k, v), atol=1e-5, rtol=1e-5)
    for _ in range(2):
        torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
    torch.compiler.reset()
