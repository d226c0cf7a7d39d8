"""The public surface: a kernel leaves or joins it on purpose."""

import inspect

import kernels


def test_public_names() -> None:
    assert kernels.__all__ == ["backend", "flash_attention", "materialised_attention"]


def test_attention_kernels_share_one_signature() -> None:
    signatures = {inspect.signature(getattr(kernels, name)) for name in kernels.__all__ if name.endswith("_attention")}
    assert len(signatures) == 1
