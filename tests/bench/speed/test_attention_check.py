"""The check finds wrong kernels, and the truth about a part of a large shape is the whole reference's."""

import pytest
import torch

import kernels
from bench.config import DeviceConfig
from bench.speed import attention_check
from bench.speed.attention_check import Shape, check, draw, first_key_head, results
from bench.training.device import Device, open_device

right = kernels.flash_attention


@pytest.fixture(params=["float32", "bfloat16"])
def device(request, monkeypatch) -> Device:
    monkeypatch.setattr(attention_check, "CHECKED_SEQUENCES", (1, 63))
    return open_device(DeviceConfig(name="cpu", precision=request.param))


def test_a_right_kernel_passes_for_each_head_and_group_size(device) -> None:
    shapes = [Shape(1, 4, key_heads, sequence, 16) for key_heads in (1, 4) for sequence in (128, 256)]
    assert check(shapes, device, any_order=False) == (8, [])
    assert check(shapes, device, any_order=True) == (16, [])


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        return k.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.1


WRONG = {
    "out": lambda q, k, v, **options: right(q, k, v, **options) * 1.1,
    "not a number": lambda q, k, v, **options: right(q, k, v, **options) * float("nan"),
    "dk": lambda q, k, v, **options: right(q, WrongGradient.apply(k), v, **options),
    "dv": lambda q, k, v, **options: right(q, k, WrongGradient.apply(v), **options),
}


@pytest.mark.parametrize("part", WRONG)
def test_a_wrong_kernel_fails_and_the_case_is_named(device, monkeypatch, part) -> None:
    monkeypatch.setattr(kernels, "flash_attention", WRONG[part])
    cases, failures = check([Shape(1, 2, 2, 64, 16)], device, any_order=False)
    assert cases == 4
    name = "out" if part == "not a number" else part
    expected = f"head size 16, 1 query heads a key head, 63 positions, causal: {name} is off by"
    assert any(failure.startswith(expected) for failure in failures)


def test_a_kernel_that_is_wrong_only_where_it_is_not_causal_fails(device, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "flash_attention", lambda q, k, v, causal: right(q, k, v, causal=True))
    _, failures = check([Shape(1, 2, 2, 64, 16)], device, any_order=False)
    assert len(failures) == 1
    assert "63 positions, not causal: out is off by" in failures[0]


def test_a_kernel_that_raises_fails(device, monkeypatch) -> None:
    def out_of_resources(q, k, v, causal):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernels, "flash_attention", out_of_resources)
    cases, failures = check([Shape(1, 2, 2, 64, 16)], device, any_order=False)
    assert len(failures) == cases
    assert failures[0].endswith("RuntimeError: out of resource: shared memory")


def test_random_tensors_are_laid_out_as_in_a_model_and_the_same_every_time(device) -> None:
    shape = Shape(2, 4, 2, 8, 16)
    q, k, v, d_out = draw(shape, device)
    assert [tuple(x.shape) for x in (q, k, v, d_out)] == [(2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16), (2, 4, 8, 16)]
    assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v, d_out))
    assert [x.requires_grad for x in (q, k, v, d_out)] == [True, True, True, False]
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, d_out), draw(shape, device), strict=True))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_truth_about_the_first_key_head(key_heads) -> None:
    inputs = draw(Shape(2, 4, key_heads, 33, 16), open_device(DeviceConfig(name="cpu")))
    whole = results(kernels.materialised_attention, [x.detach().double().requires_grad_() for x in inputs])
    part = first_key_head(inputs)
    group = 4 // key_heads
    assert [x.shape[1] for x in part] == [group, group, 1, 1]
    for found, exact in zip(part, whole, strict=True):
        torch.testing.assert_close(found.double(), exact[:1, : found.shape[1]], atol=1e-5, rtol=1e-5)


def test_flops_count_the_visible_half() -> None:
    assert Shape(2, 16, 4, 1024, 128).flops == 4 * 2 * 16 * 1024**2 * 128 * 0.5
